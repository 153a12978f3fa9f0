"""Sets held in memory and, while training, on the device: indexing and augmentation are one jitted function.

Layout: images uint8 [B, H, W, 3] in 0..255 (RGB), labels int32 [B]; programs make float32 in [0, 1].
Left out: sets that do not fit (`stream`), normalisation (inside the models), patches (`patches`).
"""

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from triqdef_jax.data.splits import Split, check_batching, choose, split_batches

# Streams of the run's root key, by name, so that no key the training loop folds from a step number is met here.
_ORDER_STREAM = zlib.crc32(b"data/order")
_AUGMENT_STREAM = zlib.crc32(b"data/augment")


def crop_and_flip(key: jax.Array, images: jax.Array, *, pad_px: int, use_flip: bool) -> jax.Array:
    """Shift every image by up to `pad_px` each way over a black border, and mirror half of them if asked.

    Args:
        key: PRNG key.
        images: uint8 [B, H, W, C].
        pad_px: largest shift, px.
        use_flip: whether images are mirrored left-right with probability one half.

    Returns:
        uint8 [B, H, W, C].
    """
    offset_key, flip_key = jax.random.split(key)
    num = images.shape[0]
    padded = jnp.pad(images, ((0, 0), (pad_px, pad_px), (pad_px, pad_px), (0, 0)))
    offsets = jax.random.randint(offset_key, (num, 2), 0, 2 * pad_px + 1)
    crop = lambda image, offset: jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])
    cropped = jax.vmap(crop)(padded, offsets)
    if not use_flip:
        return cropped
    mirrored = jax.random.bernoulli(flip_key, 0.5, (num, 1, 1, 1))
    return jnp.where(mirrored, cropped[:, :, ::-1], cropped)


# Digits fill their frame from top to bottom and lie on black: one pixel, half of one in the 8 x 8 original, cuts no
# stroke off; a black border continues the background where a repeated edge would smear strokes; mirroring is out,
# since a mirrored digit is none. CIFAR-10: the customary four pixels and mirroring.
AUGMENTATIONS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "shift": functools.partial(crop_and_flip, pad_px=1, use_flip=False),
    "crop_flip": functools.partial(crop_and_flip, pad_px=4, use_flip=True),
}


@dataclass(frozen=True)
class ImageData:
    """A set held in memory.

    Attributes:
        name: name of the set.
        num_classes: labels are 0 .. num_classes - 1.
        image_size_px: side of the square images.
        train, heldout, test: the three parts; `heldout` was taken out of the training split and is never trained on.
        augment: key of `AUGMENTATIONS`.
    """

    name: str
    num_classes: int
    image_size_px: int
    train: Split
    heldout: Split
    test: Split
    augment: str

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.train.labels)

    def train_batches(
        self, *, seed: int, batch_size: int, start_step: int, sharding: NamedSharding | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Yield augmented training batches for ever, from `start_step` on.

        The batch of a step is a pure function of (seed, step): epoch e = step // (N // B) has its own permutation, of
        which the last N mod B entries are dropped; the augmentation folds in the step. Nothing waits for the device.

        Args:
            seed: the run's seed.
            batch_size: B, images over all processes, at most N.
            start_step: number of batches to pass over; what follows is what an uninterrupted run would have met.
            sharding: where the batch axis lies; None for the default device.

        Returns:
            Iterator of {'images': uint8 [B, H, W, 3], 'labels': int32 [B]} on the device.

        Raises:
            ValueError: batch_size is outside 1..N, or start_step is negative.
        """
        check_batching(batch_size, start_step, self.num_train)
        return self._train_batches(seed, batch_size, start_step, sharding)

    def _train_batches(self, seed, batch_size, start_step, sharding):
        everywhere = sharding and NamedSharding(sharding.mesh, PartitionSpec())
        augment = AUGMENTATIONS[self.augment]
        num_train, steps_per_epoch = self.num_train, self.num_train // batch_size

        @functools.partial(jax.jit, out_shardings=everywhere)
        def epoch_order(root_data, epoch):
            key = jax.random.fold_in(jax.random.wrap_key_data(root_data), _ORDER_STREAM)
            return jax.random.permutation(jax.random.fold_in(key, epoch), num_train)

        @functools.partial(jax.jit, out_shardings=sharding)
        def batch(root_data, images, labels, order, step, start):
            rows = jax.lax.dynamic_slice_in_dim(order, start, batch_size)
            if sharding:  # each device gathers and augments its own rows only
                rows = jax.lax.with_sharding_constraint(rows, sharding)
            key = jax.random.fold_in(jax.random.wrap_key_data(root_data), _AUGMENT_STREAM)
            return {"images": augment(jax.random.fold_in(key, step), images[rows]), "labels": labels[rows]}

        root_data = np.asarray(jax.random.key_data(jax.random.key(seed)))  # host data may enter any process's jit
        images, labels = (_to_devices(array, everywhere) for array in (self.train.images, self.train.labels))
        order_epoch, order = None, None
        for step in itertools.count(start_step):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, epoch_order(root_data, epoch)
            yield batch(root_data, images, labels, order, step, position * batch_size)

    def eval_batches(self, split: str, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield a split once, unaugmented and in order, in batches of one static size.

        Args:
            split: 'train', 'heldout' or 'test'.
            batch_size: B.

        Returns:
            Iterator of {'images': uint8 [B, H, W, 3], 'labels': int32 [B], 'ids': int64 [B], 'mask': float32 [B]};
            rows that only fill up the last batch have mask 0, id -1, label 0 and a black image.

        Raises:
            ValueError: unknown split, or batch_size below 1.
        """
        parts = {"train": self.train, "heldout": self.heldout, "test": self.test}
        return split_batches(choose(parts, split, "split"), batch_size)


def _to_devices(array: np.ndarray, everywhere: NamedSharding | None) -> jax.Array:
    """Put a host array on the default device or on all of them; each process fills its own, nothing is sent between."""
    if everywhere is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, everywhere, lambda index: array[index])
