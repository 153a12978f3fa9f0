"""Studies: printed figures as printed, refusals of unfair comparisons, figures of runs by hand, tables that show them all."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import study_example as example
from scipy import stats

from triqdef_jax.report import records
from triqdef_jax.report import table as report_table
from triqdef_jax.studies import numbers, page, plan, published, tables
from triqdef_jax.studies.published import Facts
from triqdef_jax.studies.tasks import DONE, FAILED, Ended

REAL = Facts("cifar10", "resnet56", 200, 6, True, False, "")


def find_one(table, **fields):
    (row,) = [
        row for row in published.PUBLISHED if all(getattr(row, k) == v for k, v in {"table": table, **fields}.items())
    ]
    return row.percent


def test_printed_figures_are_those_of_the_paper():
    assert find_one(4, data="cifar10", method="triqdef") == {32: 89.4, 5: 83.3, 4: 78.2, 2: 75.8}
    assert find_one(4, data="imagenet", method="pbat")[4] == 74.2
    assert find_one(5, data="cifar10", method="dwq", attack="gap", patches="unseen")[2] == 72.3
    assert find_one(5, data="cifar10", method="triqdef", attack="patchattack", patches="seen")[32] == 43.2
    assert find_one(5, data="imagenet", method="pbat", attack="lavan", patches="unseen")[5] == 73.7
    assert find_one(6, method="jedi") == {32: 64.3, 2: 23.4}
    assert find_one(7, data="cifar10", method="no_fdp") == {2: 55.9}
    assert find_one(7, data="imagenet", method="triqdef", patches="unseen") == {2: 30.7}
    # 3 methods, 3 methods x 3 attacks x seen and unseen, and 4 rows, each on two data sets; 5 rows of table 6
    assert [sum(row.table == t for row in published.PUBLISHED) for t in (4, 5, 6, 7)] == [6, 36, 5, 8]


def test_table_7_repeats_figures_of_table_5():
    for data in ("cifar10", "imagenet"):
        for patches in ("seen", "unseen"):
            fields = {"data": data, "method": "triqdef", "attack": "lavan", "patches": patches}
            assert find_one(7, **fields)[2] == find_one(5, **fields)[2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "digits"}, "never: there CIFAR-10, resnet56, here digits"),
        ({"is_copy": True}, "never: here a recompressed copy of CIFAR-10"),
        ({"label": "Smoke: nothing"}, "never: smoke"),
        ({"network": "resnet20"}, "never: there CIFAR-10, resnet56, here resnet20"),
        ({"is_whole": False}, "never: there CIFAR-10, resnet56, here resnet56, reduced"),
        ({"epochs": 3}, "never: there 200 epochs and 6 px, here 3 and 6"),
        ({}, "loosely: "),
    ],
)
def test_a_printed_figure_is_comparable_to_the_same_run_alone(changes, words):
    row = next(row for row in published.PUBLISHED if row.table == 4)
    assert published.comparable(row, REAL._replace(**changes)).startswith(words)


def load(folder, fields=example.ENTRIES, **changes):
    source = example.write_study(folder, fields)
    study = dataclasses.replace(plan.load(source), **changes)
    return study, plan.make_runs(study, source, folder / "work")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("entries=()", "a study without runs"),
        ('entries=(Entry(name="triqdef", config="conf.py"),) * 2', "two runs are called triqdef"),
        ('entries=(Entry(name="a/b", config="conf.py"),), baseline="a/b"', "a run's name is a directory's"),
        ('entries=(Entry(name="qat", config="conf.py"),)', "'triqdef' is none of its runs, which are qat"),
        (f'{example.ENTRIES}, defended=("other",)', "defenses and defended come together"),
        (f"{example.ENTRIES}, seeds=(1, 1)", "expected each seed once"),
        (f"{example.ENTRIES}, label=unknown", "NameError"),
        ('entries=(Entry(name="triqdef", config="none.py"),)', "no such config file: "),
        ('entries=(Entry(name="triqdef", config="conf.py:magic"),)', "loss.method must be one of triqdef"),
        ('entries=(Entry(name="triqdef", config="conf.py", changes={"loss.x": 1}),)', "run triqdef: "),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_line(tmp_path, fields, words):
    with pytest.raises(ValueError) as error:
        load(tmp_path, fields)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_study_and_an_unknown_preset_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such study file: .*none.py"):
        plan.load(str(tmp_path / "none.py"))
    source = example.write_study(tmp_path)
    path = tmp_path / "study.py"
    path.write_text(path.read_text().replace('"quick"', '"huge"'))
    with pytest.raises(ValueError, match="must be one of pools"):
        plan.load(source)


def test_runs_of_different_budgets_are_refused_by_the_field(tmp_path):
    fields = 'entries=(Entry(name="triqdef", config="conf.py"), Entry(name="more", config="conf.py:longer"))'
    with pytest.raises(
        ValueError, match=r"^triqdef and more cannot be compared: train.epochs is 2 in the one and 3 in"
    ):
        load(tmp_path, fields)
    fields = fields.replace(":longer", '", changes={"patches.steps": 7}, row="')
    with pytest.raises(
        ValueError, match=r"patches.steps is 100 in the one and 7 in the other; the runs of a study have"
    ):
        load(tmp_path, fields)


def test_runs_differ_in_method_and_seed_and_each_has_its_command(tmp_path):
    _, plans = load(tmp_path, seeds=(0, 3))
    assert [(p.name, p.seed, p.config.loss.method) for p in plans] == [
        ("triqdef", 0, "triqdef"),
        ("other", 0, "qat"),
        ("triqdef-seed3", 3, "triqdef"),
        ("other-seed3", 3, "qat"),
    ]
    assert plans[1].flags == (f"--config={tmp_path}/conf.py:qat", "--config.seed=0")
    assert plans[3].config.seed == 3 and plans[3].workdir == tmp_path / "work" / "runs" / "other-seed3"


def test_a_directory_of_another_run_is_refused(tmp_path):
    study, plans = load(tmp_path)
    plans[0].workdir.mkdir(parents=True)
    config = plans[0].config.copy_and_resolve_references()
    config.optim.lr = 0.3
    plan.runs.open_workdir(plans[0].workdir, config)
    with pytest.raises(ValueError, match=r"holds another config: optim.lr is 0.3 there"):
        plan.make_runs(study, str(tmp_path / "study.py"), tmp_path / "work")


@pytest.mark.parametrize(("description", "is_copy"), [("32 x 32 images", False), ("JPEG-RECOMPRESSED COPY", True)])
def test_a_recompressed_data_set_is_known_by_its_own_description(tmp_path, description, is_copy):
    _, plans = load(tmp_path)
    config = plans[0].config
    assert not plan.is_recompressed(config)  # digits
    config.data.name, config.data.dir = "cifar10", str(tmp_path)
    (tmp_path / "cifar10" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar10" / "3.0.2" / "dataset_info.json").write_text(json.dumps({"description": description}))
    assert plan.is_recompressed(config) == is_copy


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(study, plans, record) of three runs by hand, of which `broken` failed in training."""
    changes = '{"loss.feature_layers": ("stem", "stage1")}'
    broken = f'Entry(name="broken", config="conf.py:patch_ce", changes={changes}, is_ablation=True)'
    fields = f"{example.ENTRIES[:-1]}, {broken})"
    study, plans = load(tmp_path_factory.mktemp("built"), fields)
    for one, fooled in zip(plans[:2], (5, 9), strict=True):
        example.write_run(one, fooled=fooled)
    ended = {f"{kind} {one.name}": Ended(DONE, "", 120.0, 90.0) for one in plans for kind in ("train", "evaluate")}
    ended["train broken"] = Ended(FAILED, "error: no luck (exit code 1)", 3.0, 2.0)
    return study, plans, numbers.build(study, plans, ended, plans[0].workdir.parent.parent)


def counts(run, column):
    return {target: (rate["num"], rate["den"]) for target, rate in run["columns"][column].items()}


def test_the_command_of_a_run_can_be_pasted_into_a_shell(built):
    _, plans, record = built
    program = ["python", "-m", "triqdef_jax.train"]
    for one, run in zip(plans, record["runs"], strict=True):
        assert shlex.split(run["command"]) == [*program, *one.flags, f"--workdir={one.workdir}"]
    assert any("(" in flag for one in plans for flag in one.flags)  # which a shell would read otherwise


def test_columns_hold_the_counts_of_the_outcomes(built):
    run = built[2]["runs"][0]
    assert counts(run, "clean accuracy") == {"32": (19, 20), "4": (18, 20)}
    assert counts(run, "lavan, held-out") == {"32": (5, 19), "4": (5, 18)}  # of the images right without the patch
    assert counts(run, "gap, held-out") == {"32": (6, 19), "4": (6, 18)}
    assert counts(run, "lavan, unseen size 4 px") == {"32": (14, 38), "4": (14, 36)}  # two patches
    assert counts(run, "gap, unseen size 4 px") == {"32": (0, 38), "4": (0, 36)}
    assert counts(run, "lavan, held-out: robust accuracy") == {"32": (14, 20), "4": (13, 20)}
    assert counts(run, "white-box") == {"32": (8, 19), "4": (8, 18)}
    assert counts(run, "patchattack") == {"4": (9, 18)}  # asked of 4 bits alone
    assert counts(run, "worst") == {"32": (9, 19), "4": (9, 18)}
    assert "per_patch" not in run["columns"]["lavan, held-out"]["32"]


def test_a_run_is_tested_against_the_baseline_image_by_image(built):
    _, plans, record = built
    found = record["runs"][1]["paired"]
    held_out = next(pair for pair in found["pairs"] if (pair["cell"], pair["target"]) == ("held-out", "32"))
    # Right under both held-out patches: all but the first and the last 6, or the last 10, of 20 images.
    assert (held_out["both"], held_out["only_a"], held_out["only_b"], held_out["neither"]) == (9, 0, 4, 7)
    assert found["tally"]["32"] == {"better": 0, "worse": 0, "undecided": 6}  # 4 images decide nothing
    assert (plans[1].workdir / "results" / "comparison-triqdef.json").is_file()
    assert "paired" not in record["runs"][0]


def test_attacks_are_tallied_by_who_is_right_more_often_and_clean_images_are_none():
    pair = lambda cell, a, b, p: {"cell": cell, "target": "4", "only_a": a, "only_b": b, "p_adjusted": p}
    pairs = [pair("clean", 9, 0, 0.001), pair("x", 9, 0, 0.01), pair("y", 0, 9, 0.01), pair("z", 9, 0, 0.2)]
    assert numbers.tally({"pairs": pairs}, ["4", "2"]) == {"4": {"better": 1, "worse": 1, "undecided": 1}}


def test_runs_that_met_other_images_are_not_tested(built):
    one = numbers.Evaluated(*numbers.results.load(numbers.evaluation_path(built[1][0], "quick")))
    other = one._replace(record=one.record | {"image_ids_sha256": "others"})
    assert "met different images" in numbers.paired(one, other)["refused"]


def test_several_seeds_give_their_mean_and_students_interval():
    rates = [{"rate": value, "low": value - 0.1, "high": value + 0.2} for value in (0.2, 0.3, 0.4)]
    summary = numbers.over_seeds(rates)
    low, high = stats.t.interval(0.95, 2, loc=0.3, scale=0.1 / np.sqrt(3))  # an independent form of the same
    np.testing.assert_allclose([summary[k] for k in ("rate", "low", "high")], [0.3, low, high], rtol=1e-12)
    assert numbers.over_seeds(rates[:1]) is rates[0]
    assert numbers.over_seeds(rates[:1] * 3) == pytest.approx(
        {**rates[0], "sd": 0.0, "num_seeds": 3}
    )  # not of no width
    near_one = numbers.over_seeds([{"rate": value, "low": 0.9, "high": 1.0} for value in (1.0, 0.99, 0.97)])
    assert near_one["high"] == 1.0 and near_one["low"] == pytest.approx(0.949, abs=1e-3)


def test_forward_equivalents_are_averaged_over_the_stages(built):
    by_method = {run["method"]: run["budget"]["forward_equivalents"] for run in built[2]["runs"]}
    # Clean training is 3 passes per bit-width, one bit-width in the first half and two in the second.
    assert by_method["qat"] == pytest.approx(0.5 * 3 + 0.5 * 6)
    assert by_method["patch_ce"] == pytest.approx(1.5 * by_method["qat"])  # and half of the images once more, patched


def table_of(record, start):
    return next(made for made in tables.make(record) if made.title.startswith(start))


def row_of(made, head, note=""):
    return next(row for row in made.rows if row.head == head and (not note or note in row.notes))


def test_tables_show_ours_and_beside_them_what_was_printed(built):
    made = table_of(built[2], "Table 5: success of LaVAN")
    ours = row_of(made, "triqdef", "patches held out, 3 px")
    assert (
        ours.cells[0].text == "26.3 %" and ours.cells[0].notes[1] == "n 19" and ours.cells[-1].text == "measured here"
    )
    assert row_of(made, "triqdef", "unseen side, 4 px").cells[1].text == "38.9 %"
    printed = row_of(made, "triqdef", "seen")
    assert [cell.text for cell in printed.cells] == ["32.4 %", "28.4 %", "never: there CIFAR-10, resnet56, here digits"]
    assert printed.group == tables.PRINTED and not ours.group
    assert row_of(table_of(built[2], "Table 5: success of PatchAttack"), "other").cells[0].text == "not measured"
    assert row_of(table_of(built[2], "Table 4"), "standard QAT").cells[0].text == "89.4 %"
    assert row_of(table_of(built[2], "Table 6"), "jedi").cells[1].text == "not printed"  # 4 bits


def test_a_failed_run_keeps_its_place_without_figures(built):
    record = built[2]
    cells = [cell.text for cell in row_of(table_of(record, "Table 4"), "broken").cells]
    assert cells == ["not measured", "not measured", "no figures"]
    status = row_of(table_of(record, "Training budget"), "broken").cells[-1].text
    assert status == "train: failed, error: no luck (exit code 1)"
    assert "broken has no figures: train: failed" in page.to_text(record)


def test_the_ablation_stands_beside_the_baseline_at_the_lowest_bits(built):
    made = table_of(built[2], "Table 7")
    assert made.columns == ("method", "LaVAN held out, 4 bits", "LaVAN 4 px, 4 bits", "comparable")
    assert [row.head for row in made.rows][:2] == ["triqdef", "broken"]
    assert [cell.text for cell in row_of(made, "triqdef without FDP").cells[:2]] == ["55.9 %", "not printed"]


def test_a_defended_run_has_a_row_of_its_own_in_every_table(built):
    record = json.loads(json.dumps(built[2])) | {"defenses": ["median"]}
    for rates in record["runs"][1]["columns"].values():
        rates |= {"median:4": rates["4"]}
    row = row_of(table_of(record, "Table 4"), "other + median")
    assert [cell.text for cell in row.cells] == ["not measured", "90.0 %", "measured here"]
    assert row_of(table_of(record, "Worst success"), "other + median", "right under all attacks")
    record["runs"][1]["columns"]["certified"] = {"median:4": record["runs"][1]["columns"]["clean accuracy"]["4"]}
    made = table_of(record, "Certified")
    assert [(row.head, [cell.text for cell in row.cells]) for row in made.rows] == [
        ("other + median", ["not measured", "90.0 %"])
    ]


def test_the_worst_attack_is_named_and_flags_are_counted(built):
    evaluated = numbers.Evaluated(*numbers.results.load(numbers.evaluation_path(built[1][0], "quick")))
    record = json.loads(json.dumps(built[2]))
    cell = row_of(table_of(record, "Worst success"), "triqdef").cells[0]
    worst = record["runs"][0]["columns"]["worst"]["32"]
    assert cell.notes[-1] == worst["cell"] and worst["cell"] in {cell["name"] for cell in evaluated.record["cells"]}
    record["runs"][0]["flags"] = ["no better than noise at 32"] * 3 + ["hardly right without a patch at 4"]
    said = page.to_markdown(record).splitlines()
    (line,) = [line for line in said if "Flags raised" in line]
    assert "triqdef: no better than noise at 32 (3), hardly right without a patch at 4 (1)" in line


def test_figures_at_drawn_bit_widths_have_a_table_of_their_own(built):
    assert not any("drawn" in made.title for made in tables.make(built[2]))
    record = json.loads(json.dumps(built[2]))
    columns = record["runs"][1]["columns"]
    columns["clean accuracy"]["random"] = columns["clean accuracy"]["4"]
    (row,) = table_of(record, "At drawn bit-widths").rows
    assert row.head == "other" and [cell.text for cell in row.cells] == ["90.0 %"] + ["not measured"] * 3


def test_what_defences_cost_stands_beside_the_network_alone(built):
    assert built[2]["latency"] == {} and not any("Latency" in made.title for made in tables.make(built[2]))
    spread = lambda median: {"median": median, "min": median / 2, "max": 3 * median}
    timed = {"none": {"1": spread(2.0), "64": spread(0.5)}, "median": {"1": spread(3.0), "64": spread(4.0)}}
    found = {"ms_per_image": timed, "rounds": 5, "cores": 2, "defended_bits": 32}
    made = table_of(built[2] | {"defenses": ["median"], "latency": found}, "Latency")
    assert made.columns == ("defence at inference", "batch 1", "batch 64")
    assert [[cell.text for cell in row.cells] for row in made.rows] == [
        ["2.00 ms, x 1.0", "0.50 ms, x 1.0"],
        ["3.00 ms, x 1.5", "4.00 ms, x 8.0"],
    ]
    assert made.rows[1].cells[1].notes == ("2.00 to 12.00 ms",)


def test_the_latency_is_read_where_its_program_ended_well(tmp_path):
    (tmp_path / numbers.LATENCY_FILE).write_text('{"rounds": 5}')
    assert numbers._latency({}, tmp_path) == numbers._latency({"latency": Ended(FAILED)}, tmp_path) == {}
    assert numbers._latency({"latency": Ended(DONE)}, tmp_path) == {"rounds": 5}


def test_entries_of_one_row_share_it_each_with_its_own_bits(built):
    record = json.loads(json.dumps(built[2]))
    for run, bits in zip(record["runs"][:2], ("32", "4"), strict=True):
        run["row"] = "alone"
        run["columns"] = {"clean accuracy": {bits: run["columns"]["clean accuracy"][bits]}}
    assert [cell.text for cell in row_of(table_of(record, "Table 4"), "alone").cells[:2]] == ["95.0 %", "90.0 %"]


def test_seeds_are_summarised_in_the_tables(built):
    record = json.loads(json.dumps(built[2]))
    record["runs"][1]["row"] = "triqdef"  # as another seed of it would
    cell = row_of(table_of(record, "Table 5: success of LaVAN"), "triqdef", "patches held out, 3 px").cells[0]
    assert cell.text == "36.8 %" and cell.notes[1] == "mean of 2 seeds"  # (5 + 9) / 2 / 19


def test_the_label_stands_at_every_table_and_title_and_no_figure_is_comparable(built):
    record = built[2] | {"label": "smoke: nothing"}
    record["facts"] = record["facts"] | {"label": record["label"]}
    made = tables.make(record)
    assert made and all(one.title.startswith("smoke: nothing. ") for one in made)
    printed = [row for one in made for row in one.rows if row.group]
    assert printed and all(row.cells[-1].text == "never: smoke" for row in printed)
    for text in (page.to_html(record, "report.html"), page.to_markdown(record), page.to_text(record)):
        assert "smoke: nothing" in text.split("Worst success")[0]


def test_the_page_holds_every_figure_greys_the_printed_ones_and_needs_no_network(built):
    html = page.to_html(built[2], "report.html")
    for made in tables.make(built[2]):
        for cell in (cell for row in made.rows for cell in row.cells):
            assert f"<b>{cell.text}</b>" in html
    assert "tr.group ~ tr" in html and 'href="report.html"' in html and "http" not in html.replace("http-equiv", "")
    assert all(report_table.to_latex(made) in page.to_latex(built[2]) for made in tables.make(built[2]))


def test_the_terminal_dims_what_was_printed_and_nothing_else(built):
    lines = page.to_text(built[2], is_colour=True).splitlines()
    dim = [line for line in lines if line.startswith(page.DIM)]
    assert dim and all("never: " in line for line in dim)
    assert page.DIM not in page.to_text(built[2])


def test_the_runs_of_a_study_are_read_by_the_report(built):
    runs = records.read_runs([run["workdir"] for run in built[2]["runs"] if run["status"] == DONE])
    assert [record["kind"] for record in runs[1].records.values()] == ["comparison", "evaluation"]
