"""Stacks over bit-widths: what is shared, what one slot holds, and running statistics of the union of batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import quantize
from triqdef_jax.models import multibit
from triqdef_jax.models.layers import LayerOptions
from triqdef_jax.models.multibit import MultiBitNetwork, Slot
from triqdef_jax.models.resnet import ResNet, ResNetPlan

MODULE = ResNet(ResNetPlan((1,), 2), 3, LayerOptions())
BITS = (32, 8, 2)


@functools.cache
def drawn():
    return jax.jit(MultiBitNetwork(MODULE, BITS).init, static_argnums=1)(jax.random.key(0), 8)


@functools.cache
def initial():
    """The per-bit network's arrays with usable scales, every slot made different from the others by its own factor."""
    weights, stats = drawn()
    spread = lambda tree, *factors: jax.tree.map(lambda x: x * np.reshape(factors, (3, *[1] * (x.ndim - 1))), tree)
    scales, affine = spread(weights.scales, 0.05, 0.06, 0.2), spread(weights.affine, 1.0, 1.5, 2.0)
    return weights._replace(scales=scales, affine=affine), spread(stats, 1.0, 1.5, 2.0)


@pytest.mark.parametrize("norm, affine, stats", [("per_bit", 3, 3), ("shared_affine", 1, 3), ("shared", 1, 1)])
def test_each_norm_stacks_what_it_keeps_per_bit_and_shares_the_rest(norm, affine, stats):
    network = MultiBitNetwork(MODULE, BITS, norm=norm)
    weights, running = jax.eval_shape(lambda key: network.init(key, 8), jax.random.key(0))
    lengths = lambda tree: {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    assert lengths(weights.scales) == {3} and lengths(weights.affine) == {affine} and lengths(running) == {stats}
    assert weights.params["stem"]["conv"]["kernel"].shape == (3, 3, 3, 2)  # shared: no leading axis
    for index, bits in enumerate(BITS):
        slot = network.slot(bits)
        assert slot == Slot(index, index if affine == 3 else 0, index if stats == 3 else 0)


def test_every_bit_width_starts_alike():
    weights, stats = drawn()
    for leaf in jax.tree.leaves((weights.scales, weights.affine, stats)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    assert weights.affine["stem"]["norm"]["gamma"][2, 0] == 1 and stats["stem"]["norm"]["mean"][2, 0] == 0


def test_observed_scales_live_among_the_statistics_and_are_not_trained():
    module = ResNet(ResNetPlan((1,), 2), 3, LayerOptions(scale="observed"))
    weights, stats = jax.eval_shape(lambda key: MultiBitNetwork(module, BITS).init(key, 8), jax.random.key(0))
    assert not jax.tree.leaves(weights.scales)
    assert stats["pool"]["largest"].shape == (3,)


def test_the_spec_carries_the_networks_options():
    network = MultiBitNetwork(MODULE, BITS, edge_bits=0, branch_bits=5, residual_bits=4, act_signed=True)
    expected = quantize.make_bit_spec(3, edge_bits=0, branch_bits=5, residual_bits=4, act_signed=True, round_bias=True)
    assert network.spec(3, round_bias=True) == expected
    assert not network.spec(3).round_bias


def test_put_replaces_one_entry_that_take_gives_back_under_a_traced_index():
    stack = {"a": jnp.arange(6.0).reshape(3, 2), "b": {"c": jnp.arange(3.0)}}
    entry = {"a": jnp.array([9.0, 8.0]), "b": {"c": jnp.float32(7)}}
    there_and_back = jax.jit(lambda i: (multibit.put(stack, i, entry), multibit.take(multibit.put(stack, i, entry), i)))
    changed, taken = there_and_back(1)
    jax.tree.map(np.testing.assert_array_equal, taken, entry)
    np.testing.assert_array_equal(changed["a"], [[0, 1], [9, 8], [4, 5]])
    np.testing.assert_array_equal(changed["b"]["c"], [0, 7, 2])


def test_one_executable_runs_every_bit_width_with_its_own_slice():
    network, (weights, stats) = MultiBitNetwork(MODULE, BITS), initial()
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    forward = jax.jit(lambda slot, spec: network.train_forward(network.slice(weights, stats, slot), spec, images))
    direct = jax.jit(lambda variables, spec: MODULE.apply(variables, images, spec, "train", mutable=["moments"])[0])
    logits = []
    for index, bits in enumerate(BITS):
        out, features, moments = forward(network.slot(bits), network.spec(bits))
        alone = jax.tree.map(lambda x, i=index: x[i], (weights.scales, weights.affine, stats))
        variables = {"params": weights.params, "scales": alone[0], "affine": alone[1], "stats": alone[2]}
        (expected, maps) = direct(variables, network.spec(bits))
        # Two programs: float32 sums in another order, and rarely a code that flips by it.
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
        assert features.keys() == maps.keys()
        assert jax.tree.structure(moments) == jax.tree.structure(alone[2])
        logits.append(np.asarray(out))
    assert forward._cache_size() == 1
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 and np.abs(logits[1] - logits[2]).max() > 1e-3


def test_evaluation_reads_the_running_statistics_of_its_slot():
    network, (weights, stats) = MultiBitNetwork(MODULE, BITS), initial()
    images = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    forward = jax.jit(network.eval_forward)
    run = lambda stats: forward(weights, stats, network.slot(8), network.spec(8), images)[0]
    changed = lambda index: jax.tree.map(lambda x: x.at[index].mul(3.0).at[index].add(1.0), stats)
    np.testing.assert_array_equal(run(changed(2)), run(stats))  # another slot's
    assert np.abs(run(changed(1)) - run(stats)).max() > 1e-3


def test_pooled_moments_are_those_of_the_union_of_the_batches():
    rng = np.random.default_rng(1)
    batches = [rng.normal(mean, 2.0, (n, 3, 3, 2)) for mean, n in ((0.0, 8), (3.0, 4), (-1.0, 2))]
    moments = [
        {"block": {"norm": {"mean": b.mean((0, 1, 2)), "var": b.var((0, 1, 2))}}, "act": {"largest": b.max()}}
        for b in batches
    ]
    pooled = multibit.pool_moments(moments, [8, 4, 2])
    union = np.concatenate(batches)
    np.testing.assert_allclose(pooled["block"]["norm"]["mean"], union.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(pooled["block"]["norm"]["var"], union.var((0, 1, 2)), rtol=1e-5)  # jnp.square is float32
    np.testing.assert_allclose(
        pooled["act"]["largest"], np.average([b.max() for b in batches], weights=[8, 4, 2]), rtol=1e-6
    )


def test_one_update_moves_one_slot_a_tenth_of_the_way():
    stats = {"norm": {"mean": jnp.array([[1.0, 2.0], [10.0, 20.0]])}}
    moments = {"norm": {"mean": jnp.array([0.0, 30.0])}}
    updated = multibit.update_stats(stats, Slot(np.int32(1), np.int32(1), np.int32(1)), moments)
    np.testing.assert_allclose(updated["norm"]["mean"], [[1.0, 2.0], [9.0, 21.0]], rtol=1e-6)
