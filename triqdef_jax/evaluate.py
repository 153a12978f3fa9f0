"""Evaluate trained runs: `python -m triqdef_jax.evaluate --workdirs=runs/digits[,runs/OTHER] [--deployed] [--extra_bits=3,6]`.

Prints clean accuracy per bit-width and the success of patches that training never met: the held-out quarter of its pool, patches of a
second source network, unseen sizes. Every rate comes with its count and a 95 % interval (`results.py`). Several runs are also set side by side.
Writes `<workdir>/results/<name>.json` and `<name>_outcomes.npz`.
"""

import functools
import sys

import numpy as np
from absl import flags

from triqdef_jax import entry


def evaluate(trained, data, pools: dict, *, bits: tuple[int, ...], deployed: bool, progress=None):
    """Predict all test images, clean and under every patch of every pool, at every bit-width.

    Args:
      trained: `runs.Trained`. data: as from `data.load`. pools: name -> `patch_pool.PatchPool`. bits: trained and other bit-widths.
      deployed: use the integer forward below 32 bits. progress: called with a line of text now and then.

    Returns:
      `results.Outcomes`.
    """
    from triqdef_jax.results import Outcomes, PoolOutcomes

    predictors = [make_predictor(trained, data, b, deployed=deployed) for b in bits]
    batch_size = trained.config.eval.batch_size
    images, labels, ids = _test_arrays(data, batch_size, trained.config.eval.images)
    clean = _predict(predictors, images, batch_size)
    outcomes = {}
    for name, pool in pools.items():
        predictions = []
        for index in range(len(pool.values)):
            if progress:
                progress(f"{name}: patch {index + 1}/{len(pool.values)}")
            paste = make_paste(pool, index, trained.config)
            predictions.append(_predict(predictors, images, batch_size, paste))
        outcomes[name] = PoolOutcomes(np.stack(predictions, axis=1), pool.target, pool.digest)
    return Outcomes(labels, ids, clean, outcomes)


def make_predictor(trained, data, bits: int, *, deployed: bool):
    """Return uint8 images `[B, H, W, 3]` -> predicted classes int32 `[B]` of one bit-width, trained or calibrated for the purpose."""
    from triqdef_jax import deploy, loop, quantize

    calibration = None
    if bits not in trained.network.bits:
        number = trained.config.data.calibration_images
        calibration = loop.unit_range(data.heldout.images[:number])
    variables = trained.variables(bits, calibration)
    spec = trained.spec(bits)
    if deployed and bits != quantize.FLOAT_BITS:
        model = deploy.lower(trained.network.module, variables, spec, data.image_size_px)
        return lambda images: _argmax(deploy.integer_forward(model, images))
    predict = _fake_quant_predictor(trained.network.module)
    return lambda images: predict(variables, spec, images)


@functools.cache
def _fake_quant_predictor(module):
    import jax

    def predict(variables, spec, images):
        logits, _ = module.apply(variables, images.astype(np.float32) / 255.0, spec, "eval")
        return logits.argmax(axis=-1)

    return jax.jit(predict)


def _argmax(logits):
    return logits.argmax(axis=-1)


def make_paste(pool, index: int, config):
    """Return (uint8 images `[B, H, W, 3]`, row numbers `[B]`) -> the images with one patch each, rounded to uint8.

    Place and jitter are functions of (config.seed, patch, row) only: every bit-width, run and batch size meets the same images.
    """
    import jax

    key = jax.random.fold_in(jax.random.key(config.seed), index)
    patch = (pool.values[index], pool.masks[index], pool.size_px[index])
    return functools.partial(_jitted_paste(), config.patches.rotation_deg, config.patches.scale_jitter, key, *patch)


@functools.cache
def _jitted_paste():
    import jax
    import jax.numpy as jnp

    from triqdef_jax import patches

    def place(rotation_deg, scale_jitter, image_size_px, size_px, key):
        scales = (1 - scale_jitter, 1 + scale_jitter)
        one = patches.sample_placements(
            key, 1, image_size_px=image_size_px, size_px=size_px, rotation_deg=rotation_deg, scale_range=scales
        )
        return jax.tree.map(lambda x: x[0], one)

    def paste(rotation_deg, scale_jitter, key, values, mask, size_px, images, rows):
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(rows)
        placements = jax.vmap(functools.partial(place, rotation_deg, scale_jitter, images.shape[1], size_px))(keys)
        values, mask = (jnp.broadcast_to(x, (len(rows), *x.shape)) for x in (values, mask))
        patched = patches.apply_patches(images.astype(jnp.float32) / 255.0, values, mask, placements)
        return jnp.round(255.0 * patched).astype(jnp.uint8)

    return jax.jit(paste, static_argnums=(0, 1))


def _predict(predictors, images, batch_size, paste=None):
    """Return int32 `[bits, N]`; batches have one size, the last one padded, so that one program serves all."""
    predictions = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padded = np.pad(batch, [(0, batch_size - len(batch))] + [(0, 0)] * 3)
        if paste is not None:
            padded = paste(padded, np.arange(start, start + batch_size))
        predictions.append([np.asarray(predict(padded))[: len(batch)] for predict in predictors])
    return np.concatenate(predictions, axis=1).astype(np.int32)


def _test_arrays(data, batch_size, limit):
    """Return (images uint8 `[N, H, W, 3]`, labels, ids) of the first `limit` test images (0: all)."""
    batches, number = [], 0
    for batch in data.eval_batches("test", batch_size):
        batches.append({name: values[batch["mask"] > 0] for name, values in batch.items()})
        number += len(batches[-1]["labels"])
        if limit and number >= limit:
            break
    return tuple(
        np.concatenate([batch[name] for batch in batches])[: limit or None] for name in ("images", "labels", "ids")
    )


def main(argv):
    del argv
    from triqdef_jax import loop, quantize, results

    options = flags.FLAGS
    if not options.workdirs:
        raise entry.UserError("--workdirs=DIR[,DIR] is needed: the directories of trained runs")
    with entry.user_errors():
        extra = tuple(quantize.check_bits(int(b)) for b in options.extra_bits)
    try:
        records = [_evaluate_run(workdir, extra, options) for workdir in options.workdirs]
    except loop.PreemptedError as error:  # while a source network was trained for the patches
        print(error, file=sys.stderr)
        return entry.EXIT_PREEMPTED
    if len(records) > 1 and not options.clean_only:
        pool = next(iter(records[0]["pools"]))
        with entry.user_errors():
            print(
                f"\nside by side, success (asr_correct) of the {pool} patches:\n{results.side_by_side(records, pool)}"
            )
    return 0


def _evaluate_run(workdir, extra_bits, options):
    from triqdef_jax import data, results, runs, sources

    with entry.user_errors():
        trained = runs.load_trained(workdir)
        loaded = data.load(trained.config.data)
        pools = {} if options.clean_only else sources.eval_pools(trained.config, loaded)
    config = trained.config
    bits = (*trained.network.bits, *(b for b in extra_bits if b not in trained.network.bits))
    progress = (lambda text: print(f"\r{text:<60}", end="", file=sys.stderr)) if sys.stderr.isatty() else None
    outcomes = evaluate(trained, loaded, pools, bits=bits, deployed=options.deployed, progress=progress)
    if progress:
        progress("\r")
    summary = results.summarise(outcomes, bits, seed=config.seed)
    record = results.describe(config, summary, workdir=workdir, step=trained.step, deployed=options.deployed)
    name = "_".join(["clean" if options.clean_only else "evaluation", *["deployed"] * options.deployed])
    path = results.save(f"{workdir}/results", name, record, outcomes)
    print(
        f"\n{record['name']}: {record['method']} on {record['data']}, {record['num_images']} test images, {record['forward']} forward"
    )
    print(f"{results.table(record)}\nwritten to {path}")
    return record


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", [], "Directories of trained runs.")
    flags.DEFINE_bool("deployed", False, "Measure the integer forward that ships instead of the fake-quant graph.")
    flags.DEFINE_bool("clean_only", False, "Measure clean accuracy alone, without patches.")
    flags.DEFINE_list("extra_bits", [], "Bit-widths that were not trained, calibrated for this evaluation (3,6).")
    entry.run_program(main)
