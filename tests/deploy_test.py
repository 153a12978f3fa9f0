"""The integer model and its carrier forward, against the fake-quant graph and against NumPy integers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import deploy
from triqdef_jax.calibration import calibrated
from triqdef_jax.deploy import operations as im
from triqdef_jax.deploy.resnet import lower_resnet
from triqdef_jax.models import make_model, resnet
from triqdef_jax.models.layers import LayerOptions
from triqdef_jax.models.multibit import MultiBitNetwork

SIZE_PX = 8


def make_variables(network, bits, key=0, size_px=SIZE_PX):
    """Initialise and calibrate one bit-width, with norms that have negative and zero gains and biases of both signs."""
    weights, stats = network.init(jax.random.key(key), size_px)
    images = jax.random.uniform(jax.random.key(key + 1), (16, size_px, size_px, 3))
    variables = network.slice(weights, stats, network.slot(bits))
    flat, tree = jax.tree.flatten(variables["affine"])
    rng = np.random.default_rng(key)
    flat = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in flat]
    flat[0] = flat[0].at[0].set(0.0)
    variables["affine"] = jax.tree.unflatten(tree, flat)
    return calibrated(network, variables, network.spec(bits), images)


def small_network(name="resnet8", *, width=4, scale="learned", **quant):
    module = make_model(name, num_classes=10, width=width, options=LayerOptions(scale=scale))
    return MultiBitNetwork(module, (8, 5, 4, 2), **quant)


def random_pixels(num=24, size_px=SIZE_PX, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (num, size_px, size_px, 3), dtype=np.uint8)


def fake_quant_logits(network, variables, bits, pixels, *, round_bias=True):
    spec = network.spec(bits, round_bias=round_bias)
    return np.asarray(jitted_apply(network.module)(variables, jnp.asarray(pixels) / 255.0, spec, "eval")[0])


@functools.cache
def jitted_apply(module):
    return jax.jit(module.apply, static_argnums=3)


def lower(network, variables, bits, size_px=SIZE_PX):
    return deploy.lower(network.module, variables, network.spec(bits, round_bias=True), size_px)


def numpy_forward(model, pixels):
    """Slow twin: 64-bit integers and loops over kernel taps; requantization in float32, rounding half to even."""
    tensors = {im.INPUT: pixels.astype(np.int64) - im.PIXEL_OFFSET}
    for op in model.operations:
        x = tensors[op.source]
        if isinstance(op, im.Conv):
            total = numpy_conv(x, op.weights.astype(np.int64), op.stride) + op.bias
            y = numpy_clip(total.astype(np.float32) * op.multiplier, op)
        elif isinstance(op, im.Requantize):
            y = numpy_clip(x.astype(np.float32) * op.multiplier, op)
        elif isinstance(op, im.Add):
            other = tensors[op.source_b].astype(np.float32) * op.multiplier_b
            y = numpy_clip(x.astype(np.float32) * op.multiplier_a + other, op)
        elif isinstance(op, im.MaxPool):
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            side = (x.shape[1] + 1) // 2
            taps = [padded[:, i : i + 2 * side - 1 : 2, j : j + 2 * side - 1 : 2] for i in range(3) for j in range(3)]
            y = np.max(taps, axis=0)
        elif isinstance(op, im.MeanPool):
            y = numpy_clip(x.sum(axis=(1, 2)).astype(np.float32) * op.multiplier, op)
        else:
            return (x @ op.weights.astype(np.int64) + op.bias).astype(np.float32) * op.scale
        tensors[op.output] = y
    raise AssertionError("no classifier")


def numpy_conv(x, weights, stride):
    kh, kw = weights.shape[:2]
    padded = np.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
    rows, columns = ((n - 1) // stride + 1 for n in x.shape[1:3])
    total = 0
    for i in range(kh):
        for j in range(kw):
            window = padded[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
            total = total + window @ weights[i, j]
    return total


def numpy_clip(values, op):
    return np.clip(np.rint(values), op.lower, op.upper).astype(np.int64)


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_carrier_equals_integers_in_numpy_bit_for_bit(bits):
    network = small_network()
    model = lower(network, make_variables(network, bits), bits)
    pixels = random_pixels()
    np.testing.assert_array_equal(deploy.integer_forward(model, pixels), numpy_forward(model, pixels))


@pytest.mark.parametrize(
    "quant",
    [{}, dict(edge_bits=0, branch_bits=0, residual_bits=0), dict(act_signed=True), dict(scale="observed")],
    ids=["default", "own_bits", "act_signed", "observed"],
)
def test_carrier_agrees_with_the_fake_quant_graph_that_rounds_its_biases(quant):
    network = small_network(**quant)
    variables = make_variables(network, 4)
    pixels = random_pixels(64)
    shipped = np.asarray(deploy.integer_forward(lower(network, variables, 4), pixels))
    # Equal up to float rounding, but for rows where a value lies so near a rounding threshold that the last bit decides.
    same_rows = np.isclose(shipped, fake_quant_logits(network, variables, 4, pixels), rtol=1e-4, atol=1e-4).all(axis=1)
    assert same_rows.mean() >= 0.95


def test_unrounded_biases_are_another_function_at_two_bits():
    network = small_network()
    variables = make_variables(network, 2)
    pixels = random_pixels(64)
    shipped = np.asarray(deploy.integer_forward(lower(network, variables, 2), pixels))
    plain = fake_quant_logits(network, variables, 2, pixels, round_bias=False)
    assert not np.isclose(shipped, plain, rtol=1e-4, atol=1e-4).all(axis=1).any()


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_networks_lower_with_their_stem_pool_and_blocks(name):
    network = small_network(name, width=4)
    variables = make_variables(network, 4, size_px=32)
    model = lower(network, variables, 4, size_px=32)
    pixels = random_pixels(4, 32)
    np.testing.assert_array_equal(deploy.integer_forward(model, pixels), numpy_forward(model, pixels))
    same_rows = np.isclose(
        deploy.integer_forward(model, pixels), fake_quant_logits(network, variables, 4, pixels), rtol=1e-3, atol=1e-3
    )
    assert same_rows.mean() >= 0.75  # a code on a rounding threshold may fall either way and moves its whole row


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_weight_codes_are_the_trained_ones_times_the_container_and_the_sign_of_the_gain(bits):
    network = small_network()
    variables = make_variables(network, bits)
    model = lower(network, variables, bits)
    conv = next(op for op in model.operations if getattr(op, "output", "") == "stage1_block1_act1")
    at = lambda name: variables[name]["stage1_block1"]["conv1"]
    kernel, scale = (np.asarray(x) for x in (at("params")["conv"]["kernel"], at("scales")["conv"]["weight_scale"]))
    bound = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(kernel / scale), -bound, bound) * np.sign(at("affine")["norm"]["gamma"]) * 2 ** (8 - bits)
    np.testing.assert_array_equal(conv.weights, codes)


def test_a_gain_of_zero_gives_no_weights_and_a_small_bias():
    network = small_network()
    variables = make_variables(network, 4)
    variables["affine"]["stage1_block1"]["conv1"]["norm"]["gamma"] = jnp.zeros(4)
    conv = next(
        op for op in lower(network, variables, 4).operations if getattr(op, "output", "") == "stage1_block1_act1"
    )
    assert not conv.weights.any()
    assert np.abs(conv.bias.astype(np.int64)).max() <= 2**22


def test_sums_beyond_float32_are_cut_into_exact_parts():
    rng = np.random.default_rng(0)
    weights = np.full((3, 3, 512, 2), 127, np.int8)
    bias = np.array([5, -7], np.int32)
    splits = im.num_splits(weights, bias, 255)
    assert splits > 1
    conv = im.Conv(weights, bias, np.full(2, 1e-6, np.float32), 1, 0, 255, splits, im.INPUT, "out")
    classifier = im.Dense(np.ones((2, 2), np.int8), np.zeros(2, np.int32), np.float32(1), source="pooled")
    pool = im.MeanPool(np.float32(1), 0, 10**6, source="out", output="pooled")
    model = im.IntegerModel((conv, pool, classifier))
    pixels = rng.integers(100, 256, (1, 4, 4, 512), dtype=np.uint8)
    np.testing.assert_array_equal(deploy.integer_forward(model, pixels), numpy_forward(model, pixels))


def test_an_accumulator_that_can_leave_int32_is_refused():
    with pytest.raises(ValueError, match="can leave int32"):
        im.num_splits(np.full((7, 7, 4096, 1), 127, np.int8), np.zeros(1, np.int32), 255)


@pytest.mark.parametrize("mutation", ["clip", "bias", "sign", "weight"])
def test_faults_in_the_model_change_its_logits(mutation):
    network = small_network()
    model = lower(network, make_variables(network, 2), 2)
    place = next(i for i, op in enumerate(model.operations) if getattr(op, "output", "") == "stage1_block1_act1")
    conv = model.operations[place]
    changed = {
        "clip": dict(upper=255),
        "bias": dict(bias=conv.bias + 20),
        "sign": dict(weights=-conv.weights),
        "weight": dict(
            weights=np.where(np.arange(conv.weights.size).reshape(conv.weights.shape) < 36, 64, conv.weights)
        ),
    }[mutation]
    operations = list(model.operations)
    operations[place] = dataclasses.replace(
        conv, **{k: np.asarray(v, getattr(conv, k).dtype) if k != "upper" else v for k, v in changed.items()}
    )
    pixels = random_pixels()
    assert (
        deploy.integer_forward(im.IntegerModel(tuple(operations)), pixels) != deploy.integer_forward(model, pixels)
    ).any()


def test_float_networks_and_float_images_are_refused():
    network = small_network()
    variables = make_variables(network, 4)
    with pytest.raises(ValueError, match=r"2\.\.8 to be deployed"):
        deploy.lower(network.module, variables, network.spec(32), SIZE_PX)
    with pytest.raises(ValueError, match="raw uint8 pixels"):
        deploy.integer_forward(lower(network, variables, 4), np.zeros((1, SIZE_PX, SIZE_PX, 3), np.float32))


def test_every_residual_network_has_a_lowering():
    assert deploy.LOWERINGS == {resnet.ResNet: lower_resnet}
