"""A bit-width that starts gets scales and statistics from images, norm affine from its wider neighbour, and disturbs nobody else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import calibration
from triqdef_jax.models.layers import LayerOptions
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.models.resnet import ResNet, ResNetPlan

MODULE = ResNet(ResNetPlan((1,), 2), 3, LayerOptions())
BITS = (32, 8, 4, 2)
IMAGES = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)


@functools.cache
def network(norm="per_bit", bits=BITS):
    return MultiBitNetwork(MODULE, bits, norm=norm)


@functools.cache
def initial(norm="per_bit", bits=BITS):
    """Arrays before calibration: random kernels, scales of 1, and in slot i a norm gain of i + 1."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key == "gamma":
            return np.broadcast_to(np.arange(1.0, leaf.shape[0] + 1)[:, None], leaf.shape).astype(np.float32)
        return np.asarray(
            rng.normal(0, 0.3, leaf.shape) if path[-1].key == "kernel" else np.ones(leaf.shape), np.float32
        )

    shapes = jax.eval_shape(lambda key: network(norm, bits).init(key, 8), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def gains(weights):
    """The norm gain of every slot, which is one number in all norms and channels here."""
    columns = [
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights.affine)
        if path[-1].key == "gamma"
    ]
    assert all(np.array_equal(column, np.broadcast_to(columns[0][:, :1], column.shape)) for column in columns)
    return columns[0][:, 0].tolist()


def changed_slots(before, after):
    """Slots in which any array of a stack differs."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return {i for a, b in pairs for i in range(len(a)) if not np.array_equal(a[i], b[i])}


def calibrate(new_bits, active_bits, *, norm="per_bit", **options):
    return calibration.calibrate_new_bits(network(norm), *initial(norm), new_bits, active_bits, IMAGES, **options)


def test_a_new_bit_width_takes_the_affine_of_the_nearest_wider_active_one():
    weights, _ = calibrate((2,), (32, 8, 2))
    assert gains(weights) == [1, 2, 3, 2]  # 2 bits from 8, because 4 bits are not active
    weights, _ = calibrate((4, 2), BITS)
    assert gains(weights) == [1, 2, 2, 2]  # 4 bits from 8, then 2 bits from 4


def test_reset_leaves_the_affine_of_a_new_bit_width_at_its_start():
    weights, _ = calibrate((4, 2), BITS, affine="reset")
    assert gains(weights) == [1, 2, 3, 4]


def test_the_first_stage_copies_from_full_precision_alone():
    weights, _ = calibrate((32, 8), (32, 8))
    assert gains(weights) == [1, 1, 3, 4]


def test_only_the_new_slot_changes_and_weights_are_never_touched():
    (weights, stats), (old, old_stats) = calibrate((4,), (32, 8, 4)), initial()
    assert changed_slots(old.scales, weights.scales) == {2}
    assert changed_slots(old.affine, weights.affine) == {2}
    assert changed_slots(old_stats, stats) == {2}
    jax.tree.map(np.testing.assert_array_equal, weights.params, old.params)


def test_scales_and_statistics_are_those_of_one_calibrating_forward_with_the_copied_affine():
    weights, stats = calibrate((4,), (32, 8, 4))
    old, old_stats = initial()
    variables = network().slice(old, old_stats, network().slot(4)) | {
        "affine": jax.tree.map(lambda x: x[1], old.affine)
    }
    expected = calibration.calibrated(network(), variables, network().spec(4), IMAGES)
    jax.tree.map(lambda stack, one: np.testing.assert_array_equal(stack[2], one), weights.scales, expected["scales"])
    jax.tree.map(lambda stack, one: np.testing.assert_array_equal(stack[2], one), stats, expected["stats"])
    kernel = np.asarray(old.params["classifier"]["kernel"])
    start = 2 * np.abs(kernel).mean() / np.sqrt(127)  # the classifier is an edge of 8 bits
    np.testing.assert_allclose(weights.scales["classifier"]["weight_scale"][2], start, rtol=1e-5)  # a float32 mean


def test_calibration_repeats_bit_for_bit_and_depends_on_its_images():
    first, again = calibrate((2,), (32, 8, 2)), calibrate((2,), (32, 8, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other, _ = calibration.calibrate_new_bits(network(), *initial(), (2,), (32, 8, 2), IMAGES[::-1] ** 2)
    assert changed_slots(first[0].scales, other.scales) == {3}


@pytest.mark.parametrize("norm, stats_slot", [("shared_affine", 2), ("shared", 0)])
def test_shared_norms_copy_no_affine_and_calibrate_the_statistics_they_have(norm, stats_slot):
    (weights, stats), (old, old_stats) = calibrate((4,), (32, 8, 4), norm=norm), initial(norm)
    jax.tree.map(np.testing.assert_array_equal, weights.affine, old.affine)
    assert changed_slots(old.scales, weights.scales) == {2}
    assert changed_slots(old_stats, stats) == {stats_slot}


@pytest.mark.parametrize("bits, source", [(6, 1), (3, 2), (5, 1)])
def test_an_untrained_bit_width_borrows_the_affine_of_the_nearest_wider_trained_one(bits, source):
    weights, stats = initial()
    variables = calibration.calibrate_bit(network(), weights, stats, bits, IMAGES)
    assert float(variables["affine"]["stem"]["norm"]["gamma"][0]) == source + 1
    mean = np.abs(np.asarray(weights.params["stage1_block1"]["conv1"]["conv"]["kernel"])).mean((0, 1, 2))
    scale = np.asarray(variables["scales"]["stage1_block1"]["conv1"]["conv"]["weight_scale"]).reshape(-1)
    np.testing.assert_allclose(scale, 2 * mean / np.sqrt(2 ** (bits - 1) - 1), rtol=1e-5)  # float32 means
    jax.tree.map(np.testing.assert_array_equal, (weights, stats), initial())  # nothing is stored


def test_a_bit_width_wider_than_all_trained_ones_borrows_from_the_widest():
    bits = (2, 4)
    variables = calibration.calibrate_bit(network(bits=bits), *initial(bits=bits), 8, jnp.asarray(IMAGES))
    assert float(variables["affine"]["stem"]["norm"]["gamma"][0]) == 2  # slot 1 holds 4 bits
