"""How good a run is while it trains: accuracy on held-out training images, by which its best checkpoint is chosen.

Best means the highest mean accuracy in evaluation mode over all bit-widths on `data.heldout`, every image met as it is and, where the run trains on
a patch pool, once more under a patch of that pool; both count the same, as they do in the loss at lambda_adv = 1. Clean accuracy alone would
prefer checkpoints whose robustness has yet to come or is gone again. Patch and place of an image are functions of (seed, id of the image),
so all checkpoints meet the same images. No test image and no patch that evaluation meets is looked at. Methods that make their patches
against the network, and those without patches, are judged on clean images: an attack here would cost more than the steps between
two checkpoints.

Reference: Rice, Wong, Kolter, Overfitting in adversarially robust deep learning, ICML 2020: choice by accuracy under attack on held-out
images. Deviation: clean accuracy counts too, because many runs reach 100 % on one of the two.
"""

import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from triqdef_jax import patches, sharding
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.objectives.methods import Pool
from triqdef_jax.retention import SCORE

CLEAN, PATCHED = "heldout_clean", "heldout_patched"
HELDOUT_SCORE = "heldout_score"
_STREAM = zlib.crc32(b"selection")


def make_judge(config: ConfigDict, network: MultiBitNetwork, mesh: Mesh, data, pool: Pool | None) -> Callable:
    """Return (weights, stats) -> metrics by name: 'heldout_clean/8', with a pool 'heldout_patched/8', and 'heldout_score', shares in [0, 1].

    One program of the network serves all bit-widths and checkpoints. Counts are whole numbers, so the score does not depend on devices beyond
    what the predictions do. With `train.keep_best` off nothing is measured and the dict is empty.

    Args:
      config: of the run. network: its network. mesh: its devices. data: `data.ImageData` or `data.StreamData`.
      pool: training patches on the devices, or None where the method takes none.
    """
    if not config.train.keep_best:
        return lambda weights, stats: {}
    count = _make_count(network, mesh)
    place = [(network.slot(b), network.spec(b, round_bias=config.quant.round_bias)) for b in network.bits]
    num = len(data.heldout.labels)
    batch_size = -(-min(num, config.eval.batch_size) // mesh.size) * mesh.size

    def judge(weights, stats):
        found = {}
        for batch in _batches(config, mesh, data, pool, batch_size):
            for name, images in batch["images"].items():
                counts = [count(weights, stats, *where, images, batch["labels"], batch["mask"]) for where in place]
                found.setdefault(name, []).append(counts)
        right = {name: np.sum(jax.device_get(counts), axis=0) for name, counts in found.items()}
        return _scalars(right, num, network.bits)

    return judge


def score_entry(metrics: dict[str, float]) -> dict[str, float]:
    """Return the entry of a checkpoint's meta that goes with what a judge found, empty where it found nothing."""
    return {SCORE: metrics[HELDOUT_SCORE]} if metrics else {}


def _scalars(right, num, bits):
    """Name the shares of right answers, and the score: one division of the sum of all counts."""
    scalars = {
        f"{name}/{b}": float(count / num)
        for name, counts in right.items()
        for b, count in zip(bits, counts, strict=True)
    }
    total = sum(int(counts.sum()) for counts in right.values())
    return scalars | {HELDOUT_SCORE: total / (num * len(bits) * len(right))}


def _make_count(network, mesh):
    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def count(weights, stats, slot, spec, images, labels, mask):
        logits, _ = network.eval_forward(weights, stats, slot, spec, images.astype(jnp.float32) / 255.0)
        return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & (mask > 0))

    return count


def _batches(config, mesh, data, pool, batch_size):
    """Yield the held-out images on the devices: uint8 images by name, labels, and a mask that is 0 on filled rows."""
    rows = sharding.batch_sharding(mesh)
    put = lambda array: jax.make_array_from_callback(array.shape, rows, lambda index: array[index])
    jitter = (config.patches.rotation_deg, config.patches.scale_jitter)
    for batch in data.eval_batches("heldout", batch_size):
        images = {CLEAN: put(batch["images"])}
        if pool is not None:
            ids = put(batch["ids"].astype(np.int32))
            images[PATCHED] = _paste(rows, *jitter, np.uint32(config.seed), pool, images[CLEAN], ids)
        yield {"images": images, "labels": put(batch["labels"]), "mask": put(batch["mask"])}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _paste(rows, rotation_deg, scale_jitter, seed, pool, images, ids):
    """Paste a patch of the pool into each image; which one and where is a function of (seed, id)."""
    root = jax.random.fold_in(jax.random.key(seed), _STREAM)

    def draw(row_id):
        choice_key, place_key = jax.random.split(jax.random.fold_in(root, row_id))
        choice = jax.random.randint(choice_key, (), 0, len(pool.values))
        places = patches.sample_placements(
            place_key,
            1,
            image_size_px=images.shape[1],
            size_px=pool.size_px[choice],
            rotation_deg=rotation_deg,
            scale_range=(1 - scale_jitter, 1 + scale_jitter),
        )
        return choice, jax.tree.map(lambda x: x[0], places)

    choice, places = jax.vmap(draw)(ids)
    floats = images.astype(jnp.float32) / 255.0
    patched = patches.apply_patches(floats, pool.values[choice], pool.masks[choice], places)
    return jax.lax.with_sharding_constraint(patches.round_to_uint8(patched), rows)
