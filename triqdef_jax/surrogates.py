"""Networks that an attacker trains: full-precision, of one bit-width, fine-tuned under switched precision, the defence with another seed.

A surrogate is an ordinary run in `<shared_dir>/surrogate-<hash of what determines it>`, trained once, resumed and verified like any other; `fp` is
source network 1 of `sources.py`. All have seeds of their own: none shares weights at the start or order of images with the defended
network, nor with another surrogate. The defended network attacked by itself, `self:*`, is named here but needs no training.
`fp@deit_tiny` and `qat:4@swin_tiny` are the same kinds of surrogate with another architecture than the defended network's.
"""

import copy
import dataclasses
import math
import pathlib
import zlib

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from triqdef_jax import config as config_lib
from triqdef_jax import curriculum, defenses, files, loop, quantize, runs, sources
from triqdef_jax.models import MODELS
from triqdef_jax.models.layers import QuantConv, QuantDense
from triqdef_jax.models.multibit import MultiBitNetwork, Slot
from triqdef_jax.sources import SEED_STEP

FAMILIES = ("fp", "qat", "qaa", "retrained", "self")
OTHER_FAMILIES = ("fp", "qat")  # those that may be of another architecture
ALL_BITS = "all"  # self:all, the defended network at all its bit-widths together
RANDOM = "random"  # self:random, the defended network where it predicts at a bit-width drawn for each image
FP_SOURCE = 1  # Source network 0 makes the patches that the defence trains on, so the attacker's own is the other one.
OTHER_MODELS = {  # What `names` lists as `fp@MODEL`, by data set: networks without convolutions inside.
    "digits": ("deit_tiny_cifar", "swin_tiny_cifar"),
    "cifar10": ("deit_tiny_cifar", "swin_tiny_cifar"),
    "imagenet": ("deit_tiny", "swin_tiny"),
}
MODEL_CLIP_NORM = 1.0  # Unclipped at rate 0.1, a small DeiT gets 51 % of digits right in place of 92 % after 200 steps; Swin 95 and 94 %.
QAA_BITS = 2
QAA_LR = 0.04
QAA_MIN_STEPS = 50  # Small data sets take several epochs; one epoch of digits is 19 steps.
SEED_PLACES = {
    "retrained": 3,
    "qaa": 9,
    "qat": 10,
}  # 1 and 2 are source networks, 4 and 5 those of the retrained defence
MODEL_PLACES = 32  # Places above that no other surrogate has, for each architecture.


def names(config: ConfigDict) -> tuple[str, ...]:
    """Return the names of all surrogates of a run with these bit-widths and data, the defended network's own last."""
    quantized = [b for b in config.quant.bits if b != quantize.FLOAT_BITS]
    own = [f"self:{b}" for b in (*config.quant.bits, ALL_BITS)]
    others = [f"fp@{model}" for model in OTHER_MODELS[config.data.name] if model != config.model.name]
    return ("fp", *others, *(f"qat:{b}" for b in quantized), "qaa", "retrained", *own)


def parse(name: str) -> tuple[str, int | str | None]:
    """Return (family, bits) of a surrogate's name; bits is None where the family has none, 'all' and 'random' for self:all and
    self:random, 'jedi:4' for self:jedi:4.

    Raises:
      ValueError: for an unknown name; the message lists the known ones.
    """
    own, model = split_model(name)
    family, _, text = own.partition(":")
    is_known = model is None or (family in OTHER_FAMILIES and model in MODELS)
    if is_known and own in ("fp", "qaa", "retrained"):
        return family, None
    if is_known and family == "self" and text in (ALL_BITS, RANDOM):
        return family, text
    if is_known and family == "self" and text.partition(":")[0] in defenses.DEFENSES:
        return family, text
    low, high = quantize.MIN_BITS, quantize.MAX_BITS
    known_bits = {str(b): b for b in range(low, high + 1)} | ({"32": quantize.FLOAT_BITS} if family == "self" else {})
    if is_known and family in ("qat", "self") and text in known_bits:
        return family, known_bits[text]
    raise ValueError(
        f"a surrogate is one of fp, qat:BITS (BITS {low}..{high}), qaa, retrained, self:BITS (BITS {low}..{high} or 32), "
        f"self:DEFENCE:BITS, self:{RANDOM} and self:{ALL_BITS}; fp and qat:BITS may end in @MODEL (MODEL one of {', '.join(MODELS)}), got {name!r}"
    )


def split_model(name: str) -> tuple[str, str | None]:
    """Return (name without architecture, architecture) of a surrogate's name; None where it is the defended network's."""
    own, mark, model = name.partition("@")
    return own, model if mark else None


def _parse_trained(name):
    """Return `parse(name)` of a network that the attacker trains."""
    family, bits = parse(name)
    if family == "self":
        raise ValueError(f"{name} is the defended network, which is loaded from its own workdir and not trained again")
    return family, bits


def get(config: ConfigDict, name: str, data, *, is_quiet: bool = False) -> runs.Trained:
    """Return a surrogate of a run, trained first where the shared folder has none; its bit-widths are `.network.bits`.

    Args:
      config: of the defended run. name: one of `names(config)`, or qat:BITS of another bit-width; not self:*.
      data: the run's data. is_quiet: print no progress.

    Raises:
      ValueError: the name is unknown, or is the defended network itself.
      loop.PreemptedError: SIGTERM arrived first; the same call continues. loop.NonFiniteLossError: a loss is no longer finite.
    """
    surrogate = surrogate_config(config, name, data.num_train)
    if name == "fp":
        return sources.train_source(config, FP_SOURCE, data, is_quiet=is_quiet)
    workdir = pathlib.Path(config.patches.shared_dir) / identity(config, name, data.num_train)
    run, pool, start = loop.make_run(surrogate, workdir, data.num_train), None, None
    if name == "qaa":
        trained = get(config, f"qat:{QAA_BITS}", data, is_quiet=is_quiet)
        run, start = _switched(run), (trained.weights, trained.stats)
    if name == "retrained" and run.method.needs_pool:
        cached = copy.deepcopy(surrogate)
        cached.patches.shared_dir = config.patches.shared_dir
        pool = sources.train_pool(cached, data).split()[0]
    return sources.train_to_end(run, data, title=f"surrogate {name}", pool=pool, start=start, is_quiet=is_quiet)


def identity(config: ConfigDict, name: str, num_train: int) -> str:
    """Return the folder name of a surrogate in the shared folder: a hash of all that determines it.

    Args:
      config: of the defended run. name: as of `get`. num_train: number of training images.

    Raises:
      ValueError: the name is unknown, or is the defended network itself.
    """
    determining = surrogate_config(config, name, num_train)
    if name == "fp":
        return sources.source_name(config, FP_SOURCE)
    if name == "qaa":
        start = identity(config, f"qat:{QAA_BITS}", num_train)
        determining = {"config": files.plain(determining), "start": start}
    return f"surrogate-{files.config_hash(determining)}"


def surrogate_config(config: ConfigDict, name: str, num_train: int) -> ConfigDict:
    """Return the config that a surrogate is trained with; arguments and errors as of `identity`."""
    family, bits = _parse_trained(name)
    _, model = split_model(name)
    if model is not None:
        other = surrogate_config(_with_model(config, model), split_model(name)[0], num_train)
        other.seed = attacker_seed(config, name)
        return other
    makers = {
        "fp": lambda: sources.source_config(config, FP_SOURCE),
        "qat": lambda: qat_config(config, bits),
        "qaa": lambda: qaa_config(config, num_train),
        "retrained": lambda: retrained_config(config),
    }
    return makers[family]()


def attacker_seed(config: ConfigDict, name: str) -> int:
    """Return the seed of a surrogate: that of the run plus a multiple of `SEED_STEP` that no other network of the run has.

    Raises:
      ValueError: the name is unknown, or is the defended network itself, whose seed is the run's.
    """
    family, bits = _parse_trained(name)
    place = FP_SOURCE + 1 if family == "fp" else SEED_PLACES[family] + (bits or 0)
    _, model = split_model(name)
    if model is not None:
        # A digest and not a place in a list: a network that joins `MODELS` moves no other one's seed.
        place += MODEL_PLACES * (1 + zlib.crc32(model.encode()) % 60_000)
    return config.seed + SEED_STEP * place


def _with_model(config, model):
    """Return the config of a run of another architecture at its published width."""
    other = copy.deepcopy(config)
    other.model.name, other.model.width = model, 0
    other.optim.clip_norm = config.optim.clip_norm or MODEL_CLIP_NORM
    return other


def qat_config(config: ConfigDict, bits: int) -> ConfigDict:
    """Return the config of the independent network of one bit-width: clean images, the run's number formats and its budget in epochs."""
    name = f"qat:{bits}"
    qat = sources.independent_config(config, seed=attacker_seed(config, name), bits=(bits,), epochs=config.train.epochs)
    for field in ("scale", "act_signed", "edge_bits", "branch_bits", "residual_bits", "round_bias"):
        qat.quant[field] = config.quant[field]
    return qat


def qaa_config(config: ConfigDict, num_train: int) -> ConfigDict:
    """Return the config of the fine-tuning under switched precision, one epoch or the first number of them with `QAA_MIN_STEPS` steps.

    Args:
      num_train: number of training images.
    """
    qaa = qat_config(config, QAA_BITS)
    qaa.seed = attacker_seed(config, "qaa")
    qaa.train.epochs = math.ceil(QAA_MIN_STEPS / max(1, num_train // config.train.batch_size))
    qaa.optim.update(lr=QAA_LR, schedule="step", milestones=(), warmup_epochs=0.0)
    return qaa


def retrained_config(config: ConfigDict) -> ConfigDict:
    """Return the config of the defence as the attacker trains it: the run's own, method and all, with another seed.

    Its patches are the attacker's too, made on a source network of that seed. What does not change the training is at its default.
    """
    retrained, default = copy.deepcopy(config), config_lib.default()
    retrained.seed = attacker_seed(config, "retrained")
    retrained.eval = copy.deepcopy(default.eval)
    for field in (*runs.FREE_FIELDS, "patches.unseen_sizes_px", "patches.eval_pool_size"):
        group, name = field.split(".")
        retrained[group][name] = default[group][name]
    return retrained


@dataclasses.dataclass(frozen=True)
class SwitchedNetwork(MultiBitNetwork):
    """One network of `QAA_BITS` whose activation quantizers are on ('bits' `QAA_BITS`) or off ('bits' 32); weights stay quantized.

    Both settings read and write one slot: the same scales, norm affine and running statistics.

    Reference: Yang et al., Quantization Aware Attack, TIFS 2024 (arXiv 2305.05875): a 2-bit substitute fine-tuned for one epoch, learning rate 0.04,
    while activation quantization is toggled from forward to forward. Deviations: every step runs both settings and follows their mean, of
    which toggling is the sampled version; the quantizer is this project's and not APoT; batch size as in the attacked run, not 128;
    small data sets take more than one epoch (`QAA_MIN_STEPS`).
    """

    def slot(self, bits: int) -> Slot:
        """Return the only slot, whatever the setting."""
        del bits
        return Slot(np.int32(0), np.int32(0), np.int32(0))

    def spec(self, bits: int, *, round_bias: bool = False) -> quantize.BitSpec:
        """Return the spec of `QAA_BITS`, for 32 with activations, and the grid of the biases, left real."""
        spec = super().spec(QAA_BITS, round_bias=round_bias)
        if bits != quantize.FLOAT_BITS:
            return spec
        return spec._replace(is_float=np.bool_(True), round_bias=np.bool_(False))

    def train_forward(self, variables, spec, images):
        """Run `MultiBitNetwork.train_forward` with weights quantized under either setting."""
        with nn.intercept_methods(_quantize_weights_always):
            return super().train_forward(variables, spec, images)


def _quantize_weights_always(call, args, kwargs, context):
    """Show convolutions and the classifier, which quantize weights only, a spec that is not float."""
    if context.method_name == "__call__" and isinstance(context.module, QuantConv | QuantDense):
        inputs, spec, mode = args
        args = (inputs, spec._replace(is_float=np.bool_(False)), mode)
    return call(*args, **kwargs)


def _switched(run):
    """Return a run of one bit-width with both settings of its activation quantizers active from step 0."""
    network = SwitchedNetwork(**vars(run.network))
    settings = dataclasses.replace(run.settings, network=network)
    stages = (curriculum.Stage(0, run.num_steps, (quantize.FLOAT_BITS, QAA_BITS), ()),)
    return dataclasses.replace(run, network=network, settings=settings, stages=stages)
