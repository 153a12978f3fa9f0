"""A data set in TensorFlow Datasets' array_record layout, written shard by shard, so that a killed preparation goes on where it was.

The records, their order, the shards' number and names are those of TFDS's own writer. That one passes everything through a thousand
temporary files, which cannot be taken up again, and needs TensorFlow for sets of more than a gigabyte.
"""

import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from triqdef_jax.writer import Progress

_TELL_EVERY_IMAGES = 2000


class Examples(NamedTuple):
    """The examples of one split, at random access.

    Attributes:
        keys: one per example, none twice; TFDS hashes them, salted with the split's name, and writes in the order of the hashes.
        num_bytes: size of all examples, about; the number of shards follows from it.
        read: row -> example as the builder's features encode it.
    """

    keys: Sequence[int | str]
    num_bytes: int
    read: Callable[[int], dict[str, Any]]


def write(builder: Any, splits: Mapping[str, Examples]) -> None:
    """Write the shards that are not there yet, then what TFDS needs to read them; `dataset_info.json` comes last.

    Args:
        builder: a `tfds.core.DatasetBuilder` of format array_record; its `data_dir` is written.
        splits: examples by name of split.

    Raises:
        ValueError: two examples of a split have the same key.
    """
    folder = pathlib.Path(builder.data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plans = {name: _plan(_template(builder, name), examples) for name, examples in splits.items()}
    missing = [(name, path, rows) for name, plan in plans.items() for path, rows in plan if not path.exists()]
    total = sum(len(examples.keys) for examples in splits.values())
    done = total - sum(len(rows) for _, _, rows in missing)
    with Progress(total, 1, start_step=done, unit="image") as progress:
        for name, path, rows in missing:
            _write_shard(path, _told(_serialized(builder, splits[name], rows), progress, done, name))
            done += len(rows)
    _write_info(builder, plans)


def _plan(template, examples):
    """Return [(path of a shard, rows of its examples in their order)] as TFDS's writer would cut and name them."""
    from tensorflow_datasets.core import hashing
    from tensorflow_datasets.core.utils import shard_utils

    num, hasher = len(examples.keys), hashing.Hasher(template.split)
    hashes = [hasher.hash_key(key) for key in examples.keys]
    rows = sorted(range(num), key=hashes.__getitem__)
    for row, following in itertools.pairwise(rows):
        if hashes[row] == hashes[following]:
            raise ValueError(f"two examples of {template.split} have the key {examples.keys[row]!r}")
    num_shards = shard_utils.ShardConfig.calculate_number_shards(examples.num_bytes, num)
    stops = shard_utils.get_shard_boundaries(num, num_shards)
    paths = [template.sharded_filepath(shard_index=index, num_shards=num_shards) for index in range(num_shards)]
    return [(pathlib.Path(p), rows[a:b]) for p, a, b in zip(paths, [0, *stops], stops, strict=False)]


def _template(builder, split):
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=builder.data_dir, dataset_name=builder.name, split=split, filetype_suffix="array_record"
    )


def _serialized(builder, examples, rows):
    from tensorflow_datasets.core import example_serializer

    features = builder.info.features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    for row in rows:
        yield serializer.serialize_example(features.encode_example(examples.read(row)))


def _told(records, progress, done, label):
    """Pass the records on and tell their number now and then, counted from `done`."""
    for number, record in enumerate(records, done + 1):
        yield record
        if number % _TELL_EVERY_IMAGES == 0:
            progress.update(number, label=label)


def _write_shard(path, records):
    """Write a shard under a name that no reader looks for, then give it its own: it is whole or absent."""
    from tensorflow_datasets.core import file_adapters

    part = path.with_name(f"{path.name}.part")
    adapter = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.ARRAY_RECORD]
    adapter.write_examples(part, ((None, record) for record in records))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


def _write_info(builder, plans):
    import tensorflow_datasets as tfds

    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[len(rows) for _, rows in plan],
            num_bytes=sum(path.stat().st_size for path, _ in plan),
            filename_template=_template(builder, name),
        )
        for name, plan in plans.items()
    ]
    builder.info.set_splits(tfds.core.splits.SplitDict(infos))
    builder.info.write_to_directory(builder.data_dir)
