"""Generated C: it compiles without a warning and computes what the carrier forward computes, bit for bit."""

import dataclasses
import os
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest
from integer_twin import lower, make_variables, random_pixels

from triqdef_jax.deploy import arena, c_source, carrier, fixed_point
from triqdef_jax.deploy import operations as ops
from triqdef_jax.deploy.harmony import harmonise
from triqdef_jax.models import make_model
from triqdef_jax.models.layers import LayerOptions
from triqdef_jax.models.multibit import MultiBitNetwork

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
SANITIZED = (*STRICT, "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
HAND_MADE_PX = 9


def compiler():
    """Return the C compiler; without one the test is skipped, or fails where continuous integration promises one."""
    found = shutil.which("cc") or shutil.which("gcc")
    if not found and os.environ.get("CI") == "true":
        pytest.fail("CI=true, and no C compiler (cc, gcc) on the path")
    if not found:
        pytest.skip("no C compiler (cc, gcc) on the path")
    return found


def build(files, folder, *flags):
    """Write and compile a program; returns its path."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    sources = [str(folder / name) for name in files if name.endswith(".c")]
    done = subprocess.run([compiler(), *flags, *sources, "-o", folder / "program"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "program"


def run_program(program, pixels):
    done = subprocess.run([program], input=pixels.tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.frombuffer(done.stdout, "<i4").reshape(len(pixels), -1)


def carrier_logits(model, pixels):
    return np.asarray(jax.jit(carrier.run)(model, pixels)[0])


class Builder:
    """Appends operations with random weights whose outputs use about the whole range of their codes."""

    def __init__(self, size_px):
        self.rng, self.operations = np.random.default_rng(0), []
        self.tensors = {ops.INPUT: ops.Tensor(np.float32(1 / 64), -128, 127)}
        self.size_px = size_px

    def open(self, output, lower, upper):
        self.tensors[output] = ops.Tensor(np.float32(self.rng.uniform(0.5, 2)), lower, upper)

    def conv(self, source, output, shape, lower, upper, *, stride=1, padding=0, is_depthwise=False):
        self.open(output, lower, upper)
        weights = self.rng.integers(-127, 128, shape).astype(np.int8)
        bias = self.rng.integers(-3000, 3000, shape[3]).astype(np.int32)
        read, written = self.tensors[source], self.tensors[output]
        spread = 60 * max(-read.lower, read.upper) / 2 * np.sqrt(np.prod(shape[:3]))
        step = np.float32(upper / spread) * self.rng.uniform(0.5, 2, shape[3]).astype(np.float32)
        weight_scale = (step * written.scale / read.scale).astype(np.float32)
        multiplier = ops.conv_multiplier(read.scale, weight_scale, written.scale)
        arrays = (weights, bias, weight_scale, multiplier)
        self.operations.append(ops.Conv(*arrays, stride, padding, is_depthwise, 1, source, output))

    def requantize(self, source, output, lower, upper):
        self.open(output, lower, upper)
        ratio = ops.ratio(self.tensors[source].scale, self.tensors[output].scale)
        self.operations.append(ops.Requantize(ratio, source, output))

    def add(self, a, b, output, lower, upper):
        self.open(output, lower, upper)
        ratios = (ops.ratio(self.tensors[name].scale, self.tensors[output].scale) for name in (a, b))
        self.operations.append(ops.Add(*ratios, source=a, source_b=b, output=output))

    def max_pool(self, source, output, size, *, stride, before, after):
        self.tensors[output] = self.tensors[source]
        self.operations.append(ops.MaxPool(size, stride, before, after, source=source, output=output))

    def mean_pool(self, source, output, positions):
        self.open(output, 0, 200)
        multiplier = ops.mean_multiplier(self.tensors[source].scale, self.tensors[output].scale, positions)
        self.operations.append(ops.MeanPool(multiplier, positions, source=source, output=output))

    def concat(self, sources, output):
        kept = [self.tensors[name] for name in sources]
        lower, upper = min(t.lower for t in kept), max(t.upper for t in kept)
        self.tensors[output] = ops.Tensor(np.float32(1), lower, upper)
        self.operations.append(ops.Concat(tuple(sources), output))

    def model(self, source, inputs):
        weights = self.rng.integers(-127, 128, (inputs, 5)).astype(np.int8)
        bias = self.rng.integers(-9000, 9000, 5).astype(np.int32)
        classifier = ops.Dense(weights, bias, np.float32(0.01), np.float32(0.3), source=source)
        return harmonise(ops.IntegerModel((*self.operations, classifier), self.tensors, self.size_px))


def every_operation(pool):
    """Return a model with every operation, odd maps, both kinds of pooling windows and codes of both signs; 9 px."""
    net = Builder(HAND_MADE_PX)
    net.conv(ops.INPUT, "stem", (3, 3, 3, 6), 0, 255, stride=2, padding=1)  # 5 x 5
    net.conv("stem", "branch", (3, 3, 1, 6), -128, 127, padding=1, is_depthwise=True)
    net.concat(["stem", "branch", "stem"], "joined")
    net.conv("joined", "normed", (1, 1, 1, 18), 0, 31, is_depthwise=True)
    net.conv("normed", "wide", (1, 1, 18, 7), -128, 127)
    net.requantize("wide", "read", 0, 15)
    net.add("wide", "read", "sum", 0, 255)
    net.max_pool("sum", "pooled", 3, stride=2, before=1, after=1)  # 3 x 3
    net.conv("pooled", "halved", (2, 2, 7, 4), 0, 255, padding=1)  # 4 x 4
    net.conv("halved", "strided", (3, 3, 1, 4), 0, 63, stride=2, padding=1, is_depthwise=True)  # 2 x 2
    net.max_pool("halved", "overhang", 2, stride=3, before=0, after=1)  # 2 x 2
    net.add("strided", "overhang", "last", 0, 127)
    if not pool:
        return net.model("last", 16)
    net.mean_pool("last", "mean", 4)
    return net.model("mean", 4)


@pytest.mark.parametrize("bits", [8, 5, 4, 2])
def test_a_network_in_c_equals_its_carrier_bit_for_bit(bits, tmp_path):
    network = MultiBitNetwork(make_model("tiny", num_classes=10, width=4, options=LayerOptions()), (8, 5, 4, 2))
    model, pixels = lower(network, make_variables(network, bits), bits), random_pixels()
    program = build(c_source.c_files(model, "model"), tmp_path, *STRICT, "-O2")
    expected = carrier_logits(model, pixels)
    assert len(np.unique(expected, axis=0)) > len(pixels) / 2
    np.testing.assert_array_equal(run_program(program, pixels), expected)


@pytest.mark.parametrize("pool", [True, False])
def test_every_operation_equals_the_carrier_and_stays_within_its_memory(pool, tmp_path):
    model, pixels = every_operation(pool), random_pixels(20, HAND_MADE_PX)
    program = build(c_source.c_files(model, "model"), tmp_path, *SANITIZED)
    expected = carrier_logits(model, pixels)
    assert len(np.unique(expected, axis=0)) > len(pixels) / 2
    np.testing.assert_array_equal(run_program(program, pixels), expected)


def test_one_flipped_weight_changes_the_logits(tmp_path):
    model, pixels = every_operation(True), random_pixels(20, HAND_MADE_PX)
    stem, *rest = model.operations
    weights = stem.weights.copy()
    weights[1, 1, 0, 0] ^= -128  # the sign bit
    changed = dataclasses.replace(model, operations=(dataclasses.replace(stem, weights=weights), *rest))
    programs = [
        build(c_source.c_files(m, "model"), tmp_path / k, "-std=c99") for k, m in (("a", model), ("b", changed))
    ]
    right, wrong = (run_program(program, pixels) for program in programs)
    assert (right != wrong).any(axis=1).mean() > 0.5


INSPECTION = r"""
#include <stdio.h>
#include "model.c"
int main(void)
{
    long long value, mantissa, shift;
    printf("%d %d\n", (int)(sizeof arena + sizeof wide_arena + sizeof run + sizeof sums), MODEL_ARENA_BYTES);
    while (scanf("%lld %lld %lld", &value, &mantissa, &shift) == 3) {
        printf("%lld\n", (long long)rescale((int32_t)value, (int32_t)mantissa, (int32_t)shift));
    }
    return 0;
}
"""


def test_rescaling_in_c_is_that_of_fixed_point_and_the_header_tells_the_memory(tmp_path):
    files = c_source.c_files(every_operation(True), "model")
    headers = {name: text for name, text in files.items() if name.endswith(".h")}
    (tmp_path / "model.c").write_text(files["model.c"])  # included, not compiled by itself
    program = build(headers | {"inspection.c": INSPECTION}, tmp_path, *STRICT, "-O2")
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.integers(-(2**31) + 1, 2**31, 200), rng.integers(-40, 40, 200), [2**31 - 1, 1 - 2**31]]
    )
    multipliers = np.exp2(rng.uniform(-30.9, 22.9, len(values))).astype(np.float32)
    multipliers[::3] = 0.5  # halves, where truncating or rounding up would differ
    mantissa, shift = fixed_point.decompose(multipliers)
    lines = "\n".join(f"{v} {m} {s}" for v, m, s in zip(values, mantissa, shift, strict=True))
    printed = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split()
    assert printed[0] == printed[1]
    np.testing.assert_array_equal(np.array(printed[2:], np.int64), fixed_point.rescale(values, multipliers))


def test_the_runner_names_no_float_no_allocation_and_no_library():
    files = c_source.c_files(every_operation(True), "model")
    code = "".join(files[name] for name in ("model.c", "model_kernels.h", "model_weights.h"))
    code = re.sub(r"/\*.*?\*/", "", code, flags=re.DOTALL)
    assert set(re.findall("#include <(.*)>", code)) == {"stddef.h", "stdint.h"}
    assert not re.search(r"\b(float|double|malloc|calloc|free|[0-9]+\.[0-9]+|[0-9]e-?[0-9])", code)


def test_a_short_read_ends_the_program_with_one_line(tmp_path):
    program = build(c_source.c_files(every_operation(False), "digits"), tmp_path, "-std=c99")
    image = random_pixels(1, HAND_MADE_PX).tobytes()
    done = subprocess.run([program], input=image + image[:-1], capture_output=True)
    assert done.returncode == 1
    assert len(done.stdout) == 5 * 4
    assert done.stderr == b"digits: input ended after 242 of an image's 243 bytes\n"


def test_the_header_states_the_scale_of_the_logits_exactly():
    model = every_operation(True)
    scale = re.search(r"MODEL_LOGIT_SCALE (\S+)f ", c_source.c_files(model, "model")["model.h"]).group(1)
    assert float.fromhex(scale) == float(model.operations[-1].scale)


def test_tensors_that_live_together_have_places_of_their_own():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 30, 40)
    lifetimes = {
        str(i): arena.Lifetime(int(rng.integers(1, 50)), int(n), int(n + rng.integers(0, 6)))
        for i, n in enumerate(first)
    }
    places, total = arena.place(lifetimes)
    alive_at = lambda step: [name for name, own in lifetimes.items() if own.first <= step <= own.last]
    for step in range(36):
        taken = [cell for name in alive_at(step) for cell in range(places[name], places[name] + lifetimes[name].size)]
        assert len(taken) == len(set(taken)) and max(taken, default=0) < total
    most_alive = max(sum(lifetimes[name].size for name in alive_at(step)) for step in range(36))
    assert most_alive <= total < 1.5 * most_alive < sum(own.size for own in lifetimes.values())


def test_a_tensor_takes_the_place_of_one_that_nobody_reads_any_more():
    lifetimes = {"a": arena.Lifetime(4, -1, 0), "b": arena.Lifetime(6, 0, 1), "c": arena.Lifetime(3, 1, 2)}
    assert arena.place(lifetimes) == ({"b": 0, "a": 6, "c": 6}, 10)


def test_what_c_cannot_hold_is_refused():
    model = every_operation(False)
    with pytest.raises(ValueError, match="name must be lower-case letters"):
        c_source.c_files(model, "8bit")
    wide = model.tensors | {"last": dataclasses.replace(model.tensors["last"], upper=1000)}
    with pytest.raises(ValueError, match=r"'last' has 0\.\.1000"):
        c_source.c_files(dataclasses.replace(model, tensors=wide), "model")
    with pytest.raises(ValueError, match=r"'last' needs an input of size \(2, 2, 4\), 'strided' has \(3, 3, 4\)"):
        c_source.c_files(dataclasses.replace(model, image_size_px=17), "model")


def test_without_a_compiler_tests_are_skipped_but_not_where_ci_promises_one(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no C compiler"):
        compiler()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no C compiler"):
        compiler()
