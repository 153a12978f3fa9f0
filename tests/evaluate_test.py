"""Evaluation: from a trained run to a record whose numbers come from the stored outcomes, flags of the network itself, and refusals."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import cells, evaluate, presets, results, runs, sources
from triqdef_jax.patch_pool import PatchPool
from triqdef_jax.presets import Preset

TINY = Preset(
    extra_bits=(3,),
    ptq=(),
    surrogates=(),
    universal_steps=1,
    num_patches=1,
    white_steps=1,
    white_images=6,
    queries=50,
    query_images=4,
)


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (2, 4, 4, 3)).astype(np.float32) / 255
    return PatchPool(
        values, np.ones((2, 4, 4), np.float32), np.full(2, 4, np.int32), np.array([1, 2], np.int32), "digest"
    )


@pytest.fixture(scope="module")
def evaluated(tiny_run, pool, tmp_path_factory):
    """(subject, record, outcomes) of a preset with one cheap cell of each access on the tiny run."""
    folder = tmp_path_factory.mktemp("evaluated")
    trained = runs.load_trained(tiny_run[0])
    trained.config.patches.shared_dir = str(folder / "shared")
    trained.config.patches.sizes_px = (4,)
    plans = [
        p
        for p in presets.plans("quick", trained.config)
        if p.name in ("grey|random", "patch_pgd|self:4", "sparse_rs|self:4")
    ]
    changed = {"patch_pgd": (("num_steps", 1),), "sparse_rs": (("num_queries", 5),), "grey": ()}
    plans = [
        cells.dataclasses.replace(p, num_images=0 if p.attack == "grey" else 6, fields=changed[p.attack]) for p in plans
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "eval_pools", lambda config, data: {"held-out": pool})
        patch.setattr(presets, "plans", lambda name, config: tuple(plans))
        patch.setitem(presets.PRESETS, "quick", TINY)
        subject = evaluate.make_subject(trained, folder / "run", "quick")
        said = []
        record, outcomes = evaluate.evaluate(subject, "quick", progress=lambda *line: said.append(line))
    return subject, record, outcomes, said


def test_every_row_predicts_the_test_images(evaluated):
    subject, _, outcomes, _ = evaluated
    assert outcomes.targets == ("32", "4", "3") and outcomes.clean.shape == (3, 50)
    np.testing.assert_array_equal(outcomes.labels, subject.data.test.labels[:50])
    images = jnp.asarray(subject.images) / 255.0
    for row, bits in enumerate((32, 4)):
        np.testing.assert_array_equal(outcomes.clean[row], subject.trained.logits_fn(bits)(images).argmax(-1))


def test_the_record_has_cells_worst_cases_and_what_was_left_out(evaluated):
    _, record, _, _ = evaluated
    assert [cell["name"] for cell in record["cells"]] == [
        "held-out",
        "grey|random",
        "patch_pgd|self:4",
        "sparse_rs|self:4",
    ]
    assert [cell["access"] for cell in record["cells"]] == ["transfer", "control", "white-box", "query"]
    for target in record["targets"]:
        attacked = [cell["success"][target]["asr_correct"] for cell in record["cells"] if cell["access"] != "control"]
        assert record["worst"][target]["rate"] == max(rate["rate"] for rate in attacked if rate["den"])
        assert record["robust_all"][target]["den"] == 6  # images that all attacks share
    assert record["not_run"] and record["kind"] == "evaluation" and record["device"]


def test_every_number_of_a_real_record_can_be_recomputed_from_its_file(evaluated, tmp_path):
    _, record, outcomes, _ = evaluated
    stored = json.loads(results.save(tmp_path, "quick", record, outcomes).read_text())
    arrays = np.load(tmp_path / "quick_outcomes.npz", allow_pickle=False)
    for cell in stored["cells"]:
        patched, target, rows = (arrays[f"{field}:{cell['name']}"] for field in ("predictions", "target", "rows"))
        labels = arrays["labels"][rows]
        for k, name in enumerate(stored["targets"]):
            counted = (arrays["clean"][k][rows] == labels) & (labels != target[:, None])
            rate = cell["success"][name]["asr_correct"]
            assert (rate["num"], rate["den"]) == ((counted & (patched[k] != labels)).sum(), counted.sum())
    for k, name in enumerate(stored["targets"]):
        assert stored["clean_accuracy"][name]["num"] == (arrays["clean"][k] == arrays["labels"]).sum()


def test_the_table_has_a_line_per_cell_and_the_worst_at_the_end(evaluated):
    lines = results.table(evaluated[1]).splitlines()
    assert lines[0].split() == ["bits", "32", "4"]  # 3 bits, not trained, are in the record alone
    assert lines[-2].startswith("worst asr") and lines[-1].startswith("right under all")


def test_progress_counts_cells_up_to_the_last(evaluated):
    said = evaluated[3]
    assert said[0][:2] == (0, 4) and said[-1] == (4, 4, "") and "sparse_rs|self:4" in said[-2][2]


def test_a_network_without_gradient_or_with_random_logits_is_flagged(evaluated):
    subject = evaluated[0]
    steps = iter(range(100))

    def jumpy(images):
        return np.eye(10)[np.full(len(images), next(steps) % 10)]

    flat = jax.tree_util.Partial(lambda images: jnp.zeros((images.shape[0], 10)))
    broken = subject.targets[0]._replace(query=jumpy, logits_fn=flat)
    flags = evaluate.health_flags(subject._replace(targets=(broken, subject.targets[1])))
    assert [(flag["flag"], flag["target"]) for flag in flags] == [
        ("non-deterministic logits", "32"),
        ("zero gradients", "32"),
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "error: --workdirs=DIR[,DIR] is needed"),
        (["--workdirs=nowhere"], "error: no run in nowhere"),
        (["--workdirs=nowhere", "--preset=huge"], "error: --preset must be one of pools, quick"),
        (["--workdirs=nowhere", "--extra_bits=9"], "9"),
        (["--workdirs={run}", "--compare=nowhere"], "error: no run in nowhere"),
        (["--workdirs={run}", "--compare={run}", "--preset=curves"], "error: --compare needs a preset with attacks"),
        (["--workdirs={run}", "--compare={other}"], "is on digits and "),
    ],
)
def test_bad_input_ends_in_one_line_and_exit_code_two(tmp_path, tmp_path_factory, tiny_run, arguments, said):
    other = tmp_path_factory.mktemp("cifar")
    config = json.loads((tiny_run[0] / "config.json").read_text())
    config["data"]["name"] = "cifar10"
    (other / "config.json").write_text(json.dumps(config))
    arguments = [argument.format(run=tiny_run[0], other=other) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "triqdef_jax.evaluate", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(cells.pathlib.Path(__file__).resolve().parent.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_runs_of_other_seeds_are_summarised_and_others_set_side_by_side(evaluated, tmp_path, monkeypatch, capsys):
    _, record, outcomes, _ = evaluated
    runs_of = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 0, "name": "other"}}
    found = {name: evaluate._Evaluated(record | changes, outcomes, tmp_path) for name, changes in runs_of.items()}
    monkeypatch.setattr(evaluate, "_evaluate_run", lambda workdir, extra, options: found[workdir])
    monkeypatch.setattr(evaluate, "_check_runs", lambda options: None)
    for workdirs, said, has_file in (("ac", "side by side", False), ("ab", "2 seeds of qat", True)):
        options = {"workdirs": list(workdirs), "preset": "quick", "extra_bits": [], "compare": ""}
        monkeypatch.setattr(evaluate.flags, "FLAGS", types.SimpleNamespace(**options))
        assert evaluate.main([]) == 0
        assert said in capsys.readouterr().out and (tmp_path / "seeds.json").is_file() == has_file
