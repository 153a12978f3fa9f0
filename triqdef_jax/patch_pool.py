"""Pools of universal patches on disk: built on a source network, stored without pickle, verified by digest, reused.

A pool is a folder with `patches.npz` (values float32 `[P, S, S, 3]` in [0, 1], masks `[P, S, S]`, size_px, target int32 `[P]`) and `pool.json` (the
request that determines it, one record per patch, the digest of the arrays). Patches alternate over families, sizes and target classes, so
that the held-out last quarter of a training pool has the mix of the rest. Training source networks is not done here.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from triqdef_jax import files, processes, sharding
from triqdef_jax.attacks import universal
from triqdef_jax.attacks.settings import make_settings

ARRAYS_FILE, RECORD_FILE = "patches.npz", "pool.json"
HELD_OUT_SHARE = 4  # one of so many patches, the last ones, never trains
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class PoolRequest:
    """Everything that determines a pool.

    Attributes:
      source: hash of the config of the network the patches are made on.
      num_patches, sizes_px, families, shape: how many, which sides in pixels, 'lavan' and/or 'gap', 'square' or 'circle'.
      num_classes: targets cycle over all classes. canvas_px: side of the arrays; smaller patches are centred in it.
      steps, batch_images, source_images: optimisation steps, images per patch and step, images they are drawn from.
      rotation_deg, scale_jitter: what 'gap' patches are optimised for, and how any patch is pasted later.
      seed: root of the pool's randomness.
    """

    source: str
    num_patches: int
    sizes_px: tuple[int, ...]
    families: tuple[str, ...]
    shape: str
    num_classes: int
    canvas_px: int
    steps: int
    batch_images: int
    source_images: int
    rotation_deg: float
    scale_jitter: float
    seed: int

    @property
    def folder_name(self) -> str:
        return f"pool-{files.config_hash(dataclasses.asdict(self))}"

    def patch_list(self) -> list[tuple[str, int, int]]:
        """Return (family, size in pixels, target class) of every patch, in order."""
        kinds = [(family, size) for size in self.sizes_px for family in self.families]
        return [(*kinds[i % len(kinds)], i // len(kinds) % self.num_classes) for i in range(self.num_patches)]


class PatchPool(NamedTuple):
    """A pool in memory, NumPy arrays as in the module's docstring, and its digest."""

    values: np.ndarray
    masks: np.ndarray
    size_px: np.ndarray
    target: np.ndarray
    digest: str

    def rows(self, rows) -> "PatchPool":
        """Return the pool of some patches; the digest stays that of the file they come from."""
        return PatchPool(*(x[rows] for x in self[:-1]), self.digest)

    def split(self) -> tuple["PatchPool", "PatchPool"]:
        """Return (the part for training, the held-out last quarter)."""
        num_train = len(self.values) - len(self.values) // HELD_OUT_SHARE
        return self.rows(slice(num_train)), self.rows(slice(num_train, None))


def get(request: PoolRequest, root: str | pathlib.Path, build_source: Callable, *, explicit: str = "") -> PatchPool:
    """Return the requested pool from the cache, building it first where there is none.

    Args:
      request: what the pool must be. root: shared folder. explicit: folder of a particular pool to use instead of the cache.
      build_source: () -> (logits_fn, images float32 `[N, H, W, 3]` in [0, 1], labels int32 `[N]`), called only to build.

    Raises:
      ValueError: the folder holds a damaged pool, or one that was made to another request.
    """
    folder = pathlib.Path(explicit) if explicit else pathlib.Path(root) / request.folder_name
    if not explicit and not processes.as_lead_says(folder.exists()):
        built = build(request, *build_source())
        with processes.together():
            if sharding.is_lead():
                save(folder, request, *built)
    return load(folder, request)


def build(request: PoolRequest, logits_fn, images, labels) -> tuple[PatchPool, list[dict]]:
    """Optimise all patches of a request; one program per family, all its patches side by side.

    Returns:
      (pool, one record per patch: family, source, size, target, loss and success on images held out of the optimisation).
    """
    wanted = request.patch_list()
    results: dict[int, tuple] = {}
    for number, family in enumerate(dict.fromkeys(request.families)):
        rows = [i for i, (name, _, _) in enumerate(wanted) if name == family]
        key = jax.random.fold_in(jax.random.key(request.seed), number)
        settings = _settings(request, family, [wanted[i] for i in rows])
        patch, info = universal.attack(key, logits_fn, images, labels, settings)
        patch = jax.device_get(patch)
        for place, row in enumerate(rows):
            results[row] = (patch, info, place)
    arrays = [
        np.stack([np.asarray(getattr(p, name)[k]) for p, _, k in map(results.get, range(len(wanted)))])
        for name in ("values", "masks", "size_px", "target")
    ]
    pool = PatchPool(*arrays, digest="")
    records = [_describe(request, wanted[row], *results[row][1:]) for row in range(len(wanted))]
    return pool._replace(digest=digest(pool)), records


def _settings(request, family, wanted):
    jitter = request.scale_jitter
    motion = {"rotation_deg": request.rotation_deg, "scale_range": (1 - jitter, 1 + jitter)} if family == "gap" else {}
    return make_settings(
        family,
        size_px=tuple(size for _, size, _ in wanted),
        target=tuple(target for _, _, target in wanted),
        canvas_px=request.canvas_px,
        num_steps=request.steps,
        batch_images=request.batch_images,
        shape=request.shape,
        **motion,
    )


def _describe(request, wanted, info, place):
    family, size_px, target = wanted
    success = {
        name: {"num": int(np.asarray(c.num)[place]), "den": int(np.asarray(c.den)[place])}
        for name, c in info["success"].items()
    }
    return {
        "family": family,
        "source": request.source,
        "size_px": size_px,
        "target": target,
        "loss": float(info["best_loss"][place]),
        "best_step": int(info["best_step"][place]),
        "success": success,
        "seed": request.seed,
    }


def digest(pool: PatchPool) -> str:
    """Return the SHA-256 of a pool's arrays, hexadecimal."""
    return files.sha256_of_arrays(pool._asdict() | {"digest": np.zeros(0)})


def save(folder: pathlib.Path, request: PoolRequest, pool: PatchPool, records: list[dict]) -> None:
    """Write a pool; the folder appears complete or not at all, and an existing one is left alone."""
    folder = pathlib.Path(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    arrays = pool._asdict()
    arrays.pop("digest")
    files.atomic_savez(partial / ARRAYS_FILE, **arrays)
    record = {"format": FORMAT, "request": dataclasses.asdict(request), "digest": pool.digest, "patches": records}
    files.atomic_write_json(partial / RECORD_FILE, record)
    if folder.exists():
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def load(folder: pathlib.Path, request: PoolRequest) -> PatchPool:
    """Read a pool and check that it is sound and made to the request.

    Raises:
      ValueError: one line, naming the folder, what is wrong with it and what to do.
    """
    folder = pathlib.Path(folder)
    advice = f"delete {folder} to have it built again"
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        with open(folder / ARRAYS_FILE, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            pool = PatchPool(*(arrays[name] for name in PatchPool._fields[:-1]), digest=record["digest"])
        made_to = record["request"]
    except Exception as error:  # NumPy, zip and JSON readers each fail in their own ways on damaged bytes
        raise ValueError(f"patch pool {folder} cannot be read ({type(error).__name__}: {error}); {advice}") from error
    if digest(pool) != pool.digest:
        raise ValueError(
            f"patch pool {folder} is damaged: its arrays do not have the digest in {RECORD_FILE}; {advice}"
        )
    asked = files.plain(dataclasses.asdict(request))
    differing = [name for name in asked if made_to.get(name) != asked[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"patch pool {folder} was made to another request: {name} is {made_to.get(name)!r} there and {asked[name]!r} in "
            f"this config; use another pool or change patches.*"
        )
    return pool
