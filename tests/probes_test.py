"""Features, gradients and Grad-CAM of one bit-width are those of the network; patched images are evaluation's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from triqdef_jax import inference, probes
from triqdef_jax.models.layers import Coded
from triqdef_jax.objectives.penalties import INPUT_GRADIENT
from triqdef_jax.patch_pool import PatchPool

RNG = np.random.default_rng(0)


class Stage(nn.Module):
    """A layer in the manner of the real ones: values and the scale of their codes."""

    @nn.compact
    def __call__(self, inputs):
        return Coded(nn.relu(nn.Conv(4, (3, 3), name="conv")(inputs)), jnp.float32(1.0))


class HandMade(nn.Module):
    """One stage and a linear classifier of its means, by which Grad-CAM has a closed form; `late` belongs to no submodule."""

    @nn.compact
    def __call__(self, images, spec, mode):
        del spec, mode
        stream = Stage(name="stage")(images)
        kernel = self.param("kernel", nn.initializers.normal(1.0), (4, 5))
        return stream.values.mean((1, 2)) @ kernel, {"stage": stream.values, "late": 2.0 * stream.values}


@pytest.fixture(scope="module")
def hand_made():
    module = HandMade()
    variables = module.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)), None, "eval")
    return probes.OneBit(4, module, variables, None), RNG.integers(0, 256, (3, 6, 6, 3), np.uint8)


def test_grad_cam_of_a_hand_made_network_equals_the_formula(hand_made):
    network, images = hand_made
    logits, features = network.module.apply(network.variables, images / np.float32(255), None, "eval")
    kernel, features = np.asarray(network.variables["params"]["kernel"]), np.asarray(features["stage"])
    classes = np.asarray(logits).argmax(-1)
    weights = kernel[:, classes].T / 36  # dy / dA is kernel / (h w) everywhere, and so is its mean
    expected = np.maximum(np.einsum("bk,bhwk->bhw", weights, features), 0.0)
    expected /= expected.max((1, 2), keepdims=True)
    cam = probes.grad_cam(network, images, layer="stage")
    np.testing.assert_array_equal(cam.classes, classes)
    np.testing.assert_allclose(cam.heat, expected, atol=1e-5)  # float32 sums in another order
    assert len(np.unique(expected)) > 10


def test_heat_is_zero_where_nothing_speaks_for_the_class():
    features = np.ones((1, 2, 2, 3), np.float32)
    np.testing.assert_array_equal(probes.cam_heat(features, -features), np.zeros((1, 2, 2)))


def test_a_change_reaches_what_reads_the_layer_and_zero_changes_nothing(hand_made):
    network, images = hand_made
    apply = lambda x: network.module.apply(network.variables, x, None, "eval")
    images = jnp.asarray(images / np.float32(255))
    logits, features = apply(images)
    change = np.zeros(features["stage"].shape, np.float32)
    same, _ = probes.apply_with_change(apply, images, "stage", change)
    np.testing.assert_array_equal(same, logits)
    change[:, 0, 0, 1] = 36.0  # raises the mean of channel 1 by one
    moved, found = probes.apply_with_change(apply, images, "stage", change)
    kernel = network.variables["params"]["kernel"]
    np.testing.assert_allclose(moved - logits, jnp.broadcast_to(kernel[1], moved.shape), atol=1e-5)  # float32 sums
    np.testing.assert_array_equal(found["stage"], features["stage"] + change)


def test_layers_that_are_unknown_or_no_submodules_output_are_refused(hand_made):
    network, images = hand_made
    with pytest.raises(ValueError, match=r"layer: expected one of .*stage, got 'stage9'"):
        probes.grad_cam(network, images, layer="stage9")
    with pytest.raises(ValueError, match="no submodule's output is the feature map 'late'"):
        probes.grad_cam(network, images, layer="late")


def test_a_probe_holds_the_features_and_the_gradient_of_each_images_own_loss(hand_made):
    network, images = hand_made
    labels = np.array([0, 3, 1])
    found = probes.probe(network, images, labels)

    def loss(image):
        logits = network.logits_fn(image[None])[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[1])

    expected = jax.grad(loss)(images[1] / np.float32(255))
    # Float32 sums of a batch of one and of three are ordered differently.
    np.testing.assert_allclose(found.maps[INPUT_GRADIENT][1], expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3
    logits, features = network.module.apply(network.variables, images / np.float32(255), None, "eval")
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    np.testing.assert_allclose(found.maps["stage"], features["stage"], atol=1e-5)


def test_bit_widths_differ_in_what_they_compute(trained):
    run, loaded = trained
    images, labels = loaded.test.images[:4], loaded.test.labels[:4]
    maps = [probes.probe(probes.one_bit(run, b), images, labels).maps for b in (32, 4)]
    assert set(maps[0]) == {"stem", "stage1", INPUT_GRADIENT}
    assert maps[0]["stage1"].shape == (4, 8, 8, 4)
    for name in maps[0]:
        assert (np.asarray(maps[0][name]) != np.asarray(maps[1][name])).any(), name


def test_predictions_and_grad_cam_of_a_trained_network_explain_the_same_class(trained):
    run, loaded = trained
    images = loaded.test.images[:4]
    network = probes.one_bit(run, 4)
    cam = probes.grad_cam(network, images, layer="stage1")
    np.testing.assert_array_equal(cam.classes, network.predict(images))
    np.testing.assert_array_equal(cam.classes, inference.predict([network], images, 2)[0])
    assert cam.heat.shape == (4, 8, 8)
    np.testing.assert_allclose(np.asarray(cam.heat).max((1, 2)), 1.0, rtol=1e-6)  # one division's rounding


def test_each_image_gets_the_next_patch_where_evaluation_pastes_it(trained):
    run, loaded = trained
    images = loaded.test.images[:5]
    pool = make_pool(2)
    found = probes.patched(pool, images, run.config)
    for n in range(5):
        expected = inference.make_paste(pool._asdict(), n % 2, run.config)(images[n : n + 1], np.array([n]))
        np.testing.assert_array_equal(found[n], expected[0])
    assert (found != images).any((1, 2, 3)).all()


def test_a_pool_without_patches_is_refused(trained):
    run, loaded = trained
    with pytest.raises(ValueError, match="at least one patch"):
        probes.patched(make_pool(3).split()[1], loaded.test.images[:2], run.config)


def make_pool(num):
    values = RNG.integers(0, 256, (num, 3, 3, 3)).astype(np.float32) / 255
    return PatchPool(values, np.ones((num, 3, 3), np.float32), np.full(num, 3, np.int32), np.arange(num), "digest")


def test_the_first_test_images_come_without_padding(trained):
    _, loaded = trained
    images, labels = probes.first_test_images(loaded, 7)
    np.testing.assert_array_equal(images, loaded.test.images[:7])
    np.testing.assert_array_equal(labels, loaded.test.labels[:7])
    assert len(probes.first_test_images(loaded, 0)[1]) == len(loaded.test.labels)
