"""What targets predict of test images, bare or with a patch pasted onto each, in batches of one size on all devices of the process.

Images are uint8 `[N, H, W, 3]`. Where a patch lands is a function of seed, patch and image alone, so that every network meets the same images.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from triqdef_jax import patches, sharding, spread


def predict(targets, images: np.ndarray, batch_size: int, paste=None) -> np.ndarray:
    """Return int32 `[T, n]` of uint8 images; batches have one size, the last one padded, so that one program serves all devices."""
    mesh = sharding.local_mesh()
    if len(images) > batch_size:
        batch_size = spread.even_batch(len(images), batch_size)
    batch_size += -batch_size % mesh.size
    found = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padded = np.pad(batch, [(0, batch_size - len(batch))] + [(0, 0)] * 3)
        if paste is not None:
            padded = paste(padded, np.arange(start, start + batch_size))
        if mesh.size > 1:
            padded = sharding.put_batch(padded, mesh)
        found.append([target.predict(padded)[: len(batch)] for target in targets])
    return np.concatenate(found, axis=1).astype(np.int32)


def make_paste(arrays: dict, index: int, config, *, placement: str = "random"):
    """Return (uint8 images `[B, H, W, 3]`, row numbers `[B]`) -> the images with patch `index` each, rounded to uint8.

    Place and jitter are functions of (config.seed, patch, row) only: every target, run and batch size meets the same images.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    patch = tuple(arrays[name][index] for name in ("values", "masks", "size_px"))
    jitter = (config.patches.rotation_deg, config.patches.scale_jitter)
    return functools.partial(_paste, placement, *jitter, key, *patch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _paste(placement, rotation_deg, scale_jitter, key, values, mask, size_px, images, rows):
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)

    def place(key):
        one = patches.sample_placements(
            key,
            1,
            image_size_px=images.shape[1],
            size_px=size_px,
            rotation_deg=rotation_deg,
            scale_range=(1 - scale_jitter, 1 + scale_jitter),
            location=placement,
        )
        return jax.tree.map(lambda x: x[0], one)

    values, mask = (jnp.broadcast_to(x, (len(rows), *x.shape)) for x in (values, mask))
    patched = patches.apply_patches(images.astype(jnp.float32) / 255.0, values, mask, jax.vmap(place)(keys))
    return patches.round_to_uint8(patched)
