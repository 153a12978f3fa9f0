"""Every runtime of every network family gives the carrier's logits bit for bit; faults in a file are seen; nothing but integers is executed."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from integer_twin import BITS, NETWORKS, example, random_pixels
from onnx import numpy_helper

from triqdef_jax import deploy
from triqdef_jax.deploy import bundle, onnx_graph, stablehlo
from triqdef_jax.deploy import operations as ops
from triqdef_jax.shipping import artefacts, probe, runtimes, speed, verification

INTEGER_KERNELS = {
    "QLinearConv",
    "QLinearAdd",
    "QLinearGlobalAveragePool",
    "QLinearLeakyRelu",
    "QLinearConcat",
    "QGemm",
    "Clip",
    "MaxPool",
    "NhwcMaxPool",
    "Concat",
    "Transpose",
    "Flatten",
    "Reshape",
}


@functools.cache
def carrier_logits(name, bits):
    _, _, model, size_px = example(name, bits)
    pixels = random_pixels(32, size_px)
    return model, pixels, np.asarray(deploy.integer_forward(model, pixels))


@functools.cache
def onnx_file(name, bits, **options):
    model, _, _ = carrier_logits(name, bits)
    return onnx_graph.integer_graph(model, weight_bits=bits, **options).SerializeToString()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_equals_the_carrier_and_runs_integers_alone(name, bits):
    model, pixels, wanted = carrier_logits(name, bits)
    made = onnx_file(name, bits)
    np.testing.assert_array_equal(runtimes.onnx_runner(made)(pixels), wanted)
    ran = speed.executed(made, pixels[:1])
    assert not ran["float_operators"]
    assert ran["operators"].keys() <= INTEGER_KERNELS  # the trace
    assert ran["graph"].keys() <= INTEGER_KERNELS  # the dump of the optimised graph
    assert ran["operators"]["QLinearConv"] == sum(isinstance(op, ops.Conv) for op in model.operations)


@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (4, {"packing": "int"}),
        (2, {"packing": "int"}),
        (4, {"packing": "none"}),
        (4, {"layout": "nchw"}),
        (2, {"edge_bits": 8, "packing": "planes", "layout": "nchw"}),
    ],
)
def test_packings_and_layouts_are_one_function(bits, options):
    _, pixels, wanted = carrier_logits("resnet", bits)
    run = runtimes.onnx_runner(onnx_file("resnet", bits, **options), layout=options.get("layout", "nhwc"))
    np.testing.assert_array_equal(run(pixels), wanted)
    np.testing.assert_array_equal(run(pixels[:1]), wanted[:1])  # the batch is dynamic


@pytest.mark.parametrize("packing", ["planes", "int"])
def test_weights_that_left_the_grid_of_their_bits_are_packed_as_they_are(packing):
    """A norm gain near 0 makes an accumulator's step too fine for its bias; the coarser one puts codes between those of b bits."""
    model, pixels, _ = carrier_logits("resnet", 4)
    place = next(i for i, op in enumerate(model.operations) if getattr(op, "output", "") == "stage1_block1_act1")
    operations = list(model.operations)
    weights = operations[place].weights // 16 * 5
    operations[place] = dataclasses.replace(operations[place], weights=weights.astype(np.int8))
    model = dataclasses.replace(model, operations=tuple(operations))
    made = onnx_graph.integer_graph(model, weight_bits=4, packing=packing).SerializeToString()
    np.testing.assert_array_equal(runtimes.onnx_runner(made)(pixels), deploy.integer_forward(model, pixels))


def test_bit_planes_hold_a_bit_for_each_bit():
    codes = np.array([0, 1, 2, 3, 3, 2, 1, 0, 2])
    planes = onnx_graph.bit_planes(codes, 2)
    assert planes.shape == (2, 2)
    bits = np.unpackbits(planes, axis=1, bitorder="little")[:, :9]
    np.testing.assert_array_equal(bits[0] + 2 * bits[1], codes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "hwc"}, "layout must be one of nhwc, nchw, got 'hwc'"),
        ({"packing": "zip"}, "packing must be one of planes, int, none, got 'zip'"),
        ({"weight_bits": 5, "packing": "int"}, "integer types of 8, 4 and 2 bits, not 5; choose packing 'planes'"),
    ],
)
def test_what_onnx_cannot_say_is_refused(options, words):
    model, _, _ = carrier_logits("resnet", 4)
    with pytest.raises(ValueError, match=words):
        onnx_graph.integer_graph(model, **({"weight_bits": 4} | options))


def test_the_float_graph_is_the_network_without_rounding():
    for name in NETWORKS:
        model, pixels, wanted = carrier_logits(name, 8)
        session = runtimes.onnx_session(onnx_graph.float_graph(model).SerializeToString())
        logits = session.run(None, {"pixels": speed.float_inputs(pixels)})[0]
        correlation = np.corrcoef(logits.ravel(), wanted.ravel())[0, 1]
        assert correlation > 0.95, (name, correlation)


@pytest.mark.parametrize("name", NETWORKS)
def test_stablehlo_equals_the_carrier_for_any_batch_and_names_no_float(name):
    for bits in (8, 2):
        model, pixels, wanted = carrier_logits(name, bits)
        made = stablehlo.export_integers(model)
        assert not stablehlo.float_types(made.mlir_module())
        run = runtimes.stablehlo_runner(made.serialize(), model.operations[-1].scale)
        np.testing.assert_array_equal(run(pixels), wanted)
    single = stablehlo.export_integers(model, batch=1)
    assert "dynamic" not in single.mlir_module() and "shape_assertion" not in single.mlir_module()
    run = runtimes.stablehlo_runner(single.serialize(), model.operations[-1].scale)
    np.testing.assert_array_equal(run(pixels[:1]), wanted[:1])


@pytest.mark.parametrize("upper", [15, 255])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_stablehlo_sums_many_channels_on_maps_smaller_than_their_filter(side, upper):
    rng = np.random.default_rng(side)
    weights = rng.integers(-127, 128, (3, 3, 64, 64)).astype(np.int8)
    scales = np.full(64, 2.0**-12, np.float32)
    conv = ops.Conv(weights, np.zeros(64, np.int32), scales, scales, 1, 1, False, 1, "spread", "out")
    widen = ops.Conv(
        np.ones((1, 1, 3, 64), np.int8),
        np.zeros(64, np.int32),
        scales,
        scales * 2**10,
        1,
        0,
        False,
        1,
        ops.INPUT,
        "spread",
    )
    pool = ops.MeanPool(np.float32(0.25), side * side, "out", "pooled")
    classifier = ops.Dense(weights[0, 0, :, :5], np.zeros(5, np.int32), np.float32(1), np.float32(1), "pooled")
    tensors = {name: ops.Tensor(np.float32(1), 0, upper) for name in ("spread", "out", "pooled")}
    tensors[ops.INPUT] = ops.Tensor(np.float32(1 / 64), -128, 127)
    model = ops.IntegerModel((widen, conv, pool, classifier), tensors, side)
    pixels = random_pixels(16, side)
    run = runtimes.stablehlo_runner(stablehlo.export_integers(model).serialize(), np.float32(1))
    np.testing.assert_array_equal(run(pixels), deploy.integer_forward(model, pixels))


def test_a_float_in_a_module_is_seen():
    for text in ("tensor<4x3xf32>", "tensor<f64>", "tensor<?x8xbf16>", "%0 : f16", "tensor<2xf8E4M3FN>"):
        assert stablehlo.float_types(text), text
    integers = "tensor<?x8xi64> tensor<ui8> tensor<i1> stablehlo.convolution func.func public @main(%arg0: tensor<1x8x8x3xui8>)"
    assert not stablehlo.float_types(integers)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_reference_equals_the_carrier_after_a_round_trip_through_json(name):
    for bits in BITS:
        model, pixels, wanted = carrier_logits(name, bits)
        layers, arrays = bundle.pack(model)
        run = runtimes.numpy_runner(json.loads(json.dumps(layers)), arrays)
        np.testing.assert_array_equal(run(pixels), wanted)


@pytest.mark.skipif(
    runtimes.compiler() is None, reason="no C compiler on this machine; c_source_test fails for it under CI"
)
@pytest.mark.parametrize("name", NETWORKS)
def test_c_equals_the_carrier(name, tmp_path):
    model, pixels, wanted = carrier_logits(name, 4)
    for path, content in artefacts.make(model, ["c"], {}).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    classifier = model.operations[-1]
    run = runtimes.c_runner(tmp_path / "c", tmp_path, classifier.scale, classifier.weights.shape[1])
    np.testing.assert_array_equal(run(pixels), wanted)


def test_shipped_files_run_without_this_package(tmp_path):
    model, pixels, wanted = carrier_logits("resnet", 4)
    about = {"bits": 4, "edge_bits": 8}
    for name, content in artefacts.make(model, ["npz", "stablehlo"], about).items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "images.npy", pixels)
    run = lambda *args, **more: (
        subprocess.run(
            [sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120, **more
        ).stdout
    )
    with open(tmp_path / "model.json") as layers:
        printed = run("-I", "reference.py", "model.npz", "images.npy", stdin=layers)
    logits = lambda lines: np.float32(np.loadtxt(lines.splitlines())) * model.operations[-1].scale
    np.testing.assert_array_equal(logits(printed), wanted)
    printed = run("-I", "-c", LOAD_STABLEHLO)
    np.testing.assert_array_equal(logits(printed), wanted)


LOAD_STABLEHLO = """
import jax.export, numpy, pathlib, sys
function = jax.export.deserialize(bytearray(pathlib.Path("model.jax_export").read_bytes()))
numpy.savetxt(sys.stdout, function.call(numpy.load("images.npy")), fmt="%d")
"""


def drop_clip(graph):
    clip = next(node for node in graph.node if node.op_type == "Clip")
    for node in graph.node:
        node.input[:] = [clip.input[0] if name == clip.output[0] else name for name in node.input]
    graph.node.remove(clip)


def keep_bias_unrounded(graph):
    """Halve the bias' scale and store 2 b + 1: half a step more on every channel."""
    bias, scale = (
        next(c for c in graph.initializer if c.name == f"stage1_block1_act1_bias{end}") for end in ("", "_scale")
    )
    replace(bias, 2 * numpy_helper.to_array(bias) + 1)
    replace(scale, numpy_helper.to_array(scale) / np.float32(2))


def lose_signs(graph):
    weights = next(c for c in graph.initializer if c.name == "stage1_block1_act1_weights")
    replace(weights, np.abs(numpy_helper.to_array(weights)))


def pad_with_black(graph):
    """The codes of the input keep their values, but zero padding becomes pixel 0 instead of 128: a Pad in front, none in the layer."""
    conv = next(node for node in graph.node if node.op_type == "Conv")
    pads = next(a for a in conv.attribute if a.name == "pads")
    width = list(pads.ints)
    pads.ints[:] = [0] * 4
    read = next(node for node in graph.node if node.output[0] == conv.input[0])
    graph.initializer.append(numpy_helper.from_array(np.array([0, 0, *width[:2], 0, 0, *width[2:]]), "pads"))
    pad = onnx.helper.make_node("Pad", [read.input[0], "pads", "code_0"], ["padded"])
    read.input[0] = "padded"
    graph.node.insert(list(graph.node).index(read), pad)


def flip_a_weight(graph):
    weights = next(c for c in graph.initializer if c.name == "stage1_block1_act1_weights")
    values = numpy_helper.to_array(weights).copy()
    place = np.unravel_index(np.abs(values).argmax(), values.shape)
    values[place] = -values[place]
    replace(weights, values)


def replace(constant, values):
    constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), constant.name))


@pytest.mark.parametrize("fault", [None, drop_clip, keep_bias_unrounded, lose_signs, pad_with_black, flip_a_weight])
def test_verification_catches_faults_in_a_file(fault):
    model, pixels, _ = carrier_logits("resnet", 4)
    made = onnx.load_model_from_string(onnx_file("resnet", 4, packing="none"))
    if fault:
        fault(made.graph)
        onnx.checker.check_model(made)
    runners = {
        verification.CARRIER: functools.partial(deploy.integer_forward, model),
        "onnxruntime": runtimes.onnx_runner(made.SerializeToString()),
    }
    record = verification.verify(runners, pixels, np.zeros(len(pixels), np.int32), random_pixels(40, 8, seed=9))
    assert record["is_exact"] == (fault is None)
    assert record["not_exact"] == ([] if fault is None else ["onnxruntime"])
    assert f"{40 if fault is None else record['runtimes']['onnxruntime']['noise_rows_equal']}/40" in verification.table(
        record
    )


def test_a_query_attack_meets_the_file_as_it_meets_the_carrier():
    model, _, _ = carrier_logits("resnet", 4)
    carrier = functools.partial(deploy.integer_forward, model)
    images = random_pixels(8, 8, seed=5)
    labels = np.asarray(carrier(images)).argmax(axis=1).astype(np.int32)
    budget = {"size_px": 3, "num_queries": 40}
    run = runtimes.onnx_runner(onnx_file("resnet", 4))
    record = probe.compare(run, carrier, images, labels, **budget)
    assert record["is_equal"] and record["success"]["den"] == 8
    assert "same patches and outcomes" in probe.text(record)
    other = lambda pixels: np.roll(run(pixels), 1, axis=1)
    assert not probe.compare(other, carrier, images, labels, **budget)["is_equal"]


def test_latency_takes_turns_and_the_static_tool_gives_a_running_model():
    model, pixels, _ = carrier_logits("resnet", 8)
    made = speed.contenders(model, onnx_file("resnet", 8), pixels)
    times = speed.latency(made, rounds=2)
    assert list(times) == [speed.INTEGER, speed.FLOAT, speed.STATIC] and all(t["min"] > 0 for t in times.values())
    ran = speed.executed(*made[speed.FLOAT])
    assert "Conv" in " ".join(ran["operators"]) and ran["float_operators"]
    sizes = {name: len(file) for name, (file, _) in made.items()}
    assert "1.00x" in speed.table(sizes, times, ran)
