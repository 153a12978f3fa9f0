"""Evaluation: from a trained run to a record whose numbers come from the stored outcomes, flags of the network itself, and refusals."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import entry, evaluate, inference, presets, processes, results, runs, sources
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


def linear(weights, images):
    return images.reshape(images.shape[0], -1) @ weights


def with_linear_networks(subject):
    """The subject with targets that compile in no time: least squares on the training images, rounded more coarsely row by row."""
    loaded = subject.data
    pixels = np.reshape(loaded.train.images / np.float32(255), (len(loaded.train.labels), -1))
    weights = np.linalg.lstsq(pixels, np.eye(10, dtype=np.float32)[loaded.train.labels], rcond=1e-3)[0]
    rows = []
    for target, levels in zip(subject.targets, (1000, 20, 10), strict=True):
        network = jax.tree_util.Partial(linear, jnp.asarray(np.round(levels * weights) / levels))
        query = lambda images, network=network: network(np.asarray(images, np.float32) / 255)
        rows.append(target._replace(logits_fn=network, query=query))
    return subject._replace(targets=tuple(rows))


@pytest.fixture(scope="module")
def subject(tiny_run, tmp_path_factory):
    """The subject of the tiny run under a tiny preset, as the program makes it."""
    folder = tmp_path_factory.mktemp("evaluated")
    trained = runs.load_trained(tiny_run[0])
    trained.config.patches.shared_dir = str(folder / "shared")
    trained.config.patches.sizes_px = (4,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "quick", TINY)
        return evaluate.make_subject(trained, folder / "run", "quick")


@pytest.fixture(scope="module")
def evaluated(subject, pool):
    """(subject, record, outcomes, what was said) of a preset with one cheap cell of each access on linear networks."""
    changed = {"patch_pgd": (("num_steps", 1),), "sparse_rs": (("num_queries", 5),), "grey": ()}
    names = ("grey|random", "patch_pgd|self:4", "sparse_rs|self:4")
    plans = [
        dataclasses.replace(p, num_images=0 if p.attack == "grey" else 6, fields=changed[p.attack])
        for p in presets.plans("quick", subject.config)
        if p.name in names
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "eval_pools", lambda config, data: {"held-out": pool})
        patch.setattr(presets, "plans", lambda *_: tuple(plans))
        said = []
        cheap = with_linear_networks(subject)
        record, outcomes = evaluate.evaluate(cheap, "quick", progress=lambda *line: said.append(line))
    return cheap, record, outcomes, said


def test_every_row_predicts_the_test_images(subject, evaluated):
    assert [target.name for target in subject.targets] == ["32", "4", "3"] == list(evaluated[2].targets)
    np.testing.assert_array_equal(subject.labels, subject.data.test.labels[:50])
    predicted = inference.predict(subject.targets[:2], subject.images, 16)
    images = jnp.asarray(subject.images) / 255.0
    for row, bits in enumerate((32, 4)):
        np.testing.assert_array_equal(predicted[row], subject.trained.logits_fn(bits)(images).argmax(-1))
    for row, target in enumerate(evaluated[0].targets):
        np.testing.assert_array_equal(evaluated[2].clean[row], target.query(subject.images).argmax(-1))


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
    attacks = {cell["name"]: cell for cell in stored["cells"] if cell["access"] != "control"}
    for k, name in enumerate(stored["targets"]):
        right = arrays["clean"][k] == arrays["labels"]
        assert stored["clean_accuracy"][name]["num"] == right.sum()
        for cell in attacks:  # each met the first images; in the end `right` is what no attack fooled
            rows = arrays[f"rows:{cell}"]
            right[rows] &= (arrays[f"predictions:{cell}"][k] == arrays["labels"][rows]).all(axis=0)
        assert stored["robust_all"][name]["num"] == right[: stored["robust_all"][name]["den"]].sum()
        for field, among in (("worst", attacks), ("worst_transfer", ["held-out"])):
            rates = [attacks[cell]["success"][name]["asr_correct"]["rate"] for cell in among]
            assert stored[field][name]["rate"] == max(rate for rate in rates if rate is not None)


def test_every_point_of_a_curve_can_be_recomputed_from_its_file(evaluated, monkeypatch, capsys):
    subject, made = evaluated[0], presets.curve_plans
    few = lambda points: [(x, dataclasses.replace(p, num_images=6, fields=(("num_steps", x),))) for x, p in points[:2]]
    monkeypatch.setattr(presets, "curve_plans", lambda *asked: {"steps": few(made(*asked)["steps"])})
    record = evaluate.measure_curves(subject)
    assert json.loads((subject.results / "curves.json").read_text())["curves"] == record["curves"]
    arrays = np.load(subject.results / "curves_outcomes.npz", allow_pickle=False)
    (curve,) = record["curves"]
    assert [point["x"] for point in curve["points"]] == [1, 2] and curve["attacked"] == "self:4"
    for point in curve["points"]:
        patched, rows = arrays[f"predictions:{point['cell']}"][:, 0], arrays[f"rows:{point['cell']}"]
        counted = arrays["clean"][:, rows] == arrays["labels"][rows]
        fooled = (counted & (patched != arrays["labels"][rows])).sum(axis=1)
        assert [(rate["num"], rate["den"]) for rate in point["success"].values()] == [
            *zip(fooled, counted.sum(1), strict=True)
        ]
    assert "success against steps (4 bits)" in capsys.readouterr().out


def test_the_table_has_a_line_per_cell_and_the_worst_at_the_end(evaluated):
    lines = results.table(evaluated[1]).splitlines()
    assert lines[0].split() == ["bits", "32", "4"]  # 3 bits, not trained, are in the record alone
    assert [line[:15].rstrip() for line in lines[-3:]] == ["worst asr", "worst transfer", "right under all"]


def test_the_text_says_what_was_checked(evaluated):
    record = evaluated[1]
    assert record["checks"][0].startswith("no attack beats patch_pgd made on the attacked bit-width (2 pairs")
    assert record["checks"][-1] == "logits repeat and every image has a gradient (3 targets)"
    assert f"checks: {'; '.join(record['checks'])}" in evaluate._text(record, "a file").splitlines()


def test_sanity_needs_no_source_network_and_flags_attacks_that_only_occlude(evaluated, monkeypatch):
    subject = evaluated[0]
    monkeypatch.setattr(sources, "eval_pools", lambda *_: pytest.fail("a pool was asked for"))
    plans = [p for p in presets.plans("sanity", subject.config) if p.attack in ("noise", "sparse_rs")]
    weak = [
        dataclasses.replace(p, num_images=6 * bool(p.surrogate), fields=(("num_queries", 1),) * bool(p.surrogate))
        for p in plans
    ]
    monkeypatch.setattr(presets, "plans", lambda *_: tuple(weak))
    record, _ = evaluate.evaluate(subject, "sanity")
    assert [(flag["flag"], flag["target"]) for flag in record["flags"]] == [("no better than noise", "32")]
    assert any(line.startswith("DO NOT beat noise of the same size at 32 bits") for line in record["checks"])


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


def options_of(**changes):
    """The flags of the program; what is not named has its default."""
    defaults = {
        "workdirs": [],
        "preset": "pools",
        "extra_bits": [],
        "compare": "",
        "checkpoint": "last",
        "deployed": False,
        "clean_only": False,
        "defenses": [],
        "surrogates": [],
    }
    return types.SimpleNamespace(**defaults | changes)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "--workdirs=DIR[,DIR] is needed"),
        ({"workdirs": ["nowhere"], "preset": "huge"}, "--preset must be one of pools, smoke, quick"),
        ({"workdirs": ["nowhere"], "extra_bits": ["9"]}, "9"),
        ({"workdirs": ["{run}"], "defenses": ["armour"]}, "defence: expected one of median, "),
        ({"workdirs": ["{run}"], "compare": "nowhere"}, "no run in nowhere"),
        ({"workdirs": ["{run}"], "checkpoint": "newest"}, "checkpoint must be last, best or a step, got 'newest'"),
        ({"workdirs": ["{run}"], "compare": "{run}", "preset": "curves"}, "--compare needs a preset with attacks"),
        ({"workdirs": ["{run}"], "compare": "{other}"}, "is on digits and "),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(tmp_path, tiny_run, monkeypatch, changes, said):
    config = json.loads((tiny_run[0] / "config.json").read_text())
    config["data"]["name"] = "cifar10"
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = lambda value: value.format(run=tiny_run[0], other=tmp_path) if isinstance(value, str) else value
    options = options_of(**{k: [*map(named, v)] if isinstance(v, list) else named(v) for k, v in changes.items()})
    monkeypatch.setattr(evaluate.flags, "FLAGS", options)
    monkeypatch.setattr(processes, "from_flags", processes.Start)
    monkeypatch.setattr(runs, "load_trained", lambda *_: pytest.fail("a run was loaded"))
    with pytest.raises(entry.UserError) as error:
        evaluate.main([])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_missing_run_ends_in_one_line_and_exit_code_two(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "triqdef_jax.evaluate", "--workdirs=nowhere"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(pathlib.Path(__file__).resolve().parent.parent), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no run in nowhere"), done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_finished_record_is_read_while_run_code_and_question_are_the_same(
    evaluated, tiny_run, tmp_path, monkeypatch, capsys
):
    _, record, outcomes, _ = evaluated
    copied = shutil.copytree(tiny_run[0], tmp_path / "tiny", ignore=shutil.ignore_patterns("results"))
    options = options_of(preset="quick")
    identity = evaluate._identity(runs.load_trained(copied), (), options)
    results.save(copied / "results", "quick", record | {"identity": identity}, outcomes)
    monkeypatch.setattr(evaluate, "make_subject", lambda *_, **__: pytest.fail("measured again"))
    found = evaluate._evaluate_run(copied, (), options)
    assert "checks: no attack beats patch_pgd" in capsys.readouterr().out
    assert (
        found.record["cells"][0]["success"]["4"]["asr_correct"]["num"]
        == record["cells"][0]["success"]["4"]["asr_correct"]["num"]
    )
    np.testing.assert_array_equal(found.outcomes.cells[1].predictions, outcomes.cells[1].predictions)
    # Not even where another name stands for the same checkpoint: its results have a folder of their own.
    others = (options_of(preset="quick", deployed=True), options_of(preset="quick", checkpoint="best"))
    for extra, other in (((3,), options), *(((), other) for other in others)):
        with pytest.raises(pytest.fail.Exception, match="measured again"):
            evaluate._evaluate_run(copied, extra, other)
    (copied / "results" / "quick.json").write_text("{torn")
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        evaluate._evaluate_run(copied, (), options)


def test_runs_that_met_other_patches_are_not_compared_and_the_program_says_so_in_a_line(
    evaluated, tmp_path, monkeypatch
):
    _, record, outcomes, _ = evaluated
    others = tuple(cell._replace(digest=f"another {cell.name}") for cell in outcomes.cells)
    found = {"a": outcomes, "b": outcomes._replace(cells=others)}
    evaluated_as = lambda workdir, extra, options: evaluate._Evaluated(
        record | {"name": workdir}, found[workdir], tmp_path
    )
    monkeypatch.setattr(evaluate, "_evaluate_run", evaluated_as)
    monkeypatch.setattr(evaluate, "_check_runs", lambda options: None)
    monkeypatch.setattr(evaluate.flags, "FLAGS", options_of(workdirs=["a"], compare="b", preset="quick"))
    monkeypatch.setattr(processes, "from_flags", processes.Start)
    with pytest.raises(
        entry.UserError, match="held-out: the two runs met different patches; evaluate both with the same"
    ) as error:
        evaluate.main([])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_runs_of_other_seeds_are_summarised_and_others_set_side_by_side(evaluated, tmp_path, monkeypatch, capsys):
    _, record, outcomes, _ = evaluated
    runs_of = {"a": {"seed": 0}, "b": {"seed": 1}, "c": {"seed": 0, "name": "other"}}
    found = {name: evaluate._Evaluated(record | changes, outcomes, tmp_path) for name, changes in runs_of.items()}
    monkeypatch.setattr(evaluate, "_evaluate_run", lambda workdir, extra, options: found[workdir])
    monkeypatch.setattr(evaluate, "_check_runs", lambda options: None)
    for workdirs, said, has_file in (("ac", "side by side", False), ("ab", "2 seeds of qat", True)):
        monkeypatch.setattr(evaluate.flags, "FLAGS", options_of(workdirs=list(workdirs), preset="quick"))
        monkeypatch.setattr(processes, "from_flags", processes.Start)
        assert evaluate.main([]) == 0
        assert said in capsys.readouterr().out and (tmp_path / "seeds.json").is_file() == has_file
