"""The default config is locked, typed and valid; every impossible value is refused in one line; settings reach what is built."""

import copy

import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import files
from triqdef_jax.models import MODELS
from triqdef_jax.objectives.methods import METHODS


def changed(**fields):
    """Return the default config with dotted fields (`loss__alpha`) replaced as a user's override would be."""
    config = config_lib.default()
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


def test_the_default_is_possible():
    config_lib.validate(config_lib.default())


def test_the_default_states_the_published_recipe():
    config = config_lib.default()
    assert config.quant.bits == (32, 8, 5, 4, 2)
    assert (config.loss.alpha, config.loss.beta) == (0.5, 1.0)
    assert (config.loss.lambda_adv, config.loss.lambda_fdp, config.loss.lambda_gpdp) == (1.0, 0.8, 0.5)
    optim = config.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.gamma, optim.milestones) == (
        0.1,
        0.9,
        1e-4,
        0.1,
        (0.5, 0.75),
    )


def test_a_misspelt_field_is_refused_at_every_level():
    config = config_lib.default()
    with pytest.raises((AttributeError, KeyError), match="lamda_fdp"):
        config.loss.lamda_fdp = 0.5
    with pytest.raises((AttributeError, KeyError), match="optimiser"):
        config.optimiser = {}


@pytest.mark.parametrize(
    "name, value", [("train__epochs", 1.5), ("optim__lr", "fast"), ("quant__bits", "8,4"), ("bact__enabled", "yes")]
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(TypeError):
        changed(**{name: value})


def test_every_group_holds_literals_only():
    for group, fields in config_lib.default().items():
        for name, value in () if group == "seed" else fields.items():
            items = value if isinstance(value, tuple) else (value,)
            assert all(isinstance(item, str | int | float | bool) for item in items), f"{group}.{name}"


def test_two_defaults_share_nothing():
    changed(loss__alpha=9.0)
    assert config_lib.default().loss.alpha == 0.5


CHOICES = {
    "data__name": "must be one of digits, cifar10, imagenet",
    "model__name": f"must be one of {', '.join(MODELS)}",
    "model__dtype": "must be one of float32, bfloat16",
    "quant__scale": "must be one of learned, observed",
    "quant__norm": "must be one of per_bit, shared_affine, shared",
    "quant__norm_stats": "must be one of pooled, clean",
    "loss__method": f"must be one of {', '.join(METHODS)}",
    "loss__reduction": "must be one of mean, sum",
    "loss__map_reduction": "must be one of mean, max, per_channel",
    "loss__hinge": "must be one of none, chance",
    "train__plan": "must be one of auto, per_bit, fused",
    "optim__schedule": "must be one of step, cosine",
    "bact__affine": "must be one of copy, reset",
    "patches__shape": "must be one of square, circle",
    "patches__attack_location": "must be one of random, fixed, direction, full",
    "baselines__dwq_attack": "must be one of linf, patch",
}
NAN, INF = float("nan"), float("inf")
REFUSED = [
    *[(name, "bogus", f"{name.replace('__', '.')} {text}, got 'bogus'") for name, text in CHOICES.items()],
    *[
        ("data__" + name, -1, "must be at least 0, got -1")
        for name in ("image_size_px", "train_images", "num_workers", "prefetch")
    ],
    ("data__heldout_images", 0, "data.heldout_images must be at least 1, got 0"),
    ("data__calibration_images", 0, "data.calibration_images must lie in 1..data.heldout_images = 128, got 0"),
    ("data__calibration_images", 129, "data.calibration_images must lie in 1..data.heldout_images = 128, got 129"),
    ("model__width", -2, "model.width must be at least 0, got -2"),
    ("quant__bits", (), "quant.bits needs at least one bit-width and none twice, got ()"),
    ("quant__bits", (8, 4, 8), "quant.bits needs at least one bit-width and none twice, got (8, 4, 8)"),
    ("quant__bits", (32, 16), "quant.bits: bits must be 2..8 or 32, got 16"),
    ("quant__bits", (32, 1), "quant.bits: bits must be 2..8 or 32, got 1"),
    *[
        ("quant__" + name, 9, f"quant.{name} must be 2..8, or 0 for the network's own bits, got 9")
        for name in ("edge_bits", "branch_bits", "residual_bits")
    ],
    *[
        (f"loss__{name}", value, f"loss.{name} must be finite and at least 0")
        for name in ("alpha", "beta", "lambda_adv", "lambda_fdp", "lambda_gpdp")
        for value in (-0.1, NAN, INF)
    ],
    *[("loss__patched_frac", value, "loss.patched_frac must lie in (0, 1]") for value in (0.0, 1.5, NAN)],
    *[("loss__penalty_warmup_frac", value, "loss.penalty_warmup_frac must lie in [0, 1)") for value in (-0.1, 1.0)],
    ("loss__min_bit_gap", -1, "loss.min_bit_gap must be at least 0, got -1"),
    ("loss__feature_layers", ("stage1", "stage4"), "resnet8 has the layers stem, stage1, stage2, stage3, got 'stage4'"),
    (
        "loss__feature_layers",
        (),
        "loss.feature_layers is empty while loss.lambda_fdp > 0: name layers or set lambda_fdp to 0.0",
    ),
    (
        "loss__patched_frac",
        0.3,
        "train.batch_size must be divisible by 10, because loss.patched_frac = 3/10 patches 3 of every 10 images; got 64",
    ),
    ("model__norm_group", -1, "model.norm_group must be at least 0"),
    ("model__norm_group", 64, "model.norm_group must divide train.batch_size and its patched part, 32 images; got 64"),
    ("train__batch_size", 33, "train.batch_size must be divisible by 2, because loss.patched_frac = 1/2"),
    *[
        (
            "train__accumulate_steps",
            value,
            "must divide train.batch_size = 64 and the 32 patched images among them, got",
        )
        for value in (0, 3, 64)
    ],
    *[
        (f"train__{name}", 0, f"train.{name} must be at least 1, got 0")
        for name in ("batch_size", "epochs", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints")
    ],
    *[("optim__lr", value, "optim.lr must be positive") for value in (0.0, -0.1, NAN)],
    ("optim__gamma", 0.0, "optim.gamma must be positive, got 0.0"),
    *[("optim__momentum", value, "optim.momentum must lie in [0, 1)") for value in (-0.1, 1.0)],
    *[
        (f"optim__{name}", -1.0, f"optim.{name} must be at least 0, got -1.0")
        for name in ("weight_decay", "warmup_epochs", "clip_norm")
    ],
    *[
        ("optim__milestones", value, "optim.milestones must be rising fractions of the run between 0 and 1")
        for value in ((0.75, 0.5), (0.5, 0.5), (0.0,), (1.0,), (50, 75))
    ],
    ("bact__starts", (0.3, 0.6), "bact.starts needs one fraction for each of the bit-widths (5, 4, 2)"),
    ("bact__starts", (0.3, 0.2, 0.6), "bact.starts must be rising fractions between 0 and 1"),
    ("patches__sizes_px", (), "patches.sizes_px needs at least one size, got ()"),
    ("patches__sizes_px", (0,), "patches.sizes_px must hold whole pixels, got 0"),
    ("patches__unseen_sizes_px", (4.5,), "patches.unseen_sizes_px must hold whole pixels, got 4.5"),
    (
        "patches__sizes_px",
        (15,),
        "a patch of 15 px, up to 17 px with scale jitter, does not fit into 16-px images of digits; use smaller patches",
    ),
    ("patches__unseen_sizes_px", (4, 17), "a patch of 17 px, up to 19 px with scale jitter, does not fit"),
    *[("patches__scale_jitter", value, "patches.scale_jitter must lie in [0, 1)") for value in (-0.1, 1.0)],
    ("patches__rotation_deg", -1.0, "patches.rotation_deg must be at least 0, got -1.0"),
    ("patches__pool_size", 3, "patches.pool_size must be at least 4 (a quarter is held out), got 3"),
    *[
        (f"patches__{name}", 0, f"patches.{name} must be at least 1, got 0")
        for name in ("eval_pool_size", "steps", "batch_images", "source_epochs", "attack_steps")
    ],
    ("patches__source_images", 128, "patches.source_images must exceed the 128 images that judge the patches, got 128"),
    ("patches__online_steps", -1, "patches.online_steps must be at least 0, got -1"),
    *[
        (f"patches__{name}", 0.0, f"patches.{name} must be positive, got 0.0")
        for name in ("online_step_size", "attack_step_size")
    ],
    (
        "patches__families",
        ("lavan", "sticker"),
        "patches.families must name at least one of lavan, gap, got ('lavan', 'sticker')",
    ),
    ("patches__families", (), "patches.families must name at least one of lavan, gap, got ()"),
    ("patches__attack_stride_px", 0, "patches.attack_stride_px must be at least 1, got 0"),
    ("patches__protected_frac", 1.0, "patches.protected_frac must lie in [0, 1), 0 for none, got 1.0"),
    *[
        (f"baselines__{name}", 0, f"baselines.{name} must be at least 1, got 0")
        for name in ("dwq_steps", "pbcat_steps", "mat_patches", "mat_trials", "mat_steps")
    ],
    *[
        (f"baselines__{name}", value, f"baselines.{name} must lie in (0, 1]")
        for name in ("dwq_epsilon", "pbcat_cell_step_size", "pbcat_noise_epsilon", "trs_epsilon", "mat_rate")
        for value in (0.0, 1.5)
    ],
    *[
        (f"baselines__{name}", value, f"baselines.{name} must be finite and at least 0")
        for name in ("lambda_gal", "lambda_trs", "lambda_smooth", "lambda_orthogonal")
        for value in (-0.1, NAN)
    ],
    ("baselines__trs_steps", -1, "baselines.trs_steps must be at least 0, got -1"),
    ("baselines__mat_step_range", (0.1, 0.01), "must be two pixel values, 0 < low <= high <= 1, got (0.1, 0.01)"),
    ("eval__batch_size", 0, "eval.batch_size must be at least 1, got 0"),
    ("eval__images", -1, "eval.images must be at least 0, got -1"),
]


@pytest.mark.parametrize("name, value, message", REFUSED, ids=[f"{name}={value}" for name, value, _ in REFUSED])
def test_an_impossible_value_is_refused_in_one_line_that_says_what_is_expected(name, value, message):
    with pytest.raises(ValueError) as refusal:
        config_lib.validate(changed(**{name: value}))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss__feature_layers": (), "loss__lambda_fdp": 0.0},
        {"loss__feature_layers": (), "loss__method": "qat"},
        {"quant__bits": (8, 4), "bact__starts": (0.5,)},
        {"quant__bits": (4,), "bact__starts": ()},
        {"bact__starts": (), "bact__enabled": False},
        {"quant__edge_bits": 0, "quant__branch_bits": 2, "quant__residual_bits": 8},
        {"loss__patched_frac": 1.0, "train__batch_size": 7},
        {"loss__patched_frac": 0.375},
        {"optim__milestones": ()},
        {"patches__sizes_px": (20,), "data__image_size_px": 32},
        {"model__name": "resnet18", "loss__feature_layers": ("stem", "stage1")},
    ],
)
def test_a_possible_combination_passes(fields):
    config_lib.validate(changed(**fields))


@pytest.mark.parametrize("name, size, classes", [("digits", 16, 10), ("cifar10", 32, 10), ("imagenet", 224, 1000)])
def test_image_size_and_classes_follow_the_data_set(name, size, classes):
    config = changed(data__name=name)
    assert (config_lib.image_size_px(config), config_lib.num_classes(config)) == (size, classes)
    assert config_lib.image_size_px(changed(data__name=name, data__image_size_px=48)) == 48


def test_the_network_gets_every_setting_of_its_groups():
    fields = {
        "edge_bits": 0,
        "branch_bits": 5,
        "residual_bits": 4,
        "act_signed": True,
        "norm": "shared",
        "bits": (8, 4),
    }
    config = changed(
        model__width=6,
        model__dtype="bfloat16",
        quant__scale="observed",
        **{f"quant__{k}": v for k, v in fields.items()},
    )
    network = config_lib.make_network(config)
    assert {name: getattr(network, name) for name in fields} == fields
    assert network.module.plan.width == 6 and network.module.num_classes == 10
    assert (network.module.options.scale, network.module.options.dtype) == ("observed", "bfloat16")
    assert config_lib.make_network(config, (32,)).bits == (32,)


@pytest.mark.parametrize(
    "fields, layers, has_penalty",
    [
        ({}, ("stage1", "stage2", "input_gradient"), True),
        ({"loss__lambda_fdp": 0.0}, ("input_gradient",), True),
        ({"loss__lambda_gpdp": 0.0}, ("stage1", "stage2"), True),
        ({"loss__lambda_fdp": 0.0, "loss__lambda_gpdp": 0.0}, (), False),
        ({"loss__feature_layers": ("stem", "stage3")}, ("stem", "stage3", "input_gradient"), True),
        ({"loss__method": "patch_ce"}, (), False),
        ({"loss__method": "qat"}, (), False),
        ({"loss__method": "pbat"}, (), False),
    ],
)
def test_a_method_reads_only_the_maps_that_its_penalties_weigh(fields, layers, has_penalty):
    method = config_lib.make_training_method(changed(**fields))
    assert method.map_layers == layers and (method.pair_penalty is not None) == has_penalty
    assert method.name == fields.get("loss__method", "triqdef")


@pytest.mark.parametrize(
    "fields, needs_pool, needs_logits",
    [
        ({}, True, False),
        ({"patches__online_steps": 2}, False, True),
        ({"loss__method": "patch_ce"}, True, False),
        ({"loss__method": "qat"}, False, False),
        ({"loss__method": "pbat"}, False, True),
    ],
)
def test_a_method_asks_for_a_pool_or_for_logits_only_where_it_uses_them(fields, needs_pool, needs_logits):
    method = config_lib.make_training_method(changed(**fields))
    assert (method.needs_pool, method.needs_logits) == (needs_pool, needs_logits)


def test_penalty_settings_and_the_weight_of_patched_images_come_from_the_loss_group():
    fields = {"alpha": 0.25, "beta": 2.0, "lambda_fdp": 0.1, "lambda_gpdp": 0.2, "reduction": "sum", "hinge": "chance"}
    config = changed(
        **{f"loss__{name}": value for name, value in fields.items()}, loss__min_bit_gap=2, loss__lambda_adv=3.0
    )
    method = config_lib.make_training_method(config)
    settings = method.pair_penalty.keywords["settings"]
    assert {name: getattr(settings, name) for name in fields} == fields and settings.min_bit_gap == 2
    assert method.bit_terms(1.0, 10.0) == 31.0


def test_maps_too_small_for_a_histogram_are_refused():
    config = config_lib.default()
    config.data.image_size_px = 8
    config.loss.feature_layers = ("stage3",)
    with pytest.raises(ValueError, match="stage3 has 2-px maps here, too small"):
        config_lib.validate(config)


@pytest.mark.parametrize(
    "fields, said",
    [
        (
            {"loss__method": "gal", "quant__bits": (4,), "bact__starts": ()},
            "gal compares pairs of bit-widths, got quant.bits = (4,)",
        ),
        ({"loss__method": "pbcat", "patches__sizes_px": (9,)}, None),
        ({"loss__method": "pbcat", "patches__sizes_px": (11,)}, "pbcat attacks a square of 16 px"),
        (
            {"loss__method": "pbat", "patches__sizes_px": (7,)},
            "a patch of 7 px has no place outside the protected centre",
        ),
        ({"loss__method": "dwq", "baselines__dwq_attack": "patch", "patches__sizes_px": (7,)}, "has no place outside"),
        ({"loss__method": "dwq", "patches__sizes_px": (7,)}, None),
        ({"loss__method": "pbat", "patches__sizes_px": (7,), "patches__protected_frac": 0.0}, None),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_it_starts(fields, said):
    config = changed(**fields)
    if said is None or "square of 16" in said:
        config.data.image_size_px = 16 if said is None else 15
    if said is None:
        config_lib.validate(config)
        return
    with pytest.raises(ValueError) as refusal:
        config_lib.validate(config)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_fields_of_single_methods_reach_them():
    config = changed(loss__method="dwq", baselines__dwq_steps=3, baselines__dwq_epsilon=0.5)
    method = config_lib.make_training_method(config)
    assert method.attack_passes == 6 and method.make_inputs.keywords["attack"].keywords["bound"] == 0.5
    config = changed(loss__method="pbat", patches__attack_location="full", patches__attack_stride_px=4)
    attack = config_lib.make_training_method(config).make_inputs.keywords["attack"].keywords["settings"]
    assert (attack.location, attack.stride_px, attack.protected_frac) == ("full", 4, 10 / 32)


def test_fields_that_are_younger_than_caches_rename_nothing_while_they_are_left_alone():
    assert (
        files.config_hash(config_lib.default()) == "bfb31c6a35ea22dd"
    )  # of the default before `baselines` and its like
    touched = changed(baselines__mat_rate=0.5, patches__attack_location="full")
    plain = files.plain(touched)
    assert plain["baselines"] == {"mat_rate": 0.5} and plain["patches"]["attack_location"] == "full"
    assert "protected_frac" not in plain["patches"] and files.config_hash(touched) != "bfb31c6a35ea22dd"
    for copied in (copy.deepcopy(touched), touched.copy_and_resolve_references()):
        assert files.plain(copied) == plain
    read = config_lib.default()
    read.update(plain)
    assert read == touched and read.baselines.mat_trials == 5
