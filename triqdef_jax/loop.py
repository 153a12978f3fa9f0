"""The training loop: stages, calibration, steps, metrics, checkpoints, preemption. One call trains one run to its end.

The host only dispatches: it waits for the device to log, to save and at stage ends. The state after step s is a function of (config, s), so a
run that is killed resumes bit-identically on the same devices. What a step computes is in `train_step.py`.
"""

import contextlib
import dataclasses
import functools
import pathlib
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from triqdef_jax import (
    ahead,
    calibration,
    curriculum,
    metric_window,
    optimizer,
    processes,
    profiling,
    selection,
    sharding,
)
from triqdef_jax import config as config_lib
from triqdef_jax.checkpoints import Checkpointer
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.objectives.methods import Method, Pool
from triqdef_jax.patch_pool import PatchPool
from triqdef_jax.train_step import CarryingState, StepSettings, TrainState, make_step
from triqdef_jax.writer import MetricWriter, Progress

CHECKPOINTS, PROFILE = "checkpoints", "profile"
FUSED_FROM_STEPS = 5000  # On one CPU the fused plan's longer compilation pays only in longer runs.
NUM_CHANNELS = 3  # of all images


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the message names the step and the last good checkpoint."""


class PreemptedError(RuntimeError):
    """SIGTERM ended the training of something that the caller cannot do without; its state is saved."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The static parts of one training run."""

    config: ConfigDict
    workdir: pathlib.Path
    network: MultiBitNetwork
    method: Method
    stages: tuple[curriculum.Stage, ...]
    num_steps: int
    settings: StepSettings
    schedule: Any
    mesh: Any

    @property
    def plan(self) -> str:
        if self.config.train.plan != "auto":
            return self.config.train.plan
        if jax.default_backend() != "cpu" or self.mesh.size > 1:
            return "fused"
        # On CPU one program runs its bit-widths side by side: remat saves memory only between programs.
        return "per_bit" if self.num_steps < FUSED_FROM_STEPS or self.config.train.remat else "fused"

    @property
    def forward_equivalents(self) -> float:
        """What the whole run costs in forward passes of one image (`Method.cost`): the budget beside the epochs, calibration left out."""
        steps = [(stage.stop - stage.start) * self.method.cost(len(stage.bits)) for stage in self.stages]
        return self.config.train.batch_size * sum(steps)


def make_run(config: ConfigDict, workdir, num_train: int, *, num_devices: int | None = None) -> Run:
    """Assemble a run.

    Raises:
      ValueError: the batch does not divide among the devices, is larger than the data, or the plan does not fit the devices.
    """
    mesh = sharding.data_mesh(num_devices)
    batch_size = config.train.batch_size
    if batch_size > num_train:
        raise ValueError(f"train.batch_size must be at most the {num_train} training images, got {batch_size}")
    num_parts = config.train.accumulate_steps
    sharding.check_batch(batch_size // num_parts, mesh)
    network, method = config_lib.make_network(config), config_lib.make_training_method(config)
    if method.patched_frac:
        sharding.check_batch(round(batch_size * method.patched_frac) // num_parts, mesh)
    if config.train.plan == "per_bit" and mesh.size > 1:
        raise ValueError(f"train.plan=per_bit runs on one device, {mesh.size} are in use; use fused or auto")
    steps_per_epoch = num_train // batch_size
    num_steps = steps_per_epoch * config.train.epochs
    schedule = optimizer.make_schedule(config.optim, num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    settings = StepSettings(
        network=network,
        method=method,
        optimizer=optimizer.make_optimizer(config.optim, schedule),
        map_reduction=config.loss.map_reduction,
        pooled_stats=config.quant.norm_stats == "pooled",
        accumulate_steps=num_parts,
        remat=config.train.remat,
    )
    stages = curriculum.make_stages(network.bits, num_steps, tuple(config.bact.starts), enabled=config.bact.enabled)
    return Run(config, pathlib.Path(workdir), network, method, stages, num_steps, settings, schedule, mesh)


def init_state(run: Run) -> TrainState | CarryingState:
    """Return the state before the first step: a function of the seed alone."""
    key = stream_key(run.config.seed, "init")
    weights, stats = run.network.init(key, config_lib.image_size_px(run.config))
    state = TrainState(jnp.int32(0), weights, stats, run.settings.optimizer.init(weights))
    if run.method.init_extra is None:
        return state
    return CarryingState(*state, run.method.init_extra(stream_key(run.config.seed, "extra"), NUM_CHANNELS))


def stream_key(seed: int, name: str) -> jax.Array:
    """Return the root key of one named stream of randomness."""
    return jax.random.fold_in(jax.random.key(seed), _stream(name))


def _stream(name):
    return zlib.crc32(name.encode())


def active_bits(run: Run, stage: curriculum.Stage, step: int) -> tuple[int, ...]:
    """Return the bit-widths that run in a step of a stage: all of its own, or those that the method draws from (seed, step)."""
    if run.method.active_bits is None:
        return stage.bits
    return run.method.active_bits((run.config.seed, _stream("bits"), step), stage.bits)


def train(
    run: Run,
    data,
    pool: PatchPool | None,
    *,
    label: str = "",
    is_quiet: bool = False,
    profile_steps: range = range(0),
) -> int:
    """Train to the end, or to the step at which SIGTERM arrives; returns the number of finished steps.

    Args:
      run: from `make_run`. data: `data.ImageData` or `data.StreamData`. pool: training patches, or None where the method takes none.
      label: what to call the run in the progress line. is_quiet: no progress at all. profile_steps: steps, counted from 1, to trace.

    Raises:
      NonFiniteLossError: the loss is no longer finite. checkpoints.CheckpointError: checkpoints of this run can be neither read nor written.
    """
    is_lead = sharding.is_lead()
    kept = dict(keep=run.config.train.keep_checkpoints, keep_best=run.config.train.keep_best)
    with Checkpointer(run.workdir / CHECKPOINTS, **kept) as checkpointer:
        state, stage_done = _restore_or_init(run, checkpointer)
        start = int(state.step)
        if start >= run.num_steps:
            return start
        with (
            MetricWriter(run.workdir, restored_step=start, is_lead=is_lead) as writer,
            Progress(
                run.num_steps, run.config.train.batch_size, start_step=start, is_lead=is_lead and not is_quiet
            ) as progress,
            processes.Preemption() as preemption,
        ):
            trainer = _Trainer(run, data, pool, checkpointer, writer, progress, preemption, label, profile_steps)
            return trainer.fit(state, start, stage_done)


def _restore_or_init(run, checkpointer):
    """Return (state on the devices of the run, index of the last stage whose bit-widths are calibrated)."""
    everywhere = sharding.replicated(run.mesh)
    if checkpointer.latest_step() is None:
        return sharding.replicate(init_state(run), run.mesh), -1
    shapes = jax.eval_shape(functools.partial(init_state, run))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    state, meta = checkpointer.restore(abstract)
    return state, meta["stage"]


class _Trainer:
    """Runs the stages of one run; holds what the steps have in common."""

    def __init__(self, run, data, pool, checkpointer, writer, progress, preemption, label, profile_steps):
        self.run, self.data, self.label = run, data, label
        self.checkpointer, self.writer, self.progress, self.preemption = checkpointer, writer, progress, preemption
        self.compiler, self.trace = ahead.Compiler(), profiling.StepTrace(run.workdir / PROFILE, profile_steps)
        self.step_fn = make_step(run.settings, plan=run.plan, mesh=run.mesh, compile_piece=self.compiler.jit)
        place = functools.partial(sharding.replicate, mesh=run.mesh)
        self.pool = None if pool is None else place(Pool(pool.values, pool.masks, pool.size_px))
        self.judge = selection.make_judge(run.config, run.network, run.mesh, data, self.pool)
        self.input_key = place(stream_key(run.config.seed, "inputs"))

    def fit(self, state, step, stage_done):
        batches = self.data.train_batches(
            seed=self.run.config.seed,
            batch_size=self.run.config.train.batch_size,
            start_step=step,
            sharding=sharding.batch_sharding(self.run.mesh),
        )
        with contextlib.closing(self.compiler), contextlib.closing(self.trace):
            for index, stage in enumerate(self.run.stages):
                if step >= stage.stop:
                    continue
                if stage_done < index:
                    state = self._enter(state, stage)
                    self.checkpointer.save(step, state, {"stage": index})
                state, step = self._run_stage(state, step, index, batches)
                if step < stage.stop:  # preempted; where that is at a stage's end, entering the next one saves
                    break
            self.checkpointer.wait()
        return step

    def _enter(self, state, stage):
        """Calibrate the bit-widths that join with this stage."""
        config = self.run.config
        place = functools.partial(sharding.replicate, mesh=self.run.mesh)
        images = unit_range(place(self.data.heldout.images[: config.data.calibration_images]))
        weights, stats = calibration.calibrate_new_bits(
            self.run.network, state.weights, state.stats, stage.new_bits, stage.bits, images, affine=config.bact.affine
        )
        return state._replace(weights=place(weights), stats=place(stats))

    def _run_stage(self, state, step, index, batches):
        run, stage, train = self.run, self.run.stages[index], self.run.config.train
        is_last = index == len(run.stages) - 1
        place, first = self._place(index), step
        window, is_leaving = None, self.preemption.is_due()
        while step < stage.stop and not is_leaving:
            state, metrics = self.trace.step(step + 1, self._step, state, step, stage, place, next(batches))
            if step == first:
                self._prepare(index + 1)
            step += 1
            window = metric_window.add(window, metrics, step)
            is_leaving = self.preemption.is_due()  # asked once per step, so that the step that leaves also saves
            is_end = step == stage.stop or is_leaving
            is_saved = step % train.checkpoint_every_steps == 0 and step != stage.stop
            # Not where the run is only interrupted: the best checkpoint must not depend on that.
            is_judged = is_last and (is_saved or step == stage.stop)
            judged = self.judge(state.weights, state.stats) if is_judged else {}
            if is_end or is_saved or step % train.log_every_steps == 0:
                self._log(window, step, stage, judged)
                window = None
            if is_saved or (is_end and (is_last or step != stage.stop)):
                self.checkpointer.save(step, state, {"stage": index} | selection.score_entry(judged))
        return state, step

    def _place(self, index):
        """Return (slot, spec) of a stage's bit-widths, on the devices once: 130 scalars from the host cost each step 4 ms with 8 devices."""
        network, stages = self.run.network, self.run.stages
        round_bias = self.run.config.quant.round_bias and index == len(stages) - 1
        place = {bits: (network.slot(bits), network.spec(bits, round_bias=round_bias)) for bits in stages[index].bits}
        return sharding.replicate(place, self.run.mesh)

    def _step(self, state, step, stage, place, batch):
        """Dispatch one step; returns (state, metrics)."""
        run, bits = self.run, active_bits(self.run, stage, step)
        slots, specs = map(list, zip(*(place[b] for b in bits), strict=True))
        key, images = jax.random.fold_in(self.input_key, step), unit_range(batch["images"])
        state, inputs = make_inputs(run, self.pool, key, state, slots, specs, images, batch["labels"])
        state, metrics = self.step_fn(state, inputs, bits, slots, specs, self._ramp(step))
        if run.method.active_bits is not None:
            metrics = metric_window.spread(
                metrics, np.array([stage.bits.index(b) for b in bits], np.int32), len(stage.bits)
            )
        return state, metrics

    def _prepare(self, index):
        """Have the program of a later stage compiled; where bit-widths are drawn, the next set is not known."""
        run = self.run
        if run.config.train.compile_ahead and index < len(run.stages) and run.method.active_bits is None:
            slots, specs = map(list, zip(*self._place(index).values(), strict=True))
            self.compiler.prepare(run.stages[index].bits, slots, specs)

    def _ramp(self, step):
        warmup_steps = int(self.run.config.loss.penalty_warmup_frac * self.run.num_steps)
        return np.float32(curriculum.penalty_ramp(step, warmup_steps=warmup_steps))

    def _log(self, window, step, stage, judged):
        sums, count, first_bad = jax.device_get(window)
        if first_bad != metric_window.NEVER:
            saved = self.checkpointer.latest_step()
            raise NonFiniteLossError(
                f"the loss or its gradient is not finite at step {first_bad}; the last good checkpoint is step {saved} in "
                f"{self.run.workdir / CHECKPOINTS}; lower optim.lr or the lambdas, or set optim.clip_norm"
            )
        scalars = metric_window.name_scalars(metric_window.means(sums, count), stage.bits) | judged
        scalars["learning_rate"] = float(self.run.schedule(step - 1))
        self.writer.write(step, scalars)
        bits = "/".join(map(str, stage.bits))
        self.progress.update(
            step, {"loss": scalars["loss"], "penalty": scalars["penalty"]}, f"{self.label} bits {bits}".strip()
        )


def make_inputs(run: Run, pool: Pool | None, key, state, slots, specs, images, labels):
    """Make the inputs of one step as the run's method does.

    Args:
      pool: training patches on the devices, or None. key: of this step. slots, specs: of the bit-widths that run, and may be attacked.
      images: float32 `[B, H, W, 3]` in [0, 1], labels: int32 `[B]`, the clean batch.

    Returns:
      (state, with what the method's extra state has become, `Inputs`).
    """
    logits_fn, method = None, run.method
    if method.needs_logits:
        logits_fn = drawn_bit_logits(run.network, state.weights, state.stats, slots, specs)
    if method.init_extra is None:
        return state, method.make_inputs(key, pool, images, labels, logits_fn)
    inputs = method.make_inputs(key, state.extra, images, labels, logits_fn)
    extra = sharding.replicate(inputs.extra, run.mesh)
    return state._replace(extra=extra), inputs._replace(extra=())


def bit_logits(network, weights, stats, bits, spec):
    """Return images `[B, H, W, 3]` -> logits of one trained bit-width in evaluation mode, arrays as arguments of any jit."""
    return jax.tree_util.Partial(_eval_logits(network), weights, stats, network.slot(bits), spec)


def drawn_bit_logits(network, weights, stats, slots, specs):
    """Return (key, images) -> logits in evaluation mode of one of the given bit-widths, drawn uniformly by the key."""
    return jax.tree_util.Partial(_drawn_logits(network), weights, stats, slots, specs)


@functools.cache
def _drawn_logits(network):
    def logits(weights, stats, slots, specs, key, images):
        drawn = jax.random.randint(key, (), 0, len(slots))
        slot, spec = (jax.tree.map(lambda *x: jnp.stack(x)[drawn], *items) for items in (slots, specs))
        return network.eval_forward(weights, stats, slot, spec, images)[0]

    return logits


@functools.cache
def _eval_logits(network):
    return lambda weights, stats, slot, spec, images: network.eval_forward(weights, stats, slot, spec, images)[0]


@jax.jit
def unit_range(images: jax.Array) -> jax.Array:
    """Return uint8 images as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255.0
