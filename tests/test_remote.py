"""Shards at addresses: real servers on this machine (HTTP with and without ranges, moto's S3), and cut connections."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from vitrail.cli import run
from vitrail.config import DataConfig
from vitrail.data.datasets.base import TarDataset
from vitrail.data.datasets.open import open_dataset
from vitrail.data.datasets.webdataset import remote, stores
from vitrail.data.datasets.write_shards import write_shards

moto_server = pytest.importorskip("moto.server")
s3fs = pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(folder))
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_folder) -> Path:
    """Return a folder of three shards, 350 KB in all."""
    folder = tmp_path_factory.mktemp("shards")
    make_folder(folder / "shapes", count=10, side=60)
    write_shards(DataConfig(source=str(folder / "shapes")), folder / "out", size=12)
    return folder / "out"


RANGE = "pictures-{000000..000002}.tar"


# --- servers


class Handler(http.server.SimpleHTTPRequestHandler):
    """Sends files, by ranges where the server has them, with one fault after the other as the server is told."""

    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        fault = self.server.fault.pop(0) if self.server.fault and "0-0" not in (wanted or "") else ""
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, start, end = path.read_bytes(), 0, path.stat().st_size - 1
        if wanted and self.server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, end = int(first), min(end, int(last or end))
        self.send_response(206 if wanted and self.server.ranges else 200)
        if self.server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        if self.server.lengths:
            self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        body = content[start : end + 1]
        self.wfile.write(body[: len(body) * 2 // 3] if fault == "cut" else body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A web server on a free port, which records its requests."""

    daemon_threads = True

    def __init__(self, folder: Path, *, ranges: bool, lengths: bool = True, fault: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.ranges, self.lengths, self.fault = ranges, lengths, list(fault)
        self.requests: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Ignore a client that hangs up."""


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Passes bytes on to a port, and hangs up in the middle of answers: after so many bytes, so many times."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, port: int, *, after: int, times: int) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.port, self.after, self.left, self.lock = port, after, times, threading.Lock()
        self.cuts = 0

    def may_cut(self) -> bool:
        with self.lock:
            self.left -= 1
            self.cuts += self.left >= 0
            return self.left >= 0

    def handle_error(self, *_: object) -> None:
        """Ignore a connection that was cut."""


class _Pass(socketserver.BaseRequestHandler):
    server: CuttingProxy

    def handle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.server.port)) as back:
            threading.Thread(target=self.pass_on, args=(self.request, back), daemon=True).start()
            passed = 0
            while block := back.recv(4096):
                passed += len(block)
                if passed > self.server.after and self.server.may_cut():
                    self.request.sendall(block[: len(block) // 2])
                    return
                self.request.sendall(block)

    def pass_on(self, front: socket.socket, back: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := front.recv(65536):
                back.sendall(block)


@pytest.fixture(scope="module")
def s3(shards) -> Iterator[int]:
    """moto's server with the shards in a bucket; returns its port."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="k", aws_secret_access_key="s",
        region_name="us-east-1",
    )  # fmt: skip
    client.create_bucket(Bucket="bucket")
    for path in shards.iterdir():
        client.put_object(Bucket="bucket", Key=f"birds/{path.name}", Body=path.read_bytes())
    client.close()
    yield port
    server.stop()


@pytest.fixture
def by_port(monkeypatch) -> Callable[[int], None]:
    """Return a function that makes s3:// mean a port of this machine."""

    def use(port: int) -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)

    return use


def opened(location: str) -> TarDataset:
    dataset = open_dataset(location)
    assert isinstance(dataset, TarDataset)
    return dataset


def check_equal(dataset: TarDataset, shards: Path) -> None:
    """Assert that the bytes of every shard, every image and label are those of the local shards."""
    local = opened(f"{shards}/{RANGE}")
    assert [Path(each.file).read_bytes() for each in dataset.shards] == [
        Path(each.file).read_bytes() for each in local.shards
    ]
    assert (dataset.labels, list(dataset.paths)) == (local.labels, list(local.paths))
    assert (dataset.targets == local.targets).all()
    for index in range(len(local.paths)):
        assert dataset.encoded(index) == local.encoded(index)
        assert (np.asarray(dataset.read(index, "RGB")) == np.asarray(local.read(index, "RGB"))).all()


# --- HTTP


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", [(), ("cut",), ("cut", "503", "cut", "cut", "429")])
def test_http_with_and_without_ranges_and_cuts(shards, ranges, fault):
    server = Server(shards, ranges=ranges, fault=fault)
    with serving(server):
        dataset = opened(f"{server.url}/{RANGE}")
        check_equal(dataset, shards)
        assert dataset.location(0) == f"{server.url}/pictures-000000.tar: 00000000.png"
        assert not server.fault
        later = [wanted for _, wanted in server.requests if wanted not in (None, "bytes=0-0")]
        assert bool(later) == bool(fault), "after a cut, the rest was to be asked for"
        num_requests = len(server.requests)
        assert list(opened(f"{server.url}/{RANGE}").paths) == list(dataset.paths)
        assert all(wanted == "bytes=0-0" for _, wanted in server.requests[num_requests:]), (
            "nothing was to be fetched again"
        )


def test_a_cut_download_is_resumed_at_the_byte_where_it_stopped(shards):
    size = (shards / "pictures-000000.tar").stat().st_size
    server = Server(shards, ranges=True, fault=("cut", "cut"))
    with serving(server):
        opened(f"{server.url}/pictures-000000.tar")
    requests = [wanted for path, wanted in server.requests if path.endswith(".tar")]
    first, second = size * 2 // 3, size * 2 // 3 + (size - size * 2 // 3) * 2 // 3
    assert requests == ["bytes=0-0", None, f"bytes={first}-", f"bytes={second}-"]


def test_the_download_of_an_ended_process_is_resumed(shards, cache):
    size = (shards / "pictures-000001.tar").stat().st_size
    server = Server(shards, ranges=True)
    with serving(server):
        (found,) = remote.inspect_addresses([f"{server.url}/pictures-000001.tar"])
        found.copy_path.parent.mkdir(parents=True)
        begun = (shards / "pictures-000001.tar").read_bytes()[:1000]
        found.copy_path.with_name(f".{found.copy_path.name}.part").write_bytes(begun)
        (path,) = remote.fetch([found])
        assert server.requests[-1][1] == "bytes=1000-"
    assert path.read_bytes() == (shards / "pictures-000001.tar").read_bytes()
    assert path.stat().st_size == size
    assert not list(cache.rglob("*.part"))


def test_a_changed_shard_is_fetched_again(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "s")
    server = Server(tmp_path / "s", ranges=True)
    with serving(server):
        url = f"{server.url}/pictures-000000.tar"
        before = opened(url)
        shutil.copy(shards / "pictures-000001.tar", tmp_path / "s" / "pictures-000000.tar")
        after = opened(url)
        assert before.encoded(0) != after.encoded(0)
        assert before.identity(0) != after.identity(0)
        assert opened(url).identity(0) == after.identity(0)


def test_two_processes_fetch_each_shard_once(shards, cache):
    program = (
        "import sys; from vitrail.data.datasets.open import open_dataset; print(len(open_dataset(sys.argv[1]).paths))"
    )
    server = Server(shards, ranges=True)
    with serving(server):
        words = [sys.executable, "-c", program, f"{server.url}/{RANGE}"]
        both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [each.communicate(timeout=60)[0].strip() for each in both] == ["30", "30"]
        fetched = [path for path, wanted in server.requests if wanted is None]
        assert sorted(fetched) == sorted(f"/{path.name}" for path in shards.iterdir())


def test_failed_downloads_are_named_by_address(shards, monkeypatch, tmp_path):
    server = Server(shards, ranges=True)
    with serving(server):
        with pytest.raises(ValueError, match=r"1 of 4 files are missing: http.*/pictures-000003\.tar; fix the address"):
            opened(f"{server.url}/pictures-{{000000..000003}}.tar")
        with pytest.raises(ValueError, match=r"web servers cannot be asked for a list; write a range"):
            opened(f"{server.url}/*.tar")
        server.fault = ["cut"] * 200
        server.ranges = False
        with pytest.raises(
            ValueError,
            match=r"pictures-000000\.tar: cannot be fetched: the connection ended after .*\(6 tries, with .* goes on",
        ):
            opened(f"{server.url}/pictures-000000.tar")
        server.fault = ["403"]
        with pytest.raises(ValueError, match=r"pictures-000001\.tar: must not be read: the server answers 403"):
            opened(f"{server.url}/pictures-000001.tar")
        server.fault, server.lengths = [], False
        with pytest.raises(ValueError, match=r"the server does not say how long the file is"):
            opened(f"{server.url}/pictures-000001.tar")
        server.lengths, server.ranges = True, True
        monkeypatch.setattr(remote, "_SPARE_BYTES", 10**18)
        with pytest.raises(
            ValueError, match=r"1 shards need .* GB in .*, where .* GB are free; make room, or set VITRAIL_CACHE"
        ):
            opened(f"{server.url}/pictures-000001.tar")
    with pytest.raises(ValueError, match=r"pictures-000000\.tar: cannot be fetched: .*[Rr]efused.* \(6 tries\)"):
        opened(f"{server.url}/pictures-000000.tar")


# --- S3


def test_s3_gives_the_same_bytes(shards, s3, by_port):
    by_port(s3)
    check_equal(opened(f"s3://bucket/birds/{RANGE}"), shards)
    check_equal(opened("s3://bucket/birds/"), shards)
    check_equal(opened("s3://bucket/birds/*.tar"), shards)
    with pytest.raises(ValueError, match=r"1 of 4 files are missing: s3://bucket/birds/pictures-000003\.tar"):
        opened("s3://bucket/birds/pictures-{000000..000003}.tar")
    with pytest.raises(ValueError, match=r"s3://bucket/none/\*\.tar: no file there has such a name"):
        opened("s3://bucket/none/")


@pytest.mark.parametrize("times", [1, 4])
def test_s3_over_a_connection_that_is_cut(shards, s3, by_port, times, monkeypatch):
    monkeypatch.setattr(stores, "BLOCK_BYTES", 50_000)
    with (proxy := CuttingProxy(s3, after=40_000, times=times)), serving(proxy):
        by_port(proxy.server_address[1])
        check_equal(opened(f"s3://bucket/birds/{RANGE}"), shards)
        assert proxy.cuts == times


@pytest.mark.slow
def test_train_from_s3(shards, s3, by_port, tmp_path, capsys):
    by_port(s3)
    url, out = f"s3://bucket/birds/{RANGE}", tmp_path / "run"
    sizes = ["--model", "nano8", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    words = [*sizes, "--epochs", "1", "--batch-size", "16"]
    assert run(["train", url, "--out", str(out), *words]) == 0
    assert run(["train", f"{shards}/{RANGE}", "--out", str(tmp_path / "local"), *words]) == 0
    ours, theirs = (json.loads((each / "evaluation.json").read_text()) for each in (out, tmp_path / "local"))
    assert ours["val"]["confusion"] == theirs["val"]["confusion"]
    assert ours["val"]["loss"] == theirs["val"]["loss"]


def test_a_missing_package_is_named():
    program = """
import sys
sys.modules["s3fs"] = sys.modules["gcsfs"] = None
from vitrail.cli import run
for url in ("s3://b/x.tar", "gs://b/x.tar"):
    assert run(["check", url]) == 1
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    output = " ".join(done.stderr.split())
    assert "s3://b/x.tar: addresses of s3:// need another package; type pip install 'vitrail[s3]'" in output
    assert "gs://b/x.tar: addresses of gs:// need another package; type pip install gcsfs" in output
    assert done.returncode == 0
