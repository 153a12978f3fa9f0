"""Files that are whole or absent, and digests of what is in them.

Everything that a later run or a report relies on is written to a temporary file beside its place, flushed to the disk
and renamed. A failing disk raises the operating system's OSError and leaves the old file as it was.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def atomic_open(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for writing bytes that replaces ``path`` when the block ends well, and is dropped when it fails.

    Parent directories are made. Readers see the old file or the whole new one, also after a crash.

    Raises:
      OSError: it cannot be written; `filename` is set, which the operating system leaves out when a disk is full.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        name_file(error, path)
        raise
    _sync_directory(path.parent)


def atomic_write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes ``obj`` as indented JSON, whole or not at all.

    NumPy numbers and arrays, tuples and `ConfigDict` are converted; numbers that are not finite become null, since JSON
    has no other word for them.

    Raises:
      ValueError: something in ``obj`` has no JSON form.
    """
    text = json.dumps(plain(obj), indent=2, allow_nan=False) + "\n"
    with atomic_open(path) as file:
        file.write(text.encode())


def atomic_savez(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays as an uncompressed ``.npz``, whole or not at all; equal arrays give equal bytes."""
    with atomic_open(path) as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file for the block; the operating system lets go of it when the process ends, however it ends.

    Args:
      path: the lock file, made if need be and left behind. wait: whether to wait for another holder.

    Raises:
      ValueError: another process holds it and ``wait`` is False.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is at work in {path.parent}; wait for it or name another directory"
            ) from error
        yield


def name_file(error: BaseException, path: str | os.PathLike) -> None:
    """Adds to an error of the operating system the file that it is about, where it does not say: writing to a full disk does not."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = str(path)


def sha256_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256, 64 hex digits, of named arrays: names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def config_hash(obj: Any) -> str:
    """Returns 16 hex digits of the SHA-256 of the canonical JSON of ``obj``.

    Keys are sorted, so their order does not count; tuples equal lists, but 1 and 1.0 differ.

    Raises:
      ValueError: something in ``obj`` has no JSON form.
    """
    text = json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def plain(obj: Any) -> Any:
    """Returns ``obj`` in the types that JSON has: dict with string keys, list, str, bool, int, finite float, None.

    Raises:
      ValueError: something in ``obj`` has no JSON form.
    """
    if hasattr(obj, "to_dict"):  # ConfigDict
        obj = obj.to_dict()
    if isinstance(obj, np.generic | np.ndarray):
        obj = obj.tolist()
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if obj is None or isinstance(obj, str | bool | int | float):
        return obj
    raise ValueError(f"cannot write a {type(obj).__name__} as JSON: use numbers, strings, lists, dicts or NumPy arrays")


def _sync_directory(path: pathlib.Path) -> None:
    """Flushes the rename itself to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
