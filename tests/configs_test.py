"""Experiment files load as users load them, are possible runs, and say the numbers that their docstrings promise."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from triqdef_jax import config as config_lib
from triqdef_jax import curriculum, files, sources
from triqdef_jax.objectives.methods import METHODS as METHODS_BY_NAME
from triqdef_jax.objectives.penalties import INPUT_GRADIENT

# ml_collections loads config files by a way that Python deprecates; programs ignore the warning as well.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).resolve().parent.parent
METHODS = ("qat", "patch_ce", "pbat")
VARIANTS = {"digits": METHODS, "cifar10": ("resnet20", *METHODS), "imagenet": ("resnet50", "pod", *METHODS)}
THREE_STAGES, FOUR_STAGES = ("stage1", "stage2"), ("stage1", "stage2", "stage3")
NOT_CLEAN = {"loss.method": "pbat", "patches.attack_steps": 25}
RANDOM_BITS = {"loss.method": "dwq", "bact.enabled": False}
# What every baseline changes beside the data set's full run.
BASELINES = {
    "triqdef": {},
    "qat": {"loss.method": "qat"},
    "patch_ce": {"loss.method": "patch_ce"},
    "pbat": NOT_CLEAN,
    "pbat_fixed": {**NOT_CLEAN, "patches.attack_location": "fixed"},
    "pbat_direction": {**NOT_CLEAN, "patches.attack_location": "direction"},
    "pbat_full": {**NOT_CLEAN, "patches.attack_location": "full"},
    "dwq": RANDOM_BITS,
    "dwq_patch": {**RANDOM_BITS, "baselines.dwq_attack": "patch", "patches.attack_steps": 25},
    "pbcat": {"loss.method": "pbcat"},
    "mat": {"loss.method": "mat"},
    "gal": {"loss.method": "gal"},
    "trs": {"loss.method": "trs"},
    "trs_max": {"loss.method": "trs", "baselines.trs_steps": 5},
    "defensive": {"loss.method": "defensive"},
}
# What every ablation changes, as (field, value); where the value depends on the full run, that of digits.
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
    "stem": {"loss.feature_layers": ("stem", "stage1", "stage2")},
    "layers_1_3": {"loss.feature_layers": ("stage1", "stage2", "stage3")},
    "raw_sum": {"loss.reduction": "sum"},
    "fdp_x10": {"loss.lambda_fdp": 8.0},
    "fdp_x60": {"loss.lambda_fdp": 48.0},
}


def load(name):
    """Return the config that --config=configs/<name> gives, locked as in programs."""
    file, _, variant = name.partition(":")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True)
    values(["program", f"--config={ROOT}/configs/{file}.py" + (f":{variant}" if variant else "")])
    return values.config


def get_config(file):
    spec = importlib.util.spec_from_file_location(file, ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def flat(config):
    plain = files.plain(config)
    return {f"{g}.{k}" if isinstance(v, dict) else g: w for g, v in plain.items() for k, w in _items(v)}


def _items(value):
    return value.items() if isinstance(value, dict) else [("", value)]


def differences(config, base):
    ours, theirs = flat(config), flat(base)
    # Fields younger than the caches are there only where they differ from the default.
    assert {field for field in ours.keys() ^ theirs.keys() if not is_young(field)} == set()
    return {field: value for field, value in ours.items() if value != theirs.get(field)}


def is_young(field):
    return any(field == young or field.startswith(f"{young}.") for young in config_lib.YOUNG_FIELDS)


@pytest.mark.parametrize("name", [f"{f}{v}" for f in VARIANTS for v in ("", *(f":{v}" for v in VARIANTS[f]))])
def test_every_config_and_variant_is_a_possible_run(name):
    config_lib.validate(load(name))


def test_digits_is_the_embedded_default():
    assert flat(load("digits")) == flat(config_lib.default())


@pytest.mark.parametrize("file", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_variant_changes_the_method_alone(file, method):
    assert differences(load(f"{file}:{method}"), load(file)) == {"loss.method": method}


def test_cifar10_is_the_papers_recipe():
    config = load("cifar10")
    assert (config.model.name, config.model.width) == ("resnet56", 0)
    assert (config.train.epochs, config.train.batch_size) == (200, 128)
    assert (config.patches.sizes_px, config.patches.unseen_sizes_px) == ((6,), (8, 10))
    assert (config.patches.pool_size, config.patches.source_epochs) == (64, 40)
    assert (config.data.heldout_images, config.data.calibration_images) == (2000, 1000)
    assert config.loss.feature_layers == THREE_STAGES


def test_imagenet_is_the_papers_recipe():
    config = load("imagenet")
    assert (config.model.name, config.model.width) == ("resnet34", 0)
    assert (config.train.epochs, config.train.batch_size) == (120, 128)
    assert (config.patches.sizes_px, config.patches.unseen_sizes_px) == ((50,), (70, 80))
    assert config.loss.feature_layers == FOUR_STAGES


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_optimiser_and_weights_of_the_loss_are_the_papers(name):
    config = load(name)
    optim, loss = config.optim, config.loss
    assert (optim.lr, optim.momentum, optim.weight_decay) == (0.1, 0.9, 1e-4)
    assert (optim.schedule, optim.milestones, optim.gamma) == ("step", (0.5, 0.75), 0.1)
    assert (loss.lambda_adv, loss.lambda_fdp, loss.lambda_gpdp) == (1.0, 0.8, 0.5)
    assert (loss.alpha, loss.beta, loss.patched_frac) == (0.5, 1.0, 0.5)
    assert config.quant.bits == (32, 8, 5, 4, 2)


def test_pod_scales_the_learning_rate_linearly_with_the_batch():
    base, pod = load("imagenet"), load("imagenet:pod")
    assert pod.train.batch_size == 4096
    # Exact: the ratio of the batches is a power of two.
    assert pod.optim.lr / pod.train.batch_size == base.optim.lr / base.train.batch_size
    assert (pod.optim.warmup_epochs, pod.model.dtype) == (5.0, "bfloat16")


def test_variants_join_by_commas():
    config = load("cifar10:resnet20,qat")
    assert differences(config, load("cifar10")) == {"model.name": "resnet20", "loss.method": "qat"}


def test_runs_of_one_network_share_their_source_networks():
    names = ("cifar10", "cifar10:qat", "ablations:own_bits,dataset=cifar10", "ablations:no_bact,dataset=cifar10")
    assert len({sources.source_name(load(name), 0) for name in names}) == 1
    assert sources.source_name(load("cifar10:resnet20"), 0) != sources.source_name(load("cifar10"), 0)


def test_costs_in_the_docstrings_follow_from_the_curriculum():
    stages = curriculum.make_stages((32, 8, 5, 4, 2), 1000, load("cifar10").bact.starts)
    active = sum(len(stage.bits) * (stage.stop - stage.start) for stage in stages) / 1000
    # In forward passes per clean image: a plain step 3; half as many patched images, 6 each with the input gradient and
    # 3 without; ten inner steps of pbat 2 each at one bit-width.
    costs = [active * 6 / 3, active * 4.5 / 3, active * 3 / 3, (active * 4.5 + 10) / 3]
    text = " ".join(get_config("cifar10").__globals__["__doc__"].split())
    said = re.search(r"multiplies ([\d.]+) times .*?`patch_ce` ([\d.]+) times, `qat` ([\d.]+) .*?`pbat` ([\d.]+)", text)
    # 0.051: the text rounds to one decimal.
    np.testing.assert_allclose([float(number) for number in said.groups()], costs, rtol=0, atol=0.051)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_exactly_its_fields(name):
    assert differences(load(f"ablations:{name}"), load("digits")) == files.plain(ABLATIONS[name])


def test_no_ablation_is_without_its_entry_here():
    assert set(get_config("ablations").__globals__["ABLATIONS"]) == set(ABLATIONS)


@pytest.mark.parametrize("dataset", ["digits", "cifar10", "cifar10:resnet20", "imagenet", "imagenet:resnet50,pod"])
def test_every_ablation_is_possible_on_every_data_set(dataset):
    base = load(dataset)
    for name in ABLATIONS:
        config = load(f"ablations:{name},dataset={dataset}")
        config_lib.validate(config)
        assert set(differences(config, base)) <= set(ABLATIONS[name])


@pytest.mark.parametrize("dataset", ["digits", "cifar10:resnet20", "imagenet:resnet50,pod"])
def test_every_baseline_is_possible_on_every_data_set_and_changes_exactly_its_fields(dataset):
    base = load(dataset)
    for name, changes in BASELINES.items():
        config = load(f"baselines:{name},dataset={dataset}")
        config_lib.validate(config)
        assert differences(config, base) == changes, name


def test_no_baseline_is_without_its_entry_here_and_every_method_has_one():
    assert set(get_config("baselines").__globals__["BASELINES"]) == {*BASELINES, "qat_single"}
    assert {fields.get("loss.method", "triqdef") for fields in BASELINES.values()} == set(METHODS_BY_NAME)


def test_the_independent_network_of_a_bit_width_has_it_alone():
    config = load("baselines:qat_single,bits=4,dataset=cifar10")
    config_lib.validate(config)
    assert differences(config, load("cifar10")) == {"loss.method": "qat", "quant.bits": [4], "bact.starts": []}


def test_bits_keep_their_places_in_the_curriculum_and_models_their_published_width():
    config = load("baselines:gal,bits=32/8/4/2,model=resnet20,dataset=cifar10")
    config_lib.validate(config)
    assert (config.quant.bits, config.bact.starts) == ((32, 8, 4, 2), (0.45, 0.6))
    assert (config.model.name, config.model.width, config.loss.feature_layers) == ("resnet20", 0, THREE_STAGES)
    assert load("baselines:mat,model=vgg16,dataset=cifar10").loss.feature_layers == (*FOUR_STAGES, "stage4")
    clipped = differences(load("baselines:triqdef,model=deit_tiny_cifar,dataset=cifar10"), load("cifar10"))
    assert (clipped.pop("model.name"), clipped.pop("optim.clip_norm")) == ("deit_tiny_cifar", 1.0)
    assert set(clipped) <= {"loss.feature_layers"}
    same = load("baselines:gal,model=resnet8")
    assert same.model.width == 16  # the data set's own network stays as it is


def test_budgets_in_the_docstring_are_the_counted_ones():
    text = " ".join(get_config("baselines").__globals__["__doc__"].split())
    said = {
        "triqdef": r"the full method, gal and trs ([\d.]+)",
        "patch_ce": r"; patch_ce ([\d.]+)",
        "qat": r"qat and defensive ([\d.]+)",
    }
    said |= {"pbat": r"pbat and pbat_fixed ([\d.]+)", "dwq": r"; dwq ([\d.]+)"}
    said |= {
        name: rf" {name} ([\d.]+)" for name in ("pbat_direction", "pbat_full", "dwq_patch", "pbcat", "mat", "trs_max")
    }
    for name, pattern in said.items():
        config = load("digits" if name == "triqdef" else f"baselines:{name}")
        number = float(re.findall(pattern, text)[-1].rstrip("."))
        assert config_lib.make_training_method(config).cost(5) == number, name


def test_layer_ablations_follow_the_networks_own_layers():
    stem, literal = (load(f"ablations:{name},dataset=imagenet") for name in ("stem", "layers_1_3"))
    assert stem.loss.feature_layers == ("stem", *FOUR_STAGES)
    assert literal.loss.feature_layers == FOUR_STAGES == load("imagenet").loss.feature_layers


@pytest.mark.parametrize(
    "name, maps",
    [
        ("no_fdp", (INPUT_GRADIENT,)),
        ("no_gpdp", THREE_STAGES),
        ("no_penalties", ()),
        ("no_patches", (*THREE_STAGES, INPUT_GRADIENT)),
    ],
)
def test_an_ablated_penalty_reads_no_maps(name, maps):
    assert config_lib.make_training_method(load(f"ablations:{name}")).map_layers == maps


@pytest.mark.parametrize(
    "file, variant, said",
    [
        ("digits", "huge", "qat, patch_ce, pbat, alone or joined by commas; got 'huge'"),
        ("cifar10", "huge", "resnet20, qat, patch_ce, pbat, alone or joined by commas; got 'huge'"),
        ("cifar10", "resnet20,", "got ''"),
        ("cifar10", "qat,pbat", "sets loss.method twice"),
        ("imagenet", "resnet34", "resnet50, pod, qat, patch_ce, pbat, alone or joined by commas; got 'resnet34'"),
        ("imagenet", "pod,pod", "twice"),
        ("ablations", "", ", ".join(ABLATIONS) + "; got ''"),
        ("ablations", "no_hog", ", ".join(ABLATIONS) + "; got 'no_hog'"),
        ("ablations", "no_fdp,cifar10", "takes ,dataset=FILE[:variant] with one of digits, cifar10, imagenet"),
        ("ablations", "no_fdp,dataset=mnist", "digits, cifar10, imagenet; got 'dataset=mnist'"),
        ("ablations", "no_fdp,dataset=cifar10:huge", "configs/cifar10.py has the variants"),
        ("ablations", "no_fdp,dataset=digits:qat", "which dataset=digits:qat replaces by qat"),
        ("baselines", "", "needs one of triqdef, qat, qat_single, patch_ce, pbat,"),
        ("baselines", "huge", "; got 'huge'"),
        ("baselines", "gal,cifar10", "takes ,dataset=FILE[:variant] ,model=NAME ,bits=8/4; got 'cifar10'"),
        ("baselines", "gal,bits=8,bits=4", "got 'bits=4'"),
        ("baselines", "gal,dataset=mnist", "must be one of digits, cifar10, imagenet; got 'mnist'"),
        ("baselines", "gal,dataset=digits:qat", "but dataset=digits:qat names another one"),
        ("baselines", "gal,model=alexnet", "model.name must be one of"),
        ("baselines", "gal,bits=8-4", "joined by slashes, as in bits=8/4; got '8-4'"),
        ("baselines", "gal,bits=8/3", "3 has no place among them"),
        ("baselines", "qat_single", "name it, as in configs/baselines.py:qat_single,bits=4"),
    ],
)
def test_an_unknown_variant_is_refused_in_one_line_that_lists_the_known(file, variant, said):
    with pytest.raises(ValueError) as refusal:
        get_config(file)(variant)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_mistyped_ablation_ends_the_program_with_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "triqdef_jax.train", f"--config={ROOT}/configs/ablations.py:no_hog"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --config: configs/ablations.py:NAME needs one of no_fdp")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
