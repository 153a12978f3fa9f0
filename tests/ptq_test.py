"""Re-quantization: observers against slow twins and hand cases, layers that see quantized layers, integers that agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import calibration, deploy, ptq, quantize, runs
from triqdef_jax import config as config_lib
from triqdef_jax.models.layers import NORM_EPSILON, LayerOptions
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.models.resnet import ResNet, ResNetPlan

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.float32) / 255
SIGNED_4 = quantize.make_bit_spec(4).weight  # codes -7..7


@functools.cache
def untrained(scale="learned", *, bits=(32, 4), round_bias=False):
    """A network of one block at its random start, as if it were trained."""
    config = config_lib.default()
    config.update_from_flattened_dict({"quant.bits": bits, "quant.scale": scale, "quant.round_bias": round_bias})
    network = MultiBitNetwork(ResNet(ResNetPlan((1,), 2), 3, LayerOptions(scale=scale)), bits)
    return runs.Trained(config, network, *network.init(jax.random.key(0), 8), step=0)


@functools.cache
def requantized(bits, observer, **which):
    return jax.device_get(ptq.requantize(untrained(**which), bits, observer, IMAGES))


def round_to_codes(values, scale, code_range):
    return np.clip(np.rint(values / scale), code_range.lower, code_range.upper) * scale


def squared_error(values, scale, code_range):
    return np.mean(np.square(values - round_to_codes(values, scale, code_range)))


def test_minmax_is_the_scale_of_the_largest_magnitude_per_group():
    values = np.array([[3.0, -7.0], [-14.0, 1.0]], np.float32)
    assert ptq.minmax_scale(values, SIGNED_4) == 2.0
    np.testing.assert_array_equal(ptq.minmax_scale(values, SIGNED_4, axes=(0,)), [[2.0, 1.0]])


@pytest.mark.parametrize("code_range", [SIGNED_4, quantize.make_bit_spec(2).weight, quantize.make_bit_spec(4).act])
def test_mse_finds_what_trying_every_ratio_one_by_one_finds(code_range):
    values = np.random.default_rng(1).standard_t(3, (40, 3)).astype(np.float32)
    scales = np.asarray(ptq.mse_scale(values, code_range, axes=(0,)))[0]
    for column, scale in zip(values.T, scales, strict=True):
        tried = np.abs(column).max() / code_range.upper * np.arange(1, 101) / 100
        errors = [squared_error(column, one, code_range) for one in tried]
        # Two ratios may differ by float32 rounding only: the error found is the least, to six digits.
        np.testing.assert_allclose(squared_error(column, scale, code_range), min(errors), rtol=1e-6)


def test_mse_clips_an_outlier_that_minmax_serves():
    values = np.append(np.linspace(-1, 1, 200), 6.0).astype(np.float32)
    three_bits = quantize.make_bit_spec(3).weight
    mse, minmax = (rule(values, three_bits) for rule in (ptq.mse_scale, ptq.minmax_scale))
    assert mse < minmax
    assert squared_error(values, np.asarray(mse), three_bits) < squared_error(values, np.asarray(minmax), three_bits)


@pytest.mark.parametrize("rule", ptq.OBSERVERS.values())
def test_all_zeros_get_the_smallest_scale(rule):
    assert rule(np.zeros(5, np.float32), SIGNED_4) == np.float32(quantize.MIN_SCALE)


def test_minmax_of_the_first_layers_equals_a_computation_by_hand():
    """Input grid -> quantized stem -> norm by its own batch -> ReLU -> 8-bit stream -> 4-bit copy, in NumPy but for the convolution."""
    trained = untrained()
    variables, spec = requantized(4, "minmax"), trained.spec(4)
    kernel = np.asarray(trained.weights.params["stem"]["conv"]["kernel"])
    weight_scale = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True) / np.float32(127)  # an edge of 8 bits
    np.testing.assert_allclose(variables["scales"]["stem"]["conv"]["weight_scale"], weight_scale, rtol=1e-6)
    inputs, weights = (255 * IMAGES - 128) / 64, round_to_codes(kernel, weight_scale, spec.edge_weight)
    layout = ("NHWC", "HWIO", "NHWC")
    sums = np.asarray(jax.lax.conv_general_dilated(inputs, weights, (1, 1), "SAME", dimension_numbers=layout))
    mean, variance = sums.mean((0, 1, 2)), sums.var((0, 1, 2))
    # Float32 sums of 384 values in another order: five digits.
    np.testing.assert_allclose(variables["stats"]["stem"]["norm"]["mean"], mean, atol=1e-5)
    np.testing.assert_allclose(variables["stats"]["stem"]["norm"]["var"], variance, rtol=1e-4)
    stream = np.maximum((sums - mean) / np.sqrt(variance + NORM_EPSILON), 0)
    scale = stream.max() / 255
    np.testing.assert_allclose(variables["scales"]["stem_stream"]["scale"], scale, rtol=1e-4)
    read = round_to_codes(stream, scale, spec.stream).max() / 15
    np.testing.assert_allclose(variables["scales"]["stage1_block1"]["read"]["scale"], read, rtol=1e-4)


def test_every_scale_is_set_and_weights_and_affine_are_those_of_32_bits():
    trained = untrained()
    start = trained.variables(32)
    for observer in ptq.OBSERVERS:
        variables = requantized(4, observer)
        assert jax.tree.structure(variables["scales"]) == jax.tree.structure(start["scales"])
        assert not any((scale == 1).any() for scale in jax.tree.leaves(variables["scales"]))  # 1 is the start of all
        for name in ("params", "affine"):
            jax.tree.map(np.testing.assert_array_equal, variables[name], start[name])
    kernel = np.asarray(start["params"]["classifier"]["kernel"])
    one_for_all = requantized(4, "minmax")["scales"]["classifier"]["weight_scale"]
    np.testing.assert_allclose(one_for_all, np.full((1, 1), np.abs(kernel).max() / 127), rtol=1e-6)


def test_observers_differ_where_clipping_pays_and_layers_see_the_layers_before_them():
    mse, minmax = (requantized(4, observer)["scales"] for observer in ("mse", "minmax"))
    kernels = [scales["stage1_block1"]["conv1"]["conv"]["weight_scale"] for scales in (mse, minmax)]
    assert (kernels[0] <= kernels[1]).all() and (kernels[0] < kernels[1]).any()
    means = [requantized(4, name)["stats"]["stage1_block1"]["conv2"]["norm"]["mean"] for name in ptq.OBSERVERS]
    assert (means[0] != means[1]).any()


def test_at_eight_bits_a_trained_network_predicts_as_its_full_precision_self(tiny_run):
    workdir, loaded = tiny_run
    trained = runs.load_trained(workdir)
    heldout, images = (x[:128].astype(np.float32) / 255 for x in (loaded.heldout.images, loaded.test.images))
    full = calibration.calibrated(trained.network, trained.variables(32), trained.spec(32), heldout)  # statistics alike
    forward = jax.jit(lambda variables, spec: trained.network.module.apply(variables, images, spec, "eval")[0])
    expected = np.asarray(forward(full, trained.spec(32)))
    logits = np.asarray(forward(ptq.requantize(trained, 8, "mse", heldout), trained.spec(8)))
    # Weights and activations each round by at most 1/254 of their range: a twentieth of the logits' spread is ample.
    assert np.abs(logits - expected).mean() < 0.05 * expected.std()
    accuracies = [(x.argmax(-1) == loaded.test.labels[:128]).mean() for x in (logits, expected)]
    assert abs(accuracies[0] - accuracies[1]) < 0.05 and (logits.argmax(-1) == expected.argmax(-1)).mean() > 0.9


def test_a_requantized_network_can_be_deployed_and_agrees_with_its_integers():
    trained = untrained(round_bias=True)
    variables, spec = requantized(4, "mse", round_bias=True), trained.spec(4)
    model = deploy.lower(trained.network.module, variables, spec, 8)
    integers = deploy.integer_forward(model, jnp.asarray(np.rint(255 * IMAGES), jnp.uint8))
    logits, _ = jax.jit(trained.network.module.apply, static_argnums=3)(variables, IMAGES, spec, "eval")
    # Equal but for codes that a float32 rounding moves over a half: one step of the classifier's accumulator, far below 1e-2.
    np.testing.assert_allclose(integers, logits, atol=1e-2 * float(jnp.std(logits)))


def test_a_network_of_observed_scales_takes_its_maxima():
    trained = untrained("observed")
    variables = requantized(4, "minmax", scale="observed")
    expected = calibration.calibrated(trained.network, trained.variables(32), trained.spec(4), IMAGES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), variables["stats"], expected["stats"])


@pytest.mark.parametrize(
    "scale, bits, observer, message",
    [
        ("learned", 4, "median", "the observer must be one of minmax, mse, got 'median'"),
        ("learned", 32, "mse", r"bits must be 2\.\.8 for a re-quantized network, got 32; attack"),
        ("learned", 9, "mse", r"bits must be 2\.\.8 or 32, got 9"),
        ("observed", 4, "mse", "observer 'mse' needs a network of quant.scale=learned, got 'observed'.*use minmax"),
    ],
)
def test_what_cannot_be_quantized_so_is_refused_in_one_line(scale, bits, observer, message):
    with pytest.raises(ValueError, match=message) as error:
        ptq.requantize(untrained(scale), bits, observer, IMAGES)
    assert "\n" not in str(error.value)
