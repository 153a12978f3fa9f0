"""Measure how alike the bit-widths of trained runs are: `python -m triqdef_jax.alignment --workdirs=runs/digits[,runs/OTHER] [--independent]`.

The method rests on the premise that patches transfer between bit-widths because their features and input gradients are aligned. For every
pair of bit-widths, on clean and on patched test images: six similarities (`similarity.py`) of the stem's, every stage's and the input
gradient's maps, each with a 95 % interval over images and beside its chance level, and whether they predict how patches
transfer. `--independent` adds networks trained apart, one per bit-width. Several runs are also set side by side: the undefended one
(`loss.method=qat`) shows what was there before the defence. Writes `<workdir>/results/alignment.json`.
"""

import importlib.metadata
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import flags

from triqdef_jax import data as data_lib
from triqdef_jax import entry, files, loop, probes, quantize, runs, similarity, sources, surrogates, transfer
from triqdef_jax.objectives.penalties import INPUT_GRADIENT
from triqdef_jax.results import PACKAGES
from triqdef_jax.similarity import PairValues

FILE = "alignment.json"
SHARED, INDEPENDENT = "shared", "independent"  # one backbone for all bit-widths, or a network trained for each
CLEAN, PATCHED = "clean", "patched"
KINDS = ("fp-b", "b-b")  # pairs with the full-precision network, and pairs of two quantized ones
P_LEVEL = 0.05


class Measured(NamedTuple):
    """Values by map and measure, arrays `[P, N]` over pairs and images; share of images whose input gradient is all zero, `[K]`."""

    values: dict[str, dict[str, PairValues]]
    zero_gradient: np.ndarray


def measure(networks: Sequence, images: np.ndarray, labels: np.ndarray, *, batch_size: int) -> Measured:
    """Measure all pairs of networks on all images.

    Args:
      networks: K `probes.OneBit`, at least 2. images: uint8 `[N, H, W, 3]`. labels: int32 `[N]`. batch_size: images per pass; chance levels
      compare images of one batch.

    Returns:
      `Measured`, pairs in the order of `similarity.all_pairs`.

    Raises:
      ValueError: fewer than two networks or images.
    """
    _check(networks, labels)
    size, pairs = min(batch_size, len(labels)), similarity.all_pairs(len(networks))
    values: dict[str, dict[str, PairValues]] = {}
    is_zero = np.zeros((len(networks), len(labels)), bool)
    for start in range(0, len(labels), size):
        first = min(start, len(labels) - size)  # the last batch reaches back, so that all have one shape
        rows = slice(first, first + size)
        maps = [probes.probe(network, images[rows], labels[rows]).maps for network in networks]
        for name in maps[0]:
            stack = jnp.stack([of_network[name] for of_network in maps])
            for measure_name, found in similarity.pair_values(stack, pairs=pairs).items():
                empty = PairValues(*np.empty((2, len(pairs), len(labels)), np.float32))
                whole = values.setdefault(name, {}).setdefault(measure_name, empty)
                whole.value[:, rows], whole.chance[:, rows] = found
        is_zero[:, rows] = [~np.asarray(of_network[INPUT_GRADIENT]).any(axis=(1, 2, 3)) for of_network in maps]
    return Measured(values, is_zero.mean(axis=1))


def _check(networks, labels):
    if len(networks) < 2 or len(labels) < 2:
        raise ValueError(f"alignment needs 2 bit-widths and 2 images or more, got {len(networks)} and {len(labels)}")


def pair_rows(values: dict, bits: Sequence[int], *, seed: int, **about: str) -> list[dict]:
    """Return one row per pair, map and measure: value with interval, and chance; `about` says which network and images."""
    pairs = similarity.all_pairs(len(bits))
    rows = []
    for name, measure_name, found in _items(values):
        for place, (i, j) in enumerate(pairs):
            row = {"a": str(bits[i]), "b": str(bits[j]), "kind": _kind(bits[i], bits[j]), **about}
            estimate = similarity.image_bootstrap(found.value[place], seed=seed)
            chance = float(found.chance[place].mean())
            rows.append(row | {"map": name, "measure": measure_name, **estimate._asdict(), "chance": chance})
    return rows


def group_rows(values: dict, bits: Sequence[int], *, seed: int, **about: str) -> list[dict]:
    """Return one row per kind of pair, map and measure: the mean over its pairs, and how far it exceeds chance, with intervals."""
    kinds = np.array([_kind(bits[i], bits[j]) for i, j in similarity.all_pairs(len(bits))])
    rows = []
    for name, measure_name, found in _items(values):
        for kind in [kind for kind in KINDS if (kinds == kind).any()]:
            value, chance = found.value[kinds == kind], found.chance[kinds == kind]
            excess = similarity.image_bootstrap(value - chance, seed=seed)
            row = {"kind": kind, "num_pairs": len(value), **about, "map": name, "measure": measure_name}
            row |= similarity.image_bootstrap(value, seed=seed)._asdict() | {"chance": float(chance.mean())}
            rows.append(row | {"excess": excess.value, "excess_low": excess.low, "excess_high": excess.high})
    return rows


def prediction_rows(values: dict, moved: transfer.Transfer, *, seed: int, **about: str) -> list[dict]:
    """Return for each map and measure how the pairs' alignment ranks beside their transfer, both directions averaged."""
    success = moved.symmetric()
    upper = np.triu_indices(len(success), k=1)
    rows = []
    for name, measure_name, found in _items(values):
        alike = np.zeros_like(success)
        alike[upper] = found.value.mean(axis=1)
        ranks = similarity.rank_correlation(alike + alike.T, success, seed=seed)
        row = {"map": name, "measure": measure_name, "rho": ranks.rho, "low": ranks.low, "high": ranks.high}
        rows.append(about | row | {"num_pairs": ranks.num_pairs, "p": ranks.p_value, "weakest": ranks.weakest})
    return rows


def _items(values):
    """Yield (map, measure, its `PairValues`): the stem, the stages, the input gradient."""
    for name in sorted(values, key=lambda name: (name == INPUT_GRADIENT, name != "stem", name)):
        for measure_name in similarity.MEASURES:
            if measure_name in values[name]:
                yield name, measure_name, values[name][measure_name]


def _kind(a, b):
    return KINDS[0] if quantize.FLOAT_BITS in (a, b) else KINDS[1]


def align(networks: dict[str, Sequence], images: dict[str, np.ndarray], labels, transfers: dict, config) -> dict:
    """Measure everything on given images and return the numeric part of a record.

    Args:
      networks: `SHARED` and perhaps `INDEPENDENT` to K `probes.OneBit` each. images: `CLEAN` and perhaps `PATCHED` to uint8
      `[N, H, W, 3]`. labels: int32 `[N]`. transfers: a `transfer.Transfer` for each key of `networks`, or none. config: of the run.
    """
    record = {"pairs": [], "groups": [], "prediction": [], "zero_gradient": [], "transfer": []}
    for network, members in networks.items():
        bits = [member.bits for member in members]
        for image_set, pixels in images.items():
            found = measure(members, pixels, labels, batch_size=config.eval.batch_size)
            about = {"network": network, "images": image_set}
            record["pairs"] += pair_rows(found.values, bits, seed=config.seed, **about)
            record["groups"] += group_rows(found.values, bits, seed=config.seed, **about)
            shares = dict(zip(map(str, bits), found.zero_gradient.tolist(), strict=True))
            record["zero_gradient"].append(about | {"share": shares})
            if network in transfers and len(bits) > 2:
                rows = prediction_rows(found.values, transfers[network], seed=config.seed, **about)
                record["prediction"] += rows
        if network in transfers:
            moved = transfers[network]
            row = {"network": network, "bits": [str(b) for b in bits], "success": moved.matrix, "origin": moved.origin}
            record["transfer"].append(row)
    return record


def describe(trained, workdir, *, num_images: int, digest: str) -> dict:
    """Return what was measured: run, versions, definitions; `digest` is that of the patches."""
    config = trained.config
    return {
        "kind": "alignment",
        "name": pathlib.Path(workdir).name,
        "config_hash": files.config_hash(config),
        "step": trained.step,
        "method": config.loss.method,
        "data": config.data.name,
        "model": config.model.name,
        "seed": config.seed,
        "num_images": num_images,
        "patches_digest": digest,
        "definitions": similarity.DEFINITIONS
        | {
            "chance": "the same measure between maps of different images",
            "interval": "95 %, bootstrap over images; of rho: over pairs, which share bit-widths",
            "p": "Mantel's test, two-sided: all relabellings of the bit-widths",
            "weakest": "what is left of rho when the bit-width that matters most is taken away with its pairs",
            "transfer": "mean of both directions of asr_correct of universal patches",
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def table(record: dict, network: str, image_set: str) -> str:
    """Return the means over pairs of one network on one set of images as text: value [interval] (chance) by kind of pair."""
    columns = {kind: _column(record, network, image_set, kind) for kind in KINDS}
    columns = {f"{kind} pairs": column for kind, column in columns.items() if column}
    return _table(
        columns, lambda row: f"{row['value']:6.3f} [{row['low']:6.3f}, {row['high']:6.3f}]  ({row['chance']:.3f})"
    )


def side_by_side(records: list[dict], network: str, image_set: str) -> str:
    """Return several runs as text, value (chance) by run and kind of pair.

    Raises:
      ValueError: the runs met different images or patches.
    """
    if len({(r["data"], r["num_images"], r["patches_digest"]) for r in records}) > 1:
        raise ValueError("the runs met different images or patches; compare runs of one data set and patch config")
    columns = {}
    for kind in KINDS:
        for record in records:
            if column := _column(record, network, image_set, kind):
                columns[f"{record['name']}: {kind}"] = column
    return _table(columns, lambda row: f"{row['value']:6.3f} ({row['chance']:.3f})")


def _column(record, network, image_set, kind):
    wanted = (network, image_set, kind)
    rows = [row for row in record["groups"] if (row["network"], row["images"], row["kind"]) == wanted]
    return {(row["map"], row["measure"]): row for row in rows}


def _table(columns, text):
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    cells = {name: {key: text(column[key]) for key in column} for name, column in columns.items()}
    widths = {name: max(len(name), *map(len, column.values())) for name, column in cells.items()}
    lines = [f"{'map':<15} {'measure':<18}" + "".join(f"  {name:>{widths[name]}}" for name in columns)]
    for key in keys:
        line = "".join(f"  {cells[name].get(key, '-'):>{widths[name]}}" for name in columns)
        lines.append(f"{key[0]:<15} {key[1]:<18}{line}")
    return "\n".join(lines)


def reading(record: dict) -> list[str]:
    """Return what the record says in a few lines, and no more than it says."""
    lines = []
    for about in record["zero_gradient"]:
        place = {key: about[key] for key in ("network", "images")}
        for kind in KINDS:
            rows = [row for row in record["groups"] if place.items() <= row.items() and row["kind"] == kind]
            if rows:
                lines.append(_above_chance(rows, f"{place['network']}, {place['images']}, {kind}"))
        zero = {b: share for b, share in about["share"].items() if share}
        if zero:
            shares = ", ".join(f"{100 * share:.1f} % at {b}" for b, share in zero.items())
            lines.append(f"{place['network']}, {place['images']}: input gradients that are all zero: {shares} bits")
    for moved in record["transfer"]:
        lines += _predicted([row for row in record["prediction"] if row["network"] == moved["network"]], moved)
    return lines


def _above_chance(rows, title):
    """Count the measures above chance, and quote two of the input gradient whose chance level is low."""
    on_gradient = {row["measure"]: row for row in rows if row["map"] == INPUT_GRADIENT}
    features = [row for row in rows if row["map"] != INPUT_GRADIENT]
    of_features, of_gradient = (sum(row["excess_low"] > 0 for row in part) for part in (features, on_gradient.values()))
    quoted = [
        f"{words} {row['value']:.2f} (chance {row['chance']:.2f})"
        for name, words in (("cosine", "cosine"), ("hog_cosine_centred", "centred HOG cosine"))
        if (row := on_gradient.get(name))
    ]
    return (
        f"{title}: above chance in {of_features} of {len(features)} measures of features and {of_gradient} of {len(on_gradient)} of the "
        f"input gradient, with {', '.join(quoted)}"
    )


def _predicted(rows, moved):
    success = np.array(moved["success"], float)
    off = success[~np.eye(len(success), dtype=bool)]
    spread = f"success on other bit-widths {100 * off.min():.1f} to {100 * off.max():.1f} %"
    lines = [f"{moved['network']}: transfer from {moved['origin']}: {spread}"]
    known = [row for row in rows if row["rho"] is not None]
    if not known:
        return [*lines, f"{moved['network']}: too few bit-widths to ask whether alignment predicts it"]
    num_small = sum(row["p"] < P_LEVEL for row in known)
    rhos = sorted(row["rho"] for row in known)
    weakest = [row["weakest"] for row in known if row["weakest"] is not None]
    robust = f", median {np.median(weakest):.2f} without the bit-width that matters most" if weakest else ""
    return [
        *lines,
        f"{moved['network']}: alignment against transfer over {known[0]['num_pairs']} pairs: Spearman's rho {rhos[0]:.2f} to {rhos[-1]:.2f}, "
        f"median {np.median(rhos):.2f}{robust}; p < {P_LEVEL} in {num_small} of {len(known)} measures (by luck {P_LEVEL * len(known):.1f}), "
        f"which depend on one another",
    ]


def make_record(
    workdir, *, num_images: int, is_independent: bool, num_steps: int, progress: Callable | None = None
) -> dict:
    """Load a run, gather networks, images and transfer, and return its whole record.

    Args:
      num_images: first so many test images, 0 for all. is_independent: also networks trained apart, trained first where the shared folder
      has none. num_steps: of the patches that measure transfer where no evaluation record has it; 0 leaves it out then.

    Raises:
      entry.UserError: no run, or nothing to compare. loop.PreemptedError: while a network was trained.
    """
    tell = progress or (lambda text: None)
    with entry.user_errors():
        trained = runs.load_trained(workdir)
        config, bits = trained.config, trained.network.bits
        data = data_lib.load(config.data)
        images, labels = probes.first_test_images(data, num_images)
        _check(bits, labels)
        pool = sources.train_pool(config, data).split()[1]
        patched = probes.patched(pool, images, config)
    networks = {SHARED: [probes.one_bit(trained, b) for b in bits]}
    if is_independent:
        networks[INDEPENDENT] = [_trained_apart(config, b, data) for b in bits]
    transfers = {}
    for name, members in networks.items():
        found = None
        if name == SHARED:
            found = transfer.from_records(f"{workdir}/results", bits, files.config_hash(config))
        if found is None and num_steps:
            line = lambda text, name=name: tell(f"transfer, {name} networks: {text}")
            found = transfer.by_attack(members, data, images, labels, config, num_steps=num_steps, progress=line)
        if found is not None:
            transfers[name] = found
    tell("similarities")
    image_sets = {CLEAN: images, PATCHED: patched}
    described = describe(trained, workdir, num_images=len(labels), digest=pool.digest)
    return files.plain(described | align(networks, image_sets, labels, transfers, config))


def _trained_apart(config, bits, data):
    name = "fp" if bits == quantize.FLOAT_BITS else f"qat:{bits}"
    return probes.one_bit(surrogates.get(config, name, data), bits)


def main(argv):
    del argv
    options = flags.FLAGS
    if not options.workdirs:
        raise entry.UserError("--workdirs=DIR[,DIR] is needed: the directories of trained runs")
    if options.images < 0 or options.transfer_steps < 0:
        raise entry.UserError("--images and --transfer_steps must be at least 0")
    progress = (lambda text: print(f"\r{text:<70}", end="", file=sys.stderr)) if sys.stderr.isatty() else None
    records = []
    try:
        for workdir in options.workdirs:
            record = make_record(
                workdir,
                num_images=options.images,
                is_independent=options.independent,
                num_steps=options.transfer_steps,
                progress=progress,
            )
            with entry.user_errors():
                files.atomic_write_json(f"{workdir}/results/{FILE}", record)
            records.append(record)
            _print_record(record, workdir)
    except loop.PreemptedError as error:
        print(error, file=sys.stderr)
        return entry.EXIT_PREEMPTED
    if len(records) > 1:
        with entry.user_errors():
            _print_side_by_side(records)
    return 0


def _print_record(record, workdir):
    for about in record["zero_gradient"]:
        place = (about["network"], about["images"])
        print(
            f"\n{record['name']} ({record['method']}): {place[0]} network, {record['num_images']} {place[1]} test images; mean over pairs "
            f"[95 % over images] (chance)\n{table(record, *place)}"
        )
    print("\n" + "\n".join(reading(record)) + f"\nwritten to {workdir}/results/{FILE}")


def _print_side_by_side(records):
    for about in records[0]["zero_gradient"]:
        place = (about["network"], about["images"])
        print(f"\nside by side: {place[0]} network, {place[1]} images, mean over pairs (chance)")
        print(side_by_side(records, *place))


if __name__ == "__main__":
    flags.DEFINE_list("workdirs", [], "Directories of trained runs.")
    flags.DEFINE_bool("independent", False, "Also networks trained apart, one per bit-width (trained if need be).")
    flags.DEFINE_integer("images", 512, "First so many test images; 0 takes all.")
    flags.DEFINE_integer(
        "transfer_steps", 100, "Steps of the patches that measure transfer where no record has it; 0: none."
    )
    entry.run_program(main)
