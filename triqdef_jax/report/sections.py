"""The sections of the page below the first screen, each a function from records to HTML that is empty where there is nothing to show."""

import base64
import html
import itertools

from triqdef_jax import grids
from triqdef_jax.report import attack_tables, evidence_tables, figures, markup, records, table, wording
from triqdef_jax.report.flags import Flag
from triqdef_jax.report.records import Run

MAX_CURVE_POINTS = 150
LOG_FROM_RATIO = 32  # from here on the points of a curve, doubled each time, would crowd at one end of a linear axis
TRAINING_CURVES = {  # prefix of the names in metrics.jsonl -> title, name of the y axis, its ends
    "acc_clean/": ("Accuracy on clean training images", "share right", (0, 1)),
    "acc_patched/": ("Accuracy on patched training images", "share right", (0, 1)),
    "ce_patched/": ("Cross-entropy of patched training images", "nats", None),
    "gpdp/": ("Similarity of input gradients, pairs of bit-widths", "similarity", None),
}
SCALARS = ("loss", "penalty")


def flags(found: list[Flag]) -> str:
    """Return what every flag means and where it was raised."""
    items = []
    for flag in found:
        places = "".join(f"<li>{markup.text(place)}</li>" for place in flag.places)
        meaning = f"<p>{markup.text(flag.meaning)}.</p>" if flag.meaning else ""
        items.append(f'<h3 class="alarm">{markup.text(flag.name)}</h3>{meaning}<ul>{places}</ul>')
    return "".join(items)


def matrices(evaluations: dict[str, dict]) -> str:
    """Return a heat map of attack by target for every run."""
    return "".join(
        table.to_html(attack_tables.matrix(label, record), css_class="matrix") for label, record in evaluations.items()
    )


def controls(evaluations: dict[str, dict]) -> str:
    """Return the strongest attacks above the stickers that nobody optimised."""
    return _optional_tables(attack_tables.controls, evaluations)


def seen(evaluations: dict[str, dict]) -> str:
    """Return the strongest attack among seen and among unseen kinds of patches."""
    return _optional_tables(attack_tables.seen, evaluations)


def success_numbers(evaluations: dict[str, dict]) -> str:
    """Return all success numbers, settings and costs of every attack, each folded."""
    parts = []
    for label, record in evaluations.items():
        parts.append(f"<h3>{markup.text(label)}</h3>")
        parts += [_attack_details(cell, record) for cells in attack_tables.by_access(record).values() for cell in cells]
    return "".join(parts)


def comparisons(found: dict[str, dict]) -> str:
    """Return paired tests: a sentence each, all counts folded."""
    parts = []
    for record in found.values():
        counts = table.to_html(evidence_tables.comparison(record))
        parts.append(f"<h3>{markup.text(record['name_a'])} against {markup.text(record['name_b'])}</h3>")
        parts.append(
            f"<p>{markup.text(evidence_tables.comparison_summary(record))}</p>{markup.fold('All pairs', counts)}"
        )
    return "".join(parts)


def seeds(found: dict[str, dict]) -> str:
    """Return the spread over training seeds."""
    return "".join(table.to_html(evidence_tables.seeds(record), css_class="matrix") for record in found.values())


def alignment(found: dict[str, dict]) -> str:
    """Return similarity of bit-widths beside chance, runs side by side; single pairs folded."""
    overview = [
        f"<div>{table.to_html(evidence_tables.alignment_means(label, record), css_class='matrix') if record.get('groups') else ''}"
        f"{table.to_html(evidence_tables.alignment_counts(label, record))}"
        f"<p>{markup.text(evidence_tables.zero_gradients(record))}</p>{_predictions(label, record)}</div>"
        for label, record in found.items()
    ]
    pairs = list(itertools.chain.from_iterable(record["pairs"] for record in found.values()))
    folds = [
        markup.fold(f"{m}, every pair", _measure(found, m)) for m in dict.fromkeys(pair["measure"] for pair in pairs)
    ]
    return markup.beside(overview) + "".join(folds) if found else ""


def curves(found: dict[str, dict]) -> str:
    """Return success against patch size, steps or restarts, drawn and, folded, as tables."""
    parts = []
    for label, record in found.items():
        for curve in record["curves"]:
            values = markup.fold("Figures", table.to_html(evidence_tables.curve(label, curve), css_class="matrix"))
            parts.append(
                f"<figure><figcaption>{markup.text(label)}: {markup.text(_curve_title(curve))}</figcaption>{_chart(curve)}{values}</figure>"
            )
    return markup.beside(parts)


def sensitivity(found: dict[str, dict]) -> str:
    """Return of each grid of settings what differs by more than seeds do, then success and clean accuracy."""
    parts = []
    for label, record in found.items():
        parts.append(f"<p><b>{markup.text(label)}: {markup.text(grids.sentence(record['against_seeds']))}</b></p>")
        tables = (evidence_tables.sensitivity(label, record, field) for field in ("success", "clean_accuracy"))
        parts.append(markup.beside([table.to_html(made, css_class="matrix") for made in tables]))
    return "".join(parts)


def pictures(runs: tuple[Run, ...]) -> str:
    """Return the pictures of all runs by group, embedded; one that is missing is said in its place."""
    parts = []
    for run in runs:
        for record in (record for record in run.records.values() if record["kind"] == "pictures"):
            groups = itertools.groupby(
                sorted(record["pictures"], key=lambda picture: picture["group"]), key=lambda picture: picture["group"]
            )
            for group, members in groups:
                shown = "".join(_picture(run, picture) for picture in members)
                parts.append(
                    f'<h3>{markup.text(run.label)}: {markup.text(group)}</h3><div class="gallery">{shown}</div>'
                )
    return "".join(parts)


def training(runs: tuple[Run, ...]) -> str:
    """Return training curves from metrics.jsonl, runs side by side, thinned to what a figure can show."""
    parts = []
    for run in runs:
        lines = run.metrics[:: max(1, -(-len(run.metrics) // MAX_CURVE_POINTS))]
        charts = [_training_chart(lines, {name: name for name in SCALARS}, "Loss and penalty", "value", None)]
        for prefix, (title, y, y_range) in TRAINING_CURVES.items():
            names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
            shown = {name: wording.bits_name(name.removeprefix(prefix)) for name in list(names)[: figures.NUM_SERIES]}
            left_out = f", first {figures.NUM_SERIES} of {len(names)}" if len(names) > figures.NUM_SERIES else ""
            charts.append(_training_chart(lines, shown, title + left_out, y, y_range))
        if any(charts):
            parts.append(f"<h3>{markup.text(run.label)}</h3>{markup.beside(charts)}")
    return "".join(parts)


def _attack_details(cell, record):
    facts = {
        "seen in training": wording.unseen(cell),
        "images": f"{cell['num_images']:,}" if cell.get("num_images") else None,
        "patches": f"{cell['num_patches']:,}" if cell.get("num_patches") else None,
        "queries per image": _queries(cell.get("queries")),
        "settings": cell.get("settings"),
        "digest of the patches": cell.get("digest"),
        "seconds": f"{cell['seconds']:,.1f}" if cell.get("seconds") is not None else None,
    }
    numbers = table.to_html(attack_tables.success_numbers(cell, record))
    return markup.fold(
        f"{wording.cell_name(cell)}, {', '.join(wording.cell_notes(cell))}", numbers + markup.definitions(facts)
    )


def _queries(queries):
    if not queries:
        return None
    mean = "" if queries.get("mean") is None else f", {queries['mean']:,.0f} on average"
    return f"{queries['budget']:,} at most{mean}"


def _predictions(label, record):
    if not record["prediction"]:
        return ""
    values = table.to_html(evidence_tables.prediction(label, record))
    moved = "".join(table.to_html(evidence_tables.transfer(label, row)) for row in record.get("transfer", ()))
    parts = [
        f"<p>{markup.text(evidence_tables.prediction_summary(record))}</p>",
        markup.fold("Rank correlations", values),
    ]
    return "".join([*parts, markup.fold("Transfer that they are compared with", moved) if moved else ""])


def _measure(found, measure):
    """Return every pair under one measure, drawn network by network and as a table, runs side by side."""
    parts = []
    for label, record in found.items():
        pairs = [pair for pair in record["pairs"] if pair["measure"] == measure and pair["value"] is not None]
        plots = [
            _pairs_plot(f"{label}: {measure}, {network} backbone; bars: chance", measure, list(members))
            for network, members in itertools.groupby(pairs, key=lambda pair: pair["network"])
        ]
        values = table.to_html(evidence_tables.alignment_values(label, record, measure))
        parts.append(f"<div>{''.join(plots)}{markup.fold('Figures', values)}</div>")
    return markup.beside(parts)


def _pairs_plot(title, measure, pairs):
    kinds = list(dict.fromkeys(pair["kind"] for pair in pairs))
    rows: dict[str, list] = {}
    for pair in pairs:
        where = f"{pair['images']} {pair['map'].replace('input_gradient', 'gradient')}"
        ends = (pair["value"], pair["low"], pair["high"])
        rows.setdefault(where, []).append(figures.Estimate(*ends, kinds.index(pair["kind"]), pair["chance"]))
    low = min(pair["value"] if pair["low"] is None else pair["low"] for pair in pairs)
    plot = figures.interval_plot(rows, title=title, x=measure, x_range=(min(0.0, low), 1.0), names=kinds)
    return f"<figure><figcaption>{markup.text(title)}</figcaption>{plot}</figure>"


def _curve_title(curve):
    return f"{curve['title']}, made on {curve['attacked']}" if curve.get("attacked") else curve["title"]


def _chart(curve):
    series: dict[str, list] = {}
    for point in curve["points"]:
        for target, rate in point["success"].items():
            if rate["rate"] is not None:
                values = (100 * rate[end] for end in ("rate", "low", "high"))
                series.setdefault(target, []).append(figures.Point(point["x"], *values))
    named = {wording.bits_name(target): points for target, points in series.items()}
    places = [point["x"] for point in curve["points"]]
    is_log = min(places, default=0) > 0 and max(places) >= LOG_FROM_RATIO * min(places)
    return figures.line_chart(
        named, title=curve["title"], x=curve["x"], y="asr_correct (%)", y_range=(0, 100), is_log_x=is_log
    )


def _training_chart(lines, names, title, y, y_range):
    series = {
        shown: [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        for name, shown in names.items()
    }
    points = {name: [figures.Point(*point) for point in curve] for name, curve in series.items() if curve}
    chart = figures.line_chart(points, title=title, x="training step", y=y, y_range=y_range)
    return f"<figure><figcaption>{markup.text(title)}</figcaption>{chart}</figure>" if chart else ""


def _picture(run, picture):
    content = records.read_picture(run, picture["file"])
    title, caption = markup.text(picture["title"]), markup.text(picture.get("caption", ""))
    if content is None:
        return f"<p>{title}: the file {markup.text(picture['file'])} is missing; make the pictures again.</p>"
    alt = html.escape(f"{picture['title']}. {picture.get('caption', '')}", quote=True)
    data = base64.b64encode(content).decode()
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption><b>{title}</b> {caption}</figcaption></figure>'


def _optional_tables(build, evaluations):
    tables = [build(label, record) for label, record in evaluations.items()]
    return "".join(table.to_html(made, css_class="matrix") for made in tables if made)
