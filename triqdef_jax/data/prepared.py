"""Data sets prepared on disk in TensorFlow Datasets' array_record layout: opened, or refused in one line that says what to do.

Nothing here opens a socket or imports TensorFlow; `prepare_data` writes what is read here.
"""

import os
import pathlib
from collections.abc import Sequence
from concurrent import futures
from typing import Any

from triqdef_jax.archives import ARCHIVES

_CHECKING_THREADS = 32  # files of a network disk answer late, and ImageNet has 1,088


def resolve_dir(data_dir: str) -> pathlib.Path:
    """Return where prepared sets lie: `data_dir`, or if it is '' $TFDS_DATA_DIR, or else ~/tensorflow_datasets."""
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


class Encoded(Sequence):
    """The records of a split at random access, images left encoded: {'image': bytes, 'label': int, ...}; picklable.

    Args:
        source: sequence of serialized `tf.train.Example`, all features of one value.
    """

    def __init__(self, source: Sequence[bytes]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return _parse(self._source[row])

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return many records, read in threads."""
        return [_parse(record) for record in self._source.__getitems__(rows)]


def _parse(record: bytes) -> dict[str, Any]:
    """Parse a record; TFDS's own way takes 0.2 ms longer, a tenth of what decoding the image takes."""
    from tensorflow_datasets.proto import tf_example_pb2

    features = tf_example_pb2.Example.FromString(record).features.feature
    return {name: (value.bytes_list.value or value.int64_list.value)[0] for name, value in features.items()}


def open_splits(name: str, splits: Sequence[str], data_dir: str) -> list[Encoded]:
    """Open splits of a prepared set.

    Args:
        name: as TFDS calls the set. splits: as TFDS calls them. data_dir: as of `resolve_dir`.

    Returns:
        The records of each split.

    Raises:
        FileNotFoundError: the set, or one of the splits, is not prepared.
        ValueError: its files are damaged, or have another format. A flipped byte is met when its record is read.
    """
    path = resolve_dir(data_dir)
    advice = f"run: {_command(name)} --data_dir={path}"
    if not (path / name).is_dir():  # answered at once, before the import and TFDS's own warnings
        raise FileNotFoundError(f"{name} is not prepared in {path}; {advice}")
    import tensorflow_datasets as tfds
    from google.protobuf import json_format

    try:
        builder = tfds.builder(name, data_dir=path, file_format="array_record")
    except (ValueError, json_format.ParseError) as error:  # TFDS refuses a format that differs from the one on disk
        raise ValueError(f"{name} in {path} is damaged or not in array_record format; {advice} --overwrite") from error
    missing = [split for split in splits if not builder.is_prepared() or split not in builder.info.splits]
    if missing:
        raise FileNotFoundError(f"{name} is not completely prepared in {path} (no {', '.join(missing)}); {advice}")
    for split in splits:
        try:
            _check_shards(builder.info.splits[split])
        except ValueError as error:
            raise ValueError(f"{name} in {path} is damaged: {error}; {advice} --overwrite") from error
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return [Encoded(builder.as_data_source(split, deserialize_method=raw)) for split in splits]


def _command(name: str) -> str:
    given = "".join(f" --{flag}={archive.file_name}" for flag, archive in ARCHIVES[name].items() if not archive.url)
    return f"python -m triqdef_jax.prepare_data --dataset={name}{given}"


def _check_shards(split: Any) -> None:
    """Raise ValueError unless all files of a split are there, whole, with as many records as they should have."""
    with futures.ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        list(pool.map(_check_shard, split.filepaths, split.shard_lengths))  # the list re-raises what a thread met


def _check_shard(path: os.PathLike, num_records: int) -> None:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(os.fspath(path))
        found = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f"{pathlib.Path(path).name} cannot be read ({str(error) or 'cut short'})") from error
    if found != num_records:
        raise ValueError(f"{pathlib.Path(path).name} has {found} records, expected {num_records}")
