"""Shards are what TFDS itself would have made, written one at a time; what is whole is not written again."""

import io
import sys

import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import shard_utils

from triqdef_jax import shards


def example(row):
    return {"id": f"train_{row:05d}", "image": io.BytesIO(b"\x89PNG" + bytes([row]) * 100), "label": row % 10}


def examples(num=20, read=example):
    return shards.Examples(range(num), 20 * 150, read)  # as many bytes as the examples take as records


def make_builder(folder):
    return tfds.builder("cifar10", data_dir=folder, file_format="array_record")


@pytest.fixture
def small_shards(monkeypatch):
    """Four shards of 20 examples, in place of one of 64 MiB at least."""
    monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 600)


def names(builder):
    return sorted(path.name for path in builder.data_path.iterdir())


def records(folder):
    """All records in their order, the images as bytes; the proto's own bytes depend on the process."""
    source = make_builder(folder).as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    return [(record["id"], record["image"], int(record["label"])) for record in source]


def test_the_records_are_those_of_the_stock_writer_and_no_tensorflow_is_needed(tmp_path, small_shards):
    stock, ours = (make_builder(tmp_path / name) for name in ("stock", "ours"))
    stock._split_generators = lambda _: {"train": ((row, example(row)) for row in range(20))}
    stock.download_and_prepare()
    shards.write(ours, {"train": examples()})
    assert names(ours) == names(stock) and names(ours)[1].endswith("00001-of-00004")
    assert ours.info.splits["train"].shard_lengths == stock.info.splits["train"].shard_lengths == [5] * 4
    assert records(tmp_path / "ours") == records(tmp_path / "stock") and len(records(tmp_path / "ours")) == 20
    assert "tensorflow" not in sys.modules


def test_an_interrupted_shard_is_written_again_and_whole_ones_are_not(tmp_path, small_shards, capsys):
    rows = []

    def interrupted(row):
        rows.append(row)
        if len(rows) == 13:  # the third of the third shard
            raise KeyboardInterrupt
        return example(row)

    builder, undisturbed = (make_builder(tmp_path / name) for name in ("interrupted", "undisturbed"))
    with pytest.raises(KeyboardInterrupt):
        shards.write(builder, {"train": examples(read=interrupted)})
    assert not builder.is_prepared()
    assert [name[-5:] for name in names(builder)] == ["00004", "00004", ".part"]
    again = []
    shards.write(builder, {"train": examples(read=lambda row: again.append(row) or example(row))})
    assert len(again) == 10 and not set(again) & set(rows[:10])
    shards.write(undisturbed, {"train": examples()})
    assert names(builder) == names(undisturbed)
    assert records(tmp_path / "interrupted") == records(tmp_path / "undisturbed")


def test_progress_tells_images_rate_and_time_left_and_counts_what_was_there(
    tmp_path, small_shards, monkeypatch, capsys
):
    monkeypatch.setattr(shards, "_TELL_EVERY_IMAGES", 5)
    builder = make_builder(tmp_path)
    shards.write(builder, {"train": examples()})
    capsys.readouterr()
    sorted(builder.data_path.glob("*of-00004"))[0].unlink()
    shards.write(builder, {"train": examples()})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("image 20/20  train  ") and " images/s  " in line and line.endswith("s left")


def test_two_examples_of_one_key_are_refused(tmp_path):
    twice = shards.Examples(["a", "b", "a"], 300, example)
    with pytest.raises(ValueError, match="two examples of train have the key 'a'"):
        shards.write(make_builder(tmp_path), {"train": twice})
