"""Objects of S3 read with URLs that the client has signed: the same bytes and errors, and no secret in sight."""

import asyncio
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from time import sleep
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
    urls = [str(signed.url) for signed in the_signed()._urls.values()]
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


def test_a_store_that_refuses_them_is_read_by_its_client(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(store, "refusing")
    for status in ("403", "400", "301"):
        store.behave(signed=status)
        signed_urls._OF_SYSTEMS.clear()
        data = ShardDataset(url, transport=PATIENT)
        assert_each_once([data[index] for index in range(COUNT)], samples())
        # Each of the first refusals is answered by the client; then no more are tried.
        assert [entry["status"] for entry in gets(store, "") if entry["signed"]] == [int(status)] * 3
    # After some time they are tried again.
    store.behave()
    now = signed_urls.monotonic()
    monkeypatch.setattr(signed_urls, "monotonic", lambda: now + 601)
    assert_each_once([data[index] for index in range(COUNT)], samples())
    assert all(entry["signed"] for entry in gets(store))


def test_refusals_between_answers_do_not_add_up(store: ObjectStore) -> None:
    data = ShardDataset(upload(store, "blips"), transport=PATIENT)
    for index in range(6):
        store.behave(signed="403")
        assert len(data[index]["tokens"]) == 300 + 7 * index
        store.behave()
        assert len(data[index]["tokens"]) == 300 + 7 * index
    asked = [entry for entry in gets(store) if entry["signed"]]
    assert len(asked) >= 12


def test_urls_whose_credentials_have_ended_are_signed_again(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a batch, all of which end at once."""
    data = ShardDataset(upload(store, "ended"), transport=PATIENT)
    assert_each_once(list(data.__getitems__(range(COUNT))), samples())
    ended = max(re.findall(r"X-Amz-Date=(\w+)", " ".join(str(one.url) for one in the_signed()._urls.values())))
    sleep(1.1)
    now = signed_urls.monotonic()
    monkeypatch.setattr(signed_urls, "monotonic", lambda: now + 100)
    store.behave(ended=ended)
    gets(store)
    for _ in range(2):
        assert_each_once(list(data.__getitems__(range(COUNT))), samples())
    asked = gets(store)
    assert all(entry["signed"] for entry in asked)
    assert [entry["status"] for entry in asked].count(403) == COUNT // EACH


@pytest.mark.parametrize("clock", ["monotonic", "time"])
def test_urls_are_signed_again_in_time(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    """By either clock: one of them stands still while a machine sleeps."""
    data = ShardDataset(upload(store, f"after-{clock}"))
    data[0]
    before = dict(the_signed()._urls)
    data[1]
    assert the_signed()._urls == before
    now = getattr(signed_urls, clock)()
    monkeypatch.setattr(signed_urls, clock, lambda: now + 601)
    data[1]
    [name] = [name for name in before if name.endswith("0.tar")]
    assert the_signed()._urls[name] is not before[name]


def test_the_urls_that_were_used_last_are_kept(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardDataset(upload(store, "kept"))
    monkeypatch.setattr(signed_urls, "_MOST", 2)
    for index in (0, EACH, 0, 2 * EACH):
        data[index]
    assert [name[-5] for name in the_signed()._urls] == ["0", "2"]
    assert_each_once(list(data.__getitems__(range(COUNT))), samples())
    assert len(the_signed()._urls) == 2


REGION = {"client_kwargs": {"region_name": "eu-west-1"}}


@pytest.mark.parametrize(
    ("bucket", "options"),
    [
        ("corpus", REGION),
        ("corpus", {"client_kwargs": {"region_name": "us-east-1"}}),
        ("corpus", REGION | {"anon": True}),
        ("corpus", REGION | {"config_kwargs": {"s3": {"addressing_style": "path"}}}),
        ("corpus", REGION | {"config_kwargs": {"s3": {"addressing_style": "virtual"}}}),
        ("my.dotted.bucket", REGION),
        ("arn:aws:s3:eu-west-1:123456789012:accesspoint/ap", REGION),
        ("corpus", REGION | {"endpoint_url": "http://store:9000/prefix"}),
    ],
    ids=str,
)
def test_the_host_is_that_which_the_client_asks(
    bucket: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red where botocore signed for the global host, which a private network may not reach.
    for name in ("AWS_ENDPOINT_URL", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    given = {} if options.get("anon") else {"key": "k", "secret": "s"}
    system = fsspec.filesystem("s3", skip_instance_cache=True, **given, **options)
    asked: list[str] = []

    class SentError(Exception):
        pass

    def note(request: Any, **_: Any) -> None:
        asked.append(request.url)
        raise SentError

    async def ask() -> None:
        signed = await signed_urls.SignedUrls(system).find(f"{bucket}/a/b.tar")
        assert signed is not None
        asked.append(str(signed.url).partition("?")[0])
        client = await system.get_s3(bucket)
        client.meta.events.register_first("before-send.s3.GetObject", note)
        with pytest.raises(SentError):
            await client.get_object(Bucket=bucket, Key="a/b.tar")

    fsspec.asyn.sync(fsspec.asyn.get_loop(), ask)
    assert asked[0] == asked[1]


def test_the_users_own_urls_are_signed_as_ever(store: ObjectStore) -> None:
    url, name = upload(store, "own"), store.url("own/shard-000000.tar")
    system = fsspec.filesystem("s3")
    before = re.findall(r"[?&]([\w-]+)=", system.url(name))
    ShardDataset(url)[0]
    assert the_signed().have_worked
    assert re.findall(r"[?&]([\w-]+)=", fsspec.filesystem("s3").url(name)) == before


def test_what_is_set_for_sites_over_http_is_not_sent_to_a_store(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(store, "private")
    told = {"headers": {"Authorization": "Bearer TOKEN"}, "params": {"token": "T"}, "proxy": "http://127.0.0.1:1"}
    monkeypatch.setitem(fsspec.config.conf, "http", told)
    assert_each_once(list(ShardDataset(url, transport=PATIENT).__getitems__(range(COUNT))), samples())
    assert the_signed().http.kwargs == {}
    assert the_signed().have_worked


def test_a_host_that_is_out_of_reach_leaves_it_to_the_client(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(store, "reach")
    sign = signed_urls.SignedUrls._sign

    async def sign_for_another(self: signed_urls.SignedUrls, name: str) -> Any:
        signed = await sign(self, name)
        return signed and signed_urls.SignedUrl(signed.url.with_port(1))

    monkeypatch.setattr(signed_urls.SignedUrls, "_sign", sign_for_another)
    data = ShardDataset(url, transport=Transport(retries=0))
    assert_each_once([data[index] for index in range(COUNT)], samples())
    assert not any(entry["signed"] for entry in gets(store))


def test_a_signature_that_does_not_come_is_tried_again(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ShardDataset(upload(store, "slow"), transport=Transport(timeout=0.3, retries=2, backoff=0.01, patience=0))
    data[0]
    sign, calls = signed_urls.SignedUrls._sign, []

    async def sign_slowly(self: signed_urls.SignedUrls, name: str) -> Any:
        calls.append(name)
        if len(calls) == 1:
            await asyncio.sleep(60)
        return await sign(self, name)

    monkeypatch.setattr(signed_urls.SignedUrls, "_sign", sign_slowly)
    assert len(data[COUNT - 1]["tokens"]) == 300 + 7 * (COUNT - 1)
    assert len(calls) >= 2


@pytest.mark.parametrize("address", ["https://store:9000", "http://store:9000"])
def test_certificates_of_the_users_own_are_for_the_client(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", "/absent.pem")
    system = fsspec.filesystem("s3", key="k", secret="s", endpoint_url=address, skip_instance_cache=True)
    signed = signed_urls.SignedUrls(system)
    found = fsspec.asyn.sync(fsspec.asyn.get_loop(), signed.find, "corpus/a.tar")
    assert (found is None) == address.startswith("https")
    assert signed._is_usable == (found is not None)


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
    system = fsspec.filesystem("s3", key="k", skip_instance_cache=True)
    monkeypatch.setattr(signed_urls, "getproxies", lambda: {"no": "localhost"})
    assert signed_urls._needs_only_a_signature(system)
    monkeypatch.undo()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert not signed_urls._needs_only_a_signature(system)


def test_a_public_bucket_is_read_without_a_signature(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(store, "public")
    for path in fsspec.filesystem("s3").ls(store.url("public")):
        fsspec.filesystem("s3").chmod(path, "public-read")
    store.log()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"anon": True})
    assert_each_once(list(ShardDataset(url).__getitems__(range(COUNT))), samples())
    assert not any(entry["signed"] for entry in gets(store))
    used = [str(each.url) for one in signed_urls._OF_SYSTEMS.values() if one for each in one._urls.values()]
    assert used
    assert not any("?" in each for each in used)


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
