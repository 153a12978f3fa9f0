"""The step on paper: layers against published counts, sums and seconds against arithmetic by hand. `scaling_test` compares with programs."""

import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import step_model
from triqdef_jax.step_model import Layers, Machine

LAYERS = Layers(macs=1000, kernels=100, outputs=50, norms=3, channels=12, act_scales=5, classes=10)


def method_of(name):
    config = config_lib.default()
    config.loss.method = name
    return config_lib.make_training_method(config)


@pytest.mark.parametrize(
    ("model", "num_params", "gmacs"),
    # Trained numbers and multiply-adds as torchvision documents them for the same networks.
    [("resnet18", 11_689_512, 1.814), ("resnet34", 21_797_672, 3.664), ("resnet50", 25_557_032, 4.089)],
)
def test_layers_add_up_to_the_published_networks(model, num_params, gmacs):
    config = config_lib.default()
    config.data.name, config.model.name, config.model.width = "imagenet", model, 0
    layers = step_model.count_layers(config_lib.make_network(config), 224)
    assert layers.kernels + 2 * layers.channels + layers.classes == num_params
    assert layers.macs / 1e9 == pytest.approx(gmacs, abs=5e-4)  # documented to three digits


def test_depthwise_kernels_read_one_channel_each():
    config = config_lib.default()
    config.data.name, config.model.name, config.model.width = "imagenet", "mobilenetv2", 0
    layers = step_model.count_layers(config_lib.make_network(config), 224)
    assert layers.kernels + 2 * layers.channels + layers.classes == 3_504_872  # as torchvision documents


@pytest.mark.parametrize(
    ("method", "norms", "kernels", "vectors", "scalars", "waits"),
    [
        ("qat", "global", 1, 4 * 12 + 10, 5 + 2, 3 * 3),
        ("patch_ce", "local", 2, 8 * 12 + 20, 14, 0),
        ("triqdef", "global", 3, 14 * 12 + 20, 14, 8 * 3),
        ("triqdef", "local", 3, 9 * 12 + 20, 14, 0),
    ],
)
def test_every_bit_width_and_pass_sums_its_own_gradients(method, norms, kernels, vectors, scalars, waits):
    method = method_of(method)
    reduced = step_model.reduced_bytes(LAYERS, method, num_bits=2, num_stacked=5, norms=norms)
    pairs = 2 * 25 * len(method.map_layers) if method.pair_penalty else 0
    expected = {"kernels": 2 * kernels * 100, "vectors": 2 * vectors, "scalars": 2 * scalars, "pairs": pairs}
    assert reduced == {name: 4 * count for name, count in expected.items()}
    assert step_model.num_waits(LAYERS, method, num_bits=2, norms=norms) == 2 * waits + 1


def test_norms_are_local_where_no_group_spans_two_devices():
    assert step_model.norm_scope(0, [16, 8]) == "global"
    assert step_model.norm_scope(8, [16, 8]) == "local"
    assert step_model.norm_scope(16, [16, 8]) == "global"
    assert step_model.norm_scope(1, [0.5]) == "global"  # more devices than images


def test_what_is_kept_grows_with_images_bit_widths_and_the_second_derivative():
    kept = lambda name, images, bits: step_model.kept_bytes(LAYERS, method_of(name), num_images=images, num_bits=bits)
    assert kept("qat", 4, 2) == 4 * 50 * step_model.KEPT_ONCE * 4 * 2
    assert kept("triqdef", 8, 5) == 5 * kept("triqdef", 4, 2)
    assert kept("qat", 4, 2) < kept("patch_ce", 4, 2) < kept("triqdef", 4, 2)


def test_a_step_takes_what_its_slowest_part_takes_and_every_wait():
    machine = Machine(4, 1e6, memory_bytes=1e9, memory_rate=1e6, link_rate=1e6, reduce_latency_s=0.5, efficiency=0.5)
    seconds = step_model.step_seconds(machine, LAYERS, method_of("qat"), batch_size=8, num_bits=1, norms="global")
    reduced = 4 * (100 + 4 * 12 + 10 + 7)
    assert seconds["multiply"] == pytest.approx(
        2 * 1000 * (2 * 3) / 5e5
    )  # two images a device, three forward-equivalents
    assert seconds["memory"] == pytest.approx(step_model.TOUCHES * 4 * 50 * 6 / 1e6)
    assert seconds["reduce"] == pytest.approx(1.5 * reduced / 1e6)  # a ring of four sends 2 x 3 / 4 of them
    assert seconds["wait"] == 9 * 0.5
    assert seconds["best"] == seconds["multiply"] + seconds["wait"]
    assert seconds["worst"] == pytest.approx(seconds["best"] + seconds["reduce"])
