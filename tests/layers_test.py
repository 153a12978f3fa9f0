"""Each quantized layer against NumPy: codes, accumulator grids, norms in all three modes, and what the modes may change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import quantize
from triqdef_jax.models import layers
from triqdef_jax.models.layers import BitNorm, Coded, LayerOptions, QuantAct, QuantConv, QuantDense

LEARNED, OBSERVED = LayerOptions(), LayerOptions(scale="observed")


@functools.partial(jax.jit, static_argnums=(0, 4))
def apply(module, variables, inputs, spec, mode):
    """Apply a layer as one program; returns (output, the variables it changed or reported)."""
    mutable = {"train": ["moments"], "eval": [], "calibrate": ["scales", "stats"]}[mode]
    return module.apply(variables, inputs, spec, mode, mutable=mutable)


def normal(*shape, seed=0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, std, shape), jnp.float32)


def coded(codes, scale):
    """A tensor of whole codes with a scale that is no power of two, as a layer meets it."""
    return Coded(jnp.asarray(codes, jnp.float32) * jnp.float32(scale), jnp.float32(scale))


def assert_whole(numbers, *, error):
    """Check that all numbers are whole up to the float32 error that their size allows."""
    np.testing.assert_allclose(numbers, np.round(numbers), atol=error)


def test_every_pixel_value_has_its_own_code_and_the_full_gradient_below_32_bits():
    pixels = jnp.arange(256, dtype=jnp.float32) / 255
    images = pixels.reshape(1, 16, 16, 1)
    for bits in (2, 8):
        output, pull = jax.vjp(lambda x, b=bits: layers.code_images(x, quantize.make_bit_spec(b)).values, images)
        np.testing.assert_array_equal(output.reshape(-1), (np.arange(256) - 128) / 64)
        np.testing.assert_allclose(pull(jnp.ones_like(images))[0], 255 / 64, rtol=1e-6)  # black and white included


def test_at_32_bits_an_image_between_two_pixel_values_is_normalised_but_not_rounded():
    images = jnp.full((1, 1, 1, 3), 100.4 / 255)
    at = lambda bits: layers.code_images(images, quantize.make_bit_spec(bits)).values
    np.testing.assert_allclose(at(32), (100.4 - 128) / 64, rtol=1e-5)  # float32 error of a difference
    np.testing.assert_array_equal(at(8), (100 - 128) / 64)


@pytest.mark.parametrize("kind, sign", [("act", 0), ("act_signed", 1), ("edge_act", 0), ("branch", 1), ("stream", 0)])
def test_a_quantized_activation_is_its_scale_times_codes_of_the_kinds_range(kind, sign):
    values = normal(4, 5, seed=1) if sign else jax.nn.relu(normal(4, 5, seed=1))
    spec = quantize.make_bit_spec(3)
    _, calibrated = apply(QuantAct(LEARNED, kind), {}, values, spec, "calibrate")
    output, _ = apply(QuantAct(LEARNED, kind), calibrated, values, spec, "eval")
    code_range = getattr(spec, kind)
    mean = np.abs(np.asarray(values)).mean()
    np.testing.assert_allclose(output.scale, 2 * mean / np.sqrt(code_range.upper), rtol=1e-5)  # float32 mean of 20
    np.testing.assert_array_equal(output.values, quantize.quantize(values, output.scale, *code_range) * output.scale)


def test_a_learned_scale_changes_in_calibration_only():
    values, spec = normal(2, 3), quantize.make_bit_spec(4)
    variables = {"scales": {"scale": jnp.float32(0.3)}}
    for mode in ("train", "eval"):
        output, changed = apply(QuantAct(LEARNED, "act"), variables, values, spec, mode)
        assert output.scale == np.float32(0.3) and not changed


def test_a_scale_driven_below_the_smallest_is_reported_as_the_one_in_use():
    output, _ = apply(
        QuantAct(LEARNED, "act_signed"),
        {"scales": {"scale": jnp.float32(-1.0)}},
        normal(2, 3),
        quantize.make_bit_spec(4),
        "eval",
    )
    assert output.scale == np.float32(quantize.MIN_SCALE)
    np.testing.assert_allclose(np.abs(output.values), 7 * quantize.MIN_SCALE, rtol=1e-6)


def test_an_observed_scale_follows_the_running_maximum_and_training_reports_the_batchs():
    values, spec = jnp.array([[0.5, 6.0], [2.0, 1.0]]), quantize.make_bit_spec(4)
    module = QuantAct(OBSERVED, "act")
    _, calibrated = apply(module, {}, values, spec, "calibrate")
    assert calibrated["stats"]["largest"] == 6.0
    output, changed = apply(module, calibrated, values / 2, spec, "train")
    np.testing.assert_allclose(output.scale, 6 / 15, rtol=1e-6)  # the running one, not this batch's
    assert changed == {"moments": {"largest": 3.0}}
    clipped, changed = apply(module, calibrated, 2 * values, spec, "eval")
    np.testing.assert_allclose(clipped.values.max(), 6.0, rtol=1e-6)
    assert not changed


def test_the_estimator_of_the_options_reaches_activations_and_weights_and_changes_no_value():
    spec, values = quantize.make_bit_spec(2), jnp.array([[0.2, 0.9, 40.0]])
    act, conv = {"scales": {"scale": jnp.float32(0.3)}}, {"scales": {"weight_scale": jnp.full((1, 1, 1, 1), 0.3)}}
    kernel, inputs = jnp.array([0.2, 40.0]).reshape(1, 1, 2, 1), Coded(jnp.ones((1, 1, 1, 2)), jnp.float32(1.0))
    activate = lambda v, options: apply(QuantAct(options, "act"), act, v, spec, "eval")[0].values
    convolve = lambda k, options: (
        apply(QuantConv(options, 1, size=1), conv | {"params": {"kernel": k}}, inputs, spec, "eval")[0].values
    )
    for run, argument in ((activate, values), (convolve, kernel)):
        for name in quantize.ESTIMATORS:
            options = LayerOptions(estimator=name)
            np.testing.assert_array_equal(run(argument, options), run(argument, LEARNED))
            slope = jax.grad(lambda x, run=run, options=options: run(x, options).sum())(argument).ravel()
            assert (slope[-1] == 0) == (name == "clipped" or name == "soft_round")  # exp(-100) is 0 in float32
            assert slope[0] != 0
    with pytest.raises(ValueError, match="estimator must be one of clipped, identity, soft_round"):
        activate(values, LayerOptions(estimator="none"))


@pytest.mark.parametrize("options", [LEARNED, OBSERVED], ids=["learned", "observed"])
@pytest.mark.parametrize("is_edge, bits, upper, container", [(False, 4, 7, 16), (True, 4, 127, 1), (False, 2, 1, 64)])
def test_a_convolution_returns_whole_accumulators_and_the_step_of_the_deployed_one(
    options, is_edge, bits, upper, container
):
    inputs = coded(np.random.default_rng(2).integers(0, 16, (2, 4, 4, 3)), 0.07)
    module, spec = QuantConv(options, 5, is_edge=is_edge), quantize.make_bit_spec(bits)
    kernel = normal(3, 3, 3, 5, seed=3, std=0.2)
    variables = {"params": {"kernel": kernel}}
    _, calibrated = apply(module, variables, inputs, spec, "calibrate")
    output, _ = apply(module, variables | calibrated, inputs, spec, "eval")
    weight_scale = np.asarray(output.scale) / 0.07 * container
    expected = (
        np.abs(kernel).max((0, 1, 2)) / upper
        if options is OBSERVED
        else 2 * np.abs(kernel).mean((0, 1, 2)) / np.sqrt(upper)
    )
    np.testing.assert_allclose(weight_scale, expected, rtol=1e-5)  # one scale per output channel
    accumulators = np.asarray(output.values) / (np.asarray(output.scale) * container)
    assert_whole(accumulators, error=0.02)  # sums up to 27 * 15 * 127 = 5e4 in float32
    codes = np.clip(np.round(np.asarray(kernel) / weight_scale), -upper, upper)
    patch = np.pad(np.round(np.asarray(inputs.values) / 0.07), ((0, 0), (1, 1), (1, 1), (0, 0)))[1, 1:4, 2:5]
    np.testing.assert_allclose(accumulators[1, 1, 2], np.einsum("hwc,hwcd->d", patch, codes), atol=0.02)


def test_a_depthwise_convolution_has_a_filter_and_a_scale_for_every_channel():
    codes, spec = np.random.default_rng(2).integers(0, 16, (2, 4, 4, 3)), quantize.make_bit_spec(4)
    module = QuantConv(LEARNED, 3, stride=2, is_depthwise=True)
    kernel = normal(3, 3, 1, 3, seed=3, std=0.2) * jnp.array([1.0, 3.0, 9.0])
    variables = {"params": {"kernel": kernel}}
    _, calibrated = apply(module, variables, coded(codes, 0.07), spec, "calibrate")
    output, _ = apply(module, variables | calibrated, coded(codes, 0.07), spec, "eval")
    scale = np.asarray(calibrated["scales"]["weight_scale"])
    assert scale.shape == (1, 1, 1, 3)
    np.testing.assert_allclose(scale.ravel(), 2 * np.abs(kernel).mean((0, 1, 2)) / np.sqrt(7), rtol=1e-5)
    np.testing.assert_allclose(output.scale, 0.07 * scale.ravel() / 16, rtol=1e-5)  # 4-bit codes times 16 in a byte
    weights = np.clip(np.round(np.asarray(kernel) / scale), -7, 7)[:, :, 0]
    expected = np.einsum("hwc,hwc->c", codes[1, 1:4, 1:4], weights)
    accumulators = np.asarray(output.values)[1, 1, 1] / (np.asarray(output.scale) * 16)
    np.testing.assert_allclose(accumulators, expected, atol=1e-3)  # sums up to 9 * 15 * 7 = 945 in float32


def test_concatenated_tensors_keep_their_values_codes_and_scales():
    tensors = [coded(np.arange(8).reshape(1, 2, 2, 2), 0.3), coded(-np.arange(4).reshape(1, 2, 2, 1), 0.07)]
    joined = layers.concatenate(tensors)
    np.testing.assert_array_equal(joined.values, np.concatenate([t.values for t in tensors], axis=-1))
    np.testing.assert_array_equal(joined.scale, np.float32([0.3, 0.3, 0.07]))
    again = layers.concatenate([joined, tensors[1]])
    np.testing.assert_array_equal(again.scale, np.float32([0.3, 0.3, 0.07, 0.07]))


def test_stored_codes_pass_a_norm_as_an_accumulator_of_sixty_four_times_their_codes():
    stored, spec = coded([[[[3.0, -5.0, 200.0]]]], 0.02), quantize.make_bit_spec(4, round_bias=True)
    variables = norm_variables()
    output, _ = apply(BitNorm(), variables, layers.as_accumulator(stored), spec, "eval")
    gain = np.asarray(variables["affine"]["gamma"]) / np.sqrt(np.asarray(variables["stats"]["var"]) + 1e-5)
    steps = np.asarray(output) / (0.02 * np.abs(gain) / 64)
    assert_whole(steps, error=0.05)  # up to 64 * 200 and a bias of some thousands in float32
    bias = np.round(
        (np.asarray(variables["affine"]["beta"]) - variables["stats"]["mean"] * gain) / (0.02 * np.abs(gain) / 64)
    )
    np.testing.assert_allclose(steps.ravel(), 64 * np.sign(gain) * [3, -5, 200] + bias, atol=0.05)


def test_at_32_bits_a_convolution_uses_its_weights_as_they_are():
    inputs, kernel = coded(np.ones((1, 3, 3, 2)), 0.5), normal(3, 3, 2, 4)
    variables = {"params": {"kernel": kernel}, "scales": {"weight_scale": jnp.ones((1, 1, 1, 4))}}
    output, _ = apply(QuantConv(LEARNED, 4), variables, inputs, quantize.make_bit_spec(32), "eval")
    np.testing.assert_allclose(
        output.values[0, 1, 1], 0.5 * kernel.sum((0, 1, 2)), rtol=1e-5, atol=1e-6
    )  # 18 float32 terms


def test_bfloat16_operands_stay_within_their_rounding_of_float32():
    inputs, kernel = coded(np.random.default_rng(4).integers(0, 16, (2, 4, 4, 8)), 0.07), normal(3, 3, 8, 4, seed=5)
    variables = {"params": {"kernel": kernel}}
    outputs = []
    for dtype in ("float32", "bfloat16"):
        module, spec = QuantConv(LayerOptions(dtype=dtype), 4), quantize.make_bit_spec(8)
        _, calibrated = apply(module, variables, inputs, spec, "calibrate")
        output, _ = apply(module, variables | calibrated, inputs, spec, "eval")
        assert output.values.dtype == jnp.float32
        outputs.append(np.asarray(output.values))
    exact, rounded = outputs
    assert (
        0 < np.abs(rounded - exact).max() < 2**-8 * np.abs(exact).max() * 4
    )  # 2**-9 per operand, 72 terms of both signs


def classifier(bias, *, round_bias, bits=4):
    inputs = coded(np.random.default_rng(6).integers(0, 256, (3, 6)), 0.011)
    variables = {"params": {"kernel": normal(6, 4, seed=7), "bias": bias}}
    spec = quantize.make_bit_spec(bits, round_bias=round_bias)
    _, calibrated = apply(QuantDense(LEARNED, 4), variables, inputs, spec, "calibrate")
    logits, _ = apply(QuantDense(LEARNED, 4), variables | calibrated, inputs, spec, "eval")
    scale = calibrated["scales"]["weight_scale"]
    assert scale.shape == (1, 1)  # one for all classes, so that integer logits compare
    return np.asarray(logits), np.asarray(inputs.values), np.asarray(variables["params"]["kernel"]), scale.item()


def test_the_classifier_multiplies_codes_and_adds_its_bias():
    bias = normal(4, seed=8)
    logits, values, kernel, scale = classifier(bias, round_bias=False)
    weights = np.clip(np.round(kernel / scale), -127, 127) * scale
    np.testing.assert_allclose(logits, values @ weights + bias, rtol=1e-4, atol=1e-4)  # float32 sums of six


def test_integer_logits_are_whole_once_the_bias_is_rounded_to_their_grid():
    logits, _, _, scale = classifier(normal(4, seed=8), round_bias=True)
    assert_whole(logits / (0.011 * scale), error=0.02)  # sums up to 6 * 255 * 127 = 2e5 in float32
    free, *_ = classifier(normal(4, seed=8), round_bias=False)
    assert (
        0.02 < np.abs(free / (0.011 * scale) - np.round(free / (0.011 * scale))).max()
    )  # without rounding they are not
    assert np.abs(free - logits).max() <= 0.51 * 0.011 * scale  # and rounding moved none by more than half a step


def norm_variables(features=3):
    rng = np.random.default_rng(9)
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, features), jnp.float32)
    return {"affine": {"gamma": draw(-1, 1), "beta": draw(-1, 1)}, "stats": {"mean": draw(-1, 1), "var": draw(0.5, 2)}}


def normalised(values, mean, var, affine):
    return (values - mean) / np.sqrt(var + 1e-5) * np.asarray(affine["gamma"]) + np.asarray(affine["beta"])


def accumulator(seed=10):
    return Coded(normal(4, 3, 3, 3, seed=seed, std=2.0) + 1.0, jnp.full(3, 0.01, jnp.float32))


def test_training_normalises_by_the_batch_and_reports_its_numpy_moments():
    inputs, variables = accumulator(), norm_variables()
    output, changed = apply(BitNorm(), variables, inputs, quantize.make_bit_spec(4), "train")
    values = np.asarray(inputs.values, np.float64)
    mean, var = values.mean((0, 1, 2)), values.var((0, 1, 2))
    # float32 means of 36 values against float64.
    np.testing.assert_allclose(changed["moments"]["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(changed["moments"]["var"], var, rtol=1e-5)
    np.testing.assert_allclose(output, normalised(values, mean, var, variables["affine"]), rtol=1e-4, atol=1e-5)


def test_groups_normalise_each_by_itself_and_report_the_moments_of_all():
    inputs, variables = accumulator(), norm_variables()
    spec = quantize.make_bit_spec(4)
    whole, reported = apply(BitNorm(), variables, inputs, spec, "train")
    output, changed = apply(BitNorm(2), variables, inputs, spec, "train")
    halves = [Coded(inputs.values[rows], inputs.scale) for rows in (slice(2), slice(2, 4))]
    own = [apply(BitNorm(), variables, half, spec, "train")[0] for half in halves]
    np.testing.assert_allclose(
        output, np.concatenate(own), rtol=1e-5, atol=1e-6
    )  # the same float32 sums, compiled twice
    assert np.abs(output - whole).max() > 0.01
    for name in ("mean", "var"):  # float32 means of 18 and of 36 values
        np.testing.assert_allclose(changed["moments"][name], reported["moments"][name], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(apply(BitNorm(4), variables, inputs, spec, "train")[0], whole)
    np.testing.assert_array_equal(
        apply(BitNorm(2), variables, inputs, spec, "eval")[0], apply(BitNorm(), variables, inputs, spec, "eval")[0]
    )
    with pytest.raises(ValueError, match=r"model\.norm_group=3 must divide the 4 images"):
        apply(BitNorm(3), variables, inputs, spec, "train")


def test_evaluation_normalises_by_the_running_statistics_and_changes_nothing():
    inputs, variables = accumulator(), norm_variables()
    output, changed = apply(BitNorm(), variables, inputs, quantize.make_bit_spec(4), "eval")
    stats = {name: np.asarray(value) for name, value in variables["stats"].items()}
    np.testing.assert_allclose(
        output, normalised(np.asarray(inputs.values), **stats, affine=variables["affine"]), rtol=1e-4, atol=1e-5
    )
    assert not changed


def test_calibration_stores_the_batchs_statistics_and_uses_them():
    inputs, variables = accumulator(), norm_variables()
    output, changed = apply(BitNorm(), variables, inputs, quantize.make_bit_spec(4), "calibrate")
    values = np.asarray(inputs.values, np.float64)
    np.testing.assert_allclose(changed["stats"]["mean"], values.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(changed["stats"]["var"], values.var((0, 1, 2)), rtol=1e-5)
    again, _ = apply(BitNorm(), variables | changed, inputs, quantize.make_bit_spec(4), "eval")
    np.testing.assert_allclose(again, output, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_the_statistics_of_the_batch_but_not_through_running_ones():
    inputs, variables, weight = accumulator(), norm_variables(), normal(4, 3, 3, 3, seed=11)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(mode):
        loss = lambda v: jnp.sum(
            weight * apply(BitNorm(), variables, Coded(v, inputs.scale), quantize.make_bit_spec(4), mode)[0]
        )
        return jax.grad(loss)(inputs.values)

    # The output of training does not change when a channel is shifted or stretched: two sums vanish up to float32 rounding.
    np.testing.assert_allclose(gradient("train").sum((0, 1, 2)), 0, atol=1e-4)
    centred = inputs.values - inputs.values.mean((0, 1, 2))
    np.testing.assert_allclose((gradient("train") * centred).sum((0, 1, 2)), 0, atol=1e-3)
    assert np.abs(gradient("eval").sum((0, 1, 2))).min() > 0.01


def test_batch_moments_have_exact_first_and_second_gradients(x64):
    rng = np.random.default_rng(13)
    values, weight = (jnp.asarray(rng.normal(1.0, 2.0, (3, 2, 2, 2))) for _ in range(2))
    plain = lambda v: (v.mean((0, 1, 2)), v.var((0, 1, 2)))

    def derivatives(moments):
        normalise = lambda v: (v - moments(v)[0]) / jnp.sqrt(moments(v)[1] + 1e-5)
        first = jax.grad(lambda v: jnp.sum(weight * jnp.tanh(normalise(v))))
        return jax.jit(lambda v: (moments(v), first(v), jax.grad(lambda u: jnp.sum(jnp.sin(first(u))))(v)))(values)

    pairs = zip(jax.tree.leaves(derivatives(layers.batch_moments)), jax.tree.leaves(derivatives(plain)), strict=True)
    for ours, theirs in pairs:
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)  # float64 sums of twelve


def test_the_norm_keeps_accumulators_on_their_grid_once_the_bias_is_rounded():
    codes = np.random.default_rng(12).integers(-200, 200, (2, 2, 2, 3))
    inputs = Coded(jnp.asarray(codes, jnp.float32) * 0.01, jnp.full(3, 0.01, jnp.float32))
    variables = norm_variables()
    gain = np.asarray(variables["affine"]["gamma"]) / np.sqrt(np.asarray(variables["stats"]["var"]) + 1e-5)
    output, _ = apply(BitNorm(), variables, inputs, quantize.make_bit_spec(4, round_bias=True), "eval")
    steps = np.asarray(output) / (0.01 * np.abs(gain))
    assert_whole(steps, error=0.01)  # a few hundred steps in float32
    free, _ = apply(BitNorm(), variables, inputs, quantize.make_bit_spec(4), "eval")
    np.testing.assert_allclose(
        np.asarray(free) / (0.01 * np.abs(gain)), steps, atol=0.51
    )  # moved by half a step at most
    assert not np.array_equal(free, output)


def test_a_bias_without_a_usable_grid_becomes_an_integer_of_at_most_22_bits():
    spec = quantize.make_bit_spec(4, round_bias=True)
    bias, step = jnp.array([0.7, -3.0, 0.0, 1.0]), jnp.array([0.0, 1e-12, 0.0, 0.3])
    rounded, pull = jax.vjp(lambda b: layers.on_accumulator_grid(b, step, spec), bias)
    np.testing.assert_allclose(rounded, [0.7, -3.0, 0.0, 0.9], rtol=2**-22)  # half a step of |bias| / 2**22
    np.testing.assert_array_equal(pull(jnp.ones(4))[0], jnp.ones(4))  # straight through, finite where the gain is 0
    unrounded = layers.on_accumulator_grid(bias, step, quantize.make_bit_spec(4))
    np.testing.assert_array_equal(unrounded, bias)
