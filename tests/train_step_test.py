"""The training step: against direct computations, in float64 against a twin without custom rules, under both plans.

Everything runs in float64: there, two right programs agree to 1e-10, while in float32 sums in another order flip codes
of low bit-widths, which changes gradients by percents.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from triqdef_jax import calibration, optimizer, quantize, sharding, train_step
from triqdef_jax.models import layers
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.models.resnet import ResNet, ResNetPlan
from triqdef_jax.objectives.methods import Inputs, MethodSettings, PatchingSettings, make_method
from triqdef_jax.objectives.penalties import INPUT_GRADIENT, PenaltySettings
from triqdef_jax.train_step import StepSettings, TrainState

BITS = (32, 4, 2)
LOW_BITS = (4, 2)
ORDER = 1e-10  # float64 sums in another order, through a dozen layers and their second derivatives


def make_settings(network, method="triqdef", feature_layers=("stage1",)):
    """A method at its default weights; a rate at which twenty steps of the smallest network learn without chaos."""
    settings = MethodSettings(1.0, feature_layers, PenaltySettings(), PatchingSettings())
    sgd = optax.chain(
        optax.add_decayed_weights(1e-2, mask=optimizer.decayed), optax.sgd(optax.constant_schedule(0.05), momentum=0.9)
    )
    return StepSettings(network, make_method(method, settings), sgd)


def make_inputs(*, dtype, num=8, is_black=False):
    rng = np.random.default_rng(0)
    images = np.round(rng.random((num, 8, 8, 3)) * 255) / 255 * (not is_black)
    patched = images[::2].copy()
    patched[:, 1:4, 2:5] = np.round(rng.random((num // 2, 3, 3, 3)) * 255) / 255
    labels = rng.integers(0, 10, num).astype(np.int32)
    return Inputs(images.astype(dtype), labels, patched.astype(dtype), labels[::2])


def make_network(dtype, bits=BITS, blocks=(1,)):
    return MultiBitNetwork(ResNet(ResNetPlan(blocks, 2), 10, layers.LayerOptions(dtype=dtype)), bits)


def make_spec(network, bits, dtype, *, round_bias=False):
    """The BitSpec with its bounds in the type of the run: the factor 1 / sqrt(N upper) of scale gradients is of their type."""
    spec = network.spec(bits, round_bias=round_bias)
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == np.float32 else x, spec)


def make_arrays(network):
    """Weights and statistics of all bit-widths, float32, calibrated, so that every bit-width computes something sensible."""
    weights, stats = network.init(jax.random.key(0), 8)
    images = make_inputs(dtype="float32").images
    return calibration.calibrate_new_bits(network, weights, stats, network.bits, network.bits, images)


class Step64:
    """The step in float64 under the per-bit plan: settings, a calibrated state, inputs, and the compiled pieces."""

    def __init__(self, blocks=(1,)):
        self.network = make_network("float64", blocks=blocks)
        self.settings = make_settings(self.network, feature_layers=("stage1",) if blocks else ("stem",))
        with jax.enable_x64(False):
            arrays = jax.device_get(make_arrays(make_network("float32", blocks=blocks)))
        weights, stats = jax.tree.map(lambda x: jnp.asarray(x, "float64"), arrays)
        self.state = TrainState(jnp.int32(0), weights, stats, self.settings.optimizer.init(weights))
        self.inputs = make_inputs(dtype="float64")
        mesh = sharding.data_mesh(1)
        self.per_bit = train_step.make_step(self.settings, plan="per_bit", mesh=mesh)
        self.fused = train_step.make_step(self.settings, plan="fused", mesh=mesh)
        self.pieces = self.per_bit.args[1]

    def place(self, bits, *, round_bias=True):
        return self.network.slot(bits), make_spec(self.network, bits, "float64", round_bias=round_bias)

    def forward(self, bits, *, inputs=None, weights=None, pieces=None):
        forward = (pieces or self.pieces).forward
        return forward(weights or self.state.weights, self.state.stats, *self.place(bits), inputs or self.inputs)

    def run(self, step, bits, num_steps, state=None, inputs=None):
        """Biases stay unrounded: on their grid a sum before a ReLU is exactly 0 now and then, and rounding decides which side it falls to."""
        state = jax.tree.map(jnp.copy, state or self.state)  # steps donate their state
        slots, specs = zip(*(self.place(b, round_bias=False) for b in bits), strict=True)
        for _ in range(num_steps):
            state, metrics = step(state, inputs or self.inputs, bits, list(slots), list(specs), np.float32(1))
        return state, metrics


@pytest.fixture(scope="module")
def step64():
    with jax.enable_x64(True):
        yield Step64()


@pytest.fixture(scope="module")
def after_three(step64):
    """(state, metrics) after three steps of two of the three bit-widths under the per-bit plan."""
    with jax.enable_x64(True):
        return step64.run(step64.per_bit, LOW_BITS, 3)


def gpdp_gradient(step64, pieces):
    """Gradient of the GPDP term of two bit-widths to all weights, through the given pieces."""
    values, _, pullbacks = zip(*(step64.forward(bits, pieces=pieces) for bits in LOW_BITS), strict=True)
    maps = [m for _, m in values]
    padding = [jax.tree.map(jnp.zeros_like, maps[0])]
    _, _, cotangents = step64.pieces.penalties(np.array([*LOW_BITS, 0], np.int32), maps + padding, np.float32(1))
    only_gradient = [{**c, "stage1": jnp.zeros_like(c["stage1"])} for c in cotangents]
    gradients = [pieces.backward(p, np.float64(0), c) for p, c in zip(pullbacks, only_gradient, strict=False)]
    return jax.tree.map(np.add, *jax.device_get(gradients))


def largest_difference(tree_a, tree_b):
    """Largest difference of any leaf, relative to the leaf's largest magnitude; leaves that are zero in both count 0."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(tree_a), jax.tree.leaves(tree_b), strict=True):
        scale = np.abs(b).max()
        worst = max(worst, np.abs(a - b).max() / scale if scale else np.abs(a).max())
    return worst


def straight_through_twin(is_float, values, scale, code_range, *, estimator="clipped"):
    """Fake quantization by stop_gradient alone: no custom rule, so JAX derives every order of differentiation."""
    fixed = jax.lax.stop_gradient
    lower, upper = code_range
    code = fixed(jnp.round(values / scale))
    inside = (code >= lower) & (code <= upper)
    slope = jnp.where(inside, code - fixed(values / scale), jnp.clip(code, lower, upper))
    num = values[0].size if jnp.ndim(scale) == 0 else values.size // scale.size
    gain = 1 / jnp.sqrt(num * upper)
    quantized = fixed(jnp.clip(code, lower, upper) * scale)
    quantized += jnp.where(inside, values - fixed(values), 0.0) + (scale - fixed(scale)) * fixed(slope * gain)
    return jnp.where(is_float, values, quantized)


@jax.custom_vjp
def inlined(values, scale, lower, upper):
    return jnp.clip(jnp.round(values / scale), lower, upper) * scale


def _inlined_fwd(values, scale, lower, upper):
    return jnp.clip(jnp.round(values / scale), lower, upper) * scale, (values, scale, lower, upper)


def _inlined_bwd(residuals, cotangent):
    values, scale, lower, upper = residuals
    code = jnp.round(values / scale)
    return jnp.where((code >= lower) & (code <= upper), cotangent, 0.0), jnp.zeros_like(scale), None, None


inlined.defvjp(_inlined_fwd, _inlined_bwd)


def plain_conv(inputs, kernel, *, stride=1, dtype):
    padding = [(n // 2, n // 2) for n in kernel.shape[:2]]
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(inputs, kernel, (stride, stride), padding, dimension_numbers=layout)


def plain_moments(values):
    return jnp.mean(values, axis=(0, 1, 2)), jnp.var(values, axis=(0, 1, 2))


def test_cross_entropy_accuracy_and_maps_equal_a_direct_computation(step64, x64):
    (loss, maps), report, _ = step64.forward(2)
    variables = step64.network.slice(step64.state.weights, step64.state.stats, step64.place(2)[0])

    @jax.jit
    def direct(images, labels):
        def log_loss(images):
            (logits, features), _ = step64.network.module.apply(
                variables, images, step64.place(2)[1], "train", mutable=["moments"]
            )
            chosen = jnp.exp(logits)[jnp.arange(len(labels)), labels] / jnp.exp(logits).sum(axis=1)
            return -jnp.log(chosen).mean(), (logits, features["stage1"])

        return jax.value_and_grad(log_loss, has_aux=True)(images)

    patched = step64.inputs[2:4]
    (ce_patched, (logits, features)), gradient = direct(*patched)
    assert float(report.ce_patched) == pytest.approx(float(ce_patched), rel=ORDER)
    assert float(report.acc_patched) == np.mean(np.argmax(logits, axis=1) == patched[1])
    assert float(loss) == pytest.approx(float(report.ce_clean + report.ce_patched), rel=ORDER)  # lambda_adv is 1
    for name, source in {"stage1": features, INPUT_GRADIENT: gradient}.items():
        expected = np.abs(source).mean(axis=-1)
        expected /= expected.max(axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(maps[name], expected, atol=ORDER)


def test_the_gpdp_gradient_equals_that_of_a_twin_without_custom_rules(step64, x64, monkeypatch):
    real = gpdp_gradient(step64, step64.pieces)
    monkeypatch.setattr(quantize, "fake_quant_unless", straight_through_twin)
    monkeypatch.setattr(
        quantize, "round_to_grid", lambda v, grid: v + jax.lax.stop_gradient(jnp.round(v / grid) * grid - v)
    )
    monkeypatch.setattr(layers, "batch_moments", plain_moments)
    monkeypatch.setattr(layers, "conv2d", plain_conv)
    twin = gpdp_gradient(step64, train_step.make_pieces(step64.settings, train_step.jit))
    assert largest_difference(real, twin) < ORDER
    moved = [np.abs(leaf).max() for leaf in jax.tree.leaves(twin.params)]
    assert np.count_nonzero(moved) == len(moved)


def test_a_rule_that_inlines_the_rounding_fails_the_same_comparison(step64, x64, monkeypatch):
    real = gpdp_gradient(step64, step64.pieces)

    def wrong(is_float, values, scale, code_range, *, estimator="clipped"):
        return jnp.where(is_float, values, inlined(values, scale, *code_range))

    monkeypatch.setattr(quantize, "fake_quant_unless", wrong)
    broken = gpdp_gradient(step64, train_step.make_pieces(step64.settings, train_step.jit))
    assert largest_difference(real.params, broken.params) > 0.01  # percents, where the truth agrees to 1e-10


def test_the_second_order_gradient_of_the_unquantized_network_equals_finite_differences(step64, x64):
    """Loss: sum of c log(map) with c summing to 0 per image, on which a map's constant peak has no influence."""
    (_, maps), _, pullback = step64.forward(32)
    maps = maps[INPUT_GRADIENT]
    chosen = np.where(maps > 0.1, np.random.default_rng(0).normal(size=maps.shape), 0.0)  # away from the kink at 0
    chosen -= (maps > 0.1) * (chosen.sum(axis=(1, 2)) / (maps > 0.1).sum(axis=(1, 2)))[:, None, None]
    cotangents = {INPUT_GRADIENT: chosen / maps, "stage1": jnp.zeros((4, 8, 8))}
    gradient = jax.device_get(step64.pieces.backward(pullback, np.float64(0), cotangents)).params
    params = jax.device_get(step64.state.weights.params)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape) * 1e-6, params)

    def loss(sign):
        moved = jax.tree.map(lambda x, d: x + sign * d, params, direction)
        (_, maps), _, _ = step64.forward(32, weights=step64.state.weights._replace(params=moved))
        return np.sum(chosen * np.log(np.where(chosen == 0, 1.0, maps[INPUT_GRADIENT])))

    slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    # Central differences of step 1e-6: the third derivative leaves 1e-12 of 1, rounding 1e-10 of the 1e-6 difference.
    assert (loss(1) - loss(-1)) / 2 == pytest.approx(slope, rel=1e-4)
    assert abs(slope) > 1e-7


def test_a_patch_on_black_images_changes_the_gradient_at_black_pixels(step64, x64):
    maps = [step64.forward(bits, inputs=make_inputs(dtype="float64", is_black=True))[0][1] for bits in BITS]
    for bits, of_bit in zip(BITS, maps, strict=True):
        black = np.array(of_bit[INPUT_GRADIENT])
        black[:, 1:4, 2:5] = 0.0  # the patch
        assert (black.reshape(4, -1).max(axis=1) > 0).all(), f"{bits} bits: the input quantizer blocks black pixels"


def test_both_plans_give_the_same_states_and_metrics(step64, after_three, x64):
    state, metrics = step64.run(step64.fused, LOW_BITS, 3)
    assert largest_difference(state, after_three[0]) < ORDER
    assert largest_difference(metrics, after_three[1]) < ORDER
    assert largest_difference(state.weights.params, step64.state.weights.params) > 1e-3  # something was learned


def test_recomputing_the_forward_changes_neither_values_nor_gradients_and_keeps_no_activations(step64, x64):
    settings = dataclasses.replace(step64.settings, remat=True)
    found = []
    for pieces in (step64.pieces, train_step.make_pieces(settings, train_step.jit)):
        (loss, maps), report, pullback = step64.forward(2, pieces=pieces)
        rng = np.random.default_rng(0)
        cotangents = {name: rng.normal(size=values.shape) for name, values in maps.items()}  # second derivatives too
        gradient = pieces.backward(pullback, np.float64(0.5), cotangents)
        found.append((sum(x.size for x in jax.tree.leaves(pullback)), (loss, maps, report, gradient)))
    (kept, expected), (kept_by_remat, values) = found
    assert largest_difference(values, expected) < ORDER
    # Left are weights, statistics and the 12 images of 8 x 8 x 3, which are there anyway.
    arrays = (step64.state.weights, step64.state.stats, step64.inputs)
    assert kept_by_remat <= sum(x.size for x in jax.tree.leaves(arrays)) + 30 < kept / 4


def test_arrays_of_inactive_bits_stay_as_they_are(step64, after_three, x64):
    state, _ = after_three
    before, momentum = step64.state, optax.tree.get(state.opt_state, "trace")
    for now, then in ((state.weights.scales, before.weights.scales), (state.weights.affine, before.weights.affine)):
        changes = jax.tree.map(lambda a, b: np.abs(a - b).reshape(len(BITS), -1).max(axis=1), now, then)
        changes = np.array(jax.tree.leaves(changes))
        np.testing.assert_array_equal(changes[:, 0], 0.0)
        assert (changes[:, 1:].max(axis=0) > 0).all()
    for trace in (momentum.scales, momentum.affine):
        assert all((leaf[0] == 0).all() for leaf in jax.tree.leaves(trace))
    moved = [(a[0] == b[0]).all() for a, b in zip(*map(jax.tree.leaves, (state.stats, before.stats)), strict=True)]
    assert all(moved)


def test_running_statistics_pool_the_moments_of_clean_and_patched_images(step64, x64):
    _, report, _ = step64.forward(4)
    stem = report.moments["stem"]["norm"]
    kernel = step64.state.weights.params["stem"]["conv"]["kernel"]
    scale = step64.state.weights.scales["stem"]["conv"]["weight_scale"][1]
    codes = np.clip(np.round(kernel / scale), -127, 127) * scale
    values = [
        np.asarray(plain_conv((255 * np.asarray(x) - 128) / 64, codes, dtype=None))
        for x in (step64.inputs.images, step64.inputs.patched_images)
    ]
    everything = np.concatenate(values).reshape(-1, 2)  # 8 clean and 4 patched images as one batch
    np.testing.assert_allclose(stem["mean"], everything.mean(axis=0), rtol=ORDER)
    np.testing.assert_allclose(stem["var"], everything.var(axis=0), rtol=ORDER)


def test_an_unknown_plan_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"train.plan must be one of auto, per_bit, fused, got 'both'"):
        train_step.make_step(None, plan="both", mesh=None)
