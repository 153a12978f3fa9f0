"""Baselines: what the full method is compared with, under the same loop, data, network, optimiser and epochs.

    python -m triqdef_jax.train --config=configs/baselines.py:gal
    python -m triqdef_jax.train --config=configs/baselines.py:pbat_full,dataset=cifar10:resnet20
    python -m triqdef_jax.train --config=configs/baselines.py:qat_single,bits=4,dataset=cifar10
    python -m triqdef_jax.evaluate --workdirs=runs/digits,runs/baselines-gal

Options after the name: `dataset`, a config file of this folder, with variants where wanted (digits, the default, cifar10
or imagenet); `model`, any network, at its published width unless it is the data set's own, with FDP on all its stages
but the last, and a transformer's gradients clipped as those of surrogates are (`MODEL_CLIP_NORM` says why); `bits`,
joined by slashes (`bits=8/4`), which keep their places in the curriculum.

    name            what it is                                            published settings it keeps
    triqdef         the full method itself, for `model` and `bits`
    qat             one backbone under all bit-widths, clean images       (Table 4, 'standard QAT', shared)
    qat_single      one network for one bit-width, named by bits=         (the same, independent networks)
    patch_ce        pool patches, cross-entropy alone: no penalties       (control of this project)
    pbat            Rao et al. 2020, AT-Rand: a random place              25 steps of 0.1, centre 10 of 32 px left free
    pbat_fixed      AT-Fixed: one place near the upper left corner        the same, (3, 3) of 32 px
    pbat_direction  AT-RandLO: a random direction tried per step          the same, stride 2 px
    pbat_full       AT-FullLO: the best of four directions per step       the same
    dwq             Fu et al. 2021: one precision per step, l-inf noise   PGD-7, 8/255, steps of 2/255; no curriculum
    dwq_patch       the same with the images of `pbat`                    (the fairer one against patches)
    pbcat           half of 64 cells, chosen by gradient, and noise       64/255 by 8/255 in the cells, 4/255 elsewhere
    mat             Metzen et al. 2021: a bank of meta-patches            1000 patches, 5 trials, 5 steps, rate 0.25
    gal             log-sum-exp of the cosines of input gradients         weight 0.5
    trs             absolute cosine and length of input gradients         form alone
    trs_max         the same, lengths by inner maximisation               form alone
    defensive       Lin et al. 2019: `qat` with orthonormal filters       beta 0.002

What of each could not be matched, and why, stands in `docs/baselines.md`. Budget: epochs, data, network and optimiser are
the full run's, so the cost per step differs. In forward passes per image of the batch at five bit-widths
(`Method.cost`; one forward 1, its backward 2, to the images alone 1): the full method, gal and trs 30; patch_ce 22.5;
qat and defensive 15; pbat and pbat_fixed 48, pbat_direction 73, pbat_full 110.5; dwq 17 and dwq_patch 30 (one bit-width
per step); pbcat 31.5; mat 30; trs_max 55.
"""

import importlib.util
import pathlib

from triqdef_jax import config as config_lib
from triqdef_jax import curriculum, surrogates

DATASETS = ("digits", "cifar10", "imagenet")
TRANSFORMERS = ("deit", "swin")
PBAT = {"loss.method": "pbat", "patches.attack_steps": 25}
DWQ = {"loss.method": "dwq", "bact.enabled": False}

# Fields by baseline, beside the data set's own run.
BASELINES = {
    "triqdef": {},
    "qat": {"loss.method": "qat"},
    "qat_single": {"loss.method": "qat"},
    "patch_ce": {"loss.method": "patch_ce"},
    "pbat": PBAT,
    "pbat_fixed": {**PBAT, "patches.attack_location": "fixed"},
    "pbat_direction": {**PBAT, "patches.attack_location": "direction"},
    "pbat_full": {**PBAT, "patches.attack_location": "full"},
    "dwq": DWQ,
    "dwq_patch": {**DWQ, "baselines.dwq_attack": "patch", "patches.attack_steps": 25},
    "pbcat": {"loss.method": "pbcat"},
    "mat": {"loss.method": "mat"},
    "gal": {"loss.method": "gal"},
    "trs": {"loss.method": "trs"},
    "trs_max": {"loss.method": "trs", "baselines.trs_steps": 5},
    "defensive": {"loss.method": "defensive"},
}


def get_config(variant=""):
    name, options = _parse(variant)
    config = _full_run(options.get("dataset", "digits"))
    if config.loss.method != "triqdef":
        raise ValueError(
            f"{name} replaces the method of the full run, but dataset={options['dataset']} names another one"
        )
    if "model" in options:
        _take_model(config, options["model"])
    if "bits" in options:
        _take_bits(config, options["bits"])
    if name == "qat_single" and len(config.quant.bits) != 1:
        raise ValueError("qat_single trains one bit-width alone; name it, as in configs/baselines.py:qat_single,bits=4")
    config.update_from_flattened_dict(BASELINES[name])
    return config


def _parse(variant):
    """Return (baseline, options by name); a part without '=' continues the variants of the data set."""
    name, *parts = variant.split(",")
    if name not in BASELINES:
        raise ValueError(f"configs/baselines.py:NAME needs one of {', '.join(BASELINES)}; got {name!r}")
    options, last = {}, ""
    for part in parts:
        key, is_option, value = part.partition("=")
        if is_option and key in ("dataset", "model", "bits") and key not in options:
            options[key], last = value, key
        elif not is_option and last == "dataset" and ":" in options[last]:
            options[last] += f",{part}"
        else:
            raise ValueError(
                f"configs/baselines.py:NAME takes ,dataset=FILE[:variant] ,model=NAME ,bits=8/4; got {part!r}"
            )
    return name, options


def _full_run(dataset):
    """Return the config of 'FILE[:variant]'."""
    file, _, variant = dataset.partition(":")
    if file not in DATASETS:
        raise ValueError(f"configs/baselines.py: dataset must be one of {', '.join(DATASETS)}; got {dataset!r}")
    # Loaded by path: config files work from any directory and are no package.
    spec = importlib.util.spec_from_file_location(f"base_{file}", pathlib.Path(__file__).with_name(f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def _take_model(config, name):
    if name == config.model.name:
        return
    config.model.name, config.model.width = name, 0
    stages = config_lib.make_network(config).module.plan.stages  # refuses an unknown name
    config.loss.feature_layers = tuple(stage for stage in stages if stage != "stem")[:-1]
    if name.startswith(TRANSFORMERS):
        config.optim.clip_norm = surrogates.MODEL_CLIP_NORM


def _take_bits(config, text):
    parts = text.split("/")
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"configs/baselines.py: bits are joined by slashes, as in bits=8/4; got {text!r}")
    starts = dict(zip(curriculum.joining_bits(config.quant.bits), config.bact.starts, strict=True))
    bits = tuple(map(int, parts))
    joining = curriculum.joining_bits(bits)
    unknown = [b for b in joining if b not in starts]
    if unknown:
        raise ValueError(
            f"configs/baselines.py: of {config.quant.bits} the bits {tuple(starts)} join later; {unknown[0]} has no place "
            "among them: train with --config.quant.bits and --config.bact.starts"
        )
    config.quant.bits, config.bact.starts = bits, tuple(starts[b] for b in joining)
