"""What an index, a shard or a server says: it chooses no program, no file, no memory and no sequence for a terminal."""

import json
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import Thread
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from faults import index_header, npy, rewritten, tar_of
from faulty import Faulty, faulty
from hypothesis import given
from hypothesis import strategies as st

from samplers import LengthIndex, ShardDataset, ShardStream, ShardWriter, Transport
from samplers.cli.commands import main
from samplers.shards.storage.network.fetched import FetchedFile
from samplers.shards.storage.network.remote import RemoteFile
from samplers.shards.storage.reading import open_file
from samplers.shards.storage.untrusted import file_name_of

SECRETS = ("hunter2", "signed-by-me")
HASTY = Transport(retries=0, timeout=5, deadline=20)


def write(folder: Path, layout: Any = "blocks") -> Path:
    with ShardWriter(folder, layout=layout, max_samples=3) as writer:
        for number in range(6):
            writer.write({"__key__": f"k{number}", "tokens": np.arange(number + 1)})
    return folder / "shard.ltx"


def name_shards(index: Path, path: str) -> None:
    """Let an index name another path in place of its first shard, with checksums that fit."""
    header = index_header(index.read_bytes())
    header["shards"][0]["path"] = path
    index.write_bytes(rewritten(index.read_bytes(), header))


# --- what an index names


def test_an_index_chooses_no_file_system_that_runs_anything(tmp_path: Path) -> None:
    # It was opened, and fsspec 2024.10, the oldest that is allowed, ran the template without any limit.
    marker, index = tmp_path / "ran", write(tmp_path / "corpus")
    run = f"{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}"
    generated = [{"key": run, "url": "a", "offset": "0", "length": "1", "dimensions": {"i": {"stop": 1}}}]
    (tmp_path / "list.json").write_text(json.dumps({"version": 1, "templates": {}, "gen": generated, "refs": {}}))
    listed = f"file://{tmp_path}/list.json"
    chains = [f"reference://a::{listed}", f"simplecache::reference://a::{listed}", "zip://a.tar::http://host/a.zip"]
    for path in [*chains, "git://a", "github://a:b@/c", "dask://a", "jupyter://a", "dir://a::file:///b", "data://a"]:
        name_shards(index, path)
        for use in (LengthIndex.open, ShardDataset, lambda each: ShardStream(each, collate_fn=list, max_tokens=9)):
            with pytest.raises(ValueError, match=r"shard.ltx: .*an index may not name files of '\w+://', got"):
                use(index)
    assert not marker.exists()
    for path in (
        "http://host/a.tar",
        "s3://bucket/a.tar",
        "memory://a.tar",
        "simplecache::http://host/a.tar",
        "own://a",
    ):
        name_shards(index, path)
        assert LengthIndex.open(index).shards[0] == path


def test_a_file_of_another_kind_that_an_index_names_is_not_served(tmp_path: Path) -> None:
    index, private = write(tmp_path / "corpus"), tmp_path / "private.txt"
    private.write_bytes(b"kept to myself\n" * 400)
    size = (tmp_path / "corpus" / "shard-000000.tar").stat().st_size
    private.write_bytes(private.read_bytes()[:size])
    for path in (str(private), "../private.txt", private.as_uri()):
        name_shards(index, path)
        with pytest.raises(ValueError, match="private.txt: ") as refusal:
            ShardDataset(index)[0]
        assert "kept to myself" not in str(refusal.value)


def test_a_name_in_an_index_is_no_pattern(tmp_path: Path) -> None:
    # `show` spelt out the braces of its names until the memory was full.
    index = write(tmp_path / "corpus")
    for path in ("/none/{0..99999999999}.tar", "/none/" + "{a,b}" * 40 + ".tar", "/none/*.tar", "/none/{.tar"):
        name_shards(index, path)
        opened = LengthIndex.open(index)
        for use in (lambda each: ShardDataset(each.shards, each), lambda each: pickle.loads(pickle.dumps(each))):
            assert len(use(opened)) == 6
        result = CliRunner().invoke(main, ["show", str(index), "--max-tokens", "2", "--overlong", "drop"])
        assert f"no shard {path}, which the index lists" in result.output


# --- names of files


@given(st.text(st.sampled_from("ab.\\\\/:*?<>|\n\0 é")))
def test_a_name_from_a_url_leads_to_no_other_folder(text: str) -> None:
    for url in (f"https://host/{text}", f"s3://bucket/a/{text}", text):
        # Both users of the name put a digest before it.
        name = f"digest-{file_name_of(url)}"
        for kind, folder in ((PureWindowsPath, "C:/cache"), (PurePosixPath, "/cache")):
            path = kind(folder) / name
            assert path.parent == kind(folder)
            assert path.name == name
        assert ":" not in name


# --- secrets in URLs


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Faulty]:
    with faulty(tmp_path / "corpus") as running:
        yield running


@pytest.mark.parametrize("layout", ["blocks", "plain"])
def test_no_message_shows_a_signature_or_a_password(tmp_path: Path, server: Faulty, layout: str) -> None:
    index = LengthIndex.open(write(tmp_path / "corpus", layout))
    paths = sorted((tmp_path / "corpus").glob("*.tar"))
    whole = paths[0].read_bytes()

    def sign(name: str) -> str:
        return server.url(name).replace("//", f"//me:{SECRETS[0]}@", 1) + f"?signature={SECRETS[1]}"

    signed = [sign(path.name) for path in paths]
    assert len(ShardDataset(signed, index, transport=HASTY)) == 6

    def read() -> Any:
        return list(ShardDataset(signed, index, transport=HASTY).__getitems__(range(6)))

    def stream() -> Any:
        return list(ShardStream(signed, index, collate_fn=list, max_tokens=9, transport=HASTY))

    def skip_all() -> Any:
        return list(ShardDataset(signed, index, handler=lambda _: True, transport=HASTY).__getitems__([2]))

    def build(**options: Any) -> Any:
        return LengthIndex.build(signed, transport=HASTY, **options)

    def verify() -> Any:
        index.moved_to(signed).verify(checksums=True, transport=HASTY)

    refuse(lambda: ShardDataset(signed[:1] * 2, index), "named twice")
    refuse(lambda: ShardDataset(signed[0] + "{", index), "braces do not match")
    refuse(lambda: LengthIndex.open(sign("none.ltx"), transport=HASTY), "no index")
    refuse(lambda: ShardDataset(sign("none.tar"), transport=HASTY), "no index")
    (tmp_path / "corpus" / "bad.ltx").write_bytes(b"none")
    refuse(lambda: LengthIndex.open(sign("bad.ltx"), transport=HASTY), "too short")
    damaged = bytearray(whole)
    for place in range(whole.find(np.arange(3).tobytes()), len(whole) - 1024):
        damaged[place] ^= 255
    damages: dict[bytes, list[Callable[[], Any]]] = {
        whole[:-1024]: [read, stream, build, verify],
        bytes(damaged): [read, stream, verify, skip_all],
        b"\x1f\x8b" + whole[2:]: [build, lambda: build(workers=2), lambda: build(resume=tmp_path / "kept")],
        tar_of([("a.x.npy", npy(np.arange(3))), ("a.y.pkl", b"")]): [build],
        tar_of([("a.y.npy", npy(np.array([None])))]): [build],
        tar_of([("a", b"")]): [build, lambda: ShardWriter.rewrite(tmp_path / "other", signed)],
        tar_of([("a.wav", b"x")]): [lambda: build(length=lambda field, data: -1)],
    }
    for content, uses in damages.items():
        paths[0].write_bytes(content)
        for use in uses:
            refuse(use, "127.0.0.1")


def refuse(use: Callable[[], Any], message: str) -> None:
    """Check that an error names the file, and shows no secret."""
    with pytest.raises((ValueError, OSError, RuntimeError), match=message) as refusal:
        use()
    text = f"{refusal.value} {getattr(refusal.value, '__notes__', '')}"
    assert not [secret for secret in SECRETS if secret in text], text
    assert "@127.0.0.1" in text


def test_a_size_that_a_server_invents_is_not_prepared_for(tmp_path: Path, server: Faulty) -> None:
    # All requests for parts of 16 MiB were made first: 67 million for a claim of one petabyte.
    write(tmp_path / "corpus")
    file = RemoteFile(server.url("shard-000000.tar"), HASTY, {"size": 1 << 42})
    file.note_ranges()
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, OSError), match="shard-000000.tar: "):
            FetchedFile(file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


class Endless(BaseHTTPRequestHandler):
    """Answers a range with a body that does not end."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-999/1000")
        self.send_header("Connection", "close")
        self.end_headers()
        with suppress(OSError):
            for _ in range(4096):
                self.wfile.write(bytes(1 << 20))
            self.server.sent_all = True  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        """Print nothing."""


def test_a_body_that_does_not_end_is_refused_at_its_first_bytes_too_many() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as endless:
        Thread(target=endless.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{endless.server_port}/a.tar"
        try:
            for read in (lambda: open_file(url, transport=HASTY).read(0, 1000), lambda: LengthIndex.open(url)):
                with pytest.raises(ValueError, match="a.tar: sends more than 1000 bytes, it had 1000"):
                    read()
        finally:
            endless.shutdown()
        assert not hasattr(endless, "sent_all")


# --- what a terminal obeys


def test_a_terminal_gets_no_sequence_from_a_shard(tmp_path: Path) -> None:
    # `show` printed keys as they are, and so did errors with names of fields.
    sequence = "\x1b]0;owned\x07\x9b2J"
    good, bad = tmp_path / "good.tar", tmp_path / "bad.tar"
    good.write_bytes(tar_of([(f"{sequence}.x{sequence}.npy", npy(np.arange(3))), (f"b.x{sequence}.npy", npy([1]))]))
    bad.write_bytes(tar_of([("a.x.npy", npy(np.arange(3))), (f"{sequence}.x.npy", b"no array")]))
    LengthIndex.build(good).save(f"{good}.ltx")
    write(tmp_path / "corpus")
    name_shards(tmp_path / "corpus" / "shard.ltx", f"/{sequence}.tar")
    commands = [
        ["show", good, "--max-tokens", "9"],
        ["verify", good],
        ["report", good, "--max-tokens", "2", "--overlong", "alone"],
        ["index", bad, "--output", tmp_path / "bad.ltx"],
        ["verify", tmp_path / "corpus"],
    ]
    texts = [CliRunner().invoke(main, list(map(str, command))).output for command in commands]
    assert not [text for text in texts if {"\x1b", "\x07", "\x9b"} & set(text)]
    assert all("\\x1b]0;owned" in text for text in texts), texts
