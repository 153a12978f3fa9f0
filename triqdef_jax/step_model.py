"""The fused step on paper: what it multiplies, sends between devices, keeps in memory, and how long that takes on a machine.

Pure functions of a network's layers, a method and a batch. `scaling` compares them with compiled programs; `docs/scaling.md` derives the constants.
Modelled are networks of convolutions, and methods whose patched images come from a pool. Left out: what attacks inside the step add.
"""

import dataclasses

import flax.linen as nn
import jax

from triqdef_jax import quantize
from triqdef_jax.models.layers import BitNorm, QuantAct, QuantConv, QuantDense
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.objectives.methods import Method
from triqdef_jax.objectives.penalties import INPUT_GRADIENT

FLOAT_BYTES = (
    4  # Gradients, statistics and what is kept between layers are float32 whatever the operands of multiplications are.
)
NUM_CHANNELS = 3  # of all images


@dataclasses.dataclass(frozen=True)
class Layers:
    """Totals over the layers of one network.

    Attributes:
      macs: multiplications with addition of one forward on one image. kernels: weights of convolutions and classifier.
      outputs: numbers that all convolutions put out for one image. norms, channels: norms, and their channels together.
      act_scales: quantizers of activations. classes: logits.
    """

    macs: int
    kernels: int
    outputs: int
    norms: int
    channels: int
    act_scales: int
    classes: int


def count_layers(network: MultiBitNetwork, image_size_px: int) -> Layers:
    """Count a network's layers from the shapes of one forward; nothing is computed."""
    seen = {name: 0 for name in Layers.__dataclass_fields__}

    def record(call, args, kwargs, context):
        result, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__":
            return result
        if isinstance(module, QuantConv):
            values, read = result.values, 1 if module.is_depthwise else args[0].values.shape[-1]
            size = module.size**2 * read
            seen["macs"] += size * values[0].size
            seen["kernels"] += size * module.num_filters
            seen["outputs"] += values[0].size
        elif isinstance(module, QuantDense):
            size = args[0].values.shape[-1] * result.shape[-1]
            seen["macs"], seen["kernels"], seen["classes"] = (
                seen["macs"] + size,
                seen["kernels"] + size,
                result.shape[-1],
            )
        elif isinstance(module, BitNorm):
            seen["norms"], seen["channels"] = seen["norms"] + 1, seen["channels"] + args[0].values.shape[-1]
        elif isinstance(module, QuantAct):
            seen["act_scales"] += module.options.scale == "learned"
        return result

    with nn.intercept_methods(record):
        images = jax.ShapeDtypeStruct((1, image_size_px, image_size_px, NUM_CHANNELS), jax.numpy.float32)
        spec = network.spec(quantize.FLOAT_BITS)
        jax.eval_shape(lambda key, x: network.module.init(key, x, spec, "eval"), jax.random.key(0), images)
    return Layers(**seen)


@dataclasses.dataclass(frozen=True)
class Sums:
    """How often one bit-width of a step sums over the batch what every image contributes to, and so over devices.

    Attributes:
      kernels: gradients of each kernel. vectors: numbers per channel of each norm. waits: sums of each norm that the next layer waits for.
      batches: batches of images that have a loss; each also brings a gradient of every activation quantizer and of the classifier's bias.
    """

    kernels: int
    vectors: int
    waits: int
    batches: int


# Of a norm: mean and variance of the batch, and backwards the sums of the cotangent and of its product with the values; a norm of groups sends
# the last two and what the running statistics learn. Differentiating the input gradient again runs every convolution's kernel
# twice (through the forward, through the input gradient), and so the norms'.
CLEAN = {"global": Sums(1, 4, 3, 1), "local": Sums(1, 4, 0, 1)}
PATCHED_ONCE = CLEAN
PATCHED_TWICE = {"global": Sums(2, 10, 5, 1), "local": Sums(2, 5, 0, 1)}


def sums_of(method: Method, norms: str) -> Sums:
    """Return what one bit-width of a method's step sums; `norms` are 'global' or 'local'."""
    parts = [CLEAN[norms]] if method.uses_clean else []
    if method.patched_frac:
        parts.append((PATCHED_TWICE if INPUT_GRADIENT in method.map_layers else PATCHED_ONCE)[norms])
    return Sums(*(sum(getattr(part, field) for part in parts) for field in Sums.__dataclass_fields__))


def norm_scope(norm_group: int, images_per_device: list[int]) -> str:
    """Return 'local' where all groups of so many images lie on one device each, else 'global'."""
    return "local" if norm_group and not any(n % norm_group for n in images_per_device) else "global"


def reduced_bytes(layers: Layers, method: Method, *, num_bits: int, num_stacked: int, norms: str) -> dict[str, int]:
    """Return the bytes that a device hands to all-reduces in one step, by what is summed.

    `kernels`: gradients of kernels, one for each bit-width and pass, summed over devices before they meet; `vectors`: norms and the
    classifier's bias; `scalars`: gradients of activation quantizers, cross-entropies, accuracies; `pairs`: similarities of all pairs of the
    `num_stacked` bit-widths and their chance levels.
    """
    sums = sums_of(method, norms)
    counts = {
        "kernels": num_bits * sums.kernels * layers.kernels,
        "vectors": num_bits * (sums.vectors * layers.channels + sums.batches * layers.classes),
        "scalars": num_bits * sums.batches * (layers.act_scales + 2),
        "pairs": 2 * num_stacked**2 * len(method.map_layers) if method.pair_penalty else 0,
    }
    return {name: FLOAT_BYTES * count for name, count in counts.items()}


def num_waits(layers: Layers, method: Method, *, num_bits: int, norms: str) -> int:
    """Return how many all-reduces the step takes at most: what the next layer waits for merges with nothing, all else into one.

    Norms side by side, such as those of a projection and of the branch beside it, merge as well.
    """
    return num_bits * sums_of(method, norms).waits * layers.norms + 1


# Arrays of the size of all convolutions' outputs that one bit-width keeps per image until its backward pass ends, counted in programs of XLA's
# CPU backend (4.0 to 5.3 and 8.8 to 9.1 in small networks; other backends fuse more). Twice: the input gradient's own pass is kept as well.
KEPT_ONCE, KEPT_TWICE = 5, 9


def kept_bytes(layers: Layers, method: Method, *, num_images: int, num_bits: int) -> int:
    """Return the bytes that a device with so many clean images keeps for the backward pass when it runs all bit-widths before any backward."""
    patched = KEPT_TWICE if INPUT_GRADIENT in method.map_layers else KEPT_ONCE
    arrays = KEPT_ONCE * method.uses_clean + method.patched_frac * patched
    return round(FLOAT_BYTES * layers.outputs * arrays * num_images * num_bits)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Published figures of a machine, and two assumptions of ours.

    Attributes:
      devices: accelerators. flops: peak bfloat16 operations per second of one, dense. memory_bytes: of one. memory_rate: bytes per second of
      its memory. link_rate: bytes per second that one sends while it receives as many.
      reduce_latency_s: assumed seconds of an all-reduce of a few kB over all devices. efficiency: assumed share of the peak in convolutions.
    """

    devices: int
    flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    reduce_latency_s: float
    efficiency: float = 0.4


# v5e: docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB at 819 GB/s; all-reduce bandwidth of a pod of 256 is 51.2 TB/s, so 200 GB/s a chip.
# H100 SXM: table of nvidia.com/en-us/data-center/h100: 1,979 TFLOP/s with sparsity, so 989 without; 80 GB at 3.35 TB/s; NVLink 900 GB/s, both
# directions together.
MACHINES = {
    "v5e-256": Machine(256, 197e12, 16e9, 819e9, 51.2e12 / 256, reduce_latency_s=30e-6),
    "8xH100": Machine(8, 989e12, 80e9, 3.35e12, 450e9, reduce_latency_s=20e-6),
}
TOUCHES = 5  # Assumed: writes and reads of memory per output of a convolution and forward-equivalent: itself, statistics, codes, the next one.


def step_seconds(
    machine: Machine, layers: Layers, method: Method, *, batch_size: int, num_bits: int, norms: str
) -> dict:
    """Return what one step takes on a machine, in seconds, by what it waits for, and the range of the whole.

    `multiply` at the assumed efficiency and `memory` traffic of activations overlap: the longer counts. `reduce`: a ring all-reduce of all bytes,
    2 (n - 1) / n of them over each link, at best hidden behind the computation, at worst not at all. `wait`: all-reduces of norms that
    nothing hides.
    """
    images = batch_size / machine.devices * method.cost(num_bits)  # forward-equivalents on one device
    num_bytes = sum(reduced_bytes(layers, method, num_bits=num_bits, num_stacked=num_bits, norms=norms).values())
    share = 2 * (machine.devices - 1) / machine.devices
    seconds = {
        "multiply": 2 * layers.macs * images / (machine.efficiency * machine.flops),
        "memory": TOUCHES * FLOAT_BYTES * layers.outputs * images / machine.memory_rate,
        "reduce": share * num_bytes / machine.link_rate,
        "wait": (num_waits(layers, method, num_bits=num_bits, norms=norms) - 1) * machine.reduce_latency_s,
    }
    compute = max(seconds["multiply"], seconds["memory"])
    best, worst = max(compute, seconds["reduce"]) + seconds["wait"], compute + seconds["reduce"] + seconds["wait"]
    return {**seconds, "best": best, "worst": worst}
