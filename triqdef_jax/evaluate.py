"""Evaluate a trained run: `python -m triqdef_jax.evaluate --workdir=runs/digits [--deployed] [--extra_bits=3,6] [--clean_only]`.

Prints clean accuracy per bit-width and the success of patches that training never met: the held-out quarter of its pool, patches of a
second source network, unseen sizes. Every rate comes with its count and a 95 % interval, bootstrapped over patches and images.
Writes `results/<name>.json` and `<name>_outcomes.npz`, from which every printed number can be recomputed.
"""

import functools
import importlib.metadata
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from absl import flags

from triqdef_jax import entry

RATES = ("robust_acc", "asr_correct", "asr_all", "tsr", "tsr_clean")
PACKAGES = ("jax", "jaxlib", "flax", "numpy")


class Outcomes(NamedTuple):
    """Predictions under one pool: int32 `[bits, patches, images]`."""

    predictions: np.ndarray
    target: np.ndarray
    digest: str


def evaluate(trained, data, pools: dict, *, bits: tuple[int, ...], deployed: bool, progress=None) -> dict:
    """Predict all test images, clean and under every patch of every pool, at every bit-width.

    Args:
      trained: `runs.Trained`. data: as from `data.load`. pools: name -> `patch_pool.PatchPool`. bits: trained and other bit-widths.
      deployed: use the integer forward below 32 bits. progress: called with a line of text now and then.

    Returns:
      dict with 'labels', 'ids' int `[N]`, 'clean' int32 `[bits, N]` and 'pools': name -> `Outcomes`.
    """
    predictors = {b: make_predictor(trained, data, b, deployed=deployed) for b in bits}
    limit = trained.config.eval.images or None
    images, labels, ids = (x[:limit] for x in _test_arrays(data, trained.config.eval.batch_size))
    clean = np.stack([_predict_all(predictors[b], images, trained.config.eval.batch_size) for b in bits])
    outcomes = {}
    for name, pool in pools.items():
        rows = []
        for index in range(len(pool.values)):
            if progress:
                progress(f"{name}: patch {index + 1}/{len(pool.values)}")
            patched = paste_on_all(images, pool, index, trained.config)
            rows.append([_predict_all(predictors[b], patched, trained.config.eval.batch_size) for b in bits])
        outcomes[name] = Outcomes(np.asarray(rows).transpose(1, 0, 2), pool.target, pool.digest)
    return {"labels": labels, "ids": ids, "clean": clean, "pools": outcomes}


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
        model = deploy.integer_model(trained.network.module, variables, spec, data.image_size_px)
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


def paste_on_all(images: np.ndarray, pool, index: int, config) -> np.ndarray:
    """Return uint8 images `[N, H, W, 3]` with one patch pasted on each, at places that depend on (seed, patch, image) only."""
    import jax

    settings = (config.patches.rotation_deg, config.patches.scale_jitter)
    key = jax.random.fold_in(jax.random.key(config.seed), index)
    return np.asarray(_paste()(key, images, pool.values[index], pool.masks[index], pool.size_px[index], *settings))


@functools.cache
def _paste():
    import jax
    import jax.numpy as jnp

    from triqdef_jax import patches

    @functools.partial(jax.jit, static_argnums=(5, 6))
    def paste(key, images, values, mask, size_px, rotation_deg, scale_jitter):
        number, image_size_px = images.shape[:2]
        placements = patches.sample_placements(
            key,
            number,
            image_size_px=image_size_px,
            size_px=size_px,
            rotation_deg=rotation_deg,
            scale_range=(1 - scale_jitter, 1 + scale_jitter),
        )
        repeat = lambda x: jnp.broadcast_to(x, (number, *x.shape))
        patched = patches.apply_patches(images.astype(jnp.float32) / 255.0, repeat(values), repeat(mask), placements)
        return jnp.round(255.0 * patched).astype(jnp.uint8)

    return paste


def _predict_all(predict, images, batch_size):
    """Predict in equal batches, the last one padded, so that one program serves all."""
    predictions = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * 3
        predictions.append(np.asarray(predict(np.pad(batch, padding)))[: len(batch)])
    return np.concatenate(predictions).astype(np.int32)


def _test_arrays(data, batch_size):
    batches = [{k: v[batch["mask"] > 0] for k, v in batch.items()} for batch in data.eval_batches("test", batch_size)]
    return tuple(np.concatenate([batch[name] for batch in batches]) for name in ("images", "labels", "ids"))


def summarise(outcomes: dict, bits: tuple[int, ...], *, seed: int) -> dict:
    """Return clean accuracy and all success rates with counts and 95 % intervals, as plain JSON types."""
    from triqdef_jax import metrics

    labels = outcomes["labels"]
    summary = {"clean_accuracy": {}, "pools": {}}
    for row, b in enumerate(bits):
        right = int((outcomes["clean"][row] == labels).sum())
        summary["clean_accuracy"][str(b)] = _rate(right, len(labels), metrics.wilson(right, len(labels)))
    for name, pool in outcomes["pools"].items():
        per_bit = {}
        for row, b in enumerate(bits):
            counts = metrics.success_counts(outcomes["clean"][row], pool.predictions[row], labels, pool.target)
            per_bit[str(b)] = {rate: _pooled(rate, outcomes, row, pool, counts[rate], seed) for rate in RATES}
        summary["pools"][name] = {"num_patches": len(pool.target), "digest": pool.digest, "bits": per_bit}
    return summary


def _pooled(name, outcomes, row, pool, count, seed):
    from triqdef_jax import metrics

    num, den = success_masks(name, outcomes["clean"][row], pool.predictions[row], outcomes["labels"], pool.target)
    interval = metrics.cluster_bootstrap(num, den, seed=seed) if len(num) > 1 else metrics.wilson(num.sum(), den.sum())
    per_patch = [{"num": int(n), "den": int(d)} for n, d in zip(count.num, count.den, strict=True)]
    return _rate(int(num.sum()), int(den.sum()), interval) | {"per_patch": per_patch}


def success_masks(name: str, clean: np.ndarray, patched: np.ndarray, labels: np.ndarray, target: np.ndarray):
    """Return (num, den) `[P, N]`: the pairs of patch and image that `metrics.success_counts` counts under one name."""
    from triqdef_jax import metrics

    pairs = [
        metrics.success_counts(clean[n : n + 1], patched[:, n : n + 1], labels[n : n + 1], target)[name]
        for n in range(len(labels))
    ]
    return np.stack([p.num for p in pairs], axis=1), np.stack([p.den for p in pairs], axis=1)


def _rate(num, den, interval):
    rate = num / den if den else float("nan")
    return {"num": num, "den": den, "rate": rate, "low": float(interval.low), "high": float(interval.high)}


def table(summary: dict) -> str:
    """Return the result as text: one line per bit-width, clean accuracy and headline success per pool."""
    pools = summary["pools"]
    lines = [f"{'bits':>4}  {'clean accuracy':>22}" + "".join(f"  {f'asr: {name}':>26}" for name in pools)]
    for b, accuracy in summary["clean_accuracy"].items():
        cells = [pools[name]["bits"][b]["asr_correct"] for name in pools]
        lines.append(f"{b:>4}  {_cell(accuracy):>22}" + "".join(f"  {_cell(cell):>26}" for cell in cells))
    return "\n".join(lines)


def _cell(rate):
    return f"{100 * rate['rate']:5.1f} [{100 * rate['low']:4.1f}, {100 * rate['high']:4.1f}] %"


def describe(trained, summary: dict, *, deployed: bool, workdir) -> dict:
    """Return the whole result record: what was attacked, how, with which versions, and the summary."""
    from triqdef_jax import files

    config = trained.config
    return {
        "workdir": pathlib.Path(workdir).name,
        "forward": "integer carrier (32 bits: float)" if deployed else "fake-quant",
        "step": trained.step,
        "config_hash": files.config_hash(config),
        "method": config.loss.method,
        "data": config.data.name,
        "quant": config.quant,
        "threat_model": {
            "patch": f"one universal {config.patches.shape}, anywhere, values in [0, 1]",
            "rotation_deg": config.patches.rotation_deg,
            "scale_jitter": config.patches.scale_jitter,
            "attacker": "knows training data and architecture, not the attacked weights (transfer)",
            "goal": "targeted patches; success of the headline counts any wrong prediction",
        },
        "definitions": {
            "asr_correct": "wrong with patch / right without, images of the target class excluded",
            "robust_acc": "right with patch / all",
            "asr_all": "prediction changed / all",
            "tsr": "target predicted with patch / label differs from target",
            "tsr_clean": "target predicted without patch / label differs from target",
            "interval": "95 %: Wilson for clean accuracy, bootstrap over patches and images for the rest",
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **summary,
    }


def _save(workdir, name, record, outcomes):
    from triqdef_jax import files

    folder = pathlib.Path(workdir) / "results"
    arrays = {name: outcomes[name] for name in ("labels", "ids", "clean")}
    for pool, outcome in outcomes["pools"].items():
        slug = pool.replace(" ", "_")
        arrays |= {f"patched/{slug}": outcome.predictions, f"target/{slug}": outcome.target}
    files.atomic_savez(folder / f"{name}_outcomes.npz", **arrays)
    files.atomic_write_json(folder / f"{name}.json", record)
    return folder / f"{name}.json"


def main(argv):
    del argv
    from triqdef_jax import data, quantize, runs, sources

    if flags.FLAGS.workdir is None:
        raise entry.UserError("--workdir=DIR is needed: the directory of a trained run")
    with entry.user_errors():
        trained = runs.load_trained(flags.FLAGS.workdir)
        extra = tuple(quantize.check_bits(int(b)) for b in flags.FLAGS.extra_bits)
        loaded = data.load(trained.config.data)
        pools = {} if flags.FLAGS.clean_only else sources.eval_pools(trained.config, loaded)
    bits = (*trained.network.bits, *(b for b in extra if b not in trained.network.bits))
    is_terminal = sys.stderr.isatty()
    progress = (lambda text: print(f"\r{text:<60}", end="", file=sys.stderr)) if is_terminal else None
    outcomes = evaluate(trained, loaded, pools, bits=bits, deployed=flags.FLAGS.deployed, progress=progress)
    summary = summarise(outcomes, bits, seed=trained.config.seed)
    record = describe(trained, summary, deployed=flags.FLAGS.deployed, workdir=flags.FLAGS.workdir)
    name = "_".join(["clean" if flags.FLAGS.clean_only else "evaluation", *["deployed"] * flags.FLAGS.deployed])
    path = _save(flags.FLAGS.workdir, name, record, outcomes)
    if is_terminal:
        print(file=sys.stderr)
    print(
        f"{record['method']} on {record['data']}, {len(outcomes['labels'])} test images, forward: {record['forward']}"
    )
    print(table(summary))
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Directory of a trained run.")
    flags.DEFINE_bool("deployed", False, "Measure the integer forward that ships instead of the fake-quant graph.")
    flags.DEFINE_bool("clean_only", False, "Measure clean accuracy alone, without patches.")
    flags.DEFINE_list("extra_bits", [], "Bit-widths that were not trained, calibrated for this evaluation (3,6).")
    entry.run_program(main)
