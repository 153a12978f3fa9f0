"""One cell of the evidence: craft patches with an attack on a surrogate, paste them, predict with every target; cached on disk, so that it resumes.

Universal patches are optimised on training images and meet all test images; per-image attacks work on the first test images themselves. Patches made
on networks that do not depend on the attacked run lie in the shared folder, so that runs meet the very same ones; the rest in `<workdir>/results`.
"""

import dataclasses
import functools
import json
import pathlib
import time
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from triqdef_jax import attacks, files, inference, loop, patches, quantize, sources, spread, surrogates
from triqdef_jax.models.multibit import make_outputs_fn
from triqdef_jax.results import Cell
from triqdef_jax.runs import Trained
from triqdef_jax.targets import Target

FORMAT = 1
SELF = "self"
ALL_BITS = "all"
FIGURES = ("best_loss", "loss", "zero_gradient")  # of an attack's info, whose means are kept


@dataclasses.dataclass(frozen=True)
class CellPlan:
    """What one cell does.

    Attributes:
      attack: key of `attacks.ATTACKS`. surrogate: 'self:4', 'self:jedi:4' through a defence, 'self:all' or one of `surrogates.names`; '' for
        controls.
      size_px: side of the patch. placement: 'random', 'center' or 'corner', where universal patches are pasted; '' for per-image attacks.
      is_targeted: one patch per target class (universal), else any wrong class. num_patches: universal patches; per-image attacks have 1.
      num_images: test images that per-image attacks work on, 0 for all. fields: further settings of the attack, as sorted pairs.
      label: ends the name where the rest does not tell two cells apart. doubles: name of the cell whose steps this one doubles, or ''.
    """

    attack: str
    surrogate: str
    size_px: int
    placement: str = "random"
    is_targeted: bool = False
    num_patches: int = 1
    num_images: int = 0
    fields: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    doubles: str = ""

    @property
    def name(self) -> str:
        return "|".join(part for part in (self.attack, self.surrogate, self.placement, self.label) if part)


class Subject(NamedTuple):
    """The run under attack and the images that judge it.

    Attributes:
      trained, data: run and data set. targets: its rows. images: uint8 `[N, H, W, 3]`, labels: int32 `[N]`, ids: `[N]`, the test images.
      workdir: where results go. deployed: integers are measured below 32 bits. networks: surrogates by name; one that is missing is trained
        by the cell that needs it, which a single process alone may do.
    """

    trained: Trained
    data: Any
    targets: tuple[Target, ...]
    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    workdir: pathlib.Path
    deployed: bool
    networks: Mapping[str, Trained] = types.MappingProxyType({})

    @property
    def config(self):
        return self.trained.config

    @property
    def results(self) -> pathlib.Path:
        return self.workdir / self.trained.results

    @property
    def identity(self) -> str:
        return files.config_hash([files.config_hash(self.config), self.trained.step])


class Crafted(NamedTuple):
    """What an attack made: arrays (universal: values, masks, size_px, target; per image: images, target, queries) and figures about it."""

    arrays: dict[str, np.ndarray]
    about: dict[str, Any]


def run(plan: CellPlan, subject: Subject, *, progress=None) -> Cell:
    """Return one cell, from disk where it is finished.

    Args:
      progress: called with a line of text now and then.

    Raises:
      ValueError: an unknown attack or surrogate, or settings that do not fit the images.
      loop.PreemptedError: SIGTERM while a surrogate was trained.
    """
    crafted = craft(plan, subject, progress)
    digest = files.sha256_of_arrays(crafted.arrays)
    rows = np.arange(crafted.about["num_images"] or len(subject.images), dtype=np.int32)
    predicted = _measured(plan, subject, crafted, digest, rows, progress)
    entry = attacks.ATTACKS[plan.attack]
    about = {
        "attack": plan.attack,
        "surrogate": plan.surrogate,
        "placement": plan.placement or "chosen by the attack",
        "size_px": plan.size_px,
        "goal": "targeted" if plan.is_targeted else "untargeted",
        "access": _access(plan, entry),
        "seen": _seen(plan, subject.config),
        **({"doubles": plan.doubles} if plan.doubles else {}),
        **{key: value for key, value in crafted.about.items() if key != "num_images"},
    }
    return Cell(plan.name, about, predicted, crafted.arrays["target"], rows, digest)


def pool_cell(name: str, pool, subject: Subject, *, progress=None) -> Cell:
    """Return the cell of a patch pool from `sources.eval_pools`, patches that were made on full-precision source networks."""
    config = subject.config
    arrays = {"values": pool.values, "masks": pool.masks, "size_px": pool.size_px, "target": pool.target}
    size_px = int(pool.size_px[0])
    seen = size_px in config.patches.sizes_px
    plan = CellPlan("pool", name, size_px, num_patches=len(pool.values))
    rows = np.arange(len(subject.images), dtype=np.int32)
    digest = files.sha256_of_arrays(arrays)
    predicted = _measured(plan, subject, Crafted(arrays, {}), digest, rows, progress)
    about = {
        "attack": "+".join(config.patches.families),
        "surrogate": "source network",
        "placement": "random",
        "size_px": size_px,
        "goal": "targeted",
        "access": "transfer",
        "seen": {"size": seen, "family": True, "placement": True},
    }
    return Cell(name, about, predicted, pool.target, rows, digest)


def _access(plan, entry):
    if entry.access == "none":
        return "control"
    if entry.access == "query" or plan.attack == "adaptive":
        return "query" if entry.access == "query" else "adaptive"
    family, bits = surrogates.parse(plan.surrogate)
    if family != SELF:
        return "transfer"
    return "adaptive" if bits == ALL_BITS else "white-box"


def _seen(plan, config):
    """What training met: the size, the family of the pool, random places."""
    return {
        "size": plan.size_px in config.patches.sizes_px,
        "family": plan.attack in config.patches.families,
        "placement": plan.placement in ("", "random"),
    }


def craft(plan: CellPlan, subject: Subject, progress=None) -> Crafted:
    """Return the patches of a cell, made first if no finished file holds them."""
    entry = attacks.get(plan.attack)
    folder = subject.results / "crafted"
    owner = subject.identity
    is_own = plan.surrogate.startswith(SELF)
    if not is_own:
        folder = pathlib.Path(subject.config.patches.shared_dir) / "crafted"
        owner = surrogates.identity(subject.config, plan.surrogate, subject.data.num_train) if plan.surrogate else ""
    settings = make_settings(plan, subject)
    facts = [
        FORMAT,
        plan.attack,
        plan.surrogate,
        plan.label,
        plan.num_images,
        _plain(settings),
        owner,
        subject.config.seed,
        subject.config.data.name,
    ]
    facts.append(subject.deployed and entry.access == "query")  # gradients exist in the fake-quant graph alone
    facts += [subject.data.image_size_px, subject.config.patches.shape, files.sha256_of_arrays({"ids": subject.ids})]
    path = folder / f"{plan.attack}-{files.config_hash(facts)}.npz"
    if not path.with_suffix(".json").is_file():
        _tell(progress, f"{plan.name}: attacking")
        start = time.perf_counter()
        made = CRAFTERS[entry.kind](plan, subject, entry, settings)
        about = made.about | {"seconds": round(time.perf_counter() - start, 1)}
        files.atomic_savez(path, **made.arrays)
        files.atomic_write_json(path.with_suffix(".json"), about)  # last: it marks the arrays as whole
    with open(path, "rb") as file, np.load(file) as arrays:
        return Crafted(dict(arrays), json.loads(path.with_suffix(".json").read_text()))


def make_settings(plan: CellPlan, subject: Subject):
    """Return the settings of a cell's attack, whole: they are part of its identity on disk."""
    entry, fields = attacks.get(plan.attack), dict(plan.fields)
    if plan.surrogate in (f"{SELF}:{ALL_BITS}", "retrained") and plan.attack != "adaptive":
        fields["random_logits"] = True  # a bit-width drawn in each step
    if entry.access == "gradient" and _is_random_row(plan, subject):
        fields["random_logits"] = True  # a defence that draws
    if entry.kind == "per_image":
        return entry.settings(size_px=plan.size_px, **fields)
    num = plan.num_patches
    targets = tuple(k % subject.data.num_classes if plan.is_targeted else -1 for k in range(num))
    shape = subject.config.patches.shape
    return entry.settings(size_px=(plan.size_px,) * num, target=targets, shape=shape, **fields)


def _craft_universal(plan, subject, entry, settings):
    logits_fn = surrogate_logits(plan.surrogate, subject) if plan.surrogate else subject.targets[0].logits_fn
    if entry.access == "gradient":
        logits_fn = spread.by_rows(logits_fn)
    images, labels = sources.training_images(subject.data, subject.config.patches.source_images)
    patch, info = entry.attack(_key(plan, subject), logits_fn, images, labels, settings)
    arrays = {name: np.asarray(getattr(patch, name)) for name in ("values", "masks", "size_px", "target")}
    return Crafted(arrays, {"settings": _plain(settings), "num_images": 0, "queries": None} | _figures(info))


def _craft_per_image(plan, subject, entry, settings):
    num = min(plan.num_images or len(subject.images), len(subject.images))
    images, labels = subject.images[:num].astype(np.float32) / 255.0, subject.labels[:num]
    key = _key(plan, subject)
    if entry.access == "query":
        network = functools.partial(_query, _own_target(plan, subject))
        needs = {"textures": _textures(plan, subject)} if plan.attack == "patchattack" else {}
        _, info = entry.attack(key, network, images, labels, settings, **needs)
    else:
        is_adaptive = plan.attack == "adaptive"
        make = adaptive_outputs if is_adaptive else surrogate_logits
        network = make(plan.surrogate, subject)
        common = dict(batch_size=_batch_size(subject), names=("images", *FIGURES))
        info = spread.attack_in_batches(entry.attack, key, network, images, labels, settings, **common)
    patched = np.asarray(patches.round_to_uint8(info["images"]))
    queries = np.asarray(info["queries"]) if "queries" in info else None
    counted = None if queries is None else {"budget": settings.num_queries, "mean": float(queries.mean())}
    arrays = {"images": patched, "target": np.array([settings.target], np.int32)}
    return Crafted(arrays, {"settings": _plain(settings), "num_images": num, "queries": counted} | _figures(info))


CRAFTERS = {"universal": _craft_universal, "per_image": _craft_per_image}


def _query(target, images):
    """Logits of float images on the uint8 grid, from the forward that is measured; of a random defence, other draws than those."""
    return np.asarray(target.ask(np.asarray(patches.round_to_uint8(jnp.asarray(images)))))


def _is_random_row(plan, subject):
    """Whether the surrogate is a row of the run itself whose network takes a key."""
    return any(target.is_random for target in subject.targets if plan.surrogate == f"{SELF}:{target.name}")


def _own_target(plan, subject):
    family, bits = surrogates.parse(plan.surrogate)
    found = [target for target in subject.targets if family == SELF and target.name == str(bits)]
    if not found:
        raise ValueError(f"{plan.attack} queries a target of the run itself, self:<bits>; got {plan.surrogate!r}")
    return found[0]


def surrogate_logits(name: str, subject: Subject):
    """Return the logits_fn of a surrogate; for 'self:all' and 'retrained' a random one, (key, images) -> logits of a bit-width drawn by the key."""
    family, bits = surrogates.parse(name)
    if family == SELF and bits != ALL_BITS:
        return _own_target(CellPlan("", name, 1), subject).logits_fn
    own = subject.trained if family == SELF else subject.networks.get(name)
    trained = own or surrogates.get(subject.config, name, subject.data)
    network = trained.network
    if family not in (SELF, "retrained"):
        return trained.logits_fn(network.bits[-1])
    slots, specs = [network.slot(b) for b in network.bits], [trained.spec(b) for b in network.bits]
    return loop.drawn_bit_logits(network, trained.weights, trained.stats, slots, specs)


def adaptive_outputs(name: str, subject: Subject):
    """Return {gradient estimator: images -> (logits, feature maps)} of the defended network, all trained bit-widths ('self:all') or one."""
    trained, layers = subject.trained, tuple(subject.config.loss.feature_layers)
    _, chosen = surrogates.parse(name)
    bits = trained.network.bits if chosen == ALL_BITS else (int(chosen),)
    variables, specs = [trained.variables(b) for b in bits], [trained.spec(b) for b in bits]
    networks = {name: trained.network.with_estimator(name) for name in quantize.ESTIMATORS}
    return {name: make_outputs_fn(network, variables, specs, layers=layers) for name, network in networks.items()}


def _textures(plan, subject):
    """The dictionary of PatchAttack's textures, from training images; regions leave room to crop the patch from many places."""
    images, labels = sources.training_images(subject.data, subject.config.patches.source_images)
    region_px = min(2 * plan.size_px, subject.data.image_size_px)
    return attacks.make_textures(_key(plan, subject), images, labels, region_px=region_px)


def _key(plan, subject):
    return loop.stream_key(subject.config.seed, f"attack {plan.attack} {plan.surrogate} {plan.label}")


def _figures(info):
    """Figures of the attack itself worth keeping: losses, best step and the zero-gradient share, where it has them."""
    kept = {}
    for name in FIGURES:
        if name in info:
            kept[f"mean_{name}"] = float(np.mean(info[name]))
    return kept


def _plain(settings):
    return files.plain(dataclasses.asdict(settings))


def _measured(plan, subject, crafted, digest, rows, progress):
    """Predictions int32 `[T, P, n]`, from disk where they were finished before."""
    names = [target.name for target in subject.targets]
    jitter = [subject.config.patches.rotation_deg, subject.config.patches.scale_jitter, subject.config.seed]
    facts = [FORMAT, digest, plan.placement, names, subject.identity, subject.deployed, jitter]
    facts.append(files.sha256_of_arrays({"ids": subject.ids[rows]}))
    path = subject.results / "cells" / f"{files.config_hash(facts)}.npz"
    if not path.is_file():
        files.atomic_savez(path, predictions=_predict_cell(plan, subject, crafted, progress))
    with open(path, "rb") as file, np.load(file) as arrays:
        return arrays["predictions"]


def _predict_cell(plan, subject, crafted, progress):
    if "images" in crafted.arrays:
        return inference.predict(subject.targets, crafted.arrays["images"], _batch_size(subject))[:, None]
    found = []
    for index in range(len(crafted.arrays["values"])):
        _tell(progress, f"{plan.name}: patch {index + 1}/{len(crafted.arrays['values'])}")
        paste = inference.make_paste(crafted.arrays, index, subject.config, placement=plan.placement)
        found.append(inference.predict(subject.targets, subject.images, _batch_size(subject), paste))
    return np.stack(found, axis=1)


def _batch_size(subject):
    return subject.config.eval.batch_size


def _tell(progress, text):
    if progress:
        progress(text)
