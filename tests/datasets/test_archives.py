"""Fetching an archive: whole or not there, and nothing outside of the folder."""

import errno
import hashlib
import io
import os
import subprocess
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from bge_pruning.cli import main
from bge_pruning.datasets import archives
from bge_pruning.datasets.archives import fetch_archive
from bge_pruning.datasets.contrastive_dataset import read_contrastive
from bge_pruning.datasets.rows import BadRows
from bge_pruning.datasets.tables import Table

NUMBERS = os.urandom(30_000).hex()  # which cannot be compressed much
FILES = {
    "data/MIRACL/de_len-0-500.jsonl": '{"query": "q", "pos": ["p"], "neg": ["n"]}\n',
    "data/MLDR/th.jsonl": f'{{"query": "{NUMBERS}", "pos": ["p"], "neg": []}}\n',
    "data/dureader.jsonl": '{"query": "狗", "pos": ["p"], "neg": []}\n',
}


def pack(path: Path, files: dict[str, str], *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for member in members:
            archive.addfile(member)
    return path


@pytest.fixture
def archive(tmp_path) -> Path:
    folder = tarfile.TarInfo("data")
    folder.type = tarfile.DIRTYPE
    return pack(tmp_path / "a.tar.gz", FILES, folder)


def files_of(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


class Handler(BaseHTTPRequestHandler):
    """Serves a file, of which each connection gives so many bytes at most."""

    content, most, ranges, starts = b"", 10**9, True, []

    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-")
        start = int(asked[6:-1]) if self.ranges else 0
        self.starts.append(start)
        self.send_response(206 if start else 404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(self.content[start : start + self.most])

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def serve(archive, monkeypatch):
    """A function that serves the archive in some way, and returns its address."""
    monkeypatch.setattr(archives, "WAIT", 0.0)
    servers = []

    def serve(**settings) -> str:
        handler = type("Ours", (Handler,), {"content": archive.read_bytes(), **settings})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/a.tar.gz"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_command_fetches_and_unpacks(serve, archive, tmp_path, capsys):
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    words = ["fetch-data", serve(), str(tmp_path / "data"), "--sha256", digest.upper()]
    assert main(words) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/data, 3 files\n"
    found = files_of(tmp_path / "data")
    sums = found.pop("SHA256SUMS")
    assert found == FILES and sums.count("\n") == 3
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "data", check=True)
    rows = read_contrastive(Table(str(tmp_path / "data/data/MIRACL/de_len-0-500.jsonl")), BadRows())
    assert [row.words for row in rows] == [("q", "p", "n")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar.gz", "data"]
    assert main(words) == 1
    assert "data exists. To fix, choose another folder" in capsys.readouterr().err


def test_a_broken_connection_goes_on_where_it_was(serve, archive, tmp_path):
    starts = []
    assert fetch_archive(serve(most=9_000, starts=starts), tmp_path / "data") == 3
    size = archive.stat().st_size
    assert starts == list(range(0, size, 9_000))
    assert FILES.items() <= files_of(tmp_path / "data").items()


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        ({"most": 0}, "", r"connection broke after 0 bytes \(it was closed\). To fix, run the c"),
        ({"most": 99, "ranges": False}, "", "broke after 99 bytes, and the server cannot go on"),
        ({}, "/../none", "the server says 404 Not Found. To fix, check the address"),
    ],
)
def test_what_a_server_does_not_give(settings, path, message, serve, tmp_path):
    place = serve(**settings).replace("/a.tar.gz", path.removeprefix("/..") or "/a.tar.gz")
    with pytest.raises(ValueError, match=message):
        fetch_archive(place, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_no_server(tmp_path):
    with pytest.raises(ValueError, match="cannot be reached .*refused.* To fix, check the address"):
        fetch_archive("http://127.0.0.1:9/a", tmp_path / "data")


def test_a_cut_off_archive_leaves_whole_files_for_the_next_call(archive, tmp_path, monkeypatch):
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    message = r"a.tar.gz: the archive is damaged or cut off after .*: 1 files are kept\."
    with pytest.raises(ValueError, match=message):
        fetch_archive(str(archive), tmp_path / "data")
    staging = tmp_path / ".data.partial"
    assert not (tmp_path / "data").exists()
    assert set(files_of(staging)) == {"SHA256SUMS", "data/MIRACL/de_len-0-500.jsonl"}
    before = (staging / "data/MIRACL/de_len-0-500.jsonl").stat().st_mtime_ns
    archive.write_bytes(whole)
    assert fetch_archive(str(archive), tmp_path / "data") == 3
    assert (tmp_path / "data/data/MIRACL/de_len-0-500.jsonl").stat().st_mtime_ns == before
    assert files_of(tmp_path / "data")["SHA256SUMS"].count("\n") == 3


@pytest.mark.parametrize("place", [100, -6])
def test_a_damaged_archive(place, archive, tmp_path):
    """Inside, and in its own checksum at the end."""
    content = bytearray(archive.read_bytes())
    content[place] ^= 255
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="the archive is damaged or cut off"):
        fetch_archive(str(archive), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("files", "members", "message"),
    [
        ({"../x": "a"}, (), r"'\.\./x' in it leads out of the folder. To fix, do not use this"),
        ({"a/../../x": "a"}, (), "leads out of the folder"),
        ({"/tmp/x": "a"}, (), "leads out of the folder"),
        ({"..\\x": "a"}, (), "leads out of the folder"),
        ({"SHA256SUMS": "a"}, (), "'SHA256SUMS' in it is our own SHA256SUMS"),
        ({"a": "a"}, (link("b", tarfile.SYMTYPE),), "'b' in it is no file or folder"),
        ({"a": "a"}, (link("b", tarfile.LNKTYPE),), "'b' in it is no file or folder"),
        ({"a": "a"}, (link("b", tarfile.FIFOTYPE),), "'b' in it is no file or folder"),
        ({}, (), "holds no files"),
    ],
)
def test_an_archive_that_would_write_elsewhere(files, members, message, tmp_path):
    place = pack(tmp_path / "inner.tar.gz", files, *members)
    with pytest.raises(ValueError, match=message):
        fetch_archive(str(place), tmp_path / "b" / "data")
    assert not (tmp_path / "x").exists() and not (tmp_path / "b" / "x").exists()
    assert not (tmp_path / "b" / "data").exists()


def test_a_full_disk_and_another_checksum(archive, tmp_path, monkeypatch, capsys):
    words = ["fetch-data", str(archive), str(tmp_path / "data")]

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives.os, "fsync", full)
        assert main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "_len-0-500.jsonl: No space left on device. To fix, free space on its "
        "disk, or choose a folder on another one, and run the command again."
    )
    assert files_of(tmp_path / ".data.partial") == {}
    with monkeypatch.context() as patch:
        patch.setattr(archives.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        with pytest.raises(OSError, match="the archive has .* bytes and its files more, and the"):
            fetch_archive(str(archive), tmp_path / "data")
    with pytest.raises(ValueError, match="its SHA-256 is .*, expected 00; what was read of it is"):
        fetch_archive(str(archive), tmp_path / "data", "00")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
    assert main(["fetch-data", str(tmp_path / "none"), str(tmp_path / "data")]) == 1
    assert "none: No such file or directory. To fix, check the path." in capsys.readouterr().err


def test_another_archive_than_the_one_that_was_begun(archive, tmp_path):
    staging = tmp_path / ".data.partial"
    staging.mkdir()
    (staging / "data").mkdir()
    (staging / "data" / "dureader.jsonl").write_text(
        "x" * len(FILES["data/dureader.jsonl"].encode())
    )
    (staging / "SHA256SUMS").write_text(f"{'0' * 64}  data/dureader.jsonl\n")
    with pytest.raises(ValueError, match="has another file than before. To fix, remove .*partial"):
        fetch_archive(str(archive), tmp_path / "data")
