"""Small data sets that tests read batches from."""

import itertools

import jax
import ml_collections
import numpy as np

from triqdef_jax import data
from triqdef_jax.data import memory, splits


def settings(name="digits", **changes):
    defaults = dict(name=name, dir="", heldout_images=0, num_workers=0, image_size_px=0, prefetch=2, train_images=0)
    return ml_collections.ConfigDict(defaults | changes)


def first(iterator, num):
    """Take `num` batches to the host and close the iterator."""
    batches = [jax.tree.map(np.asarray, batch) for batch in itertools.islice(iterator, num)]
    iterator.close()
    return batches


def assert_equal(batches, others):
    jax.tree.map(np.testing.assert_array_equal, batches, others)


def numbered(num, *, augment="shift"):
    """A set whose label is the number of the image, and whose images are one distinct colour."""
    numbers = np.arange(num)
    pixels = np.broadcast_to(numbers[:, None, None, None] + 1, (num, 4, 4, 3)).astype(np.uint8)
    split = splits.Split(pixels, numbers.astype(np.int32), numbers)
    return memory.ImageData("numbered", num, 4, split, split, split, augment)


def imagenet(imagenet_dir, **changes):
    return data.load(settings("imagenet", dir=imagenet_dir, image_size_px=16, **changes))
