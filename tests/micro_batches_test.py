"""Micro-batches: every row belongs to one of them, running means are means, and a step of them is one step, in float64."""

import dataclasses

import jax
import numpy as np
import pytest
import train_step_test as example

from triqdef_jax import micro_batches, sharding, train_step
from triqdef_jax.objectives.methods import Inputs


def test_every_row_belongs_to_one_micro_batch_and_missing_arrays_stay_missing():
    batch = {"images": np.arange(12).reshape(6, 2), "labels": np.arange(6), "patched": None}
    parts = [jax.jit(micro_batches.split, static_argnames="num")(batch, np.int32(index), num=3) for index in range(3)]
    assert [part["labels"].tolist() for part in parts] == [[0, 3], [1, 4], [2, 5]]
    assert parts[1]["images"].tolist() == [[2, 3], [8, 9]] and parts[0]["patched"] is None


def test_the_running_mean_is_the_mean_in_the_type_of_the_arrays():
    values = [np.float32([0, 8]), np.float32([3, 1]), np.float32([6, 0])]
    mean = values[0]
    for num_done, value in enumerate(values[1:], start=1):
        mean = micro_batches.mean(mean, value, np.float32(num_done))
    np.testing.assert_array_equal(mean, np.float32([3, 3]))
    assert mean.dtype == np.float32


@pytest.fixture(scope="module")
def step64():
    with jax.enable_x64(True):
        yield example.Step64(blocks=())


def make_step(step64, plan, num):
    """A step of `num` micro-batches of clean images."""
    settings = dataclasses.replace(example.make_settings(step64.network, "qat", ("stem",)), accumulate_steps=num)
    return train_step.make_step(settings, plan=plan, mesh=sharding.data_mesh(1))


@pytest.fixture(scope="module")
def of_two(step64):
    with jax.enable_x64(True):
        return make_step(step64, "per_bit", 2)


def interleaved(a, b):
    """The batch whose two micro-batches are a and b."""
    return jax.tree.map(lambda *rows: np.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:]), a, b)


def test_copies_of_one_micro_batch_give_the_update_of_the_whole_batch_under_both_plans(step64, of_two, x64):
    one = Inputs(step64.inputs.images, step64.inputs.labels)
    steps = (make_step(step64, "per_bit", 1), of_two, make_step(step64, "fused", 2))
    states = [step64.run(step, (4,), 1, inputs=interleaved(one, one))[0] for step in steps]
    assert example.largest_difference(states[0].weights.params, step64.state.weights.params) > 1e-3
    assert all(example.largest_difference(state, states[0]) < example.ORDER for state in states[1:])


def test_micro_batches_give_one_update_by_their_mean_gradient_and_the_statistics_of_all_images(step64, of_two, x64):
    one = Inputs(step64.inputs.images, step64.inputs.labels)
    other = Inputs(one.images[::-1] ** 2, one.labels[::-1])
    state, metrics = step64.run(of_two, (4,), 1, inputs=interleaved(one, other))
    slot, spec = step64.place(4, round_bias=False)
    before, terms = step64.state, of_two.args[1].terms
    parts = [terms(before.weights, before.stats, part, (4,), [slot], [spec], np.float32(1)) for part in (one, other)]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *parts)
    expected, _ = train_step.update(step64.settings, before, mean.gradients, [], [])
    assert example.largest_difference(state._replace(stats=()), expected._replace(stats=())) < example.ORDER
    assert float(metrics["ce_clean"][0]) == pytest.approx(float(mean.losses[0]), rel=example.ORDER)
    first, second = (part.reports[0].moments["stem"]["norm"]["mean"] for part in parts)
    spread = (first - second) ** 2 / 4  # of two means about the mean of all images
    assert np.abs(spread).max() > 1e-3
    now, then = (stats["stem"]["norm"]["var"][slot.stats] for stats in (state.stats, before.stats))
    variance = mean.reports[0].moments["stem"]["norm"]["var"] + spread
    np.testing.assert_allclose(now, 0.9 * then + 0.1 * variance, rtol=example.ORDER)
