"""Tests of the policies: probabilities that sum to one, samples that follow them, and learning from rewards."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from triqdef_jax.attacks import policies

SIZES = (2, 3, 2)
COMBINATIONS = np.array(list(itertools.product(*map(range, SIZES))), np.int32)
_log_prob = jax.jit(policies.log_prob)


@pytest.fixture(scope="module")
def learners():
    return policies.make_policies(jax.random.key(0), num=2, sizes=SIZES)


@pytest.fixture(scope="module")
def allowed():
    """The first policy may not choose 1 for its second action, the other has no choice but 2."""
    return (None, np.array([[True, False, True], [False, False, True]]), None)


def _probabilities(learners, allowed, index):
    params, masks = jax.tree.map(lambda array: array[index], (learners.params, allowed))
    return np.exp(np.asarray(_log_prob(params, COMBINATIONS, masks)))


def test_probabilities_of_all_combinations_sum_to_one_and_forbidden_ones_to_zero(learners, allowed):
    for index, forbidden in enumerate(((1,), (0, 1))):
        probs = _probabilities(learners, allowed, index)
        assert probs.sum() == pytest.approx(1.0, abs=1e-6)  # 12 float32 exponentials
        assert not probs[np.isin(COMBINATIONS[:, 1], forbidden)].any()


def test_samples_follow_the_probabilities(learners, allowed):
    actions = np.asarray(policies.sample(jax.random.key(1), learners, allowed, num_samples=4000))
    assert actions.shape == (2, 4000, 3)
    for index in range(2):
        codes = np.ravel_multi_index(actions[index].T, SIZES)
        frequencies = np.bincount(codes, minlength=len(COMBINATIONS)) / 4000
        # Five standard deviations of a frequency near 1/2 in 4,000 draws.
        np.testing.assert_allclose(frequencies, _probabilities(learners, allowed, index), atol=5 * 0.5 / np.sqrt(4000))


def test_a_policy_learns_what_is_rewarded_and_its_neighbour_nothing(learners, allowed):
    rewarded, trained = (1, 2, 0), learners
    before = [_probabilities(learners, allowed, index) for index in range(2)]
    for step in range(15):
        actions = policies.sample(jax.random.key(step), trained, allowed, num_samples=16)
        rewards = np.all(np.asarray(actions) == rewarded, axis=-1).astype(np.float32)
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        advantages[1] = 0.0
        trained = policies.learn(trained, actions, advantages, allowed)
    at = np.flatnonzero((rewarded == COMBINATIONS).all(axis=1))
    assert before[0][at] < 0.4 and _probabilities(trained, allowed, 0)[at] > 0.8
    np.testing.assert_array_equal(_probabilities(trained, allowed, 1), before[1])


def test_the_gradient_of_log_prob_is_that_of_finite_differences(learners, allowed, x64):
    params, masks = jax.tree.map(lambda array: np.asarray(array[0]), (learners.params, allowed))
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), params)
    actions = COMBINATIONS[[0, 5, 11]]
    value = lambda bias: policies.log_prob(params | {"lstm": params["lstm"].at[-1, :2].set(bias)}, actions, masks).sum()
    bias = params["lstm"][-1, :2]
    gradient = jax.jit(jax.grad(value))(bias)
    steps = 1e-5 * np.eye(2)
    differences = [(value(bias + step) - value(bias - step)) / 2e-5 for step in steps]
    # Central differences of float64 at steps of 1e-5: truncation and rounding are both near 1e-10.
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-9)
