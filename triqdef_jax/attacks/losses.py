"""What an attack minimises, per image, and how it steps: two small tables of pure functions.

Losses take logits [N, K], labels int32 [N], targets int32 [N] (-1: untargeted) and return float32 [N].
Optimisers turn a gradient into a descent direction and carry two moments of the gradient's shape.
"""

import jax
from jax import numpy as jnp

MOMENTUM = 0.9  # sign_momentum and adam; MI-FGSM (Dong et al., 2018) uses 1.0, which never forgets over 500 steps
ADAM_SQUARE_DECAY = 0.999  # Kingma and Ba, 2015
ADAM_EPSILON = 1e-8  # Kingma and Ba, 2015
TINY = 1e-30  # floor of a mean absolute gradient: a zero gradient stays zero instead of 0 / 0


def cross_entropy(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """Return ``log sum_k exp z_k - z_c`` per row, float32 [N].

    Args:
      logits: [N, K].
      classes: int32 [N] in 0..K-1.
    """
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]


def ce_target(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Return CE(target), the loss of Brown et al. (2017); images of the target class count like all others."""
    del labels
    return cross_entropy(logits, targets)


def lavan(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Return CE(target) - CE(label) of Karmon et al. (2018), that is z_label - z_target.

    Subtracting the logits keeps images of the target class at exactly zero loss and gradient; subtracting two
    cross-entropies would leave rounding noise, which the sign of a gradient takes for a direction.
    """
    rows = jnp.arange(logits.shape[0])
    logits = logits.astype(jnp.float32)
    return logits[rows, labels] - logits[rows, targets]


def untargeted(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Return -CE(label)."""
    del targets
    return -cross_entropy(logits, labels)


def label_or_target(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Return CE(target) where a target is given, and -CE(label) elsewhere."""
    is_targeted = targets >= 0
    value = cross_entropy(logits, jnp.where(is_targeted, targets, labels))
    return jnp.where(is_targeted, value, -value)


def margin(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the lead that is to be lost: z_label - max other, or max other - z_target where a target is given.

    Unlike a cross-entropy it does not saturate when the logits are large, as they are at 2 bits.

    Gradient: at a tie of the largest other logits it is shared equally among them.
    """
    logits = logits.astype(jnp.float32)
    is_targeted = targets >= 0
    goal = jnp.where(is_targeted, targets, labels)
    at_goal = jnp.take_along_axis(logits, goal[:, None], axis=-1)[:, 0]
    others = jnp.where(jax.nn.one_hot(goal, logits.shape[-1], dtype=bool), -jnp.inf, logits).max(axis=-1)
    return jnp.where(is_targeted, others - at_goal, at_goal - others)


LOSSES = {
    "ce_target": ce_target,
    "lavan": lavan,
    "untargeted": untargeted,
    "cross_entropy": label_or_target,
    "margin": margin,
}


def sign(gradient: jax.Array, moments: tuple, step: jax.Array) -> tuple[jax.Array, tuple]:
    """Return the sign of the gradient; `moments`, which may be empty, come back as they are."""
    del step
    return jnp.sign(gradient), moments


def sign_momentum(gradient: jax.Array, moments: tuple, step: jax.Array) -> tuple[jax.Array, tuple]:
    """Return the sign of the averaged gradient, each patch's gradient first divided by its mean absolute value.

    Args:
      gradient: float32 [P, ...], one patch per leading index.
      moments: two arrays like `gradient`, zero before the first step; the second is not used.
      step: int32, counted from 0.

    Returns:
      direction in {-1, 0, 1} (0 where no gradient ever came), the new moments.
    """
    del step
    size = jnp.abs(gradient).mean(axis=tuple(range(1, gradient.ndim)), keepdims=True)
    first = MOMENTUM * moments[0] + gradient / jnp.maximum(size, TINY)
    return jnp.sign(first), (first, moments[1])


def adam(gradient: jax.Array, moments: tuple, step: jax.Array) -> tuple[jax.Array, tuple]:
    """Return Adam's bias-corrected direction (Kingma and Ba, 2015, algorithm 1); arguments as `sign_momentum`."""
    first = MOMENTUM * moments[0] + (1.0 - MOMENTUM) * gradient
    second = ADAM_SQUARE_DECAY * moments[1] + (1.0 - ADAM_SQUARE_DECAY) * gradient**2
    count = step.astype(jnp.float32) + 1.0
    mean = first / (1.0 - MOMENTUM**count)
    square = second / (1.0 - ADAM_SQUARE_DECAY**count)
    return mean / (jnp.sqrt(square) + ADAM_EPSILON), (first, second)


OPTIMIZERS = {"sign": sign, "sign_momentum": sign_momentum, "adam": adam}
