"""Rows behind a defence in an evaluation: which are measured, how they are attacked, what is written and printed; on a run of seconds."""

import dataclasses
import json

import pytest

from triqdef_jax import cells, evaluate, presets, results, runs, sources, surrogates
from triqdef_jax.report import wording

DEFENDED = ("median", "patchcleanser")
ATTACKED = ("sparse_rs|self:median:4", "patch_pgd|self:patchcleanser:4", "sparse_rs|self:patchcleanser:4")


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory):
    """(subject, record, outcomes) of both defences around 4 bits of the tiny run, every attack through them cut to a few steps."""
    folder = tmp_path_factory.mktemp("defended")
    trained = runs.load_trained(tiny_run[0])
    trained.config.patches.shared_dir = str(folder / "shared")
    trained.config.patches.sizes_px = (4,)
    trained.config.eval.images = 12
    few = {"patch_pgd": (("location", "random"), ("num_steps", 2)), "sparse_rs": (("num_queries", 5),)}
    through = tuple(f"{defense}:4" for defense in DEFENDED)
    plans = [
        dataclasses.replace(plan, num_images=4, fields=few[plan.attack])
        for plan in presets.plans("quick", trained.config, through)
        if plan.name in ATTACKED
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "eval_pools", lambda config, data: {})
        patch.setattr(presets, "plans", lambda *_: tuple(plans))
        patch.setattr(presets, "target_names", lambda *args: ("4", *through))
        subject = evaluate.make_subject(trained, folder / "run", "quick", defenses=DEFENDED)
        return subject, *evaluate.evaluate(subject, "quick")


def test_each_defence_stands_around_the_widest_and_the_lowest_bit_width(tiny_config):
    config = tiny_config(**{"quant.bits": (32, 8, 2), "bact.starts": (0.5,)})
    bare = presets.target_names("quick", config)
    assert presets.target_names("quick", config, (), ("jedi",)) == (*bare, "jedi:32", "jedi:2")
    assert presets.target_names("pools", config, (), ("tv",))[-2:] == ("tv:32", "tv:2")
    assert presets.target_names("full", config, (), ("tv",))[-3:] == ("tv:32", "tv:8", "tv:2")


def test_rows_are_attacked_through_their_defence_and_slow_ones_with_fewer_queries(tiny_config):
    config = tiny_config()
    added = presets.plans("quick", config, ("median:4", "diffpure:4"))[len(presets.plans("quick", config)) :]
    assert [plan.name for plan in added] == [
        f"{a}|self:{d}:4" for d in ("median", "diffpure") for a in ("patch_pgd", "sparse_rs")
    ]
    queries = [dict(plan.fields)["num_queries"] for plan in added if plan.attack == "sparse_rs"]
    assert queries == [2000, 200]


def test_every_attack_through_a_defence_counts_against_its_row(evaluated):
    subject, record, outcomes = evaluated
    assert outcomes.targets == ("4", "median:4", "patchcleanser:4") == tuple(t.name for t in subject.targets)
    assert tuple(cell["name"] for cell in record["cells"]) == ATTACKED
    assert [cell["access"] for cell in record["cells"]] == ["query", "white-box", "query"]
    assert record["cells"][1]["settings"]["random_logits"]  # a mask drawn in each step
    assert record["defended"] == ["median:4", "patchcleanser:4"] and record["worst"].keys() == set(outcomes.targets)


def test_the_certificate_is_counted_on_all_test_images_and_never_beats_what_is_right(evaluated):
    subject, record, outcomes = evaluated
    certified = record["certified"]["patchcleanser:4"]
    target = subject.targets[2]
    assert certified["den"] == 12 and record["certified"].keys() == {"patchcleanser:4"}
    assert certified["num"] == target.certify(subject.images, subject.labels).sum()
    proven = target.certify(subject.images, subject.labels)
    for cell in outcomes.cells:  # patches of the certified size
        assert (cell.predictions[2][:, proven[cell.rows]] == outcomes.labels[cell.rows][proven[cell.rows]]).all()


def test_a_record_of_defended_rows_is_written_read_and_printed(evaluated, tmp_path):
    _, record, outcomes = evaluated
    path = results.save(tmp_path, "quick", record, outcomes)
    assert json.loads(path.read_text())["defended"] == record["defended"]
    lines = evaluate._text(record, path).splitlines()
    assert any(line.startswith("median:4 ") and "worst asr" in line for line in lines)
    assert any(line.startswith("patchcleanser:4 ") and "certified" in line for line in lines)
    assert wording.target_name("jedi:2", record) == "2 bits, untrained, jedi"
    assert wording.target_name("jedi:ptq:mse:4", {}) == "4 bits, ptq mse, jedi"


def test_surrogates_through_a_defence_are_named_and_others_refused(evaluated):
    assert surrogates.parse("self:jedi:4") == ("self", "jedi:4")
    with pytest.raises(ValueError, match=r"self:DEFENCE:BITS, self:random and self:all.*got 'self:blur:4'"):
        surrogates.parse("self:blur:4")
    with pytest.raises(ValueError, match="queries a target of the run itself"):
        cells.run(cells.CellPlan("sparse_rs", "self:jedi:4", 4, ""), evaluated[0])


def test_random_rows_raise_no_flag_while_their_predictions_repeat_and_every_image_has_a_gradient(evaluated):
    subject = evaluated[0]
    assert evaluate.health_flags(subject._replace(targets=(subject.targets[2],))) == []
