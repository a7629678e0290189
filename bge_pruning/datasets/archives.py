"""Fetch an archive of files (``.tar.gz``), and unpack it while it is read.

The archive is never on the disk. Its files are in a hidden folder beside the one that is wanted,
which takes its place when all are there and every checksum is right.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import logging
import os
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from bge_pruning.utils.files import atomic_file, lock_of

log = logging.getLogger(__name__)

# Names and checksums of the files, as ``sha256sum -c`` reads them.
SUMS = "SHA256SUMS"
BLOCK = 1 << 20
# How often in a row a connection may break, and seconds to wait before the next.
TRIES = 5
WAIT = 3.0
TIMEOUT = 60.0
# What a damaged archive raises.
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, tarfile.TarError)


class _Source(io.RawIOBase):
    """The bytes of a file or an address, one after the other, and their checksum.

    Where a connection breaks, the next one goes on from there.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.is_remote = urlsplit(place).scheme in ("http", "https")
        self.position, self.size, self.tag = 0, 0, ""
        self.digest = hashlib.sha256()
        self.stream = self._connect() if self.is_remote else self._open()

    def _open(self) -> io.BufferedIOBase:
        self.size = Path(self.place).stat().st_size
        return Path(self.place).open("rb")

    def _connect(self) -> http.client.HTTPResponse:
        request = Request(self.place)
        if self.position:
            request.add_header("Range", f"bytes={self.position}-")
            if self.tag:  # otherwise only the checksums tell whether it is the same file
                request.add_header("If-Range", self.tag)
        try:
            answer = urlopen(request, timeout=TIMEOUT)
        except HTTPError as error:
            raise ValueError(
                f"{self.place}: the server says {error.code} {error.reason}. To fix, check the "
                f"address, or fetch the file otherwise and name it instead."
            ) from None
        if self.position and answer.status != http.client.PARTIAL_CONTENT:
            raise ValueError(
                f"{self.place}: the connection broke after {self.position:,} bytes, and the server "
                f"cannot go on from there. To fix, run the command again."
            )
        if not self.position:
            self.size = int(answer.headers.get("Content-Length") or 0)
            self.tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        return answer

    def close(self) -> None:
        """Close the file or the connection."""
        self.stream.close()
        super().close()

    def readable(self) -> bool:
        """As :class:`gzip.GzipFile` asks."""
        return True

    def readinto(self, buffer: memoryview) -> int:
        """Read some bytes; 0 at the end."""
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        self.position += len(content)
        self.digest.update(content)
        return len(content)

    def _read(self, count: int) -> bytes:
        for attempt in range(TRIES):
            try:
                if attempt:
                    self.stream.close()
                    self.stream = self._connect()
                content = self.stream.read(count)
                if content or self.position >= self.size or not self.is_remote:
                    return content
                reason = "it was closed"
            except (URLError, http.client.HTTPException, OSError) as error:
                if not self.is_remote:
                    raise
                reason = str(getattr(error, "reason", error))
            log.warning("%s: the connection broke (%s), trying again", self.place, reason)
            time.sleep(WAIT)
        raise ValueError(
            f"{self.place}: the connection broke after {self.position:,} bytes ({reason}). To fix, "
            f"run the command again."
        )


def fetch_archive(place: str, folder: Path, sha256: str | None = None) -> int:
    """Unpack an archive into a new folder, and return how many files it has.

    A process that comes after a killed one keeps the files that are whole; the archive has to be
    read again up to there.

    Args:
        place: Address (``https://``) or path of the archive.
        sha256: Checksum that the archive must have, in hexadecimal.

    Raises:
        OSError: If the folder exists, or the disk is full.
        ValueError: If the archive cannot be fetched, is damaged, or would write elsewhere.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists. To fix, choose another folder, or remove it.")
    staging = folder.with_name(f".{folder.name}.partial")
    with lock_of(staging, wait=False) as ours:
        if not ours:
            raise FileExistsError(f"{folder} is being fetched by another process. To fix, wait.")
        with closing(_open_source(place)) as source:
            _check_room(source, folder)
            staging.mkdir(parents=True, exist_ok=True)
            count = _unpack(source, staging)
        if sha256 is not None and (found := source.digest.hexdigest()) != sha256.lower():
            shutil.rmtree(staging)
            raise ValueError(
                f"{place}: its SHA-256 is {found}, expected {sha256}; what was read of it is "
                f"removed. To fix, check the address and the checksum, and run the command again."
            )
        log.info("%s: %d files, SHA-256 %s", place, count, source.digest.hexdigest())
        staging.rename(folder)
    return count


def _open_source(place: str) -> _Source:
    try:
        return _Source(place)
    except URLError as error:
        raise ValueError(
            f"{place}: cannot be reached ({error.reason}). To fix, check the address and the "
            f"network, or fetch the file otherwise and name it instead."
        ) from None


def _check_room(source: _Source, folder: Path) -> None:
    there = next(place for place in folder.absolute().parents if place.exists())
    free = shutil.disk_usage(there).free
    if source.size > free:
        raise OSError(
            f"{folder}: the archive has {source.size:,} bytes and its files more, and the disk has "
            f"{free:,} free. To fix, free space on it, or choose a folder on another one."
        )


def _unpack(source: _Source, folder: Path) -> int:
    """Write the files of an archive, and count them; to its end, where its own checksum is."""
    known, count = _read_sums(folder), 0
    try:
        with gzip.GzipFile(fileobj=io.BufferedReader(source, BLOCK)) as content:
            with tarfile.open(fileobj=content, mode="r|") as archive:
                for member in archive:
                    name = _check_member(member, source.place)
                    if member.isreg():
                        _unpack_file(archive.extractfile(member), member.size, folder, name, known)
                        count += 1
            while content.read(BLOCK):
                pass
    except DAMAGED as error:
        raise ValueError(
            f"{source.place}: the archive is damaged or cut off after {source.position:,} bytes "
            f"({error}). To fix, copy it again, or run the command again: {count} files are kept."
        ) from None
    if not count:
        raise ValueError(f"{source.place}: holds no files. To fix, choose another archive.")
    return count


def _check_member(member: tarfile.TarInfo, place: str) -> str:
    """The name of a file or folder, which is one below the folder."""
    path = PurePosixPath(member.name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in member.name
    if outside or not (member.isreg() or member.isdir()) or str(path) == SUMS:
        kind = "is no file or folder" if not outside else "leads out of the folder"
        kind = f"is our own {SUMS}" if str(path) == SUMS else kind
        raise ValueError(
            f"{place}: '{member.name[:200]}' in it {kind}. To fix, do not use this archive."
        )
    return str(path)


def _unpack_file(
    content: io.BufferedIOBase, size: int, folder: Path, name: str, known: dict[str, str]
) -> None:
    """Write a file and its line of the checksums, unless it is there."""
    path, digest = folder / name, hashlib.sha256()
    if name in known and path.is_file() and path.stat().st_size == size:
        for block in _blocks(content, size):
            digest.update(block)
        if digest.hexdigest() != known[name]:
            raise ValueError(
                f"{name}: the archive has another file than before. To fix, remove {folder}."
            )
        return
    with _named(path), atomic_file(path) as partial, partial.open("wb") as file:
        for block in _blocks(content, size):
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    with _named(folder / SUMS), (folder / SUMS).open("a", encoding="utf-8") as sums:
        sums.write(f"{digest.hexdigest()}  {name}\n")
    log.info("%s: %s bytes", name, f"{size:,}")


def _blocks(content: io.BufferedIOBase, size: int) -> Iterator[bytes]:
    while size > 0:
        block = content.read(min(BLOCK, size))
        if not block:
            raise EOFError("a file ends too early")
        size -= len(block)
        yield block


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give errors of writing the name of the file, e.g. of a full disk, which has none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _read_sums(folder: Path) -> dict[str, str]:
    """What an earlier process has unpacked: checksums by name; a line that was cut off is none."""
    path = folder / SUMS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    pairs = (line.partition("  ") for line in lines)
    return {name: digest for digest, _, name in pairs}
