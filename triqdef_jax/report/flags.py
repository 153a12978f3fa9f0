"""What a reader must be warned of, in plain words: flags stored with the results, and runs that cannot be compared."""

from typing import NamedTuple

from triqdef_jax.report import records, wording

# The first key that occurs in a flag's name says what it means; names are compared in lower case.
MEANINGS = {
    "transfer beats white-box": "foreign patches beat those made on this network: its gradients may hide attacks, true success may be higher",
    "adaptive beats": "an attack that knows the method beats plain gradients: read its figure, not that of patch_pgd",
    "beats patch_pgd": "another attack on this very bit-width beats patch_pgd, which is badly tuned here",
    "beats white-box": "an attack without gradients beats those with them: gradients may hide attacks, true success may be higher",
    "zero": "gradients vanish for many images: gradient attacks are blind here, their success says little",
    "determin": "the network answers differently each time: attacks must average over its randomness",
    "better than noise": "such a patch only covers pixels: the attack failed, or the defence holds against it",
    "whole image": "a patch as large as the image replaces it and should fool every network: the attack is broken",
    "hardly right": "training failed here: success counts images that are right without a patch, so low figures are no robustness",
    "converge": "more steps still help: the attack was stopped early, true success is higher",
}
FEW_IMAGES = 100


class Flag(NamedTuple):
    """A warning: its name, what it means, and one line per place where it was raised."""

    name: str
    meaning: str
    places: tuple[str, ...]


def collect(evaluations: dict[str, dict]) -> list[Flag]:
    """Return all warnings of all runs, those of one name together, comparability first."""
    found: dict[str, list[str]] = {}
    for label, record in evaluations.items():
        for flag in record.get("flags", ()):
            found.setdefault(flag["flag"], []).append(_place(label, flag, record))
    stored = [Flag(name, meaning(name), tuple(places)) for name, places in found.items()]
    return [*_incomparable(records.headline(evaluations)), *_few_images(evaluations), *stored]


def meaning(name: str) -> str:
    """Return what a flag says about the figures; empty for a flag that explains itself in its details."""
    plain = name.lower().replace("_", " ") + " " + name.lower()
    return next((words for key, words in MEANINGS.items() if key in plain), "")


def _place(label, flag, record):
    target = flag.get("target")
    where = f"{label}, {wording.target_name(str(target), record)}" if target not in (None, "") else label
    return f"{where}: {flag['detail']}" if flag.get("detail") else where


def _incomparable(evaluations):
    """Return what differs between runs that stand side by side."""
    checks = {
        "different test images": ("the runs were measured on different images: do not compare them", _images),
        "different forward": ("fake-quantized and integer figures stand side by side", lambda r: r.get("forward")),
        "different attacks": ("the worst of different sets of attacks: compare only rows that both have", _attacks),
    }
    flags = []
    for name, (words, read) in checks.items():
        values = [read(record) for record in evaluations.values()]
        if any(value != values[0] for value in values):
            flags.append(Flag(name, words, tuple(evaluations)))
    changed = _changed_patches(evaluations)
    words = "attacks of one name used different patches in different runs: compare with care"
    return flags + ([Flag("different patches", words, tuple(changed))] if changed else [])


def _images(record):
    return record.get("image_ids_sha256"), record.get("num_images")


def _attacks(record):
    return sorted(cell["name"] for cell in record["cells"])


def _changed_patches(evaluations):
    """Return the foreign attacks whose patches differ between runs; those made on a defended network differ by nature."""
    digests: dict[str, set] = {}
    for record in evaluations.values():
        for cell in record["cells"]:
            if cell["access"] in ("transfer", "control") and cell.get("surrogate") != "retrained":
                digests.setdefault(cell["name"], set()).add(cell.get("digest"))
    return [name for name, values in digests.items() if len(values) > 1]


def _few_images(evaluations):
    places = [
        f"{label}, {wording.cell_name(cell)}: {cell['num_images']} images"
        for label, record in evaluations.items()
        for cell in record["cells"]
        if cell.get("num_images", FEW_IMAGES) < FEW_IMAGES
    ]
    words = f"fewer than {FEW_IMAGES} images: read the interval, not the figure"
    return [Flag("few images", words, tuple(places))] if places else []
