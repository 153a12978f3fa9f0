"""Measure what steps cost: `python -m triqdef_jax.benchmark --config=FILE[:variant] [--what=WHAT]`.

`--what=data`: the input alone. ImageNet: images per second of the pipeline and of decoding and cropping alone; the others: a batch
beside a training step.
`--what=deploy`: bytes and ms of the integer ONNX file of each bit-width beside float32 and onnxruntime's own static quantization.
`--what=defenses`: ms per image behind each defence at inference, and of the bare network.
`--what=scaling`: collectives and memory of the fused step on `--devices` virtual devices, beside the model's; nothing runs.
`--what=attacks`: patch steps per second of the universal attack, ten targets in one program, against forward and
backward passes of the same network to as many images. `--what=step`: three training steps in one interleaved run,
`method`, the config's own; `clean`, quantization-aware training of the same bit-widths on clean images; `plain`, the
same on 4 bits alone. Random images and patches stand for the data set. Every round takes one step of each, so that a
busy machine disturbs all alike; quote ratios from one pinned core (`taskset -c 0`). Prints a table and writes all
figures as JSON. Nothing is trained.
"""

import functools
import statistics

import jax
import numpy as np
from absl import flags

from triqdef_jax import (
    attack_cost,
    data_cost,
    entry,
    files,
    latency,
    loop,
    quantize,
    scaling,
    sharding,
    stand_ins,
    train_step,
)
from triqdef_jax import config as config_lib
from triqdef_jax.shipping import speed
from triqdef_jax.timing import Cost, Piece, check_rounds, number_text, scaled, spread, spread_text

PLANS = ("per_bit", "fused")
KINDS = ("method", "clean", "plain")
PLAIN_BITS = 4  # The step that all others are compared with quantizes to this bit-width alone.
NUM_WARMUP_STEPS = 2  # The first compiles, the second still meets cold memory.
NUM_CALIBRATION = 16  # images of noise that calibrate an exported network


class Stepper:
    """One kind of step under one plan, ready to be taken again and again.

    Args:
      config: validated config of the run. plan: 'per_bit' (on one device) or 'fused' (on all devices).

    Attributes:
      pieces: compiled programs by name. bits: bit-widths of every step, one where the method draws one. seconds: a `Cost` per timed step.
      num_taken: steps so far, untimed ones included.
    """

    def __init__(self, config, plan: str):
        self.config, self.plan = config.copy_and_resolve_references(), plan
        self.config.train.plan = plan
        with entry.user_errors():
            num_images = stand_ins.STEPS_PER_RUN * config.train.batch_size
            self.run = loop.make_run(self.config, "", num_images, num_devices=1 if plan == "per_bit" else None)
        network, everywhere = self.run.network, sharding.replicated(self.run.mesh)
        draws = self.run.method.active_bits is not None
        self.bits = network.bits[:1] if draws else network.bits
        self.slots, self.specs = [network.slot(b) for b in self.bits], [network.spec(b) for b in self.bits]
        self.images, self.labels = stand_ins.random_batch(config, sharding.batch_sharding(self.run.mesh))
        self.pool = jax.device_put(stand_ins.random_pool(config), everywhere) if self.run.method.needs_pool else None
        self.state = jax.device_put(stand_ins.random_state(self.run), everywhere)
        self.key = jax.device_put(jax.random.key(config.seed), everywhere)
        self._step, self.pieces = make_step(self.run, plan)
        self.seconds, self.num_taken = [], 0

    def take(self) -> None:
        """Take one step, input patches included; it changes the state as training would."""
        key = jax.random.fold_in(self.key, self.num_taken)
        images, at = loop.unit_range(self.images), (self.slots, self.specs)
        self.state, inputs = loop.make_inputs(self.run, self.pool, key, self.state, *at, images, self.labels)
        self.state, _ = jax.block_until_ready(
            self._step(self.state, inputs, self.bits, self.slots, self.specs, np.float32(1.0))
        )
        self.num_taken += 1

    def take_timed(self) -> None:
        self.seconds.append(Cost())
        self.seconds[-1].add(self.take)


def make_step(run, plan: str):
    """Return (step, pieces by name): the step of `train_step.make_step`, every program of it a `Piece`."""

    def compile_piece(piece, *, static_argnums=(), **options):
        jitted = train_step.jit(piece, static_argnums=static_argnums, **options)
        return Piece(jitted, static_argnums=static_argnums)

    step = train_step.make_step(run.settings, plan=plan, mesh=run.mesh, compile_piece=compile_piece)
    if isinstance(step, Piece):
        return step, {"step": step}
    return step, {name: piece for name, piece in step.args[1]._asdict().items() if isinstance(piece, Piece)}


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

    `Method.cost` without the attacks that make the inputs.
    """
    method = config_lib.make_training_method(config)
    return method.cost(len(config.quant.bits)) - method.patched_frac * method.attack_passes


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
    check_rounds(rounds)
    steppers = {(plan, kind): Stepper(variant, plan) for plan in plans for kind, variant in variants(config).items()}
    for stepper in steppers.values():
        for _ in range(NUM_WARMUP_STEPS):
            stepper.take()
    for _ in range(rounds):
        for stepper in steppers.values():
            stepper.take_timed()
    figures = {plan: {k: summarize(steppers[plan, k], steppers[plan, "plain"]) for k in KINDS} for plan in plans}
    return {**stand_ins.describe(config), "plain_bits": PLAIN_BITS, "rounds": rounds, "plans": figures}


def summarize(stepper: Stepper, plain: Stepper) -> dict:
    """Return one kind's figures: seconds, ratios to the plain step of the same round, compilation, FLOPs, memory."""
    pairs = list(zip(stepper.seconds, plain.seconds, strict=True))
    wall_seconds = [mine.wall for mine, _ in pairs]
    gflops, plain_gflops = (_total(s, lambda piece: scaled(piece.flops, 1e-9)) for s in (stepper, plain))
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


def _used(stepper):
    return {name: piece for name, piece in stepper.pieces.items() if piece.calls}


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
    return scaled(stepper.pieces["forward"].mib("output"), len(stepper.bits))


def _peak_mib(stepper):
    """MiB at the largest moment by the compiler's account: what is kept between programs, and the hungriest one."""
    pieces = _used(stepper)
    if any(piece.mib("temp") is None for piece in pieces.values()):
        return None
    if "step" in pieces:
        step = pieces["step"]
        return step.mib("argument") + step.mib("output") + step.mib("temp") - step.mib("alias")
    inner = "terms" if stepper.plan == "fused" else "forward"  # the program whose results are kept while others run
    kept = pieces[inner].mib("argument") + (_residual_mib(stepper) or pieces[inner].mib("output"))
    if "merge" in pieces:  # the whole batch, and the mean of the micro-batches before
        kept += pieces["split"].mib("argument") + pieces["merge"].mib("output")
    others = [piece.mib("temp") + piece.mib("output") for name, piece in pieces.items() if name != inner]
    return kept + max(pieces[inner].mib("temp"), *others)


def measure_defenses(config, *, rounds: int = 5) -> dict:
    """Time predictions of a random network behind each defence of `defenses` and alone; `latency` says how.

    Returns:
      The run's description; `defended_bits`, the bit-width; `ms_per_image` by defence and batch size.

    Raises:
      ValueError: no round.
    """
    check_rounds(rounds)
    bits, logits_fn, images, _ = stand_ins.random_network(config, max(latency.BATCHES))
    rows = latency.queries(logits_fn, images, max(config.patches.sizes_px))
    found = latency.measure(rows, images, rounds=rounds)
    return {**stand_ins.describe(config), "rounds": rounds, "defended_bits": bits, "ms_per_image": found}


def measure_deploy(config, *, rounds: int = 5) -> dict:
    """Measure exported files of an untrained network, calibrated on noise: `shipping.speed` says what is compared.

    Returns:
      The run's description; `onnx`: sizes, times and operators by bit-width below 32.

    Raises:
      ValueError: no round, or a network that cannot be deployed.
    """
    check_rounds(rounds)
    network, quant = config_lib.make_network(config), config.quant
    images = np.resize(
        stand_ins.random_batch(config, None)[0], (NUM_CALIBRATION, *(config_lib.image_size_px(config),) * 2, 3)
    )
    found = {
        bits: speed.of_untrained(network, bits, images, edge_bits=quant.edge_bits or bits, rounds=rounds)
        for bits in quant.bits
        if bits != quantize.FLOAT_BITS
    }
    return {**stand_ins.describe(config), "rounds": rounds, "onnx": found}


def measure_data(config, *, rounds: int = 5) -> dict:
    """Measure the input alone, beside the method's step where the set lies in memory; as `data_cost.measure`."""
    plan = "per_bit" if jax.device_count() == 1 else "fused"
    stepper = functools.cache(lambda: Stepper(config, plan))  # compiled where a step is asked for
    return data_cost.measure(config, lambda: stepper().take(), rounds=rounds)


def format_defenses(figures: dict) -> str:
    """Return the latencies as lines of text."""
    head = (
        f"{figures['model']}, {figures['image_size_px']} px, {figures['defended_bits']} bits; {figures['device']}, "
        f"{figures['cores']} cores, jax {figures['jax']}; {figures['rounds']} interleaved rounds"
    )
    return f"{head}\n{latency.text(figures['ms_per_image'])}"


def format_deploy(figures: dict) -> str:
    """Return the exported files' figures as lines of text."""
    head = (
        f"{figures['model']}, {figures['image_size_px']} px, untrained; onnxruntime on {figures['cores']} cores, "
        f"{figures['rounds']} interleaved rounds"
    )
    return "\n\n".join([head, *(f"{bits} bits\n{speed.table(**found)}" for bits, found in figures["onnx"].items())])


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
            times = "".join(f"{spread_text(row[name]):>22}" for name in ("wall_seconds", "cpu_seconds", "cpu_ratio"))
            tracing = row["trace_cpu_seconds"] + row["lower_cpu_seconds"]
            lines.append(
                f"{plan:8}{kind:8}{times}{row['floor_ratio']:7.1f}{number_text(row['flops_ratio'], 9, 1)}"
                f"{row['images_per_second']:10.1f}{tracing:7.1f}{row['compile_cpu_seconds']:9.1f}"
                f"{number_text(row['peak_mib'], 10, 0)}"
            )
    lines.append("trace (with lowering) and compile in CPU seconds; compare ratios on one pinned core only")
    return "\n".join(lines)


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
        measure_subject, format_figures = SUBJECTS[_WHAT.value]
        figures = measure_subject(_CONFIG.value, rounds=_ROUNDS.value)
    print(format_figures(figures))
    if _OUT.value:
        with entry.user_errors():
            files.atomic_write_json(_OUT.value, figures)
        print(f"written: {_OUT.value}")
    return 0


def _measure_step(config, *, rounds):
    return measure(config, plans=tuple(_PLANS.value), rounds=rounds)


def _measure_scaling(config, *, rounds):
    del rounds
    return scaling.measure(config, num_devices=_DEVICES.value)


SUBJECTS = {
    "step": (_measure_step, format_table),
    "attacks": (attack_cost.measure, attack_cost.text),
    "defenses": (measure_defenses, format_defenses),
    "deploy": (measure_deploy, format_deploy),
    "data": (measure_data, data_cost.text),
    "scaling": (_measure_scaling, scaling.text),
}

if __name__ == "__main__":
    _CONFIG, _WORKDIR = entry.define_config_flags(default="configs/digits.py")
    _OUT = flags.DEFINE_string("out", None, "JSON file for the figures; by default they are printed only.")
    _ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each kind.")
    _PLANS = flags.DEFINE_list("plans", "per_bit,fused", "Compilation plans to measure: per_bit, fused.")
    _WHAT = flags.DEFINE_string("what", "step", "What to measure: step, attacks, defenses, deploy, data or scaling.")
    _DEVICES = flags.DEFINE_integer("devices", 8, "Virtual devices of --what=scaling, for example 8, 64 or 256.")
    entry.run_program(main)
