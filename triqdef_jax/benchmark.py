"""Measure what a training step costs: `python -m triqdef_jax.benchmark --config=FILE[:variant] [--out=FILE]`.

Three steps, in one interleaved run: `method`, the config's own; `clean`, quantization-aware training of the same
bit-widths on clean images; `plain`, the same on 4 bits alone. Random images and patches stand for the data set. Every
round takes one step of each, so that a busy machine disturbs all alike; quote ratios from one pinned core
(`taskset -c 0`). Prints a table and writes all figures as JSON. Nothing is trained.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from triqdef_jax import config as config_lib
from triqdef_jax import entry, files, loop, patches, sharding, train_step
from triqdef_jax.objectives.methods import Pool
from triqdef_jax.objectives.penalties import INPUT_GRADIENT

SUBJECTS = ("step",)
PLANS = ("per_bit", "fused")
KINDS = ("method", "clean", "plain")
PLAIN_BITS = 4  # The step that all others are compared with quantizes to this bit-width alone.
NUM_WARMUP_STEPS = 2  # The first compiles, the second still meets cold memory.
STEPS_PER_RUN = 1000  # Length of the run that the schedules are made for; no figure depends on it.
SPREAD, SCALE = np.float32(0.1), np.float32(0.05)  # Of the random weights and of all quantizers: every code occurs.
MIB = 2**20


@dataclasses.dataclass
class Cost:
    """Seconds on the clock, and of processor time summed over all threads."""

    wall: float = 0.0
    cpu: float = 0.0

    def add(self, function: Callable, *args) -> Any:
        """Call the function, add what it took, and return its result once the device has finished it."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(function(*args))
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return result


class Piece:
    """A jitted function, compiled when first called, that remembers what this took and what the program needs.

    Args:
      jitted: as `jax.jit` returns it; called with arguments of one set of shapes only.
      static_argnums: places of its static arguments.
    """

    def __init__(self, jitted: Callable, *, static_argnums: tuple[int, ...] = ()):
        self._jitted, self._static = jitted, static_argnums
        self.compiled = None
        self.calls = 0
        self.costs = {"trace": Cost(), "lower": Cost(), "compile": Cost()}

    def __call__(self, *args):
        if self.compiled is None:
            jax.block_until_ready(args)  # else earlier programs, still running, would count as compilation
            traced = self.costs["trace"].add(lambda: self._jitted.trace(*args))
            lowered = self.costs["lower"].add(traced.lower)
            self.compiled = self.costs["compile"].add(lowered.compile)
        self.calls += 1
        return self.compiled(*(arg for place, arg in enumerate(args) if place not in self._static))

    @property
    def flops(self) -> float | None:
        """Floating-point operations of one call as the compiler counts them; None where it does not."""
        analysis = self.compiled.cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) and analysis else analysis
        return analysis.get("flops") if analysis else None

    def mib(self, part: str) -> float | None:
        """MiB of 'argument', 'output', 'temp' or 'alias' of one call; None where the compiler does not say."""
        analysis = self.compiled.memory_analysis()
        return None if analysis is None else getattr(analysis, f"{part}_size_in_bytes") / MIB

    def report(self, num_steps: int) -> dict:
        """Return calls per step, and GFLOPs, CPU seconds of the stages of compilation and MiB of one call."""
        costs = {f"{name}_cpu_seconds": cost.cpu for name, cost in self.costs.items()}
        memory = {f"{part}_mib": self.mib(part) for part in ("argument", "output", "temp")}
        return {"calls": self.calls / num_steps, "gflops": _scaled(self.flops, 1e-9), **costs, **memory}


class Stepper:
    """One kind of step under one plan, ready to be taken again and again.

    Args:
      config: validated config of the run. plan: 'per_bit' (on one device) or 'fused' (on all devices).

    Attributes:
      pieces: compiled programs by name. bits: bit-widths of every step. seconds: a `Cost` per timed step.
      num_taken: steps so far, untimed ones included.
    """

    def __init__(self, config, plan: str):
        self.config, self.plan = config.copy_and_resolve_references(), plan
        self.config.train.plan = plan
        with entry.user_errors():
            num_images = STEPS_PER_RUN * config.train.batch_size
            self.run = loop.make_run(self.config, "", num_images, num_devices=1 if plan == "per_bit" else None)
        network, everywhere = self.run.network, sharding.replicated(self.run.mesh)
        self.bits = network.bits
        self.slots, self.specs = [network.slot(b) for b in self.bits], [network.spec(b) for b in self.bits]
        self.images, self.labels = random_batch(config, sharding.batch_sharding(self.run.mesh))
        self.pool = jax.device_put(random_pool(config), everywhere) if self.run.method.needs_pool else None
        self.state = jax.device_put(random_state(self.run), everywhere)
        self.key = jax.device_put(jax.random.key(config.seed), everywhere)
        self._step, self.pieces = make_step(self.run, plan)
        self.seconds, self.num_taken = [], 0

    def take(self) -> None:
        """Take one step, input patches included; it changes the state as training would."""
        key = jax.random.fold_in(self.key, self.num_taken)
        logits_fn = None
        if self.run.method.needs_logits:
            logits_fn = loop.drawn_bit_logits(
                self.run.network, self.state.weights, self.state.stats, self.slots, self.specs
            )
        images = loop.unit_range(self.images)
        inputs = self.run.method.make_inputs(key, self.pool, images, self.labels, logits_fn)
        self.state, _ = jax.block_until_ready(
            self._step(self.state, inputs, self.bits, self.slots, self.specs, np.float32(1.0))
        )
        self.num_taken += 1

    def take_timed(self) -> None:
        self.seconds.append(Cost())
        self.seconds[-1].add(self.take)


def make_step(run, plan: str):
    """Return (step, pieces by name): the step of `train_step.make_step`, every program of it a `Piece`."""
    if plan == "fused":
        step = Piece(train_step.make_step(run.settings, plan=plan, mesh=run.mesh), static_argnums=(2,))
        return step, {"step": step}
    pieces = train_step.make_pieces(run.settings, lambda piece, **options: Piece(train_step.jit(piece, **options)))

    def step(*args):
        return train_step.run_step(run.settings, pieces, *args)

    return step, pieces._asdict()


def random_state(run):
    """Return a `TrainState` of NumPy noise, one scale for all quantizers; compiling `init_state` would take 12 s."""
    shapes = jax.eval_shape(functools.partial(loop.init_state, run))
    rng = np.random.default_rng(run.config.seed)
    filled = lambda tree, value: jax.tree.map(lambda x: np.full(x.shape, value, x.dtype), tree)
    weights = filled(shapes.weights, 1.0)._replace(
        params=jax.tree.map(lambda x: SPREAD * rng.standard_normal(x.shape, x.dtype), shapes.weights.params),
        scales=filled(shapes.weights.scales, SCALE),
    )
    zeros = filled(shapes, 0)
    return zeros._replace(weights=weights, stats=filled(shapes.stats, 1.0))


def random_batch(config, placement):
    """Return (images uint8 `[B, H, W, 3]`, labels int32 `[B]`) of the config's shapes on the devices."""
    rng, size = np.random.default_rng(config.seed), config_lib.image_size_px(config)
    images = rng.integers(0, 256, (config.train.batch_size, size, size, 3), np.uint8)
    labels = rng.integers(0, config_lib.num_classes(config), config.train.batch_size, np.int32)
    return jax.device_put((images, labels), placement)


def random_pool(config):
    """Return a `methods.Pool` of noise in the sizes and the number that training would draw from."""
    sizes = np.resize(np.array(config.patches.sizes_px, np.int32), config.patches.pool_size)
    canvas = int(sizes.max())
    values = np.random.default_rng(config.seed).random((len(sizes), canvas, canvas, 3), np.float32)
    masks = np.stack([patches.make_mask(int(size), canvas, config.patches.shape) for size in sizes])
    return Pool(values, masks, sizes)


def variants(config) -> dict:
    """Return the config of each kind of step by its name, in the order of `KINDS`."""
    return {
        "method": config,
        "clean": _changed(config, method="qat", bits=tuple(config.quant.bits)),
        "plain": _changed(config, method="qat", bits=(PLAIN_BITS,)),
    }


def _changed(config, *, method, bits):
    changed = config.copy_and_resolve_references()
    changed.loss.method, changed.quant.bits = method, bits
    changed.bact.enabled = False
    return changed


def floor_passes(config) -> float:
    """Return the forward passes per clean image below which no step of this config can go.

    A clean image costs 3 per bit-width (forward, input gradient, weight gradient), a patched one too, and 6 where its
    input gradient is differentiated again. Attacks that make the inputs are left out.
    """
    method = config_lib.make_training_method(config)
    is_patched = method.needs_pool or method.needs_logits
    per_patched = 6 if INPUT_GRADIENT in method.map_layers else 3
    return len(config.quant.bits) * (3 + is_patched * config.loss.patched_frac * per_patched)


def measure(config, *, plans: tuple[str, ...] = PLANS, rounds: int = 5) -> dict:
    """Take the three steps under each plan, interleaved, and return all figures as plain numbers.

    Args:
      config: validated config. plans: some of `PLANS`. rounds: timed steps of each kind and plan.

    Returns:
      The run's description and `plans`: plan -> kind -> figures, as `summarize` makes them.

    Raises:
      ValueError: an unknown plan, or no round.
    """
    unknown = [plan for plan in plans if plan not in PLANS]
    if unknown or not plans:
        raise ValueError(f"--plans must name some of {', '.join(PLANS)}, got {','.join(plans) or 'none'}")
    if rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {rounds}")
    steppers = {(plan, kind): Stepper(variant, plan) for plan in plans for kind, variant in variants(config).items()}
    for stepper in steppers.values():
        for _ in range(NUM_WARMUP_STEPS):
            stepper.take()
    for _ in range(rounds):
        for stepper in steppers.values():
            stepper.take_timed()
    figures = {plan: {k: summarize(steppers[plan, k], steppers[plan, "plain"]) for k in KINDS} for plan in plans}
    return {**describe(config), "rounds": rounds, "plans": figures}


def describe(config) -> dict:
    """Return what was measured and on what: network, data shape, batch, bit-widths, device, cores, versions."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "method": config.loss.method,
        "model": config.model.name,
        "image_size_px": config_lib.image_size_px(config),
        "batch_size": config.train.batch_size,
        "patched_frac": config.loss.patched_frac,
        "bits": list(config.quant.bits),
        "plain_bits": PLAIN_BITS,
        "backend": device.platform,
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "cores": cores,
        "jax": jax.__version__,
    }


def summarize(stepper: Stepper, plain: Stepper) -> dict:
    """Return one kind's figures: seconds, ratios to the plain step of the same round, compilation, FLOPs, memory."""
    pairs = list(zip(stepper.seconds, plain.seconds, strict=True))
    wall_seconds = [mine.wall for mine, _ in pairs]
    gflops, plain_gflops = (_total(s, lambda piece: _scaled(piece.flops, 1e-9)) for s in (stepper, plain))
    return {
        "bits": list(stepper.bits),
        "wall_seconds": spread(wall_seconds),
        "cpu_seconds": spread([mine.cpu for mine, _ in pairs]),
        "wall_ratio": spread([mine.wall / other.wall for mine, other in pairs]),
        "cpu_ratio": spread([mine.cpu / other.cpu for mine, other in pairs]),
        "floor_ratio": floor_passes(stepper.config) / floor_passes(plain.config),
        "flops_ratio": gflops / plain_gflops if gflops and plain_gflops else None,
        "gflops": gflops,
        "images_per_second": stepper.config.train.batch_size / statistics.median(wall_seconds),
        **{f"{name}_cpu_seconds": _staged(stepper, name, "cpu") for name in ("trace", "lower", "compile")},
        **{f"{name}_wall_seconds": _staged(stepper, name, "wall") for name in ("trace", "lower", "compile")},
        "residual_mib": _residual_mib(stepper),
        "peak_mib": _peak_mib(stepper),
        "pieces": {name: piece.report(stepper.num_taken) for name, piece in _used(stepper).items()},
    }


def spread(values: list[float]) -> dict:
    """Return median, smallest and largest of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _used(stepper):
    return {name: piece for name, piece in stepper.pieces.items() if piece.calls}


def _scaled(value, factor):
    return None if value is None else value * factor


def _total(stepper, value_of):
    """Sum a figure over the calls of one step; None where a piece does not know it."""
    values = [(value_of(piece), piece.calls / stepper.num_taken) for piece in _used(stepper).values()]
    return None if any(value is None for value, _ in values) else sum(value * calls for value, calls in values)


def _staged(stepper, name, clock):
    return sum(getattr(piece.costs[name], clock) for piece in _used(stepper).values())


def _residual_mib(stepper):
    """MiB that the per-bit plan keeps from its forwards to its backwards, all bit-widths; None under the fused plan."""
    if stepper.plan == "fused":
        return None
    return _scaled(stepper.pieces["forward"].mib("output"), len(stepper.bits))


def _peak_mib(stepper):
    """MiB at the largest moment by the compiler's account: what is kept between programs, and the hungriest one."""
    pieces = _used(stepper)
    if any(piece.mib("temp") is None for piece in pieces.values()):
        return None
    if stepper.plan == "fused":
        step = pieces["step"]
        return step.mib("argument") + step.mib("output") + step.mib("temp") - step.mib("alias")
    kept = pieces["forward"].mib("argument") + _residual_mib(stepper)
    others = [piece.mib("temp") + piece.mib("output") for name, piece in pieces.items() if name != "forward"]
    return kept + max(pieces["forward"].mib("temp"), *others)


def format_table(figures: dict) -> str:
    """Return the figures as lines of text, seconds and ratios as median (smallest..largest)."""
    bits = "/".join(map(str, figures["bits"]))
    lines = [
        f"{figures['model']}, {figures['image_size_px']} px, batch {figures['batch_size']}, bits {bits}, rho "
        f"{figures['patched_frac']}, method {figures['method']}; {figures['num_devices']} x {figures['device']}, "
        f"{figures['cores']} cores, jax {figures['jax']}; {figures['rounds']} interleaved rounds",
        f"{'plan':8}{'step':8}{'wall s':>22}{'cpu s':>22}{'x plain (cpu)':>22}{'floor':>7}{'x flops':>9}"
        f"{'images/s':>10}{'trace':>7}{'compile':>9}{'peak MiB':>10}",
    ]
    for plan, kinds in figures["plans"].items():
        for kind, row in kinds.items():
            times = "".join(f"{_spread_text(row[name]):>22}" for name in ("wall_seconds", "cpu_seconds", "cpu_ratio"))
            tracing = row["trace_cpu_seconds"] + row["lower_cpu_seconds"]
            lines.append(
                f"{plan:8}{kind:8}{times}{row['floor_ratio']:7.1f}{_number(row['flops_ratio'], 9, 1)}"
                f"{row['images_per_second']:10.1f}{tracing:7.1f}{row['compile_cpu_seconds']:9.1f}"
                f"{_number(row['peak_mib'], 10, 0)}"
            )
    lines.append("trace (with lowering) and compile in CPU seconds; compare ratios on one pinned core only")
    return "\n".join(lines)


def _spread_text(values):
    return f"{values['median']:.3f} ({values['min']:.3f}..{values['max']:.3f})"


def _number(value, width, digits):
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def main(argv):
    del argv

    with entry.user_errors():
        if _WHAT.value not in SUBJECTS:
            raise ValueError(f"--what must be one of {', '.join(SUBJECTS)}, got {_WHAT.value!r}")
        if _WORKDIR.value:
            raise ValueError("a benchmark has no --workdir; name a file for its figures with --out")
        for variant in variants(_CONFIG.value).values():
            config_lib.validate(variant)

    jax.config.update("jax_enable_compilation_cache", False)  # what another run compiled must not count as free
    with entry.user_errors():
        figures = measure(_CONFIG.value, plans=tuple(_PLANS.value), rounds=_ROUNDS.value)
    print(format_table(figures))
    if _OUT.value:
        with entry.user_errors():
            files.atomic_write_json(_OUT.value, figures)
        print(f"written: {_OUT.value}")
    return 0


if __name__ == "__main__":
    _CONFIG, _WORKDIR = entry.define_config_flags(default="configs/digits.py")
    _OUT = flags.DEFINE_string("out", None, "JSON file for the figures; by default they are printed only.")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each kind.")
    _PLANS = flags.DEFINE_list("plans", "per_bit,fused", "Compilation plans to measure: per_bit, fused.")
    _WHAT = flags.DEFINE_string("what", "step", "What to measure: step.")
    entry.run_program(main)
