"""The window of metrics: a step that is not finite is remembered, and every figure has its name."""

import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import metric_window
from triqdef_jax.objectives.penalties import INPUT_GRADIENT, Similarity


@pytest.mark.parametrize("loss, gradient_norm, is_bad", [(1.0, 1.0, False), (np.nan, 1.0, True), (1.0, np.inf, True)])
def test_a_gradient_that_is_not_finite_counts_before_its_weights_are_saved(loss, gradient_norm, is_bad):
    metrics = {"loss": jnp.float32(loss), "gradient_norm": jnp.float32(gradient_norm)}
    fine = {"loss": jnp.float32(2.0), "gradient_norm": jnp.float32(1.0)}
    window = metric_window.add(metric_window.add(None, fine, 4), metrics, 5)
    window = metric_window.add(window, fine, 6)
    assert int(window[2]) == (5 if is_bad else metric_window.NEVER)
    assert int(window[1]) == 3


def test_scalars_are_named_by_bit_pair_and_layer():
    square = np.arange(4.0).reshape(2, 2)
    metrics = {
        "loss": 1.5,
        "ce_clean": np.array([0.25, 0.5]),
        "similarity": {"stage1": Similarity(square, square + 10), INPUT_GRADIENT: Similarity(square + 20, square + 30)},
    }
    assert metric_window.name_scalars(metrics, (8, 2)) == {
        "loss": 1.5,
        "ce_clean/8": 0.25,
        "ce_clean/2": 0.5,
        "fdp/stage1/8-2": 1.0,
        "fdp_chance/stage1/8-2": 11.0,
        "gpdp/8-2": 21.0,
        "gpdp_chance/8-2": 31.0,
    }
