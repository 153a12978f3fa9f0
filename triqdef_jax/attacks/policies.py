"""Small LSTM policies that choose a row of actions, many side by side, trained by REINFORCE.

A policy draws action after action, each seeing those before it. Arrays with a leading P run over policies; actions are
int32 [P, S, A]: S samples of A actions. What actions mean and what they earn is the caller's.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp

NUM_UNITS = 30  # of the LSTM and of the embeddings
LEARNING_RATE = 0.03
_OPTIMIZER = optax.adam(LEARNING_RATE)
_FORBIDDEN = -1e9  # logit of a choice that is not allowed: its probability is exactly 0 in float32


class Policies(NamedTuple):
    """P policies and the state of their optimiser, pytrees of arrays with a leading P.

    Attributes:
      params: 'lstm' [P, 2 U + 1, 4 U]; 'heads', for action i [P, U + 1, n_i]; 'embeddings', for all actions but the last
        [P, n_i, U]; the last row of lstm and heads is the bias, U is `NUM_UNITS`.
      moments: of Adam.
    """

    params: dict
    moments: tuple


@functools.partial(jax.jit, static_argnames=("num", "sizes"))
def make_policies(key: jax.Array, *, num: int, sizes: tuple[int, ...]) -> Policies:
    """Build untrained policies, whose choices are close to uniform.

    Args:
      key: PRNG key.
      num: number of policies P.
      sizes: number of choices n_i of each of the A actions.

    Returns:
      `Policies`; weights are uniform in +- 1 / sqrt U, the start that Yang et al. inherit from their library.
    """
    shapes = {
        "lstm": (2 * NUM_UNITS + 1, 4 * NUM_UNITS),
        "heads": [(NUM_UNITS + 1, size) for size in sizes],
        "embeddings": [(size, NUM_UNITS) for size in sizes[:-1]],
    }
    shapes, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    counts = [int(np.prod(shape)) for shape in shapes]
    # One draw for all arrays: each would cost its own compilation.
    drawn = jax.random.uniform(key, (num, sum(counts)), minval=-1.0, maxval=1.0) / np.sqrt(NUM_UNITS)
    parts = jnp.split(drawn, np.cumsum(counts)[:-1], axis=1)
    params = jax.tree.unflatten(tree, [part.reshape(num, *shape) for part, shape in zip(parts, shapes, strict=True)])
    return Policies(params, jax.vmap(_OPTIMIZER.init)(params))


@functools.partial(jax.jit, static_argnames="num_samples")
def sample(key: jax.Array, policies: Policies, allowed: tuple, *, num_samples: int) -> jax.Array:
    """Draw actions.

    Args:
      key: PRNG key.
      policies: `Policies`.
      allowed: for each action None or bool [P, n_i], the choices a policy has, at least one.
      num_samples: samples S of each policy.

    Returns:
      int32 [P, S, A].
    """

    def draw(key, params, allowed):
        sizes = [head.shape[-1] for head in params["heads"]]
        noise = jnp.split(jax.random.gumbel(key, (num_samples, sum(sizes))), np.cumsum(sizes)[:-1], axis=1)
        actions, _ = _unroll(params, allowed, num_samples, lambda i, logits: (logits + noise[i]).argmax(axis=-1))
        return actions

    keys = jax.random.split(key, len(policies.params["lstm"]))
    return jax.vmap(draw)(keys, policies.params, allowed)


@jax.jit
def learn(policies: Policies, actions: jax.Array, advantages: jax.Array, allowed: tuple) -> Policies:
    """Take one step of Adam up ``mean_s advantage_s log p(actions_s)``.

    Args:
      policies: `Policies`.
      actions: int32 [P, S, A], as `sample` drew them.
      advantages: float32 [P, S]; zeros teach a policy nothing new.
      allowed: as in `sample`.

    Returns:
      `Policies`.

    Reference: Williams, REINFORCE, 1992; Kingma and Ba, Adam, 2015, with `LEARNING_RATE`.
    """

    def update(params, moments, actions, advantages, allowed):
        gradient = jax.grad(lambda params: -jnp.mean(advantages * log_prob(params, actions, allowed)))(params)
        change, moments = _OPTIMIZER.update(gradient, moments)
        return optax.apply_updates(params, change), moments

    return Policies(*jax.vmap(update)(*policies, actions, advantages, allowed))


def log_prob(params: dict, actions: jax.Array, allowed: tuple) -> jax.Array:
    """Return the log-probability, float32 [S], with which one policy (no leading P) draws actions int32 [S, A]."""
    return _unroll(params, allowed, len(actions), lambda i, logits: actions[:, i])[1]


def _unroll(params, allowed, num_samples, choose):
    """Run one policy; ``choose(i, logits [S, n_i]) -> [S]``. Return actions int32 [S, A] and their log-probability [S]."""
    hidden = cell = inputs = jnp.zeros((num_samples, NUM_UNITS))
    actions, total = [], jnp.zeros(num_samples)
    for index, head in enumerate(params["heads"]):
        gates = _affine(params["lstm"], jnp.concatenate([inputs, hidden], axis=1))
        keep, write, emit, update = jnp.split(gates, 4, axis=1)
        cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(write) * jnp.tanh(update)
        hidden = jax.nn.sigmoid(emit) * jnp.tanh(cell)
        logits = _affine(head, hidden)
        if allowed[index] is not None:
            logits = jnp.where(allowed[index], logits, _FORBIDDEN)
        action = choose(index, logits)
        actions.append(action)
        total += jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=1)[:, 0]
        if index < len(params["embeddings"]):
            inputs = params["embeddings"][index][action]
    return jnp.stack(actions, axis=1).astype(jnp.int32), total


def _affine(weights, inputs):
    return inputs @ weights[:-1] + weights[-1]
