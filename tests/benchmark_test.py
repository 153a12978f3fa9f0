"""The benchmark takes real steps of a tiny network: its figures exist and agree with one another, bad flags are refused."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest
from benchmark_example import tiny

from triqdef_jax import benchmark, defenses, latency

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPREADS = ("wall_seconds", "cpu_seconds", "wall_ratio", "cpu_ratio")


@pytest.fixture(scope="module")
def figures():
    """Both bit-widths under the per-bit plan, compiled carelessly, because only the bookkeeping is under test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield benchmark.measure(tiny(), plans=("per_bit",), rounds=2)
    jax.config.update("jax_disable_most_optimizations", False)


def test_every_kind_of_step_has_all_figures_and_they_survive_json(figures):
    kinds = json.loads(json.dumps(figures))["plans"]["per_bit"]
    assert tuple(kinds) == benchmark.KINDS
    for row in kinds.values():
        for name in SPREADS:
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        for stage in ("trace", "lower", "compile"):
            assert row[f"{stage}_cpu_seconds"] > 0 and row[f"{stage}_wall_seconds"] > 0
        assert row["gflops"] > 0 and row["peak_mib"] > row["residual_mib"] > 0
        assert row["images_per_second"] == pytest.approx(4 / row["wall_seconds"]["median"])  # batch over seconds


def test_pieces_add_up_to_the_step(figures):
    kinds = figures["plans"]["per_bit"]
    calls = {kind: {name: piece["calls"] for name, piece in row["pieces"].items()} for kind, row in kinds.items()}
    assert calls["method"] == calls["clean"] == {"forward": 2, "backward": 2, "add": 1, "finish": 1}
    assert calls["plain"] == {"forward": 1, "backward": 1, "finish": 1}
    for row in kinds.values():
        pieces = row["pieces"].values()
        # The same float64 numbers, added in another order.
        assert row["gflops"] == pytest.approx(sum(piece["calls"] * piece["gflops"] for piece in pieces))
        assert row["compile_cpu_seconds"] == pytest.approx(sum(piece["compile_cpu_seconds"] for piece in pieces))


def test_ratios_compare_with_the_plain_step_and_its_floor_is_counted_in_forward_passes(figures):
    kinds = figures["plans"]["per_bit"]
    for name in ("wall_ratio", "cpu_ratio"):
        assert kinds["plain"][name] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert kinds["plain"]["flops_ratio"] == 1.0
    assert [kinds[kind]["floor_ratio"] for kind in benchmark.KINDS] == [3.0, 2.0, 1.0]
    # Convolutions are nearly all of a step's operations, so the compiler's count stays near that of forward passes.
    assert kinds["clean"]["flops_ratio"] == pytest.approx(2.0, rel=0.1)
    assert kinds["method"]["flops_ratio"] == pytest.approx(3.0, rel=0.1)


@pytest.mark.parametrize(
    ("method", "passes"), [("triqdef", 2 * (3 + 0.5 * 6)), ("patch_ce", 2 * (3 + 0.5 * 3)), ("qat", 2 * 3)]
)
def test_the_floor_charges_for_patched_images_and_for_their_differentiated_input_gradient(method, passes):
    assert benchmark.floor_passes(tiny(method)) == passes


def test_the_fused_plan_measures_one_program_per_step():
    jax.config.update("jax_disable_most_optimizations", True)
    config = benchmark.variants(tiny("qat"))["plain"]
    stepper = benchmark.Stepper(config, "fused")
    stepper.take_timed()
    jax.config.update("jax_disable_most_optimizations", False)
    row = benchmark.summarize(stepper, stepper)
    assert list(row["pieces"]) == ["step"] and row["bits"] == [4]
    assert row["residual_mib"] is None and row["peak_mib"] > 0
    assert int(stepper.state.step) == stepper.num_taken == 1


def test_micro_batches_are_calls_of_the_same_programs():
    jax.config.update("jax_disable_most_optimizations", True)
    config = benchmark.variants(tiny("qat"))["plain"]
    config.train.accumulate_steps = 2
    stepper = benchmark.Stepper(config, "fused")
    stepper.take_timed()
    jax.config.update("jax_disable_most_optimizations", False)
    row = benchmark.summarize(stepper, stepper)
    calls = {name: piece["calls"] for name, piece in row["pieces"].items()}
    assert calls == {"terms": 2, "split": 2, "merge": 1, "finish": 1}
    assert row["peak_mib"] > row["pieces"]["finish"]["argument_mib"] > 0


def test_the_table_names_every_step_and_its_floor(figures):
    lines = benchmark.format_table(figures).splitlines()
    assert lines[0].startswith("resnet8, 16 px, batch 4, bits 8/2, rho 0.5, method patch_ce; ")
    assert [line.split()[:2] for line in lines[2:5]] == [["per_bit", kind] for kind in benchmark.KINDS]


def test_the_latency_of_every_defence_stands_beside_the_bare_network(monkeypatch):
    quick = {name: defenses.get(name) for name in ("median", "gaussian")}
    monkeypatch.setattr(defenses, "DEFENSES", quick)
    monkeypatch.setattr(latency, "BATCHES", (1, 2))
    config = tiny("qat")
    config.data.image_size_px, config.patches.sizes_px = 8, (3,)
    figures = json.loads(json.dumps(benchmark.measure_defenses(config, rounds=2)))
    assert list(figures["ms_per_image"]) == ["none", *quick] and figures["defended_bits"] == 8
    assert all(times["min"] > 0 for row in figures["ms_per_image"].values() for times in row.values())
    lines = benchmark.format_defenses(figures).splitlines()
    assert lines[0].startswith("resnet8, 8 px, 8 bits; ")
    assert [line.split()[0] for line in lines[2:]] == ["none", *quick]


def test_exported_files_stand_beside_the_float_network():
    config = tiny("qat")
    config.model.name, config.model.width, config.data.image_size_px = "tiny", 4, 8
    config.quant.bits = (32, 8, 2)
    figures = json.loads(json.dumps(benchmark.measure_deploy(config, rounds=1)))
    assert list(figures["onnx"]) == ["8", "2"]
    assert all(set(found["sizes"]) == {"integer", "fp32", "quantize_static"} for found in figures["onnx"].values())
    assert not any(found["ran"]["float_operators"] for found in figures["onnx"].values())
    assert "\n2 bits\nONNX file" in benchmark.format_deploy(figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plans": ("per_bit", "scan")}, "--plans must name some of per_bit, fused, got per_bit,scan"),
        ({"plans": ()}, "--plans must name some of per_bit, fused, got none"),
        ({"rounds": 0}, "--rounds must be at least 1, got 0"),
    ],
)
def test_nothing_to_measure_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.measure(tiny(), **arguments)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--what=attack", "--what must be one of step, attacks, defenses, deploy, data, scaling, got 'attack'"),
        ("--workdir=runs/x", "a benchmark has no --workdir"),
    ],
)
def test_bad_flags_end_in_one_line(flag, message):
    command = [sys.executable, "-m", "triqdef_jax.benchmark", flag]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
