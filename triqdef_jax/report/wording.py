"""Words and numbers as the report prints them: rates with interval and n, names of targets, attacks and attackers."""

from triqdef_jax.report.table import Cell

ACCESS = {
    "white-box": "Made on the defended network itself",
    "adaptive": "Adaptive: made on the defended network, against its own idea",
    "transfer": "Transfer: made on a network of the attacker's",
    "query": "Query only: sees outputs, never gradients",
    "control": "Controls: nothing was optimised",
}
SURROGATES = {
    "fp": "an independent full-precision network",
    "qat:b": "an independent network trained at b bits alone",
    "qaa": "an independent 2-bit network fine-tuned under switched precision",
    "self:b": "the defended network at b bits",
    "self:all": "the defended network at all its bit-widths together",
    "retrained": "the defence, trained by the attacker with another seed, all bit-widths together",
}
TARGETS = {
    "b bits": "the defended network at a bit-width that it was trained at",
    "b bits, untrained": "the same backbone, calibrated for a bit-width that training never used",
    "b bits, ptq": "the same trained weights, quantized again afterwards with another observer, as a vendor would",
}
ATTACKS = {
    "lavan": "patches at a fixed or random place that lower the loss of a target class and raise that of the label",
    "gap": "the same under random place, rotation and scale",
    "patch_pgd": "sign steps on the patch of each image, which searches its place; the strongest attack with gradients",
    "adaptive": "patch_pgd that knows the method: all bit-widths at once, three gradients of the quantizer, logits rescaled",
    "sparse_rs": "random search on the logits, patch and place",
    "patchattack": "textures of training images, place and crop learned by a policy from the logits",
    "mpa": "one rectangle of one colour, found the same way",
    "grey, noise, crop": "controls: a grey square, noise, a square cut from another image",
}
SEEN = "everything seen"


def percent(share: float | None) -> str:
    """Return `44.2 %` for 0.442, `none` for None: nothing was counted."""
    return "none" if share is None else f"{100 * share:.1f} %"


def interval(rate: dict) -> str:
    """Return the ends of a rate's 95 % interval in percent: `[40.1, 48.3]`, empty where nothing was counted."""
    if rate.get("low") is None or rate.get("high") is None:
        return ""
    return f"[{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def count(number: int) -> str:
    """Return `n 4,050`."""
    return f"n {number:,}"


def rate_text(rate: dict) -> str:
    """Return a rate in a line: `44.2 % [40.1, 48.3], n 4,050`."""
    ends = interval(rate)
    return f"{percent(rate['rate'])}{' ' * bool(ends)}{ends}, {count(rate['den'])}"


def rate_cell(rate: dict, *more: str, marks: tuple[str, ...] = (), is_shaded: bool = True) -> Cell:
    """Return a rate as a cell of a table, shaded by its size; `more` are further notes."""
    notes = tuple(note for note in (interval(rate), count(rate["den"]), *more) if note)
    return Cell(percent(rate["rate"]), notes, rate["rate"] if is_shaded else None, marks)


def p_value(p: float | None) -> str:
    """Return a p-value with the precision a reader needs: `0.031`, `< 0.001`."""
    if p is None:
        return "none"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def is_trained(target: str, record: dict) -> bool:
    """Return whether a target is a bit-width that the run trained; a record that does not say counts every bit-width."""
    trained = [str(bits) for bits in record.get("quant", {}).get("bits", ())]
    return target in trained if trained else target.isdigit()


def target_name(target: str, record: dict) -> str:
    """Return what a target is: `4 bits`, `3 bits, untrained`, `4 bits, ptq mse`, `4 bits, jedi`."""
    defense, _, rest = target.partition(":")
    if rest and defense != "ptq":
        return f"{target_name(rest, record)}, {defense}"
    if target.startswith("ptq:"):
        observer, _, bits = target.rpartition(":")
        return f"{bits} bits, {observer.replace(':', ' ')}"
    if not target.isdigit():
        return target
    return f"{target} bits" if is_trained(target, record) else f"{target} bits, untrained"


def bits_name(target: str) -> str:
    """Return `4 bits` for `4`; other names as they are."""
    return f"{target} bits" if target.isdigit() else target


def cell_name(cell: dict) -> str:
    """Return which attack and where its patches were made: `lavan on fp`, or the given name of a pool: `held-out (lavan+gap)`."""
    if "|" not in cell["name"] and cell["name"] != cell["attack"]:
        return f"{cell['name']} ({cell['attack']})"
    surrogate = cell.get("surrogate")
    return cell["attack"] if surrogate in (None, "", "none", "-") else f"{cell['attack']} on {surrogate}"


def cell_notes(cell: dict) -> tuple[str, ...]:
    """Return what else tells cells apart: `5 px, random place`, `targeted`, `10 patches`, queries."""
    notes = [f"{cell['size_px']} px, {cell['placement']} place", cell.get("goal", "")]
    if cell.get("num_patches"):
        notes.append(f"{cell['num_patches']:,} patches")
    if cell.get("queries"):
        notes.append(f"{cell['queries']['budget']:,} queries at most")
    return tuple(note for note in notes if note)


def short_notes(cell: dict) -> tuple[str, ...]:
    """Return what tells the rows of a matrix apart: size and place, `untargeted`, what training never met, a label in the name."""
    labels = [part for part in cell["name"].split("|")[1:] if part not in (cell.get("surrogate"), cell["placement"])]
    novelty = unseen(cell)
    goal = "untargeted" if cell.get("goal") == "untargeted" else ""
    notes = (f"{cell['size_px']} px, {cell['placement']}", goal, "" if novelty == SEEN else novelty, *labels)
    return tuple(note for note in notes if note)


def unseen(cell: dict) -> str:
    """Return what of the patches training never met: `unseen size, placement`, or `everything seen`."""
    names = [name for name, is_seen in cell.get("seen", {}).items() if not is_seen]
    return f"unseen {', '.join(names)}" if names else SEEN
