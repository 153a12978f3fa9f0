"""Learning rates at the milestones, and one step of SGD by hand: what decays, what is clipped, what momentum keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax.models.multibit import Weights
from triqdef_jax.optimizer import decayed, make_optimizer, make_schedule


def optim(**changes):
    settings = config_lib.default().optim
    settings.update(changes)
    return settings


def rates(settings, steps, *, num_steps=100, steps_per_epoch=10):
    schedule = jax.vmap(make_schedule(settings, num_steps=num_steps, steps_per_epoch=steps_per_epoch))
    return np.asarray(schedule(jnp.asarray(steps, jnp.int32)))


def test_the_step_schedule_drops_tenfold_at_half_and_at_three_quarters():
    # rtol: the rate is a float32 product of factors 0.1.
    np.testing.assert_allclose(rates(optim(), [0, 49, 50, 74, 75, 99]), [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_milestones_and_gamma_are_read_from_the_config():
    settings = optim(lr=0.4, milestones=(0.2,), gamma=0.5)
    np.testing.assert_allclose(rates(settings, [0, 19, 20, 99]), [0.4, 0.4, 0.2, 0.2], rtol=1e-6)


def test_cosine_falls_from_the_peak_through_its_half_to_zero():
    np.testing.assert_allclose(rates(optim(schedule="cosine"), [0, 50, 100]), [0.1, 0.05, 0.0], atol=1e-8)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_warm_up_rises_linearly_and_milestones_stay_where_they_are_in_the_run(schedule):
    settings = optim(schedule=schedule, warmup_epochs=2.0)
    np.testing.assert_allclose(rates(settings, [0, 5, 10, 20]), [0.0, 0.025, 0.05, 0.1], rtol=1e-5)
    after = rates(settings, [49, 50, 60, 75, 100])
    expected = (
        [0.1, 0.01, 0.01, 0.001, 0.001]
        if schedule == "step"
        else 0.05 * (1 + np.cos(np.pi * np.array([29, 30, 40, 55, 80]) / 80))
    )
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-8)  # float32 cosine


def tiny_weights():
    params = {
        "stem": {"conv": {"kernel": jnp.full((1, 1, 1, 2), 2.0)}},
        "classifier": {"kernel": jnp.full((2, 1), 3.0), "bias": jnp.ones(1)},
    }
    return Weights(
        params,
        {"stem": {"conv": {"weight_scale": jnp.ones(2)}}},
        {"stem": {"norm": {"gamma": jnp.ones(2), "beta": jnp.ones(2)}}},
    )


def test_only_kernels_decay():
    assert decayed(tiny_weights()) == Weights(
        {"stem": {"conv": {"kernel": True}}, "classifier": {"kernel": True, "bias": False}},
        {"stem": {"conv": {"weight_scale": False}}},
        {"stem": {"norm": {"gamma": False, "beta": False}}},
    )


def steps(settings, weights, gradients, num):
    optimizer = make_optimizer(settings, lambda step: 0.5)
    state = optimizer.init(weights)
    for _ in range(num):
        updates, state = optimizer.update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def test_without_gradients_kernels_shrink_by_rate_times_decay_and_nothing_else_moves():
    weights = tiny_weights()
    after = steps(optim(weight_decay=0.1), weights, jax.tree.map(jnp.zeros_like, weights), 1)
    np.testing.assert_allclose(after.params["stem"]["conv"]["kernel"], 2.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_allclose(after.params["classifier"]["kernel"], 3.0 * (1 - 0.5 * 0.1), rtol=1e-6)
    np.testing.assert_array_equal(after.params["classifier"]["bias"], 1.0)
    jax.tree.map(np.testing.assert_array_equal, after._replace(params=0), weights._replace(params=0))


def test_momentum_sums_earlier_gradients_with_its_factor():
    weights = tiny_weights()
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 0.1), weights)
    after = steps(optim(weight_decay=0.0), weights, gradients, 2)
    moved = 0.1 * (0.5 * 1 + 0.5 * (1 + 0.9))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b - moved, rtol=1e-5), after, weights)


def test_clipping_bounds_the_norm_of_the_whole_gradient_before_decay():
    weights = tiny_weights()
    gradients = jax.tree.map(lambda x: jnp.full_like(x, 4.0), weights)._replace(
        scales=jax.tree.map(jnp.zeros_like, weights.scales)
    )
    settings = optim(clip_norm=2.0, weight_decay=0.0, momentum=0.0)
    moved = jax.tree.map(jnp.subtract, weights, steps(settings, weights, gradients, 1))
    assert float(optax.tree.norm(moved)) == pytest.approx(0.5 * 2.0, rel=1e-5)  # rate x largest norm
    unclipped = steps(optim(weight_decay=0.0, momentum=0.0), weights, gradients, 1)
    np.testing.assert_allclose(unclipped.params["classifier"]["bias"], 1 - 0.5 * 4)


def test_no_scale_crosses_zero_or_more_than_doubles_in_a_step_and_small_steps_are_left_alone():
    weights = tiny_weights()
    moved = lambda gradient: steps(
        optim(weight_decay=0.0, momentum=0.0), weights, jax.tree.map(lambda x: jnp.full_like(x, gradient), weights), 1
    )
    scale_of = lambda after: np.asarray(after.scales["stem"]["conv"]["weight_scale"])
    np.testing.assert_array_equal(scale_of(moved(1e4)), 0.5)
    np.testing.assert_array_equal(scale_of(moved(-1e4)), 2.0)
    np.testing.assert_array_equal(scale_of(moved(0.25)), 1 - 0.5 * 0.25)
    np.testing.assert_array_equal(moved(1e4).affine["stem"]["norm"]["gamma"], 1 - 0.5e4)  # nothing else is held back
    again = steps(optim(weight_decay=0.0), weights, jax.tree.map(lambda x: jnp.full_like(x, 1e4), weights), 40)
    assert (scale_of(again) > 0).all()
