"""Residual networks: 32 bits against a plain network, whole codes at every convolution below, published sizes, calibration in order."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_networks
from jax import lax

from triqdef_jax import quantize
from triqdef_jax.models import MODELS, make_model
from triqdef_jax.models.layers import LayerOptions, QuantAct, QuantConv, QuantDense
from triqdef_jax.models.resnet import PLANS, ResNet, ResNetPlan

RESNET8 = make_model("resnet8", num_classes=5, width=4)
# Both other branches of the code in one small network: bottleneck blocks with and without projection, the pooled 7x7 stem.
BOTTLENECK = ResNet(ResNetPlan((2, 1), 2, is_bottleneck=True, is_imagenet=True), 5, LayerOptions())
OBSERVED = make_model("resnet8", num_classes=5, width=4, options=LayerOptions(scale="observed"))


@functools.partial(jax.jit, static_argnums=(0, 4))
def probe(module, variables, images, spec, mode):
    """Run a network; returns ((logits, features), changed variables, inputs of products, inputs of activation quantizers)."""
    products, quantized = {}, {}

    def watch(call, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, QuantConv | QuantDense):
            products[context.module.path] = args[0]
        if context.method_name == "__call__" and isinstance(context.module, QuantAct):
            quantized[context.module.path] = args[0]
        return call(*args, **kwargs)

    mutable = {"train": ["moments"], "eval": [], "calibrate": ["scales", "stats"]}[mode]
    with nn.intercept_methods(watch):
        outputs, changed = module.apply(variables, images, spec, mode, mutable=mutable)
    as_names = lambda seen: {"/".join(path): value for path, value in seen.items()}
    return outputs, changed, as_names(products), as_names(quantized)


@functools.cache
def images(size_px=8):
    """Eight images of all kinds: noise, a black one, a white one."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, size_px, size_px, 3))
    pixels[0], pixels[1] = 0, 255
    return (pixels / 255).astype(np.float32)


@functools.cache
def variables(module, size_px=8):
    """Weights with norm gains of both signs, so that nothing is hidden behind a one or a zero; scales are all 1."""
    rng = np.random.default_rng(1)
    draws = {
        "kernel": lambda shape: rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape),
        "bias": lambda shape: rng.normal(0, 1, shape),
        "gamma": lambda shape: rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape),
        "beta": lambda shape: rng.normal(0, 1, shape),
        "mean": lambda shape: rng.normal(0, 1, shape),
        "var": lambda shape: rng.uniform(0.5, 2, shape),
        "scale": np.ones,
        "weight_scale": np.ones,
        "largest": np.ones,
    }
    init = lambda: module.init(jax.random.key(0), images(size_px), quantize.make_bit_spec(32), "eval")
    draw = lambda path, leaf: np.asarray(draws[path[-1].key](leaf.shape), np.float32)
    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(init))


@functools.cache
def calibrated(module, spec_arguments, size_px=8):
    spec = quantize.make_bit_spec(*spec_arguments[:1], **dict(spec_arguments[1:]))
    _, changed, _, _ = probe(module, variables(module, size_px), images(size_px), spec, "calibrate")
    return {**variables(module, size_px), **changed}, spec


def plain_network(module, tree, pixels, mode):
    """The same function without any of our layers: `lax` convolutions, NumPy-style norms, additions."""
    plan, moments = module.plan, {}
    at = lambda collection, path: functools.reduce(lambda node, key: node[key], path, tree[collection])

    def conv_norm(x, path, stride):
        kernel = at("params", (*path, "conv"))["kernel"]
        pad = [(n // 2, n // 2) for n in kernel.shape[:2]]
        x = lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        stats = at("stats", (*path, "norm"))
        mean, var = (x.mean((0, 1, 2)), x.var((0, 1, 2))) if mode == "train" else (stats["mean"], stats["var"])
        moments["/".join(path)] = {"mean": mean, "var": var}
        affine = at("affine", (*path, "norm"))
        return (x - mean) / jnp.sqrt(var + 1e-5) * affine["gamma"] + affine["beta"]

    def block(x, name, stride):
        strides = (1, stride, 1) if plan.is_bottleneck else (stride, 1)
        y = x
        for index, step in enumerate(strides, start=1):
            y = conv_norm(y if index == 1 else jnp.maximum(y, 0), (name, f"conv{index}"), step)
        return jnp.maximum(
            y + (conv_norm(x, (name, "projection"), stride) if "projection" in tree["params"][name] else x), 0
        )

    x = jnp.maximum(conv_norm((255 * pixels - 128) / 64, ("stem",), 2 if plan.is_imagenet else 1), 0)
    if plan.is_imagenet:
        x = lax.reduce_window(x, 0.0, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    features = {"stem": x}
    for stage, num_blocks in enumerate(plan.stage_blocks, start=1):
        for index in range(1, num_blocks + 1):
            x = block(x, f"stage{stage}_block{index}", 2 if stage > 1 and index == 1 else 1)
        features[f"stage{stage}"] = x
    classifier = tree["params"]["classifier"]
    return (x.mean((1, 2)) @ classifier["kernel"] + classifier["bias"], features), moments


@pytest.mark.parametrize(
    "module, size_px, mode", [(RESNET8, 8, "eval"), (RESNET8, 8, "train"), (BOTTLENECK, 16, "eval")]
)
def test_at_32_bits_the_network_is_the_plain_float_network(module, size_px, mode):
    tree = variables(module, size_px)
    ours, changed, _, _ = probe(module, tree, images(size_px), quantize.make_bit_spec(32), mode)
    theirs, moments = jax.jit(plain_network, static_argnums=(0, 3))(module, tree, images(size_px), mode)
    # float32: under ten layers of sums in another order, relative to the largest value of each tensor.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())
    jax.tree.map(close, ours, theirs)
    for path, expected in moments.items() if mode == "train" else ():
        jax.tree.map(
            close,
            functools.reduce(lambda node, key: node[key], [*path.split("/"), "norm"], changed["moments"]),
            expected,
        )


SPECS = {
    "8": (8,),
    "5": (5,),
    "2": (2,),
    "own_bits": (4, ("edge_bits", 0), ("branch_bits", 0), ("residual_bits", 0)),
    "act_signed": (4, ("act_signed", True), ("round_bias", True)),
}


def assert_codes(tensor, scale, code_range, name):
    codes = np.asarray(tensor) / np.asarray(scale)
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4, err_msg=name)  # one float32 division of a product
    assert code_range.lower <= np.round(codes).min() and np.round(codes).max() <= code_range.upper, name


@pytest.mark.parametrize("arguments", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("module", [RESNET8, OBSERVED], ids=["learned", "observed"])
def test_every_product_reads_whole_codes_within_the_range_of_its_place(module, arguments):
    tree, spec = calibrated(module, arguments)
    pixels = images()[::-1] ** 0.5  # other images than calibration's: values beyond the calibrated range must clip
    (_, features), _, products, _ = probe(module, tree, pixels, spec, "eval")
    assert len(products) == 1 + 2 * 3 + 2 + 1  # stem, three blocks, two projections, classifier
    for name, coded in products.items():
        places = {"stem/conv": quantize.input_range(), "classifier": spec.edge_act}
        assert_codes(coded.values, coded.scale, places.get(name, spec.act), name)
    scales = tree["stats" if module is OBSERVED else "scales"]
    for name, values in features.items():
        entry = scales["stem_stream"] if name == "stem" else scales[f"{name}_block1"]["stream"]
        scale = entry["scale"] if "scale" in entry else entry["largest"] / spec.stream.upper
        assert_codes(values, scale, spec.stream, name)


def test_bottleneck_networks_read_whole_codes_behind_the_pooled_stem_too():
    tree, spec = calibrated(BOTTLENECK, (4,), 16)
    _, _, products, _ = probe(BOTTLENECK, tree, images(16), spec, "eval")
    assert len(products) == 1 + 3 * 3 + 2 + 1
    for name, coded in products.items():
        places = {"stem/conv": quantize.input_range(), "classifier": spec.edge_act}
        assert_codes(coded.values, coded.scale, places.get(name, spec.act), name)


def test_convolutions_read_the_stream_itself_only_where_it_has_the_networks_bits():
    for arguments, is_same in ((8,), True), ((4,), False), (SPECS["own_bits"], True):
        tree, spec = calibrated(RESNET8, arguments)
        (_, features), _, products, _ = probe(RESNET8, tree, images(), spec, "eval")
        for feature, block in ("stem", "stage1_block1"), ("stage1", "stage2_block1"), ("stage2", "stage3_block1"):
            read = products[f"{block}/conv1/conv"]
            assert np.array_equal(read.values, features[feature]) == is_same, (arguments, block)
            if block != "stage1_block1":
                np.testing.assert_array_equal(read.values, products[f"{block}/projection/conv"].values)
            if not is_same:
                assert len(np.unique(read.values)) <= 16 < len(np.unique(features[feature]))


def test_each_scale_is_calibrated_on_what_the_calibrated_layers_before_it_produce():
    tree, spec = calibrated(RESNET8, (4,))
    _, _, _, quantized = probe(RESNET8, tree, images(), spec, "eval")
    uppers = {"read": 15, "act1": 15, "branch": 127, "shortcut": 127, "stream": 255, "stem_stream": 255, "pool": 255}
    for name, values in quantized.items():
        entry = functools.reduce(lambda node, key: node[key], name.split("/"), tree["scales"])
        start = 2 * np.abs(values).mean() / np.sqrt(uppers[name.split("/")[-1]])
        # A code on a rounding edge may flip between two compiled programs; each flip moves a mean by less than 1e-3 of it.
        np.testing.assert_allclose(entry["scale"], start, rtol=2e-3, err_msg=name)


def test_statistics_are_calibrated_under_the_calibrated_scales_of_earlier_layers():
    tree, spec = calibrated(RESNET8, (2,))
    moments = lambda tree: probe(RESNET8, tree, images(), spec, "train")[1]["moments"]
    distance = lambda a, b: max(
        float(np.abs(x - y).max() / np.abs(y).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert distance(moments(tree), tree["stats"]) < 5e-3  # flips of codes between two compiled programs, as above
    assert distance(moments({**tree, "scales": variables(RESNET8)["scales"]}), tree["stats"]) > 0.1


def test_evaluation_is_repeatable_and_treats_every_image_alone():
    tree, spec = calibrated(RESNET8, (32,))
    run = lambda pixels: np.asarray(probe(RESNET8, tree, pixels, spec, "eval")[0][0])
    logits = run(images())
    np.testing.assert_array_equal(run(images()), logits)
    others = images().copy()
    others[1:] = 1 - others[1:]
    np.testing.assert_allclose(run(others)[0], logits[0], rtol=1e-5)  # a kernel may sum in another order
    np.testing.assert_allclose(run(images()[::-1])[::-1], logits, rtol=1e-4, atol=1e-5)
    assert np.abs(run(others)[1:] - logits[1:]).max() > 1e-3


def test_rounded_biases_change_the_network_by_less_than_its_bits_do():
    (plain_tree, plain), (_, rounded) = calibrated(RESNET8, (4,)), calibrated(RESNET8, (4, ("round_bias", True)))
    run = lambda spec: np.asarray(probe(RESNET8, plain_tree, images(), spec, "eval")[0][0])
    moved = np.abs(run(rounded) - run(plain)).mean()
    assert 0 < moved < np.abs(run(quantize.make_bit_spec(32)) - run(plain)).mean()


def test_bfloat16_operands_stay_close_to_float32():
    module = make_model("resnet8", num_classes=5, width=4, options=LayerOptions(dtype="bfloat16"))
    tree = variables(RESNET8)
    run = lambda module: np.asarray(probe(module, tree, images(), quantize.make_bit_spec(32), "train")[0][0])
    exact, rounded = run(RESNET8), run(module)
    assert rounded.dtype == np.float32
    # Nine layers, 2**-8 relative error each at worst, in part cancelled; logits of this network are of order 1.
    assert 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


@functools.cache
def abstract(name, *, num_classes, size_px, width=0):
    module = make_model(name, num_classes=num_classes, width=width)
    pixels = jax.ShapeDtypeStruct((2, size_px, size_px, 3), jnp.float32)
    run = lambda key, pixels: module.init_with_output(key, pixels, quantize.make_bit_spec(32), "eval")
    return jax.eval_shape(run, jax.random.key(0), pixels)


def num_parameters(tree):
    return sum(leaf.size for leaf in jax.tree.leaves((tree["params"], tree["affine"])))


@pytest.mark.parametrize(
    "name, published", [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)]
)
def test_imagenet_networks_have_the_published_numbers_of_parameters_and_map_sizes(name, published):
    # Published: torchvision's models of the same names, norm gains and biases included.
    (logits, features), tree = abstract(name, num_classes=1000, size_px=64)
    assert num_parameters(tree) == published
    widths = [64, *(np.array([64, 128, 256, 512]) * (4 if name == "resnet50" else 1))]
    sizes = [16, 16, 8, 4, 2]
    expected = {
        f: (2, s, s, w) for f, s, w in zip(["stem", "stage1", "stage2", "stage3", "stage4"], sizes, widths, strict=True)
    }
    assert {f: leaf.shape for f, leaf in features.items()} == expected
    assert logits.shape == (2, 1000) and tuple(expected) == make_model(name, num_classes=2).plan.stages


@pytest.mark.parametrize("name, blocks", [("resnet8", 1), ("resnet20", 3)])
def test_cifar_networks_have_the_parameters_of_the_formula_and_map_sizes(name, blocks):
    (logits, features), tree = abstract(name, num_classes=10, size_px=32)
    convolutions = (
        9 * 3 * 16 + sum(9 * 2 * w * w * blocks for w in (16, 32, 64)) - sum(9 * w * w // 2 for w in (32, 64))
    )
    projections = sum(w * w // 2 for w in (32, 64))
    norms = 2 * (16 + sum(2 * blocks * w for w in (16, 32, 64)) + 32 + 64)
    assert num_parameters(tree) == convolutions + projections + norms + 64 * 10 + 10
    assert {f: leaf.shape for f, leaf in features.items()} == {
        "stem": (2, 32, 32, 16),
        "stage1": (2, 32, 32, 16),
        "stage2": (2, 16, 16, 32),
        "stage3": (2, 8, 8, 64),
    }
    assert logits.shape == (2, 10)


def test_resnet20_has_270_thousand_parameters_and_a_width_scales_every_stage():
    _, tree = abstract("resnet20", num_classes=10, size_px=32)
    assert num_parameters(tree) == 272_474  # 0.27 M, with 1x1 projections
    (_, features), _ = abstract("resnet8", num_classes=10, size_px=32, width=6)
    assert {f: leaf.shape[-1] for f, leaf in features.items()} == {"stem": 6, "stage1": 6, "stage2": 12, "stage3": 24}


def test_resnet56_has_27_blocks_of_two_convolutions():
    assert len(list(PLANS["resnet56"].blocks())) * 2 + 2 == 56


def test_an_unknown_network_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model.name must be one of .*resnet18, .*resnet8, .*got 'vgg'"):
        make_model("vgg", num_classes=10)
    assert set(PLANS) < set(MODELS)


def test_every_network_has_a_plan_that_names_its_maps_and_tells_their_sides():
    for name in MODELS.keys() - small_networks.PLANS.keys():
        plan = make_model(name, num_classes=10).plan
        assert plan.stages[:2] == ("stem", "stage1") and plan.width > 0, name
        image_size_px = 32 if name.endswith("_cifar") else 224
        sides = [plan.map_side_px(stage, image_size_px) for stage in plan.stages]
        assert sides == sorted(sides, reverse=True) and sides[-1] >= 1, name


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="mode must be one of train, eval, calibrate, got 'test'"):
        RESNET8.apply({}, images(), quantize.make_bit_spec(8), "test")
