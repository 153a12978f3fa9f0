"""What is logged: the metrics of the steps since the last line, summed on the device, and their means by name on the host."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from triqdef_jax.objectives.gradients import COSINE
from triqdef_jax.objectives.penalties import INPUT_GRADIENT
from triqdef_jax.train_step import BitReport

NEVER = np.int32(np.iinfo(np.int32).max)
PER_BIT = BitReport._fields[:-1]  # metrics with one figure per bit-width
PAIR_NAMES = {INPUT_GRADIENT: ("gpdp", ""), COSINE: (COSINE, "")}  # what is no feature layer


def add(window: tuple | None, metrics: dict, step: int) -> tuple:
    """Return the window (sums of metrics, number of steps, first step that is not finite or `NEVER`) with one more step; None is empty."""
    if window is None:
        window = jax.tree.map(jnp.zeros_like, metrics), jnp.int32(0), jnp.int32(NEVER)
    return _accumulate(window, metrics, step)


@functools.partial(jax.jit, donate_argnums=0)
def _accumulate(window, metrics, step):
    sums, count, first_bad = window
    # The gradient counts too: it makes the next step's weights, which may be saved before their loss is known.
    bad = jnp.where(jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"]), NEVER, step)
    return jax.tree.map(jnp.add, sums, metrics), count + 1, jnp.minimum(first_bad, bad)


@functools.partial(jax.jit, static_argnums=2)
def spread(metrics: dict, places: jax.Array, num_bits: int) -> dict:
    """Return a step's metrics with the figures `[k]` of the bit-widths that ran at their places among all `[num_bits]`, 0 elsewhere.

    `drawn` is added: 1 for those that ran.
    """
    put = lambda values: jnp.zeros(num_bits).at[places].set(values)
    placed = {name: put(metrics[name]) if name in PER_BIT else value for name, value in metrics.items()}
    return placed | {"drawn": put(jnp.ones(len(places)))}


def means(sums: dict, count: int) -> dict:
    """Return the means over steps of summed metrics; of `spread` ones over the steps at which the bit-width ran, nan where there was none."""
    averages = jax.tree.map(lambda x: x / count, sums)
    if "drawn" not in averages:
        return averages
    drawn = averages["drawn"]
    over_own = lambda x: np.divide(x, drawn, out=np.full_like(x, np.nan), where=drawn > 0)
    return averages | {name: over_own(averages[name]) for name in PER_BIT}


def name_scalars(metrics: dict, bits: tuple[int, ...]) -> dict[str, float]:
    """Flatten a step's metrics to names such as 'ce_clean/8', 'fdp/stage1/8-5' and 'gpdp_chance/8-5'; a bit-width that never ran has none."""
    scalars = {}
    for name, value in metrics.items():
        if name == "similarity":
            continue
        if np.ndim(value) == 0:
            scalars[name] = float(value)
        else:
            ran = metrics.get("drawn", np.ones(len(bits)))
            scalars |= {f"{name}/{b}": float(v) for b, v, has_run in zip(bits, value, ran, strict=True) if has_run}
    for layer, similarity in metrics["similarity"].items():
        kind, place = PAIR_NAMES.get(layer, ("fdp", f"/{layer}"))
        for i, j in itertools.combinations(range(len(bits)), 2):
            pair = f"{bits[i]}-{bits[j]}"
            scalars[f"{kind}{place}/{pair}"] = float(similarity.value[i, j])
            scalars[f"{kind}_chance{place}/{pair}"] = float(similarity.chance[i, j])
    return scalars
