"""Data sets by name: handwritten digits, CIFAR-10, ImageNet; training batches are a pure function of (seed, step).

Layout: images uint8 [N, H, W, 3] in 0..255 (RGB), labels int32 [N], ids int64 [N]; programs make float32 in [0, 1].
Left out: downloads and preparation (`prepare_data`); nothing here opens a socket or imports TensorFlow.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from triqdef_jax.data import images
from triqdef_jax.data.memory import ImageData
from triqdef_jax.data.prepared import Encoded, open_splits, resolve_dir
from triqdef_jax.data.splits import Split, check_at_least, choose, evenly_spaced, stratified_mask, take
from triqdef_jax.data.stream import RecordError, Records, StreamData, centre_split

__all__ = ["LOADERS", "ImageData", "RecordError", "Split", "StreamData", "load", "resolve_dir", "test_arrays"]

_DIGITS_TEST_IMAGES = 450  # a quarter of 1,797


def load(settings: Any) -> ImageData | StreamData:
    """Load a data set; nothing is ever downloaded.

    Args:
        settings: the `data` part of a config, with the fields `name` (key of `LOADERS`), `dir` ('' for $TFDS_DATA_DIR,
            else ~/tensorflow_datasets), `heldout_images` (taken out of the training split by a fixed rule, whatever
            the seed), `image_size_px` (0 for the set's own: 16, 32, 224), `train_images` (0 for all, else the first so
            many of what is left) and, for streamed sets, `num_workers` and `prefetch`.

    Returns:
        `ImageData` for digits and cifar10, `StreamData` for imagenet.

    Raises:
        ValueError: unknown name, a negative number, more images asked for than there are, or damaged files.
        FileNotFoundError: the set is not prepared; the message says how to do it.
    """
    loader = choose(LOADERS, settings.name, "data.name")
    for field in ("heldout_images", "image_size_px", "train_images", "num_workers", "prefetch"):
        check_at_least(f"data.{field}", settings[field], 0)
    return loader(settings)


def test_arrays(data: ImageData | StreamData, batch_size: int, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (images uint8 `[N, H, W, 3]`, labels, ids) of the first `limit` test images (0: all), read in batches."""

    batches, number = [], 0
    for batch in data.eval_batches("test", batch_size):
        batches.append({name: values[batch["mask"] > 0] for name, values in batch.items()})
        number += len(batches[-1]["labels"])
        if limit and number >= limit:
            break
    return tuple(
        np.concatenate([batch[name] for batch in batches])[: limit or None] for name in ("images", "labels", "ids")
    )


def _load_digits(settings: Any) -> ImageData:
    from sklearn import datasets  # here, because importing it takes 1.5 s

    digits = datasets.load_digits()
    pixels = np.uint8(np.rint(digits.images * (255 / 16)))  # values 0..16
    ids = np.arange(len(pixels), dtype=np.int64)
    everything = Split(np.repeat(pixels[..., None], 3, axis=-1), digits.target.astype(np.int32), ids)
    # The images come ordered by writer. RandomState's stream is frozen by NumPy: this order is the same for ever.
    shuffled = take(everything, np.random.RandomState(0).permutation(len(ids)))
    is_test = stratified_mask(shuffled.labels, _DIGITS_TEST_IMAGES)
    return _image_data("digits", 16, take(shuffled, ~is_test), take(shuffled, is_test), "shift", settings)


def _load_cifar10(settings: Any) -> ImageData:
    train, test = (_decode_cifar(source) for source in open_splits("cifar10", ("train", "test"), settings.dir))
    return _image_data("cifar10", 32, train, test, "crop_flip", settings)


def _load_imagenet(settings: Any) -> StreamData:
    train, test = open_splits("imagenet2012", ("train", "validation"), settings.dir)
    _check_heldout(settings, len(train))
    # Records lie in the order of a hash of their names, so evenly spaced ones are a fair sample; no label is read.
    is_heldout = np.zeros(len(train), bool)
    is_heldout[evenly_spaced(len(train), settings.heldout_images)] = True
    size_px = settings.image_size_px or 224
    return StreamData(
        name="imagenet",
        num_classes=1000,
        image_size_px=size_px,
        train=Records(train, _first(np.flatnonzero(~is_heldout), settings)),
        heldout=centre_split(Records(train, np.flatnonzero(is_heldout)), size_px),
        test=Records(test, np.arange(len(test))),
        num_workers=settings.num_workers,
        prefetch=settings.prefetch,
    )


LOADERS: dict[str, Callable[[Any], ImageData | StreamData]] = {
    "digits": _load_digits,
    "cifar10": _load_cifar10,
    "imagenet": _load_imagenet,
}


def _image_data(name: str, own_size_px: int, train: Split, test: Split, augment: str, settings: Any) -> ImageData:
    """Take the held-out images out of `train`, bring everything to its size, and put the set together."""
    _check_heldout(settings, len(train.labels))
    size_px = settings.image_size_px or own_size_px
    is_heldout = stratified_mask(train.labels, settings.heldout_images)
    parts = take(train, _first(np.flatnonzero(~is_heldout), settings)), take(train, is_heldout), test
    return ImageData(name, 10, size_px, *(_resize(part, size_px) for part in parts), augment=augment)


def _check_heldout(settings: Any, num_images: int) -> None:
    if settings.heldout_images >= num_images:
        raise ValueError(
            f"data.heldout_images must be below {num_images}, the images of the training split, "
            f"got {settings.heldout_images}; lower it"
        )


def _first(rows: np.ndarray, settings: Any) -> np.ndarray:
    if settings.train_images > len(rows):
        raise ValueError(f"data.train_images must be at most {len(rows)}, got {settings.train_images}; 0 takes all")
    return rows[: settings.train_images or None]


def _resize(split: Split, size_px: int) -> Split:
    if split.images.shape[1] == size_px:
        return split
    resized = np.empty((len(split.images), size_px, size_px, 3), np.uint8)
    for row, image in enumerate(split.images):
        resized[row] = images.resize(image, size_px, size_px)
    return split._replace(images=resized)


def _decode_cifar(source: Encoded) -> Split:
    """Decode a split into its original order, which the example ids ('train_00042') carry."""
    encoded = sorted(source.take(range(len(source))), key=lambda record: record["id"])
    ids = np.array([int(record["id"].rsplit(b"_")[-1]) for record in encoded], np.int64)
    pixels = np.stack([images.decode(record["image"]) for record in encoded])
    return Split(pixels, np.array([record["label"] for record in encoded], np.int32), ids)
