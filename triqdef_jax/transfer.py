"""How well patches made on one bit-width work on another: read from an evaluation record, or from patches made here.

A transfer matrix is float `[K, K]`, row: the bit-width the patches were made on, column: the one they are tried on; entries are
`asr_correct` (`metrics.success_counts`) pooled over patches and images, the diagonal is the white-box attack.
"""

import collections
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from triqdef_jax import config as config_lib
from triqdef_jax import inference, metrics, sources
from triqdef_jax.attacks import universal
from triqdef_jax.attacks.settings import make_settings
from triqdef_jax.probes import OneBit
from triqdef_jax.results import HEADLINE

FAMILY = "gap"  # patches that work at any place and turn, as they are tried


class Transfer(NamedTuple):
    """The matrix `[K, K]` of success rates in [0, 1] and, in words, what it was computed from."""

    matrix: np.ndarray
    origin: str

    def symmetric(self) -> np.ndarray:
        """Return the mean of both directions of every pair, `[K, K]`; likeness of two networks has no direction either."""
        return (self.matrix + self.matrix.T) / 2


def from_records(folder: str | pathlib.Path, bits: Sequence[int], config_hash: str) -> Transfer | None:
    """Read the transfer between the bit-widths of one run from its evaluation records.

    Args:
      folder: `<workdir>/results`. bits: trained bit-widths, in the order of the matrix. config_hash: of the run; other records are passed by.

    Returns:
      The mean over all attacks (attack, placement, size, goal) that have a cell `self:<b>` for each bit-width with every bit-width as
      target; of the record with the most such attacks. None where there is no such record.
    """
    best = None
    for path in sorted(pathlib.Path(folder).glob("*.json")):
        record = json.loads(path.read_text())
        if record.get("kind") != "evaluation" or record.get("config_hash") != config_hash:
            continue
        matrices = _complete(record["cells"], [str(b) for b in bits])
        if matrices and (best is None or len(matrices) > best[0]):
            names = ", ".join(" ".join(map(str, key)) for key in matrices)
            origin = f"{path.name}, {record['num_images']} test images, patches of: {names}"
            best = len(matrices), Transfer(np.mean(list(matrices.values()), axis=0), origin)
    return best and best[1]


def _complete(cells, bits):
    """Return {(attack, placement, size, goal): matrix} of the attacks made on every bit-width and tried on every one."""
    rows = collections.defaultdict(dict)
    for cell in cells:
        family, _, source = cell["surrogate"].partition(":")
        rates = [(cell["success"].get(target) or {}).get(HEADLINE, {}).get("rate") for target in bits]
        is_first = "doubles" not in cell  # such a cell repeats another one with twice the steps
        if family == "self" and source in bits and None not in rates and is_first:
            rows[cell["attack"], cell["placement"], f"{cell['size_px']} px", cell["goal"]][source] = rates
    return {key: np.array([found[b] for b in bits], float) for key, found in rows.items() if found.keys() == set(bits)}


def by_attack(
    networks: Sequence[OneBit],
    data,
    images: np.ndarray,
    labels: np.ndarray,
    config: ConfigDict,
    *,
    num_steps: int,
    progress=None,
) -> Transfer:
    """Make universal patches for all classes on every network, and try them on every network.

    Args:
      networks: K of one module. data: its training images make the patches. images, labels: uint8 `[N, H, W, 3]` and int32 `[N]`, the test
      images on which they are tried. config: size, shape, jitter and seed. num_steps: of the optimisation.
      progress: called with a line of text now and then.
    """
    settings = _settings(config, num_steps)
    training = sources.training_images(data, config.patches.source_images)
    clean = inference.predict(networks, images, config.eval.batch_size)
    matrix = np.zeros((len(networks), len(networks)))
    for row, source in enumerate(networks):
        if progress:
            progress(f"patches on bit-width {source.bits}")
        patch, _ = universal.attack(jax.random.key(config.seed), source.logits_fn, *training, settings)
        arrays = {name: np.asarray(array) for name, array in patch._asdict().items()}
        pastes = [inference.make_paste(arrays, index, config) for index in range(len(settings.target))]
        predictions = np.stack(
            [inference.predict(networks, images, config.eval.batch_size, paste) for paste in pastes], axis=1
        )
        for column, per_patch in enumerate(predictions):
            count = metrics.success_counts(clean[column], per_patch, labels, arrays["target"])[HEADLINE]
            matrix[row, column] = metrics.Count(count.num.sum(), count.den.sum()).rate
    words = (
        f"{len(settings.target)} {FAMILY} patches of {settings.size_px[0]} px made on each bit-width for this purpose"
    )
    return Transfer(matrix, f"{words}, {num_steps} steps, {len(labels)} test images")


def _settings(config, num_steps):
    classes, patches = config_lib.num_classes(config), config.patches
    return make_settings(
        FAMILY,
        size_px=(patches.sizes_px[0],) * classes,
        target=tuple(range(classes)),
        num_steps=num_steps,
        batch_images=patches.batch_images,
        rotation_deg=patches.rotation_deg,
        scale_range=(1 - patches.scale_jitter, 1 + patches.scale_jitter),
        shape=patches.shape,
    )
