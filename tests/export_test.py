"""The program: a trained run becomes verified files and a card; what differs, or would overwrite, leaves nothing behind."""

import json
import pathlib
import re
import shutil
import types

import numpy as np
import pytest

from triqdef_jax import data, entry, export, results, runs, targets
from triqdef_jax.results import Cell, Outcomes
from triqdef_jax.shipping import artefacts, card, runtimes, speed, verification

ROOT = pathlib.Path(__file__).resolve().parent.parent
OPTIONS = {
    "workdir": "",
    "checkpoint": "last",
    "bits": 4,
    "format": ["onnx", "stablehlo", "npz", "c"],
    "out": "",
    "layout": "nhwc",
    "packing": "planes",
    "verify": True,
    "verify_images": 20,
    "noise_images": 10,
    "attack_images": 4,
    "attack_queries": 20,
    "calibration_images": 8,
}


def start(monkeypatch, config=None, **options):
    """Run the program in this process; returns its exit code."""
    monkeypatch.setattr(export.flags, "FLAGS", types.SimpleNamespace(**(OPTIONS | options)))
    monkeypatch.setattr(export, "_CONFIG", types.SimpleNamespace(value=config), raising=False)
    return export.main([])


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    copy = tmp_path_factory.mktemp("export") / "run"
    shutil.copytree(tiny_run[0], copy)
    return copy


def test_a_run_becomes_files_that_are_proven_equal(workdir, monkeypatch, capsys):
    assert start(monkeypatch, workdir=str(workdir)) == 0
    out = workdir / "export" / "4bit"
    names = {path.name for path in out.iterdir()}
    assert names == {
        *("model.onnx", "model.stablehlo", "model.jax_export", "model.json", "model.npz", "reference.py", "c"),
        *("verification.json", "MODEL_CARD.md"),
    }
    record = json.loads((out / "verification.json").read_text())
    found = record["verification"]
    ran = {"carrier", "fake-quant", "onnxruntime", "stablehlo", "numpy"} | ({"c"} if runtimes.compiler() else set())
    assert found["is_exact"] and found["runtimes"].keys() == ran and found["num_images"] == 20
    for name in ran - {"fake-quant"}:
        assert found["runtimes"][name]["rows_equal"] == 20 and found["runtimes"][name]["noise_rows_equal"] == 10
    assert found["attack"]["is_equal"] and not record["onnx"]["ran"]["float_operators"]
    said, text = capsys.readouterr().out, (out / "MODEL_CARD.md").read_text()
    assert "against the carrier forward, 20 data images and 10 of noise" in said and "written to" in said
    assert record["about"]["digest"] in text and "Not measured on this forward" in text
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    # The layer list carries the same digest as was computed from the model.
    trained = runs.load_trained(workdir)
    model = targets.integer_model(trained, data.load(trained.config.data), 4)
    assert json.loads((out / "model.json").read_text())["about"]["digest"] == artefacts.digest(model)


def test_the_examples_of_the_page_run_in_the_folder_of_an_export(workdir, monkeypatch, capsys):
    out = workdir / "export" / "4bit"
    if not out.exists():
        start(monkeypatch, workdir=str(workdir), verify=False, format=["onnx"])
        capsys.readouterr()
    monkeypatch.chdir(out)
    page, names = (ROOT / "docs" / "deploy.md").read_text(), {}
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 2
    for code in examples:
        exec(compile(code, "docs/deploy.md", "exec"), names)
    assert names["logits"].shape == (2, 10) and names["found"]["images"].shape == (2, 8, 8, 3)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_export_that_exists_is_not_overwritten(workdir, monkeypatch, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(entry.UserError, match="is in use; name another --out"):
        start(monkeypatch, workdir=str(workdir), out=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_another_checkpoint_than_the_last_is_shipped_under_its_step(workdir, monkeypatch, capsys):
    assert start(monkeypatch, workdir=str(workdir), checkpoint="4", verify=False, format=["npz"]) == 0
    out = workdir / "export" / "4bit-step4"
    assert f"written to {out}" in capsys.readouterr().out and "step 4," in (out / "MODEL_CARD.md").read_text()


def test_a_runtime_that_differs_fails_the_export_and_leaves_nothing(workdir, monkeypatch, tmp_path, capsys):
    honest = runtimes.onnx_runner
    monkeypatch.setattr(
        runtimes, "onnx_runner", lambda *args, **more: lambda x: honest(*args, **more)(x) + (x[0, 0, 0, 0] > 99)
    )
    options = {"format": ["onnx"], "attack_images": 0}
    assert start(monkeypatch, workdir=str(workdir), out=str(tmp_path / "out"), **options) == entry.EXIT_FAILED
    said = capsys.readouterr()
    assert said.err.startswith("error: logits of onnxruntime are not those of the carrier forward (rows above)")
    assert said.err.endswith("; nothing was written\n") and "20 data images" in said.out
    assert not list(tmp_path.iterdir())


def test_a_float_operator_fails_a_verified_export_alone(workdir, monkeypatch, tmp_path, capsys):
    figures = speed.figures
    monkeypatch.setattr(
        speed,
        "figures",
        lambda rivals: figures(rivals, rounds=1) | {"ran": {"operators": {}, "float_operators": ["Conv"]}},
    )
    options = dict(workdir=str(workdir), out=str(tmp_path / "out"), format=["onnx"], attack_images=0)
    assert start(monkeypatch, **options) == entry.EXIT_FAILED
    assert "error: onnxruntime computes Conv in float on this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert start(monkeypatch, **(options | {"verify": False})) == 0
    assert "None: the export was told to leave it out." in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_a_bit_width_that_was_not_trained_is_said_to_be_calibrated(workdir, monkeypatch, tmp_path, capsys):
    options = dict(out=str(tmp_path / "out"), format=["npz"], bits=6, noise_images=2, verify_images=4)
    assert start(monkeypatch, workdir=str(workdir), **options) == 0
    assert "6 bits were not trained: scales and statistics were calibrated" in capsys.readouterr().out
    assert "not trained: calibrated" in (tmp_path / "out" / "MODEL_CARD.md").read_text()


def test_evidence_that_cannot_be_read_is_told_before_anything_is_written(workdir, monkeypatch, tmp_path):
    (workdir / "results").mkdir(exist_ok=True)
    broken = workdir / "results" / "quick_deployed.json"
    broken.write_text("{")
    with pytest.raises(entry.UserError, match=r"quick_deployed\.json cannot be read"):
        start(monkeypatch, workdir=str(workdir), out=str(tmp_path / "out"))
    broken.unlink()
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told(workdir, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(entry.UserError, match="file"):
        start(monkeypatch, workdir=str(workdir), out=str(tmp_path / "file" / "out"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    options = dict(format=["npz"], noise_images=2, verify_images=4)
    assert start(monkeypatch, workdir=str(workdir), out=str(tmp_path / "link"), **options) == 0
    assert (tmp_path / "link" / "model.npz").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workdir": ""}, "--workdir=DIR is needed"),
        ({"workdir": "nowhere"}, "no run in nowhere"),
        ({"format": ["onnx", "pdf"]}, "--format takes onnx, stablehlo, npz, c, tflite, got 'pdf'"),
        ({"format": []}, "--format takes onnx, stablehlo, npz, c, tflite, got ''"),
        ({"bits": 5, "packing": "int"}, "integer types of 8, 4 and 2 bits, not 5"),
    ],
)
def test_bad_flags_are_told_in_one_line(workdir, monkeypatch, tmp_path, options, words):
    with pytest.raises((entry.UserError, FileNotFoundError), match=words):
        start(monkeypatch, **({"workdir": str(workdir), "out": str(tmp_path / "out")} | options))
    assert not list(tmp_path.iterdir())


def test_a_config_of_another_run_is_refused(workdir, monkeypatch, tiny_config, tmp_path):
    with pytest.raises(entry.UserError, match="holds another config: seed is"):
        start(monkeypatch, tiny_config(seed=99), workdir=str(workdir), out=str(tmp_path / "out"))


ABOUT = {
    **{
        "name": "digits",
        "bits": 4,
        "edge_bits": 8,
        "branch_bits": 8,
        "stream_bits": 8,
        "model": "resnet8",
        "data": "digits",
    },
    **{
        "method": "qat",
        "step": 7,
        "config_hash": "ab",
        "seed": 0,
        "input": "raw",
        "digest": "cd",
        "is_trained": True,
        "versions": {"jax": "1"},
    },
}


def test_the_card_quotes_the_deployed_record_with_counts_and_says_what_is_missing(tmp_path):
    assert card.find_record(tmp_path, ABOUT) is None
    labels = np.arange(8, dtype=np.int32) % 4
    predictions = np.stack([np.zeros(8, np.int32)])[None]
    about = {"attack": "sparse_rs", "surrogate": "self:4", "access": "query"}
    cell = Cell("sparse_rs from self:4", about, predictions, np.array([-1]), np.arange(8), "digest")
    outcomes = Outcomes(("4",), labels, np.arange(8), labels[None], (cell,))
    facts = {"name": "digits", "forward": "integer", "preset": "quick", "step": 7, "config_hash": "ab"}
    record = results.summarise(outcomes, seed=0) | facts
    results.save(tmp_path, "quick_deployed", record, outcomes)
    for stale in ({"step": 6}, {"config_hash": "xy"}):
        assert card.find_record(tmp_path, ABOUT | stale) is None
    text = card.text(ABOUT, None, None, card.find_record(tmp_path, ABOUT))
    assert "| success of sparse_rs from self:4 | 75.0 % [40.9, 92.9] | 6/8 |" in text
    assert "None: the export was told to leave it out." in text and "## Size" not in text
    assert "has no row of 5 bits" in card.text(ABOUT | {"bits": 5}, None, None, record)
    runners = {
        verification.CARRIER: lambda x: np.zeros((len(x), 2)),
        verification.FAKE_QUANT: lambda x: np.eye(2)[x[:, 0] % 2],
    }
    verified = verification.verify(runners, labels[:, None], labels % 2, labels[:2, None])
    said = card.text(ABOUT, verified | {"not_run": {"c": "no C compiler on this machine"}}, None, record)
    assert "Not run: c (no C compiler on this machine)." in said
    assert "Accuracy changes by -50.0 points from the fake-quant graph, MORE THAN ONE" in said
