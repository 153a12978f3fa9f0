"""How much evidence an evaluation gathers: `pools`, `smoke`, `quick`, `standard`, `full`, `sanity`, `curves`, as a list of `CellPlan` for one config.

`smoke` to `full` have each kind of attacker: transfer from surrogates, white-box, adaptive, queries, and controls, per-image ones
with a smaller patch too, which does not fool every image. They differ in images, steps, restarts and queries: `smoke` runs every kind and says
nothing, `full` is what a published claim needs and is meant for an accelerator. `sanity` asks of an undefended network whether the attacks attack.
"""

import dataclasses
import itertools

from ml_collections import ConfigDict

from triqdef_jax import config as config_lib
from triqdef_jax import ptq, surrogates, verdicts
from triqdef_jax.cells import ALL_BITS, SELF, CellPlan

FLOAT_BITS = 32
UNIVERSAL = ("lavan", "gap")
CONTROLS = ("grey", "noise", "crop")
PLACES = ("random", "center", "corner")
# A prediction behind them takes many passes: a tenth of the queries, and PGD on as few images as queries.
SLOW_DEFENSES = ("diffpure", "patchcleanser")
# Side of the smaller patch over the larger. At 5 of 16 px per-image attacks fool 95 to 100 % on digits. At 3 px, on 64 images at 32 bits
# of `triqdef`, `sparse_rs` fools 73 %, `patchattack` 41 %, `patch_pgd` 30 % from one place and 67 % with `SMALL_SEARCH`; at 2 px the first
# two fool 13 and 8 %, too few to compare.
SMALL_FRAC = 0.6
SMALL_SEARCH = {"location": "full", "grid_stride_px": 1, "move_every_steps": 3, "step_size": 0.3}
SMALL_RESTARTS = 8  # at least
CURVE_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
CURVE_RESTARTS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Preset:
    """Budget of one preset.

    Attributes:
      extra_bits: bit-widths that were never trained. ptq: (observer, bits) of re-quantized rows.
      surrogates: names, with 'qat:low' for the lowest trained bit-width, 'qat:each' for all below 32 and 'fp@each' for every other architecture of
        `surrogates.names`. places: where universal patches are pasted; places other than 'random' are measured for the first surrogate alone.
      universal_steps, num_patches: of LaVAN and GAP; patches cycle over the classes.
      white_steps, white_restarts, white_images: of per-image attacks with gradients; 0 images takes all.
      realign_gradients: the adaptive attack re-aligns input gradients too, not feature maps alone; twice the cost of its steps.
      queries, query_images: of the score-based attacks, per image.
      all_bits: LaVAN and attacks by query are made on every bit-width, else on the widest and the lowest.
    """

    extra_bits: tuple[int, ...] = (3, 6)
    ptq: tuple[tuple[str, int], ...] = (("minmax", 8), ("mse", 8), ("minmax", 4), ("mse", 4))
    surrogates: tuple[str, ...] = ("fp", "qat:low")
    places: tuple[str, ...] = ("random",)
    universal_steps: int = 150
    num_patches: int = 10
    white_steps: int = 50
    white_restarts: int = 1
    white_images: int = 256
    realign_gradients: bool = False
    queries: int = 2000
    query_images: int = 64
    all_bits: bool = False


_STANDARD = Preset(
    surrogates=("fp", "qat:each", "qaa", "retrained"),
    places=PLACES,
    universal_steps=500,
    white_steps=100,
    white_restarts=5,
    white_images=1000,
    realign_gradients=True,
    queries=5000,
    query_images=256,
    all_bits=True,
)
PRESETS = {
    "smoke": Preset(
        extra_bits=(),
        ptq=(),
        surrogates=("fp",),
        universal_steps=2,
        num_patches=2,
        white_steps=2,
        white_images=8,
        queries=100,
        query_images=4,
    ),
    "quick": Preset(),
    "standard": _STANDARD,
    "full": dataclasses.replace(
        _STANDARD,
        surrogates=("fp", "fp@each", "qat:each", "qaa", "retrained"),
        num_patches=20,
        white_steps=500,
        white_restarts=10,
        white_images=0,
        queries=10_000,
        query_images=1000,
    ),
}
# PGD starts from as many places as the adaptive attack has estimators, so that neither wins by their number.
SANITY = Preset(extra_bits=(), ptq=(), surrogates=(), universal_steps=200, white_steps=50, white_restarts=3)
NAMES = ("pools", *PRESETS, "sanity", "curves")


def check(name: str) -> str:
    """Return the name of a preset; raises ValueError that lists them for another."""
    if name not in NAMES:
        raise ValueError(f"--preset must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def target_names(
    name: str, config: ConfigDict, extra_bits: tuple[int, ...] = (), defenses: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the rows of an evaluation: trained bit-widths, untrained ones, the backbone re-quantized (where it was trained in float).

    Each of `defenses` adds a row around the widest and the lowest bit-width, around all where the preset attacks all. A run that was trained to
    predict at random bit-widths adds that. 'sanity' has the widest trained bit-width alone.
    """
    trained = (max(config.quant.bits),) if name == "sanity" else tuple(config.quant.bits)
    preset = PRESETS.get(name)
    extra = [b for b in dict.fromkeys((*extra_bits, *(preset.extra_bits if preset else ()))) if b not in trained]
    requantized = (
        [f"ptq:{observer}:{b}" for observer, b in preset.ptq if observer in _observers(config)] if preset else []
    )
    defended = [f"{defense}:{b}" for defense in defenses for b in _ends(preset, trained)]
    drawn = _drawn(config) if name != "sanity" else ()
    return (*(str(b) for b in (*trained, *extra)), *requantized, *drawn, *defended)


def _drawn(config):
    """The row of a network that is meant to predict at random bit-widths."""
    return (surrogates.RANDOM,) if config.loss.method == "dwq" and len(config.quant.bits) > 1 else ()


def _observers(config):
    """What can re-quantize the run: nothing without float weights; under observed scales the channel maximum decides anyway."""
    if FLOAT_BITS not in config.quant.bits:
        return ()
    return ("minmax",) if config.quant.scale == "observed" else tuple(ptq.OBSERVERS)


def plans(
    name: str, config: ConfigDict, defended: tuple[str, ...] = (), further: tuple[str, ...] = ()
) -> tuple[CellPlan, ...]:
    """Return the cells of a preset for one run, cheapest kind of attacker first; none for 'pools'.

    Args:
      defended: rows behind a defence, such as 'jedi:4', to be attacked through it. further: surrogates beside the preset's, for universal
        patches and, other than those, for per-image ones each.

    Raises:
      ValueError: `further` under a preset without surrogates, or one of them is unknown or the defended network itself.
    """
    further = tuple(dict.fromkeys(further))
    check_further(name, further)
    if name == "sanity":
        return (*_sanity(config), *_through_defenses(SANITY, defended, config.patches.sizes_px[0]))
    if name not in PRESETS:
        return ()
    preset, size_px = _with_models(PRESETS[name], config), config.patches.sizes_px[0]
    further = tuple(one for one in further if one not in preset.surrogates)
    preset = dataclasses.replace(preset, surrogates=(*preset.surrogates, *further))
    bits, few_px = tuple(config.quant.bits), small_px(size_px)
    sizes = (size_px, few_px) if few_px < size_px else (size_px,)
    return (
        *_controls(preset, sizes),
        *_universal(preset, bits, size_px),
        *_white_box(preset, bits, sizes, further),
        *_queries(preset, bits, sizes),
        *_through_defenses(preset, (*_drawn(config), *defended), size_px),
    )


def check_further(name: str, further: tuple[str, ...]) -> None:
    """Refuse surrogates that cannot stand beside those of a preset; raises as `plans`."""
    if further and name not in PRESETS:
        raise ValueError(f"preset {name} has no surrogates; ask for {', '.join(further)} under {', '.join(PRESETS)}")
    for surrogate in further:
        if surrogates.parse(surrogate)[0] == SELF:
            raise ValueError(
                f"{surrogate} is the network itself, which the presets attack anyway; name another surrogate"
            )


def meets_pools(name: str) -> bool:
    """Return whether a preset meets the patch pools of source networks, which are trained first where the shared folder has none."""
    return name != "sanity"


def small_px(size_px: int) -> int:
    """Return the side of the smaller patch, at least one pixel."""
    return max(1, round(SMALL_FRAC * size_px))


def _label(sizes, size_px, *words):
    """End the name of a cell whose patch is not of the first size."""
    return ", ".join([*words, *([] if size_px == sizes[0] else [f"{size_px} px"])])


def _controls(preset, sizes):
    for name in CONTROLS:
        yield CellPlan(name, "", sizes[0], num_patches=preset.num_patches)
    for size in sizes[1:]:
        yield CellPlan("noise", "", size, num_patches=preset.num_patches, label=_label(sizes, size))


def _ends(preset, bits):
    """All bit-widths, or the widest and the lowest."""
    return bits if preset and preset.all_bits else tuple(dict.fromkeys((max(bits), min(bits))))


def _with_models(preset, config):
    """Write 'fp@each' out: every other architecture that the run's data set has."""
    each = [name for name in surrogates.names(config) if name.startswith("fp@")]
    listed = [each if name == "fp@each" else [name] for name in preset.surrogates]
    return dataclasses.replace(preset, surrogates=tuple(itertools.chain.from_iterable(listed)))


def _surrogates(preset, bits):
    low = [b for b in bits if b != FLOAT_BITS]
    expand = {"qat:low": [f"qat:{min(low)}"] if low else [], "qat:each": [f"qat:{b}" for b in low]}
    return [name for entry in preset.surrogates for name in expand.get(entry, [entry])]


def _universal(preset, bits, size_px):
    """LaVAN and GAP, for every class as target: from independent networks, from every bit-width of the run itself, from all together."""
    fields = (("num_steps", preset.universal_steps),)
    others = _surrogates(preset, bits)
    for attack in UNIVERSAL:
        own = [f"{SELF}:{b}" for b in (_ends(preset, bits) if attack == "lavan" else bits)]
        own += [f"{SELF}:{ALL_BITS}"] * (len(bits) > 1)
        for surrogate in (*others, *own):
            places = preset.places if surrogate == others[0] else preset.places[:1]
            for place in places:
                yield CellPlan(
                    attack, surrogate, size_px, place, is_targeted=True, num_patches=preset.num_patches, fields=fields
                )


def _white_box(preset, bits, sizes, further=()):
    """Per-image attacks with gradients: PGD on every bit-width, from some surrogates and on all; adaptive on all; both with the smaller patch.

    Twice the steps and re-alignment are asked of the smaller patch, for the larger leaves hardly an image to gain.
    """
    base = {"num_steps": preset.white_steps, "num_restarts": preset.white_restarts}

    def cell(attack, surrogate, size, *words, doubles="", **fields):
        num_images, search = preset.white_images, {}
        if size != sizes[0]:  # on the images that attacks by query meet, for they are compared
            num_images = preset.query_images
            restarts = max(SMALL_RESTARTS, preset.white_restarts)
            search = SMALL_SEARCH | {"num_restarts": restarts} if attack == "patch_pgd" else {}
        common = dict(num_images=num_images, doubles=doubles, fields=_pairs(base | search | fields))
        return CellPlan(attack, surrogate, size, "", label=_label(sizes, size, *words), **common)

    few, low, every = sizes[-1], f"{SELF}:{min(bits)}", f"{SELF}:{ALL_BITS}"
    yield from (cell("patch_pgd", f"{SELF}:{b}", sizes[0]) for b in bits)
    if few < sizes[0]:
        yield from (cell("patch_pgd", f"{SELF}:{b}", few) for b in _ends(preset, bits))
    original = cell("patch_pgd", low, few).name
    yield cell("patch_pgd", low, few, "twice the steps", doubles=original, num_steps=2 * preset.white_steps)
    for surrogate in dict.fromkeys((_surrogates(preset, bits)[0], *further)):
        yield cell("patch_pgd", surrogate, sizes[0])
    if len(bits) > 1:
        yield cell("patch_pgd", every, sizes[0])
        yield from (cell("adaptive", every, size) for size in sizes)
        aligned = {"realign_weight": 1.0, "realign_gradients": preset.realign_gradients}
        yield cell("adaptive", every, few, "re-aligning", **aligned)


def _queries(preset, bits, sizes):
    for attack, size in ((attack, size) for size in sizes for attack in ("sparse_rs", "patchattack", "mpa")):
        if attack == "mpa" and size != sizes[0]:
            continue  # its rectangle is as small as will do anyway
        # One start is as published; eight that share the budget fool more small patches' images (88 instead of 80 % at 3 px on digits).
        restarts = {"num_restarts": 8} if attack == "sparse_rs" else {}
        fields = _pairs({"num_queries": preset.queries} | restarts)
        for b in _ends(preset, bits):
            common = dict(num_images=preset.query_images, fields=fields, label=_label(sizes, size))
            yield CellPlan(attack, f"{SELF}:{b}", size, "", **common)


def _sanity(config):
    """Every attack on the widest bit-width alone, noise of the same size, and a patch as large as the image."""
    size_px, bits = config.patches.sizes_px[0], (max(config.quant.bits),)
    own, num_patches = f"{SELF}:{bits[0]}", SANITY.num_patches
    yield CellPlan("noise", "", size_px, num_patches=num_patches)
    for attack in UNIVERSAL:
        # Patches are pasted at random places, where LaVAN made for one place loses: on 512 training images of digits that no attack saw,
        # its ten patches fool 15.4 % (the best 21.6 %), made for random places 19.0 % (29.3 %); GAP's 18.0 % (27.8 %), noise 9.9 % (12.3 %).
        fields = _pairs({"num_steps": SANITY.universal_steps, "location": "random"})
        yield CellPlan(attack, own, size_px, is_targeted=True, num_patches=num_patches, fields=fields)

    def cell(attack, size, restarts, label=""):
        fields = {"num_steps": SANITY.white_steps, "num_restarts": restarts}
        return CellPlan(attack, own, size, "", num_images=SANITY.white_images, fields=_pairs(fields), label=label)

    yield cell("patch_pgd", size_px, SANITY.white_restarts)
    yield cell("adaptive", size_px, 1)  # from one place per estimator
    yield cell("patch_pgd", config_lib.image_size_px(config), 1, verdicts.WHOLE_IMAGE)
    yield from _queries(SANITY, bits, (size_px,))


def _through_defenses(preset, rows, size_px):
    """Attacks that know the defence: PGD through it (or straight through, in expectation over its draws) and queries of it."""
    for row in rows:
        is_slow = row.partition(":")[0] in SLOW_DEFENSES
        images = preset.query_images if is_slow else preset.white_images
        steps = {"num_steps": preset.white_steps, "num_restarts": preset.white_restarts}
        queries = {"num_queries": max(1, preset.queries // (10 if is_slow else 1)), "num_restarts": 8}
        cell = lambda attack, num, fields, row=row: CellPlan(
            attack, f"{SELF}:{row}", size_px, "", num_images=num, fields=_pairs(fields)
        )
        yield cell("patch_pgd", images, steps)
        yield cell("sparse_rs", preset.query_images, queries)


def not_run(name: str) -> list[dict]:
    """Return what the larger presets do and this one leaves out, for the record; nothing for a preset without attacks."""
    if name == "sanity":
        what = "surrogates, lower bit-widths, other sizes and places"
        return [{"attack": what, "reason": "not part of preset sanity"}]
    if name not in PRESETS or name == "full":
        return []
    done, full = PRESETS[name], PRESETS["full"]
    left = [f"surrogate {s}" for s in full.surrogates if s not in done.surrogates]
    left += [f"placement {p}" for p in full.places if p not in done.places]
    budget = f"{full.white_steps} steps x {full.white_restarts} restarts and {full.queries} queries on all images"
    return [{"attack": what, "reason": f"not part of preset {name}"} for what in (*left, budget)]


def curve_plans(config: ConfigDict, image_size_px: int) -> dict[str, list[tuple[int, CellPlan]]]:
    """Return {what is varied: [(its value, cell)]}: white-box patch PGD on the lowest bit-width against patch size, steps and restarts.

    Sizes run up to the whole image, where any network must fall; if it does not, the attack is broken.
    """
    size_px, surrogate = config.patches.sizes_px[0], f"{SELF}:{min(config.quant.bits)}"
    sizes = sorted({*range(1, size_px + 1, max(1, size_px // 3)), size_px, 2 * size_px, image_size_px})

    def plan(what, value, size=size_px, **fields):
        chosen = _pairs({"num_steps": 64, "num_restarts": 1} | fields)
        return value, CellPlan("patch_pgd", surrogate, size, "", num_images=256, fields=chosen, label=f"{what} {value}")

    return {
        "patch side (px)": [plan("side", s, size=s) for s in sizes if s <= image_size_px],
        "steps": [plan("steps", s, num_steps=s) for s in CURVE_STEPS],
        "restarts": [plan("restarts", r, num_restarts=r) for r in CURVE_RESTARTS],
    }


def _pairs(fields):
    return tuple(sorted(fields.items()))
