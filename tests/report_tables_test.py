"""Tables of the report: which cell is named strongest or white-box, what is flagged, and one table in three forms."""

import copy

import pytest
import report_example as example

from triqdef_jax import grids
from triqdef_jax.report import (
    attack_tables,
    evidence_tables,
    figures,
    first_screen,
    flags,
    records,
    sections,
    table,
    wording,
)
from triqdef_jax.report.table import Cell, Row, Table

MADE_FROM_ATTACKS = ("worst", "worst_transfer", "robust_all", "flags", "checks")
SMALL = Table(
    "a <title>",
    ("row", "x", "y"),
    (
        Row("1", (Cell("10.0 %", ("[8.0, 12.0]", "n 900"), 0.1, ("white-box",)), Cell("a|b_c")), ("5 px",), "first"),
        Row("2", (Cell("none", ("n 0",)), Cell("50 % & more")), (), "second"),
    ),
    "a note",
)


@pytest.fixture
def record():
    return example.evaluation("digits")


def cell_of(record, name):
    return next(cell for cell in record["cells"] if cell["name"] == name)


def set_rates(record, **shares):
    """Set the headline success of cells, by attack, to made-up shares of 400 at every target."""
    for cell in record["cells"]:
        if cell["attack"] in shares:
            for target in cell["success"]:
                cell["success"][target]["asr_correct"] = example.rate(int(400 * shares[cell["attack"]]), 400)


def row_named(made, head, group=""):
    return next(row for row in made.rows if row.head == head and group in row.group)


def test_a_rate_is_printed_with_interval_and_n():
    rate = {"num": 1792, "den": 4050, "rate": 0.44247, "low": 0.4272, "high": 0.4579}
    assert wording.rate_text(rate) == "44.2 % [42.7, 45.8], n 4,050"
    assert wording.rate_cell(rate) == Cell("44.2 %", ("[42.7, 45.8]", "n 4,050"), 0.44247)


def test_a_rate_of_nothing_says_so_and_has_no_shade():
    assert wording.rate_text(example.rate(0, 0)) == "none, n 0"
    assert wording.rate_cell(example.rate(0, 0)) == Cell("none", ("n 0",), None)


@pytest.mark.parametrize(("p", "words"), [(0.0009, "< 0.001"), (0.001, "0.001"), (1.0, "1.000"), (None, "none")])
def test_p_values_are_printed_to_three_digits(p, words):
    assert wording.p_value(p) == words


def test_targets_say_what_they_are(record):
    names = [wording.target_name(target, record) for target in ("4", "3", "ptq:minmax:4", "onnx")]
    assert names == ["4 bits", "3 bits, untrained", "4 bits, ptq minmax", "onnx"]


def test_only_an_attackers_own_bit_width_is_marked_white_box(record):
    marks = {
        (name, target): attack_tables.own_mark(cell_of(record, name), target, record)
        for name in (
            "lavan|self:4|random",
            "lavan|qat:4|random",
            "adaptive|self:all|random",
            "sparse_rs|self:4|random",
        )
        for target in ("4", "2", "3", "ptq:mse:4")
    }
    assert {key for key, mark in marks.items() if mark == "white-box"} == {
        ("lavan|self:4|random", "4"), ("adaptive|self:all|random", "4"), ("adaptive|self:all|random", "2"),
    }  # fmt: skip
    assert {key for key, mark in marks.items() if mark == "own bits"} == {("sparse_rs|self:4|random", "4")}


def test_the_strongest_attack_passes_over_what_counted_nothing(record):
    for cell in record["cells"][1:]:
        cell["success"]["4"]["asr_correct"] = example.rate(0, 0)
    assert attack_tables.strongest(record["cells"], "4") is record["cells"][0]
    assert attack_tables.strongest(record["cells"][1:], "4") is None


def test_an_attack_is_above_control_only_when_the_intervals_are_disjoint(record):
    set_rates(record, grey=0.10, noise=0.20, lavan=0.22, patch_pgd=0.60)
    assert attack_tables.is_above_controls(cell_of(record, "patch_pgd|self:4|random"), "4", record) is True
    assert attack_tables.is_above_controls(cell_of(record, "lavan|fp|random"), "4", record) is False
    assert attack_tables.is_above_controls(cell_of(record, "gap|qaa|corner"), "4", record) is None  # no control there
    row = row_named(attack_tables.matrix("digits", record), "lavan on fp")
    assert all(attack_tables.NOT_ABOVE in cell.marks for cell in row.cells)


def test_controls_stand_below_the_strongest_attack_of_their_size_and_place(record):
    set_rates(record, noise=0.2, patch_pgd=0.6)
    made = attack_tables.controls("digits", record)
    best = row_named(made, "strongest attack", "5 px, random")
    assert {cell.text for cell in best.cells} == {"60.0 %"} and best.cells[0].notes[-1] == "patch_pgd on self:4"
    assert {cell.text for cell in row_named(made, "noise", "5 px").cells} == {"20.0 %"}
    record["cells"] = [cell for cell in record["cells"] if cell["access"] != "control"]
    assert attack_tables.controls("digits", record) is None


def test_unseen_patches_are_kept_apart_from_seen_ones(record):
    made = attack_tables.seen("digits", record)
    assert made.rows[0].head == "everything seen"
    best = row_named(made, "unseen size, family").cells[0]
    assert best.notes[-1] == "lavan on fp" and best.text == wording.percent(
        cell_of(record, "lavan|fp|random|6 px")["success"]["32"]["asr_correct"]["rate"]
    )


def test_a_target_that_an_attack_did_not_meet_is_not_measured_rather_than_zero(record):
    del cell_of(record, "sparse_rs|self:4|random")["success"]["6"]
    row = row_named(attack_tables.matrix("digits", record), "sparse_rs on self:4")
    assert row.cells[record["targets"].index("6")] == Cell("not measured")


def test_the_verdict_names_the_weakest_points_with_interval_and_n(record):
    record["worst"]["2"] = {"cell": "lavan|fp|random", **example.rate(360, 400)}
    record["clean_accuracy"]["5"] = example.rate(300, 450)
    said = first_screen.verdict("digits", record)
    assert f"{wording.rate_text(example.rate(360, 400))}, of right answers wrong (at 2 bits; lavan on fp)" in said
    transferred = wording.rate_text(max(record["worst_transfer"].values(), key=lambda rate: rate["rate"]))
    assert f"the strongest made without the network's weights {transferred} (at" in said
    assert f"clean accuracy is at least {wording.rate_text(example.rate(300, 450))} (at 5 bits)" in said


def test_flags_of_one_name_are_gathered_and_explained(record):
    found = {flag.name: flag for flag in flags.collect({"a": record, "b": copy.deepcopy(record)})}
    assert set(found) == {"transfer beats white-box", "few images"}
    assert len(found["transfer beats white-box"].places) == 2
    assert "foreign patches" in found["transfer beats white-box"].meaning
    assert "knows the method" in flags.meaning("adaptive beats patch_pgd")
    assert "badly tuned" in flags.meaning("white-box beats patch_pgd")
    assert "without gradients" in flags.meaning("black-box beats white-box")
    assert "covers pixels" in flags.meaning("no better than noise")
    assert "broken" in flags.meaning("whole image resists")
    assert "no robustness" in flags.meaning("hardly right without a patch")
    assert "gradients" in flags.meaning("zero_gradients") and flags.meaning("never heard of") == ""


def test_runs_that_cannot_be_compared_are_flagged(record):
    other = example.evaluation("other", images="b" * 64)
    other["forward"] = "integer"
    cell_of(other, "lavan|fp|random")["digest"] = "another"
    cell_of(other, "lavan|self:4|random")["digest"] = "its own by nature"
    other["cells"].pop()
    found = {flag.name: flag for flag in flags.collect({"a": record, "b": other})}
    assert {"different test images", "different forward", "different attacks", "different patches"} <= set(found)
    assert found["different patches"].places == ("lavan|fp|random",)
    assert "different test images" not in {flag.name for flag in flags.collect({"a": record})}


def test_a_grid_marks_what_differs_by_more_than_seeds_do_and_shows_what_they_do():
    record = example.sensitivity()
    made = evidence_tables.sensitivity("grid", record, "success")
    seed = made.rows[0]
    assert seed.head == "one more seed of the base" and {cell.text for cell in seed.cells} == {"10.2 %"}
    low, high = (100 * record["against_seeds"]["seeds"]["success"]["4"][end] for end in ("low", "high"))
    assert seed.cells[1].notes == (f"[{low:.1f}, {high:.1f}]",) and low < 9.5 and 11.5 < high < 33
    marked = {row.head for row in made.rows if any(cell.marks for cell in row.cells)}
    assert marked == {"loss.lambda_fdp 8.0, loss.alpha 0"} and row_named(made, "base").cells[0].text == "10.0 %"
    assert not [row for row in evidence_tables.sensitivity("grid", record, "clean_accuracy").rows if row.cells[0].marks]
    said = "Of 12 rates 3 differ from the base by more than its 3 seeds do (by chance alone up to 1 may): loss.lambda_fdp 8.0, loss.alpha 0."
    assert f"<p><b>grid: {said}</b></p>" in sections.sensitivity({"grid": record})
    for point in record["points"][1:3]:
        point["changes"] = {"loss.beta": 0.0}  # now no seed stands beside the base
    record["against_seeds"] = grids.against_seeds(record["points"])
    bare = sections.sensitivity({"grid": record})
    assert "no difference here can be told from chance" in bare and "beyond seeds" not in bare


def test_paired_tests_name_a_winner_only_by_the_adjusted_p_value():
    record = example.comparison()
    assert [row.cells[-1].text for row in evidence_tables.comparison(record).rows] == [
        "digits",
        "undecided",
        "digits-qat",
    ]
    assert "3 pairs: digits better in 1, digits-qat better in 1, undecided 1" in evidence_tables.comparison_summary(
        record
    )
    pair = {"only_a": 9, "only_b": 1, "p_value": 0.02, "p_adjusted": 0.2}
    assert evidence_tables.verdict(pair, "a", "b") == "undecided"


def test_alignment_counts_pairs_whose_whole_interval_is_above_chance():
    pair = {
        "a": "32",
        "b": "8",
        "kind": "fp-b",
        "network": "shared",
        "images": "clean",
        "map": "stage1",
        "measure": "cosine",
    }
    ends = ((0.5, 0.41), (0.5, 0.39), (0.5, None))
    pairs = [pair | {"value": value, "low": low, "high": 0.6, "chance": 0.4} for value, low in ends]
    made = evidence_tables.alignment_counts("digits", {"pairs": pairs, "num_images": 64})
    assert made.rows[0].cells[0].text == "fp-b 1 of 3" and "n 64 images" in made.title


def test_mean_similarity_is_marked_only_where_its_excess_over_chance_is_beyond_the_interval():
    rows = evidence_tables.alignment_means("digits", example.alignment()).rows
    assert [(row.notes, row.cells[0].marks) for row in rows] == [
        (("fp-b, n 3 pairs",), ()),
        (("b-b, n 3 pairs",), ("above chance",)),
    ]
    assert rows[0].cells[0].notes == ("[0.500, 0.700]", "chance 0.300")


def test_transfer_says_where_it_was_read_and_correlations_what_is_left_of_them():
    record = example.alignment()
    made = evidence_tables.transfer("digits", record["transfer"][0])
    assert [[cell.text for cell in row.cells] for row in made.rows] == [["90.0 %", "20.0 %"], ["25.0 %", "80.0 %"]]
    assert (made.columns, made.rows[1].head) == (("patches", "at 32 bits", "at 4 bits"), "made on 4 bits")
    assert "from quick.json" in made.note
    assert evidence_tables.prediction("digits", record).rows[0].cells[2].text == "0.170"


def test_vanished_gradients_are_said_where_they_are():
    said = evidence_tables.zero_gradients(example.alignment())
    assert said == "Input gradients that are all zero: 25.0 % at 2 bits (shared backbone, clean images)."
    assert evidence_tables.zero_gradients({}) == ""


def test_the_size_of_the_worst_attack_is_said_where_it_is_not_the_usual_one(record):
    record["worst"]["4"]["cell"], record["worst"]["2"]["cell"] = "lavan|fp|random|6 px", "lavan|fp|random"
    rows = {row.head: row.cells[1].notes[-1] for row in attack_tables.summary({"digits": record}).rows}
    assert (rows["4 bits"], rows["2 bits"]) == ("lavan on fp, 6 px", "lavan on fp")


def test_correlations_predict_only_where_the_interval_excludes_0():
    rows = [{"low": low, "high": high} for low, high in ((0.1, 0.9), (-0.9, -0.1), (-0.1, 0.5), (None, None))]
    said = evidence_tables.prediction_summary({"prediction": rows})
    assert "Of 4 maps" in said and "above 0 in 1 and below 0 in 1" in said


def test_an_evaluation_of_pool_patches_alone_names_no_worst_attack(record):
    pools = {name: value for name, value in record.items() if name not in MADE_FROM_ATTACKS}
    cell = pools["cells"][0] | {"name": "held-out", "attack": "lavan+gap", "surrogate": "source network"}
    assert wording.cell_name(cell) == "held-out (lavan+gap)"
    assert records.headline({"pools": pools, "quick": record}) == {"quick": record}
    made = attack_tables.summary(records.headline({"pools": pools}))
    assert {row.cells[1] for row in made.rows} == {Cell("not measured")}
    assert "strongest" not in first_screen.verdict("pools", pools)


def test_one_table_has_the_same_figures_in_html():
    text = table.to_html(SMALL)
    assert (
        '<td class="heat" style="--level:10.0%"><b>10.0 %</b> <small>[8.0, 12.0]</small> <small>n 900</small>' in text
    )
    assert '<i class="mark">white-box</i>' in text and "a &lt;title&gt;" in text
    assert text.count('<tr class="group">') == 2


def test_one_table_has_the_same_figures_in_markdown():
    lines = table.to_markdown(SMALL).splitlines()
    assert lines[0] == r"**a \<title\>**"
    assert lines[4:6] == ["| first |  |  |", r"| 1, 5 px | 10.0 % \[8.0, 12.0\], n 900, white-box | a\|b\_c |"]
    assert {line.replace(r"\|", "").count("|") for line in lines[2:8]} == {4}


def test_one_table_has_the_same_figures_in_latex():
    lines = table.to_latex(SMALL).splitlines()
    assert r"1, 5 px & 10.0 \% [8.0, 12.0], n 900, white-box & a\textbar{}b\_c \\" in lines
    assert r"2 & none, n 0 & 50 \% \& more \\" in lines
    assert r"\begin{tabular}{lll}" in lines and lines.count(r"\midrule") == 1


def test_spanned_headings_are_repeated_where_a_format_has_none():
    made = Table("t", ("row", "x", "x"), (Row("1", (Cell("1"), Cell("2"))),), "", (("a", 1), ("b", 1)))
    assert "| row | a: x | b: x |" in table.to_markdown(made)
    assert '<th colspan="1" scope="colgroup">b</th>' in table.to_html(made)


def test_round_steps_are_round_and_inside():
    assert figures.round_steps(0, 100) == [0, 20, 40, 60, 80, 100]
    assert figures.round_steps(0.13, 0.52, number=4) == pytest.approx([0.2, 0.3, 0.4, 0.5])  # sums of floats
    assert figures.round_steps(-1, 1) == pytest.approx([-1, -0.5, 0, 0.5, 1])


def test_axes_place_values_by_hand():
    assert figures.Axis(0, 10, 100, 200).place(5) == 150
    assert figures.Axis(0, 10, 200, 100).place(12) == 100  # outside: at the end
    assert figures.Axis(1, 16, 0, 100, True).place(4) == pytest.approx(50)  # half of four doublings


def test_a_curve_passes_through_its_points_and_whiskers_span_the_interval():
    points = {"a": [figures.Point(0, 0, 0, 50), figures.Point(10, 100, 50, 100)]}
    text = figures.line_chart(points, title="t", x="x", y="y", y_range=(0, 100))
    left, right = figures.MARGIN_LEFT, figures.WIDTH - figures.MARGIN_RIGHT
    top, bottom = figures.MARGIN_TOP, figures.MARGIN_TOP + figures.PLOT_HEIGHT
    assert f'points="{left:.1f},{bottom:.1f} {right:.1f},{top:.1f}"' in text
    assert f'class="whisker" x1="{left:.1f}" y1="{bottom:.1f}" x2="{left:.1f}" y2="{(top + bottom) / 2:.1f}"' in text


def test_figures_of_nothing_and_of_one_value_are_drawn_without_failing():
    assert figures.line_chart({"a": []}, title="t", x="x", y="y") == ""
    assert "<svg" in figures.line_chart({"a": [figures.Point(3, 0.5)]}, title="t", x="x", y="y")


def test_series_differ_in_more_than_colour():
    points = [figures.Point(0, 0), figures.Point(1, 1)]
    text = figures.line_chart({str(i): points for i in range(8)}, title="t", x="x", y="y")
    dashes = {
        part.split('"')[0]
        for part in text.split('<polyline class="curve" points="')[1:]
        for part in [part.split('dasharray="')[1]]
    }
    assert len(dashes) == figures.NUM_SERIES
