"""Tables of everything but the attack matrix: paired tests, seeds, similarity of bit-widths, curves, grids of settings.

They take records of the kinds comparison, seeds, alignment, curves and sensitivity, as `records` describes them.
"""

from triqdef_jax import grids
from triqdef_jax.report import wording
from triqdef_jax.report.table import Cell, Row, Table

SIGNIFICANT = 0.05  # of p-values adjusted for the number of tests
BEYOND = "beyond seeds"
SEEDS_NOTE = (
    "One more seed: mean over the base's seeds and where a further one would lie (95 % prediction interval, Student's t). "
    f'"{BEYOND}": outside of it, and its own 95 % interval apart from that of the base. Other seeds meet patches of their own.'
)


def comparison(record: dict) -> Table:
    """Return the paired tests between two runs: images right under both, one or none, and the p-values."""
    a, b = record["name_a"], record["name_b"]
    rows = []
    for pair in record["pairs"]:
        counts = tuple(Cell(f"{pair[name]:,}") for name in ("both", "only_a", "only_b", "neither"))
        tests = (Cell(wording.p_value(pair["p_value"])), Cell(wording.p_value(pair["p_adjusted"])))
        rows.append(Row(f"{pair['cell']} at {pair['target']}", (*counts, *tests, Cell(verdict(pair, a, b)))))
    columns = ("attack at target", "right under both", f"only {a}", f"only {b}", "neither", "p", "p adjusted", "better")
    note = "McNemar's exact test on the same images under the same patches; n is the sum of the four counts; adjusted for all rows."
    return Table(f"{a} against {b}, paired", columns, tuple(rows), note)


def comparison_summary(record: dict) -> str:
    """Return in one sentence how many pairs went which way."""
    a, b = record["name_a"], record["name_b"]
    verdicts = [verdict(pair, a, b) for pair in record["pairs"]]
    return (
        f"Of {len(verdicts)} pairs: {a} better in {verdicts.count(a)}, {b} better in {verdicts.count(b)}, "
        f"undecided {verdicts.count('undecided')} (adjusted p of {SIGNIFICANT} or more)."
    )


def verdict(pair: dict, name_a: str, name_b: str) -> str:
    """Return the name that is right on more images, where the adjusted test says so, else `undecided`."""
    p = pair["p_value"] if pair["p_adjusted"] is None else pair["p_adjusted"]
    if p is None or p >= SIGNIFICANT or pair["only_a"] == pair["only_b"]:
        return "undecided"
    return name_a if pair["only_a"] > pair["only_b"] else name_b


def seeds(record: dict) -> Table:
    """Return mean, standard deviation and interval over training seeds: clean accuracy first, then every attack."""
    targets = list(record["clean_accuracy"])
    groups = {"clean accuracy": record["clean_accuracy"]} | record["success"]
    rows = [
        Row(name, tuple(_spread_cell(spreads.get(target)) for target in targets)) for name, spreads in groups.items()
    ]
    note = f"Over runs {', '.join(record['names'])}; sd: standard deviation over seeds."
    return Table(
        "Spread over seeds", ("measured", *(wording.bits_name(target) for target in targets)), tuple(rows), note
    )


def alignment_means(label: str, record: dict) -> Table:
    """Return the mean similarity over pairs of one kind, beside chance; marked where the excess over chance is beyond its interval."""
    measures = list(dict.fromkeys(row["measure"] for row in record["groups"]))
    rows = []
    for (network, images, kind, name), found in _grouped(
        record["groups"], ("network", "images", "kind", "map")
    ).items():
        by_measure = {row["measure"]: row for row in found}
        cells = tuple(_mean_cell(by_measure.get(measure)) for measure in measures)
        rows.append(
            Row(name, cells, (f"{kind}, n {found[0]['num_pairs']} pairs",), f"{network} backbone, {images} images")
        )
    note = (
        "Means over pairs of bit-widths (fp-b: 32 bits and a narrower one, b-b: two narrower ones), 95 % interval over images. "
        '"above chance": the whole interval of value minus chance is above 0.'
    )
    return Table(f"{label}: similarity{_over_images(record)}", ("map", *measures), tuple(rows), note)


def alignment_counts(label: str, record: dict) -> Table:
    """Return per map and measure how many pairs of bit-widths are more alike than chance: interval above its chance level."""
    measures = list(dict.fromkeys(pair["measure"] for pair in record["pairs"]))
    rows = []
    for (network, images, name), pairs in _grouped(record["pairs"], ("network", "images", "map")).items():
        cells = tuple(_above_chance([pair for pair in pairs if pair["measure"] == measure]) for measure in measures)
        rows.append(Row(name, cells, (), f"{network} backbone, {images} images"))
    note = (
        "Pairs whose 95 % interval lies above the chance level (the same measure between different images), fp-b: 32 bits and "
        "a narrower bit-width, b-b: two narrower ones."
    )
    return Table(f"{label}: pairs more alike than chance{_over_images(record)}", ("map", *measures), tuple(rows), note)


def alignment_values(label: str, record: dict, measure: str) -> Table:
    """Return one measure of every pair of bit-widths beside its chance level."""
    rows = []
    for pair in record["pairs"]:
        if pair["measure"] == measure:
            group = f"{pair['network']} backbone, {pair['images']} images, {pair['map']}"
            cells = (_plain_cell(pair), Cell(_number(pair["chance"])), Cell(pair["kind"]))
            rows.append(Row(f"{pair['a']} and {pair['b']} bits", cells, (), group))
    return Table(f"{label}: {measure}{_over_images(record)}", ("pair", measure, "chance", "kind"), tuple(rows))


def prediction(label: str, record: dict) -> Table:
    """Return whether alike pairs of bit-widths are also those between which patches transfer: rank correlations."""
    rows = []
    for row in record["prediction"]:
        cell = Cell(_number(row["rho"]), (_ends(row), f"n {row['num_pairs']} pairs"))
        where = tuple(row[name] for name in ("network", "images") if name in row)
        cells = (cell, Cell(wording.p_value(row["p"])), Cell(_number(row.get("weakest"))))
        rows.append(Row(f"{row['map']}, {row['measure']}", cells, where))
    note = (
        "Spearman's rank correlation over pairs of bit-widths, 95 % interval. An interval that holds 0 predicts nothing; weakest: what is left "
        "of rho without the bit-width that matters most; p by Mantel's test."
    )
    columns = ("map, measure", "rho", "p", "weakest")
    return Table(f"{label}: does similarity predict transfer", columns, tuple(rows), note)


def zero_gradients(record: dict) -> str:
    """Return in a sentence where input gradients are all zero, so that nothing is compared there; empty where they are nowhere."""
    shares = [
        f"{wording.percent(share)} at {bits} bits ({row['network']} backbone, {row['images']} images)"
        for row in record.get("zero_gradient", ())
        for bits, share in row["share"].items()
        if share
    ]
    return f"Input gradients that are all zero: {', '.join(shares)}." if shares else ""


def transfer(label: str, moved: dict) -> Table:
    """Return which share of right answers patches made on one bit-width (rows) turn wrong at another (columns), and where that was read."""
    rows = [
        Row(f"made on {bits} bits", tuple(Cell(wording.percent(rate), (), rate) for rate in rates))
        for bits, rates in zip(moved["bits"], moved["success"], strict=True)
    ]
    columns = ("patches", *(f"at {bits} bits" for bits in moved["bits"]))
    title = f"{label}: transfer between bit-widths, {moved['network']} backbone"
    return Table(title, columns, tuple(rows), f"Mean asr_correct, without intervals; from {moved['origin']}.")


def prediction_summary(record: dict) -> str:
    """Return in a sentence how many of the rank correlations have an interval that excludes 0."""
    intervals = [(row["low"], row["high"]) for row in record["prediction"] if None not in (row["low"], row["high"])]
    above, below = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
    return (
        f"Does similarity predict transfer? Of {len(record['prediction'])} maps and measures, the interval of rho lies "
        f"above 0 in {above} and below 0 in {below}."
    )


def curve(label: str, record: dict) -> Table:
    """Return one curve as a table: a row per point, a column per target."""
    targets = list(dict.fromkeys(target for point in record["points"] for target in point["success"]))
    rows = []
    for point in record["points"]:
        rates = [point["success"].get(target) for target in targets]
        rows.append(Row(f"{point['x']}", tuple(wording.rate_cell(r) if r else Cell("not measured") for r in rates)))
    return Table(
        f"{label}: {record['title']}", (record["x"], *(wording.bits_name(target) for target in targets)), tuple(rows)
    )


def sensitivity(label: str, record: dict, field: str) -> Table:
    """Return a grid of settings: what seeds of the base let one expect, then a row per point; `field` is `clean_accuracy` or `success`."""
    targets = list(dict.fromkeys(target for point in record["points"] for target in point[field]))
    expected = record["against_seeds"].get("seeds", {}).get(field)
    beyond = grids.beyond_rates(record["against_seeds"])
    rows = [Row("one more seed of the base", tuple(_expected_cell(expected[t]) for t in targets))] if expected else []
    for point in record["points"]:
        name = grids.point_name(point["changes"])
        marks = {target: (BEYOND,) * ((name, field, target) in beyond) for target in targets}
        rates = {target: point[field].get(target) for target in targets}
        shade = dict(is_shaded=field == "success")
        cells = [wording.rate_cell(r, marks=marks[t], **shade) if r else Cell("not measured") for t, r in rates.items()]
        rows.append(Row(name, tuple(cells)))
    title = {"clean_accuracy": "clean accuracy", "success": "success of attacks (asr_correct)"}[field]
    columns = ("changed", *(wording.bits_name(target) for target in targets))
    return Table(f"{label}: {title}", columns, tuple(rows), SEEDS_NOTE if expected else "")


def _expected_cell(expected):
    return Cell(wording.percent(expected["mean"]), (wording.interval(expected),))


def is_above_chance(pair: dict) -> bool:
    """Return whether a pair's whole interval lies above its chance level."""
    return None not in (pair["low"], pair["chance"]) and pair["low"] > pair["chance"]


def _spread_cell(spread):
    if spread is None or spread["mean"] is None:
        return Cell("not measured")
    sd = "sd none" if spread["sd"] is None else f"sd {100 * spread['sd']:.1f}"
    notes = (wording.interval(spread), sd, f"n {spread['num_seeds']} seeds")
    return Cell(wording.percent(spread["mean"]), tuple(note for note in notes if note))


def _mean_cell(row):
    if row is None or row["value"] is None:
        return Cell("not measured")
    notes = (_ends(row), f"chance {_number(row['chance'])}")
    return Cell(_number(row["value"]), notes, None, ("above chance",) if (row["excess_low"] or 0) > 0 else ())


def _above_chance(pairs):
    """Return `fp-b 3 of 4, b-b 6 of 6` as a cell, shaded by the share of all pairs."""
    if not pairs:
        return Cell("not measured")
    kinds = _grouped(pairs, ("kind",))
    counts = {kind: sum(is_above_chance(pair) for pair in members) for (kind,), members in kinds.items()}
    words = [f"{kind} {counts[kind]} of {len(members)}" for (kind,), members in kinds.items()]
    return Cell(words[0], tuple(words[1:]), sum(counts.values()) / len(pairs))


def _grouped(pairs, fields):
    groups: dict[tuple, list] = {}
    for pair in pairs:
        groups.setdefault(tuple(pair[field] for field in fields), []).append(pair)
    return groups


def _over_images(record):
    return f" (n {record['num_images']:,} images)" if record.get("num_images") else ""


def _plain_cell(value):
    return Cell(_number(value["value"]), (_ends(value),))


def _ends(value):
    return f"[{_number(value['low'])}, {_number(value['high'])}]"


def _number(value):
    return "none" if value is None else f"{value:.3f}"
