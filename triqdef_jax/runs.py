"""Run directories: which config a workdir belongs to, and the trained network that it holds.

<workdir>/config.json  metrics.jsonl  checkpoints/<step>/  results/[step<step>/]
"""

import json
import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from triqdef_jax import calibration, files, loop
from triqdef_jax import config as config_lib
from triqdef_jax.checkpoints import Checkpointer
from triqdef_jax.models.multibit import MultiBitNetwork, Weights

CONFIG_FILE = "config.json"
LAST, BEST = "last", "best"  # names of checkpoints beside the steps themselves
LOCK_FILE = ".lock"  # held by the process that trains in the directory
# Fields that may differ when a run is continued: they say where things lie and how fast, not what is trained.
FREE_FIELDS = (
    "data.dir",
    "data.num_workers",
    "data.prefetch",
    "patches.shared_dir",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.remat",
    "train.compile_ahead",
)


class Trained(NamedTuple):
    """A trained network: config, network, weights and running statistics on the default device, finished steps.

    The network is float32, in whatever type it was trained: it is what is measured and shipped. `calibration_images` are those of bit-widths that
    were not trained. `results` is the folder, within the workdir, of what is measured on it.
    """

    config: ConfigDict
    network: MultiBitNetwork
    weights: Weights
    stats: dict
    step: int
    calibration_images: jax.Array | None = None
    results: str = "results"

    def logits_fn(self, bits: int):
        """Return images float32 `[B, H, W, 3]` in [0, 1] -> logits of one trained bit-width in evaluation mode."""
        return loop.bit_logits(self.network, self.weights, self.stats, bits, self.spec(bits))

    def spec(self, bits: int):
        return self.network.spec(bits, round_bias=self.config.quant.round_bias)

    def variables(self, bits: int, calibration_images: jax.Array | None = None) -> dict:
        """Return one bit-width's variables; one that was not trained is calibrated on the given images."""
        if bits in self.network.bits:
            return self.network.slice(self.weights, self.stats, self.network.slot(bits))
        return calibration.calibrate_bit(self.network, self.weights, self.stats, bits, calibration_images)


def default_workdir(file: str, variant: str, overrides: list[str]) -> pathlib.Path:
    """Return runs/<config name>[-<variant>].

    Raises:
      ValueError: the command line changes fields, so that this name would not say which run it is.
    """
    named = pathlib.Path(file).stem
    changed = [field for field in overrides if field not in FREE_FIELDS]
    if changed:
        raise ValueError(
            f"--config.{changed[0]} changes the run {named}: name a directory for it with --workdir=runs/NAME"
        )
    slug = "".join(c if c.isalnum() or c in "._" else "-" for c in variant).strip("-")
    return pathlib.Path("runs") / (f"{named}-{slug}" if slug else named)


def open_workdir(workdir: str | pathlib.Path, config: ConfigDict) -> None:
    """Claim a directory for a config, or check that it already belongs to it.

    Raises:
      ValueError: the directory holds another config, or files but no config.
    """
    workdir = pathlib.Path(workdir)
    path = workdir / CONFIG_FILE
    if not path.exists():
        if workdir.exists() and any(workdir.iterdir()):
            raise ValueError(
                f"{workdir} holds files but no {CONFIG_FILE}, so it is no run of ours; name another --workdir"
            )
        files.atomic_write_json(path, config)
        return
    held = files.plain(read_config(workdir))
    differing = [name for name in _differences(held, files.plain(config)) if name not in FREE_FIELDS]
    if differing:
        name = differing[0]
        there, here = (_lookup(tree, name) for tree in (held, files.plain(config)))
        raise ValueError(
            f"{workdir} holds another config: {name} is {there!r} there and {here!r} here"
            f"{f' ({len(differing) - 1} more differ)' if len(differing) > 1 else ''}; name another --workdir"
        )


def read_config(workdir: str | pathlib.Path) -> ConfigDict:
    """Return the config of a run.

    Raises:
      FileNotFoundError: the directory is no run. ValueError: its config cannot be read.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no run in {workdir} ({CONFIG_FILE} is missing); train first or name another --workdir"
        )
    config = config_lib.default()
    try:
        config.update(_tuples(json.loads(path.read_text())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return config


def load_trained(workdir: str | pathlib.Path, checkpoint: str = LAST) -> Trained:
    """Return the network of a checkpoint of a run.

    Args:
      workdir: of the run. checkpoint: 'last', the newest sound one; 'best', see `selection.py`; or a step. What is measured on one asked for by
        'best' or step has a folder of its own, `results/step<step>`, so that nothing of several checkpoints mixes.

    Raises:
      FileNotFoundError: no run or no such checkpoint there. ValueError: `checkpoint` is no name and no step. checkpoints.CheckpointError: it, or
        for 'last' every one, is damaged.
    """
    config = read_config(workdir)
    network = config_lib.make_network(config, dtype="float32")
    step = find_step(workdir, checkpoint)
    with Checkpointer(pathlib.Path(workdir) / loop.CHECKPOINTS) as checkpointer:
        raw, meta = checkpointer.restore_raw(step)
    weights, stats = jax.device_put((Weights(**raw["weights"]), raw["stats"]))
    trained = Trained(config, network, weights, stats, meta["step"])
    return trained if step is None else trained._replace(results=f"results/step{step}")


def find_step(workdir: str | pathlib.Path, checkpoint: str) -> int | None:
    """Return the step that a checkpoint's name stands for, None for the newest sound one.

    Raises:
      ValueError: no name and no step. FileNotFoundError: no checkpoint has been judged.
    """
    if checkpoint == LAST:
        return None
    if checkpoint != BEST:
        if not checkpoint.isdecimal():
            raise ValueError(f"checkpoint must be {LAST}, {BEST} or a step, got {checkpoint!r}")
        return int(checkpoint)
    step = Checkpointer(pathlib.Path(workdir) / loop.CHECKPOINTS).best_step()
    if step is None:
        raise FileNotFoundError(
            f"no checkpoint in {workdir} was judged on held-out images: the run has not got to its last BACT stage, or train.keep_best was off; "
            f"use {LAST} or a step"
        )
    return step


def _tuples(tree):
    """Return JSON lists as tuples, which is what configs hold."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(_tuples(v) for v in tree) if isinstance(tree, list) else tree


def _differences(a, b, prefix=""):
    """Return the dotted names of the fields in which two nested dicts differ."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix]
    names = []
    for key in sorted({*a, *b}):
        names += _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    return names


def _lookup(tree, dotted):
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
