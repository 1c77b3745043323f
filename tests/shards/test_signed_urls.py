"""Objects of S3 read with URLs that the client has signed: the same bytes and errors, and no secret in sight."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

# Not among the oldest versions.
pytest.importorskip("s3fs")
pytest.importorskip("moto")

from corpora import tokens, write
from object_store import ObjectStore, object_store
from remote_corpus import PATIENT, assert_each_once
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset, ShardStream, Transport
from samplers.shards.storage.network import signed_urls

COUNT, EACH = 24, 6


@pytest.fixture(scope="module")
def running() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def store(running: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    running.behave()
    running.log()
    # Each test begins with clients of its own.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(signed_urls, "_OF_SYSTEMS", {})
    return running


def samples() -> list[dict[str, Any]]:
    return tokens([300 + 7 * number for number in range(COUNT)])


def upload(store: ObjectStore, name: str) -> str:
    """A corpus in the store; the URL of its index."""
    write(store.url(name), samples(), max_samples=EACH)  # type: ignore[arg-type]
    store.log()
    return store.url(f"{name}/shard.ltx")


def gets(store: ObjectStore, suffix: str = ".tar") -> list[dict[str, Any]]:
    """The GETs of shards since this was last asked."""
    return [entry for entry in store.log() if entry["method"] == "GET" and entry["path"].endswith(suffix)]


def the_signed() -> signed_urls.SignedUrls:
    [found] = [one for one in signed_urls._OF_SYSTEMS.values() if one is not None]
    return found


@pytest.mark.parametrize("name", ["plain", "with spaces", "a+b=c&d", "ünï%20cödé", "a'b(c)~*!"])
def test_shards_are_read_by_signed_urls_alone(store: ObjectStore, name: str) -> None:
    url = upload(store, name)
    data = ShardDataset(url)
    assert_each_once([data[index] for index in range(COUNT)], samples())
    assert_each_once(list(data.__getitems__(range(COUNT))), samples())
    read = [sample for batch in ShardStream(url, collate_fn=list, max_tokens=2000) for sample in batch]
    assert_each_once(read, samples())
    asked = gets(store)
    assert asked
    assert all(entry["signed"] and entry["status"] in {200, 206} for entry in asked)
    urls = [str(url) for url, _ in the_signed()._urls.values()]
    # The four shards and the index, each signed once, with the version that all regions take.
    assert len(urls) == COUNT // EACH + 1
    assert all("X-Amz-Algorithm=AWS4-HMAC-SHA256" in each for each in urls)
    # Sent as they were signed: not quoted in another way.
    assert all("%2Fs3%2Faws4_request" in each for each in urls)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_sign_for_themselves(store: ObjectStore, workers: int) -> None:
    data = ShardDataset(upload(store, f"workers-{workers}"))
    assert len(data[0]["tokens"]) == 300
    sampler = LengthBucketBatchSampler(data.index, batch_size=4)
    loader = DataLoader(data.follow(sampler), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    for _ in range(2):
        assert_each_once([sample for batch in loader for sample in batch], samples())
    assert all(entry["signed"] for entry in gets(store))


def test_a_store_that_refuses_them_is_read_by_its_client(store: ObjectStore) -> None:
    url = upload(store, "refusing")
    for status in ("403", "400", "301"):
        store.behave(signed=status)
        signed_urls._OF_SYSTEMS.clear()
        data = ShardDataset(url, transport=PATIENT)
        assert_each_once([data[index] for index in range(COUNT)], samples())
        asked = gets(store, "")
        # Each of the first refusals is answered by the client; then no more are tried.
        assert [entry["status"] for entry in asked if entry["signed"]] == [int(status)] * 3
        assert not the_signed()._is_usable


def test_a_url_whose_credentials_have_ended_is_signed_again(store: ObjectStore) -> None:
    data = ShardDataset(upload(store, "ended"), transport=PATIENT)
    data[0]
    store.behave(signed="403")
    before = dict(the_signed()._urls)
    assert len(data[1]["tokens"]) == 307
    assert before.keys() - the_signed()._urls.keys() == {"corpus/ended/shard-000000.tar"}
    store.behave()
    gets(store)
    assert len(data[3]["tokens"]) == 321
    assert [entry["signed"] for entry in gets(store)] == [True]
    assert the_signed()._is_usable


def test_urls_are_signed_again_in_time(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardDataset(upload(store, "time"))
    data[0]
    [before] = [end for name, (_, end) in the_signed()._urls.items() if name.endswith("0.tar")]
    now = signed_urls.monotonic()
    monkeypatch.setattr(signed_urls, "monotonic", lambda: now + 601)
    data[1]
    [after] = [end for name, (_, end) in the_signed()._urls.items() if name.endswith("0.tar")]
    assert after > before + 500
    monkeypatch.setattr(signed_urls, "_MOST", 2)
    assert_each_once(list(data.__getitems__(range(COUNT))), samples())
    assert len(the_signed()._urls) == 2


def test_transient_faults_are_tried_again_with_the_bytes_that_have_come(store: ObjectStore) -> None:
    data = ShardDataset(upload(store, "faults"), transport=PATIENT)
    store.behave(every={"break": (3, 0), "503": (5, 1), "drop": (7, 2)})
    assert_each_once([data[index] for index in range(COUNT)], samples())
    asked = gets(store)
    assert all(entry["signed"] for entry in asked)
    starts: dict[str, set[str]] = {}
    for entry in asked:
        start, end = entry["range"].removeprefix("bytes=").split("-")
        starts.setdefault(entry["path"] + end, set()).add(start)
    # A body that broke off is continued, not begun again.
    assert any(len(each) > 1 for each in starts.values())
    assert data.transfers["retries"] > 0


def test_what_is_stored_with_an_encoding_is_read_as_it_is(store: ObjectStore) -> None:
    url = upload(store, "encoded")
    system = fsspec.filesystem("s3")
    for number in range(COUNT // EACH):
        key = f"encoded/shard-{number:06}.tar"
        told = {"MetadataDirective": "REPLACE", "ContentEncoding": "gzip"}
        system.call_s3("copy_object", Bucket="corpus", Key=key, CopySource=f"corpus/{key}", **told)
        assert system.call_s3("head_object", Bucket="corpus", Key=key)["ContentEncoding"] == "gzip"
    assert_each_once(list(ShardDataset(url).__getitems__(range(COUNT))), samples())
    assert all(entry["signed"] for entry in gets(store))


@pytest.mark.parametrize(
    "options",
    [
        {"requester_pays": True},
        {"s3_additional_kwargs": {"SSECustomerAlgorithm": "AES256"}},
        {"client_kwargs": {"verify": False}},
        {"config_kwargs": {"proxies": {"https": "http://proxy"}}},
        {"version_aware": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_requests_that_need_more_than_a_signature_are_the_clients(options: dict[str, Any]) -> None:
    system = fsspec.filesystem("s3", key="k", secret="s", skip_instance_cache=True, **options)
    assert not signed_urls._needs_only_a_signature(system)
    plain = fsspec.filesystem("s3", key="k", secret="s", endpoint_url="http://localhost", skip_instance_cache=True)
    assert signed_urls._needs_only_a_signature(plain)
    assert signed_urls.signed_urls(fsspec.filesystem("memory")) is None


def test_with_a_proxy_requests_are_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert not signed_urls._needs_only_a_signature(fsspec.filesystem("s3", key="k", skip_instance_cache=True))


def test_a_public_bucket_is_read_without_a_signature(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(store, "public")
    for path in fsspec.filesystem("s3").ls(store.url("public")):
        fsspec.filesystem("s3").chmod(path, "public-read")
    store.log()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    assert_each_once(list(ShardDataset(url).__getitems__(range(COUNT))), samples())
    assert not any(entry["signed"] for entry in gets(store))
    [url, *_] = [
        str(url) for one in signed_urls._OF_SYSTEMS.values() if one and one._urls for url, _ in one._urls.values()
    ]
    assert "?" not in url


def test_messages_and_logs_have_no_signature(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = upload(store, "secret")
    data = ShardDataset(url, transport=Transport(retries=1, backoff=0.01, timeout=100))
    data[0]
    messages = []
    with caplog.at_level(logging.INFO):
        for manner in ({"every": {"403": (1, 0)}}, {"every": {"503": (1, 0)}}, {"every": {"drop": (1, 0)}}):
            store.behave(**manner)
            with pytest.raises(OSError, match=r"s3://corpus/secret/shard-000000\.tar: cannot be read") as raised:
                data[2]
            messages.append(str(raised.value) + repr(raised.value.__cause__) + repr(raised.value.__context__))
        store.behave()
        fsspec.filesystem("s3").rm(store.url("secret/shard-000001.tar"))
        with pytest.raises(FileNotFoundError, match=r"shard-000001\.tar") as missing:
            data[EACH]
        messages.append(str(missing.value))
    assert not any("X-Amz" in message or "Signature" in message for message in [*messages, caplog.text])
    assert "X-Amz" not in repr(data)
    LengthIndex.open(url).save(tmp_path / "saved.ltx")
    assert b"X-Amz" not in (tmp_path / "saved.ltx").read_bytes()
