"""How attacks use all devices: batches of images split by rows as in training, and networks that split whatever batch they are given.

Attacks know no devices. Per-image attacks follow the layout of their images; universal ones fold patches and images into a batch of their
own, so that their network does the splitting. Left out: attacks by query, which run on the host, and several processes.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.tree_util import Partial

from triqdef_jax import sharding


def attack_in_batches(
    attack: Callable,
    key: jax.Array,
    network,
    images: np.ndarray,
    labels: np.ndarray,
    settings,
    *,
    batch_size: int,
    names: tuple[str, ...],
    num_devices: int | None = None,
) -> dict[str, np.ndarray]:
    """Attack images in batches of one size, each split over the devices and filled up with its last image where it is too small.

    Images draw their randomness by their row, so that those that fill up change nothing for the others but what an attack averages over all
    its images (`rescale_margin` of the adaptive one). Batch sizes that divide by the devices need none.

    Args:
      attack: per-image, with gradients, as in `attacks.ATTACKS`.
      key: PRNG key of the first batch, so that images that fit into one get the patches of a plain call; others fold their first row in.
      network: a `jax.tree_util.Partial` or a dict of them; every device gets a whole copy.
      images: float32 [B, H, W, C] in [0, 1].
      labels: int32 [B].
      settings: of the attack.
      batch_size: most images of a batch, without those that fill it up to a multiple of the devices.
      names: what to return of the attack's info, arrays whose last axis runs over images, or 'images' themselves; absent ones are left out.
      num_devices: the first so many, None for all.

    Returns:
      The arrays of all images.
    """
    mesh = sharding.data_mesh(num_devices)
    network = sharding.replicate(network, mesh)
    size, parts = even_batch(len(images), batch_size), []
    on_devices = -(-size // mesh.size) * mesh.size
    for start in range(0, len(images), size):
        num = min(size, len(images) - start)
        rows = start + np.minimum(np.arange(on_devices), num - 1)
        batch = sharding.put_batch({"images": images[rows], "labels": labels[rows]}, mesh)
        batch_key = jax.random.fold_in(key, start) if start else key
        _, info = attack(batch_key, network, batch["images"], batch["labels"], settings)
        kept = {name: np.asarray(info[name]) for name in names if name in info}
        parts.append({name: x[:num] if name == "images" else x[..., :num] for name, x in kept.items()})
    axes = {name: 0 if name == "images" else -1 for name in parts[0]}
    return {name: np.concatenate([part[name] for part in parts], axis=axis) for name, axis in axes.items()}


def even_batch(num_images: int, batch_size: int) -> int:
    """Return the size of the smallest equal batches, of at most `batch_size`, that are as few as possible: 450 images at 256 make two of 225."""
    return -(-num_images // -(-num_images // batch_size))


def by_rows(network: Partial, *, num_devices: int | None = None) -> Partial:
    """Return the network that computes each device's share of a batch there, for any number of images.

    Images come and logits go whole on every device, so that what the attack does around the network needs no layout. Of the gradient one
    batch of images travels per step: 100 MB for 160 ImageNet images, little beside the network's passes.

    Args:
      network: ``(*others, images [N, ...]) -> logits [N, K]`` with its arrays.
      num_devices: the first so many, None for all.
    """
    mesh = sharding.data_mesh(num_devices)
    if mesh.size == 1:
        return network
    return Partial(_split(network.func, mesh), *sharding.replicate(network.args, mesh))


@functools.cache
def _split(fn, mesh):
    """One function object per network and mesh, so that jitted attacks compile once for all parameters."""
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    place = jax.lax.with_sharding_constraint

    def logits(*args):
        *others, images = args
        num = len(images)
        rows = jnp.pad(place(images, whole), [(0, -num % mesh.size)] + [(0, 0)] * (images.ndim - 1))
        return place(fn(*others, place(rows, split))[:num], whole)

    return logits
