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


@functools.cache
def outputs_fn(estimator="clipped", layers=("stage1",)):
    network, (weights, stats) = MultiBitNetwork(MODULE, BITS), initial()
    variables = [network.slice(weights, stats, network.slot(bits)) for bits in (8, 2)]
    specs = [network.spec(bits) for bits in (8, 2)]
    return multibit.make_outputs_fn(network.with_estimator(estimator), variables, specs, layers=layers)


@functools.partial(jax.jit, static_argnums=1)
def outputs_and_gradient(outputs_fn, num_batches, images):
    """Run the function, on one batch or on one for each bit-width, and differentiate its logits to the images."""
    shown = jnp.stack([images] * num_batches) if num_batches else images
    (_, outputs), gradient = jax.value_and_grad(
        lambda x: (outputs_fn(x)[0][..., 0].sum(), outputs_fn(x)), has_aux=True
    )(shown)
    return outputs, gradient


def test_one_function_gives_all_bit_widths_outputs_of_one_batch_or_of_a_batch_each():
    network, (weights, stats) = MultiBitNetwork(MODULE, BITS), initial()
    images = np.random.default_rng(2).random((4, 8, 8, 3), np.float32)
    (logits, maps), gradient = outputs_and_gradient(outputs_fn(), 0, images)
    (each_logits, _), gradients = outputs_and_gradient(outputs_fn(), 2, images)
    assert logits.shape == (2, 4, 3) and maps["stage1"].shape == (2, 4, 8, 8, 2) and gradients.shape == (2, 4, 8, 8, 3)
    forward = jax.jit(network.eval_forward)
    for index, bits in enumerate((8, 2)):
        expected, features = forward(weights, stats, network.slot(bits), network.spec(bits), images)
        # Separate programs: float32 sums in another order, and rarely a code that flips by it.
        np.testing.assert_allclose(logits[index], expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(maps["stage1"][index], features["stage1"], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(each_logits, logits, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(gradients.sum(axis=0), gradient, rtol=1e-2, atol=1e-3 * np.abs(gradient).max())
    assert np.abs(gradients[0] - gradients[1]).max() > 1e-3  # each bit-width has a gradient of its own
    again = multibit.make_outputs_fn(network.with_estimator("clipped"), [{}], [network.spec(8)], layers=("stage1",))
    assert again.func is outputs_fn().func  # so that a jitted attack meets it again


@pytest.mark.parametrize("name", ["identity", "soft_round"])
def test_another_estimator_changes_gradients_and_no_value(name):
    images = np.random.default_rng(2).random((4, 8, 8, 3), np.float32)
    (logits, _), gradient = outputs_and_gradient(outputs_fn(), 0, images)
    (other_logits, _), other = outputs_and_gradient(outputs_fn(name), 0, images)
    np.testing.assert_array_equal(other_logits, logits)
    assert np.isfinite(other).all() and np.abs(other).max() > 0
    assert np.abs(other - gradient).max() > 1e-3 * np.abs(gradient).max()


def test_outputs_of_bit_widths_refuse_what_does_not_fit_in_one_line():
    network = MultiBitNetwork(MODULE, BITS)
    with pytest.raises(ValueError, match="estimator must be one of clipped, identity, soft_round, got 'ste'"):
        network.with_estimator("ste")
    with pytest.raises(ValueError, match="variables: expected one entry per spec, got 1 for 2 specs"):
        multibit.make_outputs_fn(network, [{}], [network.spec(8), network.spec(2)])
    images = jax.ShapeDtypeStruct((3, 4, 8, 8, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"one batch for each of 2 bits, got \(3, 4, 8, 8, 3\)"):
        jax.eval_shape(outputs_fn(), images)
    with pytest.raises(ValueError, match="layers: expected some of stem, stage1, got 'stage9'"):
        jax.eval_shape(outputs_fn(layers=("stage9",)), jax.ShapeDtypeStruct(images.shape[1:], jnp.float32))


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
