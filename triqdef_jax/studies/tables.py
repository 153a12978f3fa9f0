"""The tables of a study, from its record alone: the paper's tables 4 to 7 with our figures above the printed ones, paired tests, budgets.

Printed figures stand in rows of their own, under a heading that says whose they are, with a column that says how comparable they are.
"""

from collections.abc import Callable

from triqdef_jax import latency, surrogates
from triqdef_jax.report import wording
from triqdef_jax.report.table import Cell, Row, Table
from triqdef_jax.studies import numbers, published
from triqdef_jax.studies.published import Facts

NOT_MEASURED, OURS, NO_FIGURES = Cell("not measured"), Cell("measured here"), Cell("no figures")
COMPARABLE = "comparable"
PRINTED = "As printed in the paper: no interval, no n, no seeds"
ATTACK_NAMES = {"lavan": "LaVAN", "gap": "GAP", "patchattack": "PatchAttack", "sparse_rs": "Sparse-RS"}
METHOD_NAMES = {
    "qat": "standard QAT",
    "no_fdp": "triqdef without FDP",
    "no_gpdp": "triqdef without GPDP",
}
INTERVAL = (
    "[..] 95 % interval, over several seeds Student's of their mean; n images, for universal patches image-patch pairs."
)
SUCCESS = f"Success (asr_correct): of the images right without the patch and not of its target class, the share wrong with it. {INTERVAL}"


def make(record: dict) -> list[Table]:
    """Return all tables of a study that have a row, in reading order; each title begins with the study's label, if it has one."""
    built = [
        strongest(record),
        clean_accuracy(record),
        *(success(record, attack) for attack in published.ATTACKS),
        *(own_success(record, name, title) for name, title in OWN_TABLES.items()),
        drawn(record),
        certified(record),
        robust_accuracy(record),
        ablation(record),
        paired(record),
        *(paired_counts(record, words, cell_of) for words, cell_of in PAIRED.items()),
        inference_cost(record),
        budget(record),
    ]
    label = f"{record['label']}. " if record["label"] else ""
    return [table._replace(title=label + table.title) for table in built if table.rows]


PAIRED = {
    "held-out patches of all families": lambda target: numbers.HELD_OUT,
    "white-box patch PGD on the very bit-width": lambda target: f"patch_pgd|self:{target}",
}
OWN_TABLES = {
    numbers.WHITE_BOX: "White-box patch PGD on the attacked bit-width itself",
    "sparse_rs": "Sparse-RS, queries to the attacked bit-width itself",
}


def strongest(record: dict) -> Table:
    """Return the worst success of all attacks per bit-width, with the share right under all of them."""
    rows = []
    for head, found in _rows_of(record):
        cells = tuple(_worst(found, target) for target in _targets(record, head))
        rows.append(Row(_name(head), cells))
        cells = tuple(_rate(found, numbers.RIGHT, target, is_shaded=False) for target in _targets(record, head))
        rows.append(Row(_name(head), cells, ("right under all attacks",)))
    note = (
        "Worst: the strongest of all attacks at each bit-width, white-box and queries included; the interval is not widened for having been "
        "chosen after the fact. "
    )
    kept = tuple(row for row in rows if any(cell != NOT_MEASURED for cell in row.cells))
    return Table("Worst success of an attack", ("method", *_bits(record)), kept, note + INTERVAL)


def clean_accuracy(record: dict) -> Table:
    """Return the paper's table 4."""
    rows = [_row(record, head, found, numbers.CLEAN, is_shaded=False) for head, found in _rows_of(record)]
    printed = [_printed(record, row) for row in _find(record, 4)]
    return Table("Table 4: clean accuracy", _columns(record), (*rows, *printed), INTERVAL)


def success(record: dict, attack: str) -> Table:
    """Return one attack's part of the paper's table 5: patches of seen and of unseen sides for the universal ones."""
    name = ATTACK_NAMES[attack]
    rows = []
    for head, found in _rows_of(record):
        kinds = {f"patches held out, {record['facts']['size_px']} px": numbers.column(attack, numbers.HELD_OUT)}
        kinds |= {f"unseen side, {px} px": numbers.column(attack, numbers.unseen(px)) for px in record["unseen_px"]}
        if attack not in ("lavan", "gap"):
            kinds = {f"queries, {record['facts']['size_px']} px": attack}
        rows += [_row(record, head, found, column, (words,)) for words, column in kinds.items()]
    printed = [_printed(record, row) for row in _find(record, 5, attack=attack)]
    how = {
        "lavan": "Universal patches made on independent full-precision networks, at random places. ",
        "gap": "Universal patches made on independent full-precision networks, at random places. ",
        "patchattack": "Each bit-width is queried itself; training met no patch of this family. ",
    }
    return Table(f"Table 5: success of {name}", _columns(record), (*_measured(rows), *printed), how[attack] + SUCCESS)


def own_success(record: dict, column: str, title: str) -> Table:
    """Return the success of an attack that the paper has no table of."""
    return Table(title, ("method", *_bits(record)), _unprinted(record, column), SUCCESS)


def drawn(record: dict) -> Table:
    """Return the figures of networks that predict at a bit-width drawn for each image, as DWQ means to be used."""
    held_out = numbers.column("lavan", numbers.HELD_OUT)
    columns = (numbers.CLEAN, held_out, numbers.WHITE_BOX, "sparse_rs")
    rows = []
    for head, found in _rows_of(record):
        cells = tuple(_rate(found, name, surrogates.RANDOM, is_shaded=name != numbers.CLEAN) for name in columns)
        if not head[1] and set(cells) != {NOT_MEASURED}:
            rows.append(Row(_name(head), cells))
    names = ("method", "clean accuracy", "LaVAN, held out", "patch PGD in expectation over the draw", "Sparse-RS")
    note = f"Each image is predicted at a trained bit-width drawn for it; attacks draw anew in every step and query. {SUCCESS}"
    return Table("At drawn bit-widths, the inference of DWQ", names, tuple(rows), note)


def certified(record: dict) -> Table:
    """Return what defences with a certificate prove."""
    note = f"Of all images, the share proven right under any one patch of {record['facts']['size_px']} px, by two masks. {INTERVAL}"
    rows = _unprinted(record, numbers.CERTIFIED, is_shaded=False)
    return Table("Certified robust accuracy", ("method", *_bits(record)), rows, note)


def robust_accuracy(record: dict) -> Table:
    """Return the paper's table 6: right with a LaVAN patch, of all images, beside the figures printed for ImageNet."""
    column = f"{numbers.column('lavan', numbers.HELD_OUT)}: {numbers.ROBUST}"
    rows = _measured([_row(record, head, found, column, is_shaded=False) for head, found in _rows_of(record)])
    printed = [_printed(record, row) for row in _find(record, 6)]
    note = f"Of all images, the share right with a held-out LaVAN patch. Printed: sources disagree whether it counts successes. {INTERVAL}"
    return Table("Table 6: robust accuracy under LaVAN", _columns(record), (*rows, *printed), note)


def ablation(record: dict) -> Table:
    """Return the paper's table 7: LaVAN at the lowest bit-width, the baseline, its ablations, and training without penalties."""
    low = min(record["bits"], key=int)
    chosen = {run["row"] for run in record["runs"] if run["is_ablation"]} | {record["baseline"]}
    kinds = {"held out": numbers.HELD_OUT} | {f"{px} px": numbers.unseen(px) for px in record["unseen_px"]}
    rows = []
    for head, found in _rows_of(record):
        if head in {(name, "") for name in chosen}:
            cells = (_rate(found, numbers.column("lavan", pool), low) for pool in kinds.values())
            rows.append(Row(head[0], _ours(*cells)))
    printed = []
    for name in dict.fromkeys(row.method for row in _find(record, 7)):
        found = {row.patches: row for row in _find(record, 7, method=name)}
        values = [found.get(published.SEEN)] + [found.get(published.UNSEEN)] * len(record["unseen_px"])
        cells = (Cell(f"{row.percent[2]:.1f} %" if row else "not printed") for row in values)
        words = published.comparable(next(iter(found.values())), Facts(**record["facts"]))
        printed.append(Row(METHOD_NAMES.get(name, name), (*cells, Cell(words)), ("2 bits",), PRINTED))
    columns = ("method", *(f"LaVAN {kind}, {low} bits" for kind in kinds), COMPARABLE)
    return Table(
        "Table 7: ablation",
        columns,
        (*rows, *printed) if len(rows) > 1 else (),
        f"Printed unseen: sides not told. {SUCCESS}",
    )


def paired(record: dict) -> Table:
    """Return on how many attacks every method beats or loses to the baseline, per bit-width."""
    bits, base = _bits(record), record["baseline"]
    rows = []
    for run in record["runs"]:
        found = run.get("paired", {})
        if "refused" in found:
            rows.append(Row(run["name"], (Cell(found["refused"]),) + (Cell("none"),) * (len(bits) - 1)))
        elif found:
            rows.append(Row(run["name"], tuple(_tally(found["tally"].get(target)) for target in record["bits"])))
    note = (
        f"Attacks on which the method is right on more images than {base} : on fewer : undecided. McNemar's exact test per attack on the same "
        "images, adjusted by Holm over all attacks and bit-widths of the pair of runs; attacks on the run itself have equal settings, all others "
        "the very same patches. Right means right under every patch of the attack."
    )
    return Table(f"Paired tests against {base}", ("run", *bits), tuple(rows), note)


def paired_counts(record: dict, words: str, cell_of: Callable[[str], str]) -> Table:
    """Return the paired counts of one attack: images right under the method alone and under the baseline alone, adjusted p.

    Args:
      words: what the attack is called. cell_of: target -> name of its cell.
    """
    rows = []
    for run in record["runs"]:
        pairs = {(p["cell"], p["target"]): p for p in run.get("paired", {}).get("pairs", ())}
        found = [pairs.get((cell_of(target), target)) for target in record["bits"]]
        if any(found):
            rows.append(Row(run["name"], tuple(_pair(pair) for pair in found)))
    title = f"Images right under the method alone : under {record['baseline']} alone, {words}"
    return Table(title, ("run", *_bits(record)), tuple(rows), "McNemar, p adjusted by Holm as above.")


def inference_cost(record: dict) -> Table:
    """Return the time per image behind each defence beside that of the network alone."""
    timed = record["latency"]
    if not timed:
        return Table("", (), (), "")
    bare, rows = timed["ms_per_image"][latency.BARE], []
    for name in (latency.BARE, *record["defenses"]):
        cells = []
        for size, ms in timed["ms_per_image"][name].items():
            words = f"{ms['median']:.2f} ms, x {ms['median'] / bare[size]['median']:.1f}"
            cells.append(Cell(words, (f"{ms['min']:.2f} to {ms['max']:.2f} ms",)))
        rows.append(Row("none, as triqdef" if name == latency.BARE else name, tuple(cells)))
    note = (
        f"Per image: median of {timed['rounds']} rounds by the clock, multiple of the network alone, range. Methods of training, triqdef too, leave "
        f"the network alone to compute. An untrained one of this shape, {timed['defended_bits']} bits, fake-quant forward, {timed['cores']} cores."
    )
    columns = ("defence at inference", *(f"batch {size}" for size in bare))
    return Table("Latency at inference", columns, tuple(rows), note)


def budget(record: dict) -> Table:
    """Return what every run was given and what it took."""
    rows = []
    for run in record["runs"]:
        given = run["budget"]
        status = "done" if run["status"] == "done" else run["status"]
        times = (_minutes(given[name]) for name in ("train_wall_s", "train_cpu_s", "evaluate_wall_s"))
        cost = Cell(f"{given['forward_equivalents']:.1f}")
        cells = (Cell(run["method"]), Cell(str(given["epochs"])), cost, *times, Cell(status))
        rows.append(Row(run["name"], tuple(cells)))
    columns = (
        "run",
        "method",
        "epochs",
        "forward-equivalents per image of a batch",
        "training, clock",
        "training, processor",
        "evaluation, clock",
        "status",
    )
    note = (
        "Epochs are equal by construction. Forward-equivalents: what an image of the batch costs in a step, averaged over the run (a forward at "
        "one bit-width is 1, its backward 2, attacks in training included). Times are of whole processes, compilation included, without the "
        "source networks and patches that all share."
    )
    return Table("Training budget", columns, tuple(rows), note)


def _rows_of(record):
    """Yield ((row, defence or ''), {column: {target: [rate per seed]}}) for every row, defended ones after their own."""
    for name in dict.fromkeys(run["row"] for run in record["runs"]):
        runs = [run for run in record["runs"] if run["row"] == name]
        merged: dict[str, dict[str, list]] = {}
        for run in runs:
            for column, rates in run.get("columns", {}).items():
                for target, rate in rates.items():
                    merged.setdefault(column, {}).setdefault(target, []).append(rate)
        yield (name, ""), merged
        for defence in record["defenses"]:
            if any(target.startswith(f"{defence}:") for rates in merged.values() for target in rates):
                yield (name, defence), merged


def _row(record, head, found, column, notes=(), *, is_shaded=True):
    cells = tuple(_rate(found, column, target, is_shaded=is_shaded) for target in _targets(record, head))
    return Row(_name(head), _ours(*cells), notes)


def _unprinted(record, column, *, is_shaded=True):
    """Return the rows that have a figure, without the column of comparability, for nothing is printed of these."""
    rows = _measured([_row(record, head, found, column, is_shaded=is_shaded) for head, found in _rows_of(record)])
    return tuple(row._replace(cells=row.cells[:-1]) for row in rows)


def _ours(*cells):
    """End the cells of a row of ours with what stands in the column of comparability."""
    return (*cells, OURS if any(cell != NOT_MEASURED for cell in cells) else NO_FIGURES)


def _name(head):
    return " + ".join(filter(None, head))


def _targets(record, head):
    return [f"{head[1]}:{b}" if head[1] else b for b in record["bits"]]


def _rate(found, column, target, *, is_shaded=True):
    rates = [rate for rate in found.get(column, {}).get(target, ()) if rate["rate"] is not None]
    if not rates:
        return NOT_MEASURED
    rate = numbers.over_seeds(rates)
    if len(rates) == 1:
        return wording.rate_cell(rate, is_shaded=is_shaded)
    notes = (wording.interval(rate), f"mean of {len(rates)} seeds")
    return Cell(wording.percent(rate["rate"]), notes, rate["rate"] if is_shaded else None)


def _worst(found, target):
    """The rate of the strongest attack, with its name where one run has one."""
    cell, rates = _rate(found, numbers.WORST, target), found.get(numbers.WORST, {}).get(target, ())
    return cell._replace(notes=(*cell.notes, rates[0]["cell"])) if len(rates) == 1 and cell != NOT_MEASURED else cell


def _measured(rows):
    """Leave out the rows without any figure, such as those of attacks that the preset has not."""
    return [row for row in rows if row.cells[-1] == OURS]


def _find(record, table, **fields):
    return published.find(table, data=record["facts"]["data"], **fields)


def _printed(record, row):
    values = (row.percent.get(int(b)) for b in record["bits"])
    cells = tuple(Cell("not printed" if value is None else f"{value:.1f} %") for value in values)
    notes = (row.patches, row.note) if row.patches else (row.note,)
    words = published.comparable(row, Facts(**record["facts"]))
    name = METHOD_NAMES.get(row.method, row.method)
    return Row(name, (*cells, Cell(words)), tuple(note for note in notes if note), PRINTED)


def _columns(record):
    return ("method", *_bits(record), COMPARABLE)


def _bits(record):
    return tuple(wording.bits_name(b) for b in record["bits"])


def _tally(counts):
    if counts is None:
        return NOT_MEASURED
    return Cell(f"{counts['better']} : {counts['worse']} : {counts['undecided']}")


def _pair(pair):
    if pair is None:
        return NOT_MEASURED
    return Cell(f"{pair['only_a']} : {pair['only_b']}", (f"p {wording.p_value(pair['p_adjusted'])}",))


def _minutes(seconds):
    return Cell(f"{seconds / 60:.1f} min")
