"""Full-precision source networks and the patch pools made on them; both live in the shared folder and serve many runs.

A source network is an ordinary training run (32 bits, clean images) in `<shared_dir>/source-<hash of its config>`, so it resumes and
is verified like any other. Source 0 makes the training pool; source 1, of another seed, makes patches that evaluation alone meets.
"""

import contextlib
import copy
import dataclasses
import pathlib
import sys

import jax.numpy as jnp
from ml_collections import ConfigDict

from triqdef_jax import config as config_lib
from triqdef_jax import files, loop, patch_pool, processes, runs, sharding, spread
from triqdef_jax.checkpoints import Checkpointer
from triqdef_jax.patch_pool import PatchPool, PoolRequest
from triqdef_jax.train_step import TrainState

SEED_STEP = 1000  # Seeds of a run's source networks lie this far from its own.


def independent_config(config: ConfigDict, *, seed: int, bits: tuple[int, ...], epochs: int) -> ConfigDict:
    """Return the config of a network trained on clean images that owes a run nothing but data, model, optimiser and batch size."""
    independent = config_lib.default()
    for group in ("data", "model", "optim"):
        independent[group] = copy.deepcopy(config[group])
    independent.seed = seed
    independent.quant.bits = bits
    independent.bact.starts = ()
    independent.loss.method = "qat"
    independent.loss.feature_layers = ()
    independent.train.batch_size = config.train.batch_size
    independent.train.epochs = epochs
    for field in ("data.dir", "data.num_workers", "data.prefetch"):  # where data lie does not change what is trained
        group, name = field.split(".")
        independent[group][name] = config_lib.default()[group][name]
    return independent


def source_config(config: ConfigDict, index: int) -> ConfigDict:
    """Return the config of source network `index` of a run; depends on data, model, optimiser, batch and seed only."""
    bits, epochs = (config_lib.quantize.FLOAT_BITS,), config.patches.source_epochs
    return independent_config(config, seed=config.seed + SEED_STEP * (index + 1), bits=bits, epochs=epochs)


def source_name(config: ConfigDict, index: int) -> str:
    """Return the folder name of source network `index`, which determines it."""
    return f"source-{files.config_hash(source_config(config, index))}"


def train_source(config: ConfigDict, index: int, data, *, is_quiet: bool = False) -> runs.Trained:
    """Return source network `index`, trained first if the shared folder has none; raises as `train_to_end`."""
    workdir = pathlib.Path(config.patches.shared_dir) / source_name(config, index)
    run = loop.make_run(source_config(config, index), workdir, data.num_train)
    return train_to_end(run, data, title=f"source network {index + 1}", is_quiet=is_quiet)


def train_to_end(
    run: loop.Run,
    data,
    *,
    title: str,
    pool: PatchPool | None = None,
    start: tuple | None = None,
    is_quiet: bool = False,
) -> runs.Trained:
    """Return the trained network of a run, trained or resumed first where it is not finished; runs that start together train it once.

    Args:
      run: from `loop.make_run`; its directory is claimed. title: what messages call it. pool: training patches, where its method takes some.
      start: (`Weights`, running statistics) with which step 0 begins in place of random weights and calibrated quantizers.

    Raises:
      loop.PreemptedError: SIGTERM arrived first; what is trained so far is saved and the same call continues it.
      loop.NonFiniteLossError: its loss is no longer finite.
    """
    with contextlib.ExitStack() as held:
        with processes.together():
            if sharding.is_lead():
                runs.open_workdir(run.workdir, run.config)
                held.enter_context(files.exclusive(run.workdir / runs.LOCK_FILE, wait=True))
        if start is not None:
            _begin_with(run, *start)
        step = loop.train(_without_best(run), data, pool, label=f"{title}:", is_quiet=is_quiet)
    if step < run.num_steps:
        raise loop.PreemptedError(
            f"preempted: step {step} of {run.num_steps} of {title} is saved in {run.workdir}; the same command continues"
        )
    return runs.load_trained(run.workdir)


def _without_best(run):
    """Return a run that measures nothing at its checkpoints: the last one alone is asked for, and its config names folders as it is."""
    config = copy.deepcopy(run.config)
    config.train.keep_best = False
    return dataclasses.replace(run, config=config)


def _begin_with(run, weights, stats):
    """Give a new run a checkpoint of step 0 that the loop resumes from, its bit-widths ready to train."""
    with Checkpointer(run.workdir / loop.CHECKPOINTS) as checkpointer:
        if checkpointer.latest_step() is None:
            state = TrainState(jnp.int32(0), weights, stats, run.settings.optimizer.init(weights))
            checkpointer.save(0, state, {"stage": 0})


def request(config: ConfigDict, source_index: int, sizes_px: tuple[int, ...], num_patches: int) -> PoolRequest:
    """Return the request of a pool of this run's patch settings on one of its source networks."""
    patches = config.patches
    return PoolRequest(
        source=source_name(config, source_index),
        num_patches=num_patches,
        sizes_px=tuple(sizes_px),
        families=tuple(patches.families),
        shape=patches.shape,
        num_classes=config_lib.num_classes(config),
        canvas_px=max(sizes_px),
        steps=patches.steps,
        batch_images=patches.batch_images,
        source_images=patches.source_images,
        rotation_deg=patches.rotation_deg,
        scale_jitter=patches.scale_jitter,
        seed=config.seed,
    )


def train_pool(config: ConfigDict, data) -> PatchPool:
    """Return the pool of the run, seen sizes, made on source network 0; its last quarter is held out from training."""
    wanted = request(config, 0, tuple(config.patches.sizes_px), config.patches.pool_size)
    return _get(config, wanted, 0, data)


def eval_pools(config: ConfigDict, data) -> dict[str, PatchPool]:
    """Return the pools that evaluation meets, by name: held-out patches of the run's pool, patches of the other source, unseen sizes."""
    number = config.patches.eval_pool_size
    pools = {"held-out": train_pool(config, data).split()[1]}
    pools["other source"] = _get(config, request(config, 1, tuple(config.patches.sizes_px), number), 1, data)
    for size in config.patches.unseen_sizes_px:
        pools[f"unseen size {size} px"] = _get(config, request(config, 1, (size,), number), 1, data)
    return pools


def _get(config, wanted, source_index, data):
    def build_source():
        trained = train_source(config, source_index, data)
        sizes = "/".join(map(str, wanted.sizes_px))
        processes.say(f"making {wanted.num_patches} patches of {sizes} px", file=sys.stderr)
        images, labels = training_images(data, config.patches.source_images)
        logits_fn = trained.logits_fn(trained.network.bits[0])
        return spread.by_rows(logits_fn, mesh=sharding.data_mesh()), images, labels

    return patch_pool.get(wanted, config.patches.shared_dir, build_source)


def training_images(data, num_images):
    """Return the first training images, unaugmented: (float32 `[N, H, W, 3]` in [0, 1], labels int32 `[N]`)."""
    num_images = min(num_images, data.num_train)
    batch = next(iter(data.eval_batches("train", num_images)))
    return loop.unit_range(jnp.asarray(batch["images"])), jnp.asarray(batch["labels"])
