"""What the fused step needs on many devices: collectives and memory of the compiled program, counted beside the model of `step_model`.

Nothing runs and no array is made: the step is compiled from shapes for virtual CPU devices, at any size. The partitioner that places the
collectives is that of all backends; what they do with them later (merging, overlapping) and their memory is their own.
"""

import dataclasses
import functools
import math
import time

import jax
import numpy as np

from triqdef_jax import collectives, loop, sharding, stand_ins, step_model, train_step
from triqdef_jax import config as config_lib
from triqdef_jax.objectives.methods import Inputs
from triqdef_jax.timing import MIB

MEMORY = ("argument", "output", "alias", "temp")


def use_virtual_devices(num_devices: int) -> None:
    """Make jax see so many CPU devices, whatever the machine has.

    Raises:
      ValueError: fewer than one, or jax has started its devices already.
    """
    if num_devices < 1:
        raise ValueError(f"--devices must be at least 1, got {num_devices}")
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError as error:
        raise ValueError(
            f"{num_devices} virtual devices need a process of their own: jax has started already"
        ) from error


def lower(run: loop.Run) -> jax.stages.Lowered:
    """Lower the fused step of the run, all bit-widths active, from shapes: the state replicated, the batch split by rows."""
    bits = active_bits(run)
    step = train_step.make_step(run.settings, plan="fused", mesh=run.mesh)
    slots, specs = [run.network.slot(b) for b in bits], [run.network.spec(b) for b in bits]
    return step.lower(state_shapes(run), input_shapes(run), bits, slots, specs, np.float32(1.0))


def active_bits(run: loop.Run) -> tuple[int, ...]:
    """Return the bit-widths of the last stage's steps, one where the method draws one."""
    return run.network.bits[:1] if run.method.active_bits else run.network.bits


def state_shapes(run: loop.Run):
    """Return the run's state as shapes that are replicated over its devices."""
    return _placed(jax.eval_shape(functools.partial(loop.init_state, run)), sharding.replicated(run.mesh))


def input_shapes(run: loop.Run) -> Inputs:
    """Return a step's inputs as shapes whose rows are split over the run's devices."""
    num_images, size = run.config.train.batch_size, config_lib.image_size_px(run.config)
    num_patched, place = round(num_images * run.method.patched_frac), sharding.batch_sharding(run.mesh)
    images = lambda num: jax.ShapeDtypeStruct((num, size, size, loop.NUM_CHANNELS), np.float32, sharding=place)
    labels = lambda num: jax.ShapeDtypeStruct((num,), np.int32, sharding=place)
    clean = (images(num_images), labels(num_images)) if run.method.uses_clean else (None, None)
    return Inputs(*clean, *((images(num_patched), labels(num_patched)) if num_patched else ()))


def _placed(shapes, place):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def lower_inputs(run: loop.Run) -> jax.stages.Lowered:
    """Lower what turns a batch of bytes and the pool into a step's inputs."""
    inputs, everywhere = input_shapes(run), sharding.replicated(run.mesh)
    pool = _placed(stand_ins.random_pool(run.config), everywhere) if run.method.needs_pool else None
    raw = jax.ShapeDtypeStruct(inputs.images.shape, np.uint8, sharding=inputs.images.sharding)
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), everywhere)
    make = lambda key, pool, raw, labels: run.method.make_inputs(key, pool, loop.unit_range(raw), labels, None)
    return train_step.jit(make).lower(key, pool, raw, inputs.labels)


def measure(config, *, num_devices: int) -> dict:
    """Compile the step for virtual devices and return what it sends and needs, counted and predicted, as plain numbers.

    Args:
      config: validated config, its batch over all devices. num_devices: virtual devices; sets jax up, so nothing may have used it.

    Returns:
      The run's description; `collectives` of the step and `input_collectives` of what makes its inputs, each kind's count and bytes; `memory` of
      one device in bytes; `gflops` and `gbytes_accessed` of one device, as the compiler counts them; `predicted`, see `predict`; the
      CPU seconds of compilation.

    Raises:
      ValueError: jax has started, the batch does not divide among the devices, or is cut into micro-batches.
    """
    if config.train.accumulate_steps > 1:
        raise ValueError(
            "--what=scaling compiles one micro-batch: set train.accumulate_steps=1 and train.batch_size to a micro-batch"
        )
    use_virtual_devices(num_devices)
    run = loop.make_run(config, "", stand_ins.STEPS_PER_RUN * config.train.batch_size)
    start = time.process_time()
    lowered = lower(run)
    is_lowered = time.process_time()
    compiled = lowered.compile({train_step.CPU_OPTION: 0})  # the code is never run
    is_compiled = time.process_time()
    analysis = compiled.memory_analysis()
    costs = compiled.cost_analysis()
    is_pooled = not run.method.needs_logits and run.method.init_extra is None
    return {
        **stand_ins.describe(config),
        "norm_group": config.model.norm_group,
        "active_bits": list(active_bits(run)),
        "images_per_device": config.train.batch_size // num_devices,
        "shardings": shardings(compiled),
        "collectives": _counted(compiled),
        "input_collectives": _counted(lower_inputs(run).compile()) if is_pooled else None,
        "memory": {part: getattr(analysis, f"{part}_size_in_bytes") for part in MEMORY},
        "gflops": costs["flops"] / 1e9,
        "gbytes_accessed": costs["bytes accessed"] / 1e9,
        "predicted": predict(run),
        "lower_cpu_seconds": is_lowered - start,
        "compile_cpu_seconds": is_compiled - is_lowered,
    }


def _counted(compiled):
    return collectives.summarize(collectives.find(compiled.as_text()))


def shardings(compiled: jax.stages.Compiled) -> dict[str, list[str]]:
    """Return the distinct shardings of the step's state and of its inputs, as the compiled program has them."""
    state, inputs = compiled.input_shardings[0][:2]
    distinct = lambda tree: sorted({str(leaf.spec) for leaf in jax.tree.leaves(tree)})
    return {"state": distinct(state), "inputs": distinct(inputs)}


def predict(run: loop.Run) -> dict:
    """Return what `step_model` says of the run's step on its devices: layers, bytes, waits, memory of one device; and seconds per machine."""
    network, method, size = run.network, run.method, run.config.train.batch_size
    layers, num_bits = step_model.count_layers(network, config_lib.image_size_px(run.config)), len(active_bits(run))
    norms = _norms(run, run.mesh.size)
    reduced = step_model.reduced_bytes(layers, method, num_bits=num_bits, num_stacked=len(network.bits), norms=norms)
    inputs = sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(input_shapes(run)))
    return {
        "layers": dataclasses.asdict(layers),
        "norms": norms,
        "reduced_bytes": {**reduced, "total": sum(reduced.values())},
        "num_waits": step_model.num_waits(layers, method, num_bits=num_bits, norms=norms),
        "argument_bytes": inputs + sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(state_shapes(run))),
        "kept_bytes": step_model.kept_bytes(layers, method, num_images=size // run.mesh.size, num_bits=num_bits),
        "gflops": 2e-9 * layers.macs * method.cost(num_bits) * size / run.mesh.size,
        "seconds": {
            name: step_model.step_seconds(
                machine, layers, method, batch_size=size, num_bits=num_bits, norms=_norms(run, machine.devices)
            )
            for name, machine in step_model.MACHINES.items()
        },
    }


def _norms(run, num_devices):
    """Return the scope of the run's norms over so many devices."""
    size = run.config.train.batch_size
    parts = [size, round(size * run.method.patched_frac)]
    return step_model.norm_scope(run.config.model.norm_group, [part / num_devices for part in parts if part])


def _shard_bytes(shape):
    return np.dtype(shape.dtype).itemsize * math.prod(shape.sharding.shard_shape(shape.shape))


def text(figures: dict) -> str:
    """Return the figures as lines of text."""
    model, memory = figures["predicted"], figures["memory"]
    lines = [
        f"{figures['model']}, {figures['image_size_px']} px, batch {figures['batch_size']}, bits "
        f"{'/'.join(map(str, figures['active_bits']))}, method {figures['method']}, norms {model['norms']}; "
        f"{figures['num_devices']} virtual devices of {figures['images_per_device']} images, jax {figures['jax']}",
        f"{'collective':22}{'count':>8}{'MB':>12}",
    ]
    for where in ("collectives", "input_collectives"):
        for kind, found in (figures[where] or {}).items():
            note = "  of the inputs" if where == "input_collectives" else ""
            lines.append(f"{kind:22}{found['count']:8}{found['bytes'] / 1e6:12.3f}{note}")
    expected = model["reduced_bytes"]["total"] / 1e6
    lines.append(
        f"{'all-reduce, model':22}{model['num_waits']:8}{expected:12.3f}  at most so many, exactly so many bytes"
    )
    parts = ", ".join(f"{name} {memory[name] / MIB:.1f}" for name in MEMORY)
    lines += [
        f"MiB of one device: {parts}; model: argument {model['argument_bytes'] / MIB:.1f}, kept {model['kept_bytes'] / MIB:.1f}",
        f"GFLOP of one device: {figures['gflops']:.3f}; model: {model['gflops']:.3f} in convolutions and classifier",
        f"compiled in {figures['lower_cpu_seconds']:.1f} + {figures['compile_cpu_seconds']:.1f} CPU seconds",
    ]
    for name, seconds in model["seconds"].items():
        rate = [figures["batch_size"] / seconds[end] for end in ("worst", "best")]
        terms = ", ".join(f"{term} {1e3 * seconds[term]:.2f}" for term in ("multiply", "memory", "reduce", "wait"))
        lines.append(f"{name}, on paper, ms: {terms}; {rate[0]:.0f} to {rate[1]:.0f} images/s")
    return "\n".join(lines)
