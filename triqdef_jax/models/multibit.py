"""One backbone under several bit-widths: stacks what belongs to one bit-width and picks its slice inside the compiled program.

`Shared` holds weights and biases; `Stacks` holds quantizer scales, norm affine parameters and running statistics with a leading axis in
the order of `bits` (of length 1 where they are shared). A bit-width is chosen by a traced `Slot`, so one executable serves them all.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from triqdef_jax import quantize

NORMS = ("per_bit", "shared_affine", "shared")
STATS_DECAY = 0.9  # Share of the old running statistics kept at each update.
Tree = Any


class Weights(NamedTuple):
    """All trained arrays: shared parameters, and scales and affine parameters stacked over bit-widths."""

    params: Tree
    scales: Tree
    affine: Tree


class Slot(NamedTuple):
    """Where one bit-width lies in the stacks: int32 scalars, 0 where the stack is shared."""

    scales: np.int32
    affine: np.int32
    stats: np.int32


@dataclasses.dataclass(frozen=True)
class MultiBitNetwork:
    """A module together with the bit-widths it is trained under.

    Attributes:
      module: flax module of `models.make_model`.
      bits: bit-widths in the order of the stacks, for example (32, 8, 5, 4, 2).
      norm: 'per_bit' (statistics and affine per bit-width), 'shared_affine' (statistics per bit-width) or 'shared' (neither).
      edge_bits, branch_bits, residual_bits, act_signed: see `quantize.make_bit_spec`.
    """

    module: nn.Module
    bits: tuple[int, ...]
    norm: str = "per_bit"
    edge_bits: int = 8
    branch_bits: int = 8
    residual_bits: int = 8
    act_signed: bool = False

    def spec(self, bits: int, *, round_bias: bool = False) -> quantize.BitSpec:
        """Return the BitSpec of one bit-width, trained or not."""
        return quantize.make_bit_spec(
            bits,
            edge_bits=self.edge_bits,
            branch_bits=self.branch_bits,
            residual_bits=self.residual_bits,
            act_signed=self.act_signed,
            round_bias=round_bias,
        )

    def slot(self, bits: int) -> Slot:
        """Return the place of a trained bit-width in the stacks."""
        index = np.int32(self.bits.index(bits))
        zero = np.int32(0)
        return Slot(
            scales=index,
            affine=index if self.norm == "per_bit" else zero,
            stats=zero if self.norm == "shared" else index,
        )

    def with_estimator(self, name: str) -> "MultiBitNetwork":
        """Return the same network, for the same arrays, under another gradient estimator of its quantizers.

        Values stay bit for bit what they are (see `quantize.fake_quant_unless`).

        Raises:
          ValueError: for an unknown name; the message lists the known ones.
        """
        quantize.check_estimator(name)
        options = dataclasses.replace(self.module.options, estimator=name)
        return dataclasses.replace(self, module=self.module.clone(options=options))

    def init(self, key: jax.Array, image_size_px: int) -> tuple[Weights, Tree]:
        """Return (weights, running statistics), every bit-width starting alike; scales are set by `calibrate` before use."""
        images = jnp.zeros((1, image_size_px, image_size_px, 3), jnp.float32)
        init = jax.jit(self.module.init, static_argnums=3)  # one compilation instead of one per operation
        variables = init(key, images, self.spec(quantize.FLOAT_BITS), "eval")
        first = self.slot(self.bits[-1])
        stacks = {
            name: jax.tree.map(lambda x, n=last + 1: jnp.stack([x] * n), variables.get(name, {}))
            for name, last in first._asdict().items()
        }
        return Weights(variables["params"], stacks["scales"], stacks["affine"]), stacks["stats"]

    def slice(self, weights: Weights, stats: Tree, slot: Slot) -> dict[str, Tree]:
        """Return one bit-width's variables, as the module reads them."""
        return {
            "params": weights.params,
            "scales": take(weights.scales, slot.scales),
            "affine": take(weights.affine, slot.affine),
            "stats": take(stats, slot.stats),
        }

    def train_forward(self, variables, spec, images):
        """Run one training-mode forward of the variables that `slice` returned.

        Returns:
          logits `[B, K]`, features (dict of `[B, h, w, C]`), moments (the batch's statistics, in the structure of one slice of `stats`).
        """
        (logits, features), new = self.module.apply(variables, images, spec, "train", mutable=["moments"])
        return logits, features, new.get("moments", {})

    def eval_forward(self, weights, stats, slot, spec, images):
        """Run one evaluation forward with running statistics; returns (logits, features)."""
        return self.module.apply(self.slice(weights, stats, slot), images, spec, "eval")

    def calibrate(self, variables: dict[str, Tree], spec: quantize.BitSpec, images: jax.Array) -> dict[str, Tree]:
        """Return one bit-width's variables with scales and statistics set from `images`, layer by layer in forward order."""
        _, new = self.module.apply(variables, images, spec, "calibrate", mutable=["scales", "stats"])
        return {**variables, **new}


def make_outputs_fn(
    network: MultiBitNetwork,
    variables: Sequence[dict[str, Tree]],
    specs: Sequence[quantize.BitSpec],
    *,
    layers: Sequence[str] = (),
) -> jax.tree_util.Partial:
    """Return one function of K bit-widths' outputs in evaluation mode, all arrays as arguments of any jit.

    Args:
      network: whose module runs; networks that compare equal share one compiled program.
      variables: one entry per bit-width, from `MultiBitNetwork.slice` or calibrated for an untrained bit-width.
      specs: one per entry.
      layers: names of the feature maps to return.

    Returns:
      ``images -> (logits float32 [K, B, classes], dict from layer to features float32 [K, B, h, w, C])``; images are float32
      `[B, H, W, 3]` in [0, 1], shown to every bit-width, or `[K, B, H, W, 3]`, one batch for each.

    Raises:
      ValueError: as many variables as specs are needed; when called, for an unknown layer or another number of batches.
    """
    if not specs or len(variables) != len(specs):
        raise ValueError(f"variables: expected one entry per spec, got {len(variables)} for {len(specs)} specs")
    return jax.tree_util.Partial(_stacked_outputs(network.module, tuple(layers)), tuple(variables), tuple(specs))


@functools.cache
def _stacked_outputs(module, layers):
    """Return the function behind `make_outputs_fn`, one object per module and layers."""

    def outputs(variables, specs, images):
        batches = images if images.ndim == 5 else [images] * len(specs)
        if len(batches) != len(specs):
            raise ValueError(
                f"images: expected [B, H, W, 3] or one batch for each of {len(specs)} bits, got {images.shape}"
            )
        logits, features = zip(
            *(module.apply(*args, "eval") for args in zip(variables, batches, specs, strict=True)), strict=True
        )
        unknown = [name for name in layers if name not in features[0]]
        if unknown:
            raise ValueError(f"layers: expected some of {', '.join(features[0])}, got {unknown[0]!r}")
        return jnp.stack(logits), {name: jnp.stack([maps[name] for maps in features]) for name in layers}

    return outputs


def take(stack: Tree, index: jax.Array) -> Tree:
    """Return entry `index` (may be traced) of every array's leading axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


def put(stack: Tree, index: jax.Array, entry: Tree) -> Tree:
    """Return the stack with entry `index` replaced."""
    return jax.tree.map(lambda x, e: jax.lax.dynamic_update_index_in_dim(x, e, index, 0), stack, entry)


def pool_moments(moments: list[Tree], num_images: list[int]) -> Tree:
    """Pool the moments of several batches into those of their union, weighted by images.

    Means and maxima-by-average are weighted means; a variance also gains the spread of the means, as a variance of the union must.
    """
    shares = [n / sum(num_images) for n in num_images]
    return _pool(moments, shares)


def _pool(nodes, shares):
    first = nodes[0]
    if not isinstance(first, dict):
        return sum(share * node for share, node in zip(shares, nodes, strict=True))
    pooled = {name: _pool([node[name] for node in nodes], shares) for name in first}
    if "var" in first:
        spread = [jnp.square(node["mean"] - pooled["mean"]) for node in nodes]
        pooled["var"] = pooled["var"] + _pool(spread, shares)
    return pooled


def update_stats(stats: Tree, slot: Slot, moments: Tree) -> Tree:
    """Return the running statistics after one exponential update of one bit-width.

    Rows are chosen by a mask: the updates of all bit-widths then compile to one kernel per array instead of ten.
    """

    def updated(stack, new):
        is_row = jnp.arange(stack.shape[0]).reshape(-1, *[1] * (stack.ndim - 1)) == slot.stats
        return jnp.where(is_row, STATS_DECAY * stack + (1 - STATS_DECAY) * new, stack)

    return jax.tree.map(updated, stats, moments)
