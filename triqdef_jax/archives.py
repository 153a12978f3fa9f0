"""The official archives of data sets: what they are called, their checksums, fetching them, and the members of a tar at random access."""

import contextlib
import gzip
import hashlib
import pathlib
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_DOWNLOAD_TIMEOUT_S = 60
_BLOCK_BYTES = 1 << 20
_TELL_EVERY_BYTES = 10 * 10**9  # a line every 10 to 30 s on most machines


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        file_name: as its publisher calls it.
        sha256: hexadecimal, as listed by TFDS.
        url: where it may be fetched without an account, or None.
    """

    file_name: str
    sha256: str
    url: str | None = None


# By data set, then by the flag that names the file.
ARCHIVES: dict[str, dict[str, Archive]] = {
    "cifar10": {
        "archive": Archive(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        )
    },
    "imagenet2012": {
        "archive_train": Archive(
            "ILSVRC2012_img_train.tar", "b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb"
        ),
        "archive_val": Archive(
            "ILSVRC2012_img_val.tar", "c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0"
        ),
    },
}


class Member(NamedTuple):
    """A file inside an archive: its name, and where its bytes lie in the archive."""

    name: str
    offset: int
    size: int


def check_file(path: pathlib.Path, sha256: str | None) -> None:
    """Check that a file is there and, unless `sha256` is None, that it has this digest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the digest differs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such archive: {path}")
    if sha256 is None:
        return
    found, total = hashlib.sha256(), path.stat().st_size
    print(f"checking {path}, {total / 1e9:.1f} GB", file=sys.stderr)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
            if file.tell() % _TELL_EVERY_BYTES < _BLOCK_BYTES < file.tell():
                print(f"checking {path}, {file.tell() / 1e9:.0f} of {total / 1e9:.1f} GB", file=sys.stderr)
    if found.hexdigest() != sha256:
        raise ValueError(
            f"wrong checksum of {path}: SHA-256 is {found.hexdigest()}, expected {sha256}; download it anew"
        )


def fetch(url: str, path: pathlib.Path, sha256: str | None) -> pathlib.Path:
    """Download `url` to `path`, or keep the file that is there; it appears only when complete and checked.

    Args:
        url: address.
        path: file to write; its directory is made.
        sha256: expected digest, hexadecimal, or None.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: the address cannot be reached.
        ValueError: the digest differs.
    """
    if path.exists():
        check_file(path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        part = pathlib.Path(folder) / path.name
        print(f"fetching {url}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as source, part.open("wb") as target:
                while block := source.read(_BLOCK_BYTES):
                    target.write(block)
        except OSError as error:  # URLError, time-outs and broken connections are OSErrors
            raise FileNotFoundError(f"cannot fetch {url} ({error}); get the file and pass --archive=FILE") from error
        check_file(part, sha256)
        part.rename(path)
    return path


def contents(path: pathlib.Path) -> dict[str, bytes]:
    """Return the files of a small archive, compressed or not, by their names in it.

    Raises:
        ValueError: it is no complete tar archive.
    """
    with _complete(str(path)), tarfile.open(path) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
        archive.fileobj.read()  # to the very end, where gzip keeps its own checksum
    return found


def members(path: pathlib.Path, within: Member | None = None) -> Iterator[Member]:
    """Yield the files of an uncompressed tar archive, or of the one inside it that `within` names; only headers are read.

    Raises:
        ValueError: it is no complete tar archive.
    """
    name, start, size = within or Member("", 0, path.stat().st_size)
    what = f"{name} in {path}" if within else str(path)
    with _complete(what), path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.offset_data + member.size > start + size:  # it runs into what follows
                    raise EOFError("unexpected end of data")
                if member.isfile():
                    yield Member(member.name, member.offset_data, member.size)


def read(path: pathlib.Path, member: Member) -> bytes:
    """Return the bytes of a member.

    Raises:
        ValueError: the archive ends before them.
    """
    with path.open("rb") as file:
        file.seek(member.offset)
        found = file.read(member.size)
    if len(found) != member.size:
        raise ValueError(f"{path} ends within {member.name}; download it anew")
    return found


@contextlib.contextmanager
def _complete(what: str) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{what} is no complete tar archive ({error}); download it anew") from error
