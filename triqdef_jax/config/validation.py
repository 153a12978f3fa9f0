"""What a run cannot be: values and combinations that are refused in one line each, before data are read or a device is started."""

import math
from fractions import Fraction

from ml_collections import ConfigDict

from triqdef_jax import curriculum, perceptual, quantize
from triqdef_jax.attacks.settings import NUM_EVAL_IMAGES
from triqdef_jax.config.building import make_network, make_patching_settings
from triqdef_jax.config.defaults import DATASETS, image_size_px
from triqdef_jax.models import MODELS
from triqdef_jax.models.multibit import NORMS
from triqdef_jax.objectives import pbat, pbcat
from triqdef_jax.objectives.methods import METHODS, pbat_settings
from triqdef_jax.objectives.penalties import HINGES, REDUCTIONS

PLANS = ("auto", "per_bit", "fused")
AFFINE_STARTS = ("copy", "reset")
NORM_STATS = ("pooled", "clean")
SCHEDULES = ("step", "cosine")
PATCH_FAMILIES = ("lavan", "gap")
DWQ_ATTACKS = ("linf", "patch")


def validate(config: ConfigDict) -> None:
    """Raise ValueError, one line, for a value or combination that cannot run; reads no data and starts no device."""
    _validate_choices(config)
    _validate_counts(config)
    _validate_quant(config.quant)
    _validate_loss(config)
    _validate_train(config)
    _validate_patches(config)
    _validate_baselines(config)


def _validate_choices(config):
    choices = {
        "data.name": tuple(DATASETS),
        "model.name": tuple(MODELS),
        "model.dtype": ("float32", "bfloat16"),
        "quant.scale": ("learned", "observed"),
        "quant.norm": NORMS,
        "quant.norm_stats": NORM_STATS,
        "loss.method": tuple(METHODS),
        "loss.reduction": REDUCTIONS,
        "loss.map_reduction": ("mean", "max", "per_channel"),
        "loss.hinge": HINGES,
        "train.plan": PLANS,
        "optim.schedule": SCHEDULES,
        "bact.affine": AFFINE_STARTS,
        "patches.shape": ("square", "circle"),
        "patches.attack_location": pbat.LOCATIONS,
        "baselines.dwq_attack": DWQ_ATTACKS,
    }
    for field, known in choices.items():
        group, name = field.split(".")
        if config[group][name] not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}, got {config[group][name]!r}")


def _validate_counts(config):
    for field in ("image_size_px", "train_images", "num_workers", "prefetch"):
        _require(config.data[field] >= 0, f"data.{field} must be at least 0", config.data[field])
    _require(config.model.width >= 0, "model.width must be at least 0", config.model.width)
    _require(config.model.norm_group >= 0, "model.norm_group must be at least 0", config.model.norm_group)
    _require(config.eval.batch_size >= 1, "eval.batch_size must be at least 1", config.eval.batch_size)
    _require(config.eval.images >= 0, "eval.images must be at least 0", config.eval.images)


def _validate_quant(quant):
    bits = tuple(quant.bits)
    if not bits or len(set(bits)) != len(bits):
        raise ValueError(f"quant.bits needs at least one bit-width and none twice, got {bits}")
    for value in bits:
        _named("quant.bits", quantize.check_bits, value)
    for name in ("edge_bits", "branch_bits", "residual_bits"):
        if quant[name] not in (0, *range(quantize.MIN_BITS, quantize.MAX_BITS + 1)):
            raise ValueError(f"quant.{name} must be 2..8, or 0 for the network's own bits, got {quant[name]!r}")


def _validate_loss(config):
    loss, plan = config.loss, make_network(config).module.plan
    for name in ("alpha", "beta", "lambda_adv", "lambda_fdp", "lambda_gpdp"):
        _require(
            math.isfinite(loss[name]) and loss[name] >= 0, f"loss.{name} must be finite and at least 0", loss[name]
        )
    _require(0 < loss.patched_frac <= 1, "loss.patched_frac must lie in (0, 1]", loss.patched_frac)
    _require(0 <= loss.penalty_warmup_frac < 1, "loss.penalty_warmup_frac must lie in [0, 1)", loss.penalty_warmup_frac)
    _require(loss.min_bit_gap >= 0, "loss.min_bit_gap must be at least 0", loss.min_bit_gap)
    for layer in loss.feature_layers:
        if layer not in plan.stages:
            raise ValueError(
                f"loss.feature_layers: {config.model.name} has the layers {', '.join(plan.stages)}, got {layer!r}"
            )
        side = plan.map_side_px(layer, image_size_px(config))
        if loss.method == "triqdef" and side < 2 * perceptual.default_cell_px(side):
            raise ValueError(
                f"loss.feature_layers: {layer} has {side}-px maps here, too small for orientation histograms (2 x 2 cells of "
                f"{perceptual.default_cell_px(side)} px); leave it out or use larger images"
            )
    if loss.lambda_fdp and not loss.feature_layers and loss.method == "triqdef":
        raise ValueError("loss.feature_layers is empty while loss.lambda_fdp > 0: name layers or set lambda_fdp to 0.0")
    share = Fraction(loss.patched_frac).limit_denominator(16)
    if config.train.batch_size % share.denominator:
        raise ValueError(
            f"train.batch_size must be divisible by {share.denominator}, because loss.patched_frac = {share} patches "
            f"{share.numerator} of every {share.denominator} images; got {config.train.batch_size}"
        )
    num, num_patched = config.train.accumulate_steps, config.train.batch_size // share.denominator * share.numerator
    if num < 1 or config.train.batch_size % num or num_patched % num:
        raise ValueError(
            f"train.accumulate_steps must divide train.batch_size = {config.train.batch_size} and the {num_patched} patched images "
            f"among them, got {num}"
        )


def _validate_train(config):
    train, optim = config.train, config.optim
    for name in ("batch_size", "epochs", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints"):
        _require(train[name] >= 1, f"train.{name} must be at least 1", train[name])
    _require(optim.lr > 0, "optim.lr must be positive", optim.lr)
    _require(optim.gamma > 0, "optim.gamma must be positive", optim.gamma)
    _require(0 <= optim.momentum < 1, "optim.momentum must lie in [0, 1)", optim.momentum)
    for name in ("weight_decay", "warmup_epochs", "clip_norm"):
        _require(optim[name] >= 0, f"optim.{name} must be at least 0", optim[name])
    milestones = tuple(optim.milestones)
    rising = all(isinstance(m, float) and 0 < m < 1 for m in milestones) and list(milestones) == sorted(set(milestones))
    _require(rising, "optim.milestones must be rising fractions of the run between 0 and 1", milestones)
    for num_images in (config.train.batch_size, round(config.train.batch_size * config.loss.patched_frac)):
        if config.model.norm_group and num_images % config.model.norm_group:
            raise ValueError(
                f"model.norm_group must divide train.batch_size and its patched part, {num_images} images; got {config.model.norm_group}"
            )
    curriculum.make_stages(config.quant.bits, 1000, config.bact.starts, enabled=config.bact.enabled)
    data = config.data
    _require(data.heldout_images >= 1, "data.heldout_images must be at least 1", data.heldout_images)
    _require(
        1 <= data.calibration_images <= data.heldout_images,
        f"data.calibration_images must lie in 1..data.heldout_images = {data.heldout_images}",
        data.calibration_images,
    )


def _validate_patches(config):
    patches, image = config.patches, image_size_px(config)
    for name in ("sizes_px", "unseen_sizes_px"):
        for size in patches[name]:
            _require(isinstance(size, int) and size >= 1, f"patches.{name} must hold whole pixels", size)
            largest = math.ceil(size * (1 + patches.scale_jitter))
            if largest > image:
                raise ValueError(
                    f"patches.{name}: a patch of {size} px, up to {largest} px with scale jitter, does not fit into "
                    f"{image}-px images of {config.data.name}; use smaller patches"
                )
    _require(bool(patches.sizes_px), "patches.sizes_px needs at least one size", tuple(patches.sizes_px))
    _require(0 <= patches.scale_jitter < 1, "patches.scale_jitter must lie in [0, 1)", patches.scale_jitter)
    _require(patches.rotation_deg >= 0, "patches.rotation_deg must be at least 0", patches.rotation_deg)
    _require(patches.pool_size >= 4, "patches.pool_size must be at least 4 (a quarter is held out)", patches.pool_size)
    for name in ("eval_pool_size", "steps", "batch_images", "source_epochs", "attack_steps"):
        _require(patches[name] >= 1, f"patches.{name} must be at least 1", patches[name])
    _require(
        patches.source_images > NUM_EVAL_IMAGES,
        f"patches.source_images must exceed the {NUM_EVAL_IMAGES} images that judge the patches",
        patches.source_images,
    )
    _require(patches.online_steps >= 0, "patches.online_steps must be at least 0", patches.online_steps)
    for name in ("online_step_size", "attack_step_size"):
        _require(patches[name] > 0, f"patches.{name} must be positive", patches[name])
    _require(patches.attack_stride_px >= 1, "patches.attack_stride_px must be at least 1", patches.attack_stride_px)
    _require(
        0 <= patches.protected_frac < 1, "patches.protected_frac must lie in [0, 1), 0 for none", patches.protected_frac
    )
    unknown = set(patches.families) - set(PATCH_FAMILIES)
    _require(
        bool(patches.families) and not unknown,
        f"patches.families must name at least one of {', '.join(PATCH_FAMILIES)}",
        tuple(patches.families),
    )


def _validate_baselines(config):
    constants, method, patches = config.baselines, config.loss.method, config.patches
    for name in ("dwq_steps", "pbcat_steps", "mat_patches", "mat_trials", "mat_steps"):
        _require(constants[name] >= 1, f"baselines.{name} must be at least 1", constants[name])
    for name in ("epsilon", "step_size"):
        for kind in ("dwq", "pbcat_cell", "pbcat_noise"):
            value = constants[f"{kind}_{name}"]
            _require(0 < value <= 1, f"baselines.{kind}_{name} must lie in (0, 1]", value)
    for name in ("lambda_gal", "lambda_trs", "lambda_smooth", "lambda_orthogonal"):
        value = constants[name]
        _require(math.isfinite(value) and value >= 0, f"baselines.{name} must be finite and at least 0", value)
    _require(constants.trs_steps >= 0, "baselines.trs_steps must be at least 0", constants.trs_steps)
    _require(0 < constants.trs_epsilon <= 1, "baselines.trs_epsilon must lie in (0, 1]", constants.trs_epsilon)
    _require(0 < constants.mat_rate <= 1, "baselines.mat_rate must lie in (0, 1]", constants.mat_rate)
    sizes = tuple(constants.mat_step_range)
    is_range = len(sizes) == 2 and 0 < sizes[0] <= sizes[-1] <= 1
    _require(is_range, "baselines.mat_step_range must be two pixel values, 0 < low <= high <= 1", sizes)
    if method in ("gal", "trs") and len(config.quant.bits) < 2:
        raise ValueError(
            f"loss.method={method} compares pairs of bit-widths, got quant.bits = {tuple(config.quant.bits)}; name two or more, or take patch_ce"
        )
    side, image = pbcat.square_px(patches.sizes_px[0]), image_size_px(config)
    if method == "pbcat" and side > image:
        raise ValueError(
            f"loss.method=pbcat attacks a square of {side} px (patches.sizes_px[0] = {patches.sizes_px[0]}), too large for {image}-px images"
        )
    if method == "pbat" or (method == "dwq" and constants.dwq_attack == "patch"):
        pbat.corners(image, pbat_settings(make_patching_settings(config)))


def _require(condition, expectation, value):
    if not condition:
        raise ValueError(f"{expectation}, got {value!r}")


def _named(field, check, value):
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
