"""Ablations: a data set's full run with the named fields changed and everything else equal.

    python -m triqdef_jax.train --config=configs/ablations.py:no_fdp
    python -m triqdef_jax.train --config=configs/ablations.py:own_bits,dataset=cifar10:resnet20
    python -m triqdef_jax.evaluate --workdirs=runs/digits,runs/ablations-no_fdp

`dataset` is a config file of this folder, with variants where wanted (digits, the default, cifar10 or imagenet). Source
networks and patch pools are those of the full run, so results compare patch by patch. Cost: about that of the full run.

What each one asks:
    no_fdp, no_gpdp     what one penalty adds; the paper's Table 7 (LaVAN success on CIFAR-10 at 2 bits: 55.9 % without
                        FDP, 37.6 % without GPDP, 26.2 % with both)
    no_penalties        both off: the same training as the variant `patch_ce` of the data set
    no_patches          penalties without learning from patches: no cross-entropy on patched images, none of them in the
                        running statistics. FDP and GPDP are defined on patched images, so these still feed the
                        penalties; training that meets no patch at all is the variant `qat`
    no_bact             all bit-widths from the first step
    shared_norm         one set of norm statistics and affine parameters for all bit-widths
    observed_scales     quantizer ranges from observed maxima instead of trained step sizes
    signed_activations  symmetric signed codes after ReLU too, the text read literally
    own_bits            first and last layer, residual branch and stream in the network's own bits instead of 8
    centered_hog        histograms minus their mean, so that unrelated maps score near 0 instead of 0.7 to 0.9
    stem                FDP reads the stem as well
    layers_1_3          FDP reads stages 1 to 3, L1 to L3 read literally: in networks of three stages the last one too;
                        in those of four (ImageNet) this is the default, and the run equals the full one
    raw_sum             sums over ordered pairs and layers, the formula read literally: GPDP 20 times, FDP 20 times the
                        number of layers larger at the same lambdas
    fdp_x10, fdp_x60    FDP alone ten times as strong, and as strong as the literal sum over three layers. A pilot with
                        both penalties ten times as strong collapsed to one class: read clean accuracy first
"""

import importlib.util
import pathlib

DATASETS = ("digits", "cifar10", "imagenet")

# Fields by ablation; a function computes the value from the full run's config.
ABLATIONS = {
    "no_fdp": {"loss.lambda_fdp": 0.0},
    "no_gpdp": {"loss.lambda_gpdp": 0.0},
    "no_penalties": {"loss.lambda_fdp": 0.0, "loss.lambda_gpdp": 0.0},
    "no_patches": {"loss.lambda_adv": 0.0, "quant.norm_stats": "clean"},
    "no_bact": {"bact.enabled": False},
    "shared_norm": {"quant.norm": "shared"},
    "observed_scales": {"quant.scale": "observed"},
    "signed_activations": {"quant.act_signed": True},
    "own_bits": {"quant.edge_bits": 0, "quant.branch_bits": 0, "quant.residual_bits": 0},
    "centered_hog": {"loss.centered_hog": True},
    "stem": {"loss.feature_layers": lambda base: ("stem", *base.loss.feature_layers)},
    "layers_1_3": {"loss.feature_layers": ("stage1", "stage2", "stage3")},
    "raw_sum": {"loss.reduction": "sum"},
    "fdp_x10": {"loss.lambda_fdp": lambda base: 10.0 * base.loss.lambda_fdp},
    "fdp_x60": {"loss.lambda_fdp": lambda base: 60.0 * base.loss.lambda_fdp},
}


def get_config(variant=""):
    name, _, rest = variant.partition(",")
    if name not in ABLATIONS:
        raise ValueError(f"configs/ablations.py:NAME needs one of {', '.join(ABLATIONS)}; got {name!r}")
    config = _full_run(rest)
    changes = ABLATIONS[name]
    if config.loss.method != "triqdef" and any(field.startswith("loss.") for field in changes):
        raise ValueError(f"{name} changes the loss of the full method, which {rest} replaces by {config.loss.method}")
    config.update_from_flattened_dict({k: v(config) if callable(v) else v for k, v in changes.items()})
    return config


def _full_run(option):
    """Return the config named by 'dataset=FILE[:variant]', digits where nothing is named."""
    key, _, dataset = (option or "dataset=digits").partition("=")
    file, _, variant = dataset.partition(":")
    if key != "dataset" or file not in DATASETS:
        raise ValueError(
            f"configs/ablations.py:NAME takes ,dataset=FILE[:variant] with one of {', '.join(DATASETS)}; got {option!r}"
        )
    # Loaded by path: config files work from any directory and are no package.
    spec = importlib.util.spec_from_file_location(f"base_{file}", pathlib.Path(__file__).with_name(f"{file}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)
