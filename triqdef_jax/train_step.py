"""One optimisation step: `bit_forward` -> `penalties` -> `bit_backward` -> `update`, under two compilation plans.

Every active bit-width runs one forward on the clean and one on the patched images; cross-entropy, feature maps and input gradient come from
the same forward. Pair penalties are differentiated with respect to the maps alone, and each bit-width's pullback takes the result
back to the weights. Plan 'per_bit' compiles each piece once for all bit-widths and stages (one device); plan 'fused' compiles their
composition per set of active bits. With `accumulate_steps` the terms of several micro-batches are averaged before the update. Arrays live on
devices, nothing here waits for them.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from triqdef_jax import micro_batches, perceptual, quantize, sharding
from triqdef_jax.models import multibit
from triqdef_jax.models.multibit import MultiBitNetwork, Slot, Weights
from triqdef_jax.objectives.methods import Inputs, Method
from triqdef_jax.objectives.penalties import INPUT_GRADIENT, MOVED_GRADIENT

PLANS = ("per_bit", "fused")
CPU_OPTION = "xla_backend_optimization_level"
Tree = Any


class TrainState(NamedTuple):
    """All that training carries from step to step; arrays only, saved as it is.

    Attributes:
      step: int32 scalar, number of finished steps.
      weights: `Weights`; stats: running statistics, stacked over bit-widths; opt_state: momentum of the optimiser.
    """

    step: jax.Array
    weights: Weights
    stats: Tree
    opt_state: Tree


class CarryingState(NamedTuple):
    """`TrainState` of a method with extra state: `extra`, arrays of its own. A type of its own, so that all others are saved as ever."""

    step: jax.Array
    weights: Weights
    stats: Tree
    opt_state: Tree
    extra: Tree


class BitReport(NamedTuple):
    """What one bit-width reports beside its loss: means over images, and the batch moments of its norms."""

    ce_clean: jax.Array
    acc_clean: jax.Array
    ce_patched: jax.Array
    acc_patched: jax.Array
    moments: Tree


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Static part of the step.

    Attributes:
      network, method: what is trained and how. optimizer: optax transformation over `Weights`.
      map_reduction: how channels become one map, see `perceptual.channel_map`.
      pooled_stats: running statistics learn from clean and patched images; False takes the clean ones alone.
      accumulate_steps: micro-batches per step; their terms are averaged and give one update.
      remat: run each bit-width's forward again when its gradient is taken, instead of keeping its activations until then.
    """

    network: MultiBitNetwork
    method: Method
    optimizer: optax.GradientTransformation
    map_reduction: str = "mean"
    pooled_stats: bool = True
    accumulate_steps: int = 1
    remat: bool = False


def bit_forward(
    settings: StepSettings, weights: Weights, stats: Tree, slot: Slot, spec: quantize.BitSpec, inputs: Inputs
):
    """Run one bit-width forward.

    Args:
      weights, stats: all bit-widths' arrays; slot, spec: which bit-width, may be traced. inputs: clean and patched images.

    Returns:
      ((loss, maps), report, pullback): the bit-width's scalar loss, its maps float32 `[b, h, w]` in [0, 1] by name, a `BitReport`, and the
      function that takes cotangents of (loss, maps) to the gradient of `Weights`.
    """

    def outputs(weights):
        variables = settings.network.slice(weights, stats, slot)  # once: gradients meet before they are scattered
        zero = jnp.float32(0)
        if inputs.images is None:
            ce_patched, acc_patched, maps, moments = _patched_part(settings, variables, spec, inputs)
            loss = settings.method.bit_terms(None, ce_patched)
            return (loss, maps), BitReport(zero, zero, ce_patched, acc_patched, moments)
        ce_clean, acc_clean, moments = _clean_part(settings, variables, spec, inputs)
        if inputs.patched_images is None:
            return (settings.method.bit_terms(ce_clean, None), {}), BitReport(ce_clean, acc_clean, zero, zero, moments)
        ce_patched, acc_patched, maps, patched_moments = _patched_part(settings, variables, spec, inputs)
        if settings.pooled_stats:
            counts = [inputs.images.shape[0], inputs.patched_images.shape[0]]
            moments = multibit.pool_moments([moments, patched_moments], counts)
        loss = settings.method.bit_terms(ce_clean, ce_patched)
        return (loss, maps), BitReport(ce_clean, acc_clean, ce_patched, acc_patched, moments)

    values, pullback, report = jax.vjp(jax.checkpoint(outputs) if settings.remat else outputs, weights, has_aux=True)
    return values, report, pullback


def _clean_part(settings, variables, spec, inputs):
    logits, _, moments = settings.network.train_forward(variables, spec, inputs.images)
    return cross_entropy(logits, inputs.labels), accuracy(logits, inputs.labels), moments


def _patched_part(settings, variables, spec, inputs):
    """Cross-entropy, maps and input gradient of the patched images, from one forward."""

    def loss(images):
        logits, features, moments = settings.network.train_forward(variables, spec, images)
        return cross_entropy(logits, inputs.patched_labels), (logits, features, moments)

    if INPUT_GRADIENT in settings.method.map_layers:
        (ce, aux), gradient = jax.value_and_grad(loss, has_aux=True)(inputs.patched_images)
    else:
        (ce, aux), gradient = loss(inputs.patched_images), None
    logits, features, moments = aux
    sources = features if gradient is None else {**features, INPUT_GRADIENT: gradient}
    if MOVED_GRADIENT in settings.method.map_layers:
        sources[MOVED_GRADIENT] = jax.grad(loss, has_aux=True)(inputs.moved_images)[0]
    maps = {name: _map(settings, sources[name]) for name in settings.method.map_layers}
    return ce, accuracy(logits, inputs.patched_labels), maps, moments


def _map(settings, source):
    """Return what the pair penalty reads of features or gradients `[b, h, w, C]`."""
    if settings.method.reads_raw:
        return source * source.shape[0]  # from the gradient of the mean to that of each image's own cross-entropy
    return perceptual.channel_map(source, reduction=settings.map_reduction)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy in nats of logits `[B, K]` and labels int32 `[B]`."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the share of images whose largest logit is at the label."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)


def penalties(settings: StepSettings, bits: jax.Array, maps: list[dict[str, jax.Array]], ramp: jax.Array):
    """Return (ramp x penalty, similarities by map name, cotangents of the maps, one dict per bit-width).

    Args:
      bits: int32 `[K]`, 0 for padding. maps: one dict of maps `[b, h, w]` per entry of `bits`. ramp: factor in [0, 1].
    """

    def total(maps):
        stacks = {name: jnp.stack([m[name] for m in maps]) for name in maps[0]}
        penalty, similarities = settings.method.pair_penalty(stacks, bits)
        return ramp * penalty, similarities

    (penalty, similarities), cotangents = jax.value_and_grad(total, has_aux=True)(maps)
    return penalty, similarities, cotangents


def bit_backward(pullback: Callable, bit_weight: jax.Array, map_cotangents: dict[str, jax.Array]) -> Weights:
    """Pull the loss's weight (1 / number of active bits) and the maps' cotangents back to a gradient of `Weights`."""
    return pullback((bit_weight, map_cotangents))[0]


def weight_penalty(settings: StepSettings, weights: Weights) -> tuple[jax.Array, Weights]:
    """Return the method's penalty on the weights and its gradient, of the shape of `Weights`."""
    return jax.value_and_grad(lambda weights: settings.method.weight_penalty(weights.params))(weights)


def update(
    settings: StepSettings,
    state: TrainState | CarryingState,
    gradients: Weights,
    slots: list[Slot],
    moments: list[Tree],
):
    """Apply the optimiser and one running-statistics update per active bit-width; returns (state, gradient norm)."""
    updates, opt_state = settings.optimizer.update(gradients, state.opt_state, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    stats = state.stats
    for slot, moment in zip(slots, moments, strict=True):
        stats = multibit.update_stats(stats, slot, moment)
    state = state._replace(step=state.step + 1, weights=weights, stats=stats, opt_state=opt_state)
    return state, optax.tree.norm(gradients)


class Terms(NamedTuple):
    """What one micro-batch says to the update: gradient without that of the weight penalty, and the parts of the metrics, one per bit-width.

    `penalty` and `similarities` are those of the pairs; `reports` are `BitReport`s.
    """

    gradients: Weights
    losses: tuple[jax.Array, ...]
    penalty: jax.Array
    similarities: Tree
    reports: tuple[BitReport, ...]


class Pieces(NamedTuple):
    """The functions that one step is composed of, plain or each compiled on its own; `terms` composes the first four."""

    forward: Callable
    penalties: Callable
    backward: Callable
    add: Callable
    terms: Callable
    split: Callable
    merge: Callable
    weight_penalty: Callable
    finish: Callable


def make_pieces(settings: StepSettings, compile_piece: Callable = lambda piece, **_: piece) -> Pieces:
    """Bind the settings to the pieces; `compile_piece(function, **jit_options)` may compile each of them."""
    pieces = Pieces(
        forward=compile_piece(functools.partial(bit_forward, settings)),
        penalties=compile_piece(functools.partial(penalties, settings)),
        backward=compile_piece(bit_backward),  # pullbacks are never donated: weights hide among their residuals
        add=compile_piece(functools.partial(jax.tree.map, jnp.add), donate_argnums=0),
        terms=None,
        split=compile_piece(functools.partial(micro_batches.split, num=settings.accumulate_steps)),
        merge=compile_piece(merge, donate_argnums=0),
        weight_penalty=compile_piece(functools.partial(weight_penalty, settings)),
        finish=compile_piece(functools.partial(_finish, settings), donate_argnums=0),
    )
    return pieces._replace(terms=functools.partial(batch_terms, settings, pieces))


def jit(function: Callable, **options) -> Callable:
    """Return `jax.jit(function, **options)`; on a CPU without LLVM's costly passes, unless XLA_FLAGS chooses: quicker to compile, as fast to run."""
    if jax.default_backend() == "cpu" and CPU_OPTION not in os.environ.get("XLA_FLAGS", ""):
        options["compiler_options"] = {CPU_OPTION: 1}
    return jax.jit(function, **options)


def make_step(settings: StepSettings, *, plan: str, mesh: jax.sharding.Mesh, compile_piece: Callable = jit) -> Callable:
    """Return `step(state, inputs, bits, slots, specs, ramp) -> (state, metrics)`.

    Args of the returned function:
      state: `TrainState` or `CarryingState`, donated. inputs: `Inputs` without extra state. bits: active bit-widths, a static tuple: the fused
      plan compiles once for each that it meets. slots, specs: one `Slot` and one `BitSpec` for each. ramp: factor of the pair penalties in
      [0, 1].
    mesh: devices over which the fused plan splits the batch; the state is replicated. compile_piece: what compiles each program, like `jit`.

    Raises:
      ValueError: for an unknown plan.
    """
    if plan not in PLANS:
        raise ValueError(f"train.plan must be one of auto, {', '.join(PLANS)}, got {plan!r}")
    if plan == "per_bit":
        return functools.partial(run_step, settings, make_pieces(settings, compile_piece))
    plain, rows, everywhere = make_pieces(settings), sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def step(state, inputs, bits, slots, specs, ramp):
        inputs = jax.lax.with_sharding_constraint(inputs, rows)
        return run_step(settings, plain, state, inputs, bits, slots, specs, ramp)

    def terms(weights, stats, inputs, bits, slots, specs, ramp):
        inputs = jax.lax.with_sharding_constraint(inputs, rows)
        return plain.terms(weights, stats, inputs, bits, slots, specs, ramp)

    if settings.accumulate_steps == 1:
        return compile_piece(step, static_argnums=(2,), donate_argnums=0, out_shardings=(everywhere, everywhere))
    # One program per micro-batch, called again and again: a loop inside would be slow on CPU and its unrolled form long to compile.
    pieces = make_pieces(settings, functools.partial(compile_piece, out_shardings=everywhere))
    return functools.partial(
        run_step,
        settings,
        pieces._replace(
            split=compile_piece(plain.split, out_shardings=rows),
            terms=compile_piece(terms, static_argnums=(3,), out_shardings=everywhere),
        ),
    )


def run_step(settings, pieces, state, inputs, bits, slots, specs, ramp):
    """Compose the pieces into one step."""
    terms = None
    for index in range(settings.accumulate_steps):
        part = inputs if settings.accumulate_steps == 1 else pieces.split(inputs, np.int32(index))
        new = pieces.terms(state.weights, state.stats, part, bits, slots, specs, ramp)
        terms = new if terms is None else pieces.merge(terms, new, np.asarray(index, new.losses[0].dtype))
    if settings.method.weight_penalty is not None:
        on_weights, gradient = pieces.weight_penalty(state.weights)
        terms = terms._replace(penalty=terms.penalty + on_weights, gradients=pieces.add(terms.gradients, gradient))
    return pieces.finish(state, terms, slots)


def batch_terms(settings, pieces, weights, stats, inputs, bits, slots, specs, ramp) -> Terms:
    """Compose the pieces into the `Terms` of one batch; the loop over bit-widths is unrolled under either plan."""
    values, reports, pullbacks = zip(
        *(pieces.forward(weights, stats, slot, spec, inputs) for slot, spec in zip(slots, specs, strict=True)),
        strict=True,
    )
    losses, maps = zip(*values, strict=True)
    if settings.method.pair_penalty is not None and len(bits) > 1:
        # Padded to all bit-widths, so that the per-bit plan compiles the descriptors once for the whole curriculum.
        padding = [jax.tree.map(jnp.zeros_like, maps[0])] * (len(settings.network.bits) - len(bits))
        all_bits = np.array([*bits, *[0] * len(padding)], np.int32)
        penalty, similarities, cotangents = pieces.penalties(all_bits, [*maps, *padding], ramp)
        cotangents = cotangents[: len(bits)]
    else:
        penalty, similarities, cotangents = jnp.float32(0), {}, jax.tree.map(jnp.zeros_like, list(maps))
    gradients = None
    for pullback, cotangent in zip(pullbacks, cotangents, strict=True):
        gradient = pieces.backward(pullback, np.asarray(1 / len(bits), losses[0].dtype), cotangent)
        gradients = gradient if gradients is None else pieces.add(gradients, gradient)
    return Terms(gradients, losses, penalty, similarities, reports)


def merge(terms: Terms, new: Terms, num_done: jax.Array) -> Terms:
    """Return the means of `num_done + 1` micro-batches from those of `num_done` and the next one; moments become those of all their images."""
    reports = [
        BitReport(
            *micro_batches.mean(old[:-1], late[:-1], num_done),
            multibit.pool_moments([old[-1], late[-1]], [num_done, 1]),
        )
        for old, late in zip(terms.reports, new.reports, strict=True)
    ]
    return Terms(*micro_batches.mean(terms[:-1], new[:-1], num_done), tuple(reports))


def _finish(settings, state, terms, slots):
    """Update the state and gather the metrics of the step."""
    losses, reports = terms.losses, terms.reports
    new_state, gradient_norm = update(settings, state, terms.gradients, slots, [report.moments for report in reports])
    loss = sum(losses) / len(losses) + terms.penalty
    metrics = {
        "loss": loss,
        "penalty": terms.penalty,
        "gradient_norm": gradient_norm,
        "similarity": terms.similarities,
    }
    for name in BitReport._fields[:-1]:
        metrics[name] = jnp.stack([getattr(report, name) for report in reports])
    return new_state, metrics
