"""Parts of a data set in memory: choosing rows, and batches of one static size for evaluation.

Layout: images uint8 [N, H, W, 3] in 0..255 (RGB), labels int32 [N], ids int64 [N].
Left out: training batches, which live beside the set they come from (`memory`, `stream`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_FILL = {"images": 0, "labels": 0, "ids": -1}


class Split(NamedTuple):
    """Labelled images in memory.

    Attributes:
        images: uint8 [N, H, W, 3], RGB.
        labels: int32 [N].
        ids: int64 [N], index in the original order of the split the images come from.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


def take(split: Split, rows: np.ndarray) -> Split:
    """Return the examples that `rows`, indices or a bool mask, selects."""
    return Split(*(array[rows] for array in split))


def evenly_spaced(total: int, num: int) -> np.ndarray:
    """Return `num` <= `total` distinct indices into `total` things, int64, evenly spaced and away from both ends."""
    return (2 * np.arange(num, dtype=np.int64) + 1) * total // (2 * max(1, num))


def stratified_mask(labels: np.ndarray, num: int) -> np.ndarray:
    """Choose `num` examples evenly spaced within every class, in proportion to its size; no randomness.

    Args:
        labels: int32 [N].
        num: how many, at most N.

    Returns:
        bool [N], true for the chosen ones; a class's count differs from its exact share by less than one.
    """
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(labels, kind="stable")[evenly_spaced(len(labels), num)]] = True
    return chosen


def split_batches(split: Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Return an iterator over a split in order, each batch as of `pad_batch`.

    Raises:
        ValueError: batch_size is below 1.
    """
    check_at_least("batch_size", batch_size, 1)
    starts = range(0, len(split.labels), batch_size)
    pieces = (take(split, slice(start, start + batch_size)) for start in starts)
    return (pad_batch(piece._asdict(), batch_size) for piece in pieces)


def pad_batch(batch: dict[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Fill a batch up to a static size.

    Args:
        batch: 'images' uint8 [n, H, W, 3], 'labels' int32 [n], 'ids' int64 [n], with n <= batch_size.
        batch_size: B.

    Returns:
        The same three with B rows, and 'mask' float32 [B]: 1 on the given rows; filled rows are black images with
        label 0, id -1 and mask 0.
    """
    num = len(batch["labels"])
    padded = {
        name: np.full((batch_size, *batch[name].shape[1:]), fill, batch[name].dtype) for name, fill in _FILL.items()
    }
    for name, array in padded.items():
        array[:num] = batch[name]
    return {**padded, "mask": np.float32(np.arange(batch_size) < num)}


def check_batching(batch_size: int, start_step: int, num_train: int) -> None:
    """Check the arguments of a training iterator.

    Raises:
        ValueError: batch_size is outside 1..num_train, or start_step is negative.
    """
    if not 1 <= batch_size <= num_train:
        raise ValueError(f"batch_size must lie in 1..{num_train} (the training images), got {batch_size}; lower it")
    check_at_least("start_step", start_step, 0)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ValueError where a value lies below its least one."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def choose(table: dict[str, Any], name: str, what: str) -> Any:
    """Return `table[name]`; raise ValueError with the known names where there is none."""
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}; got {name!r}")
    return table[name]
