"""The one config: every field with its default, meaning and unit; what combinations are possible; what a run is made of.

`default()` is the embedded digits run. Experiment files in `configs/` state their differences only. `validate` raises ValueError with one line;
the `make_*` functions turn config groups into the plain settings that lower layers take.
"""

import math
from fractions import Fraction

from ml_collections import ConfigDict

from triqdef_jax import curriculum, perceptual, quantize
from triqdef_jax.attacks.settings import NUM_EVAL_IMAGES
from triqdef_jax.models import MODELS, make_model
from triqdef_jax.models.layers import LayerOptions
from triqdef_jax.models.multibit import NORMS, MultiBitNetwork
from triqdef_jax.objectives.methods import METHODS, Method, MethodSettings, PatchingSettings, make_method
from triqdef_jax.objectives.penalties import HINGES, REDUCTIONS, PenaltySettings

DATASETS = {"digits": (16, 10), "cifar10": (32, 10), "imagenet": (224, 1000)}  # default image side in pixels, classes
PLANS = ("auto", "per_bit", "fused")
AFFINE_STARTS = ("copy", "reset")
NORM_STATS = ("pooled", "clean")
SCHEDULES = ("step", "cosine")
PATCH_FAMILIES = ("lavan", "gap")


def default() -> ConfigDict:
    """Return the digits run: the full method on real images within minutes on two CPU cores. Locked: no field can be added."""
    return ConfigDict(
        {
            "seed": 0,  # root of all randomness of the run
            "data": {
                "name": "digits",  # digits | cifar10 | imagenet
                "dir": "",  # folder of prepared data sets; '' means $TFDS_DATA_DIR or ~/tensorflow_datasets
                "image_size_px": 0,  # side of the network's input; 0 means the data set's own (16, 32, 224)
                "train_images": 0,  # use the first so many training images only; 0 means all
                "heldout_images": 128,  # taken out of the training split: calibration and choice of checkpoints
                "calibration_images": 128,  # how many of the held-out images calibrate a new bit-width
                "num_workers": 0,  # decoding processes of imagenet; 0 decodes in threads
                "prefetch": 2,  # batches prepared ahead by imagenet's pipeline
            },
            "model": {
                "name": "resnet8",  # resnet8 | resnet20 | resnet56 | resnet18 | resnet34 | resnet50
                "width": 16,  # filters of the first stage; 0 means the published number
                "dtype": "float32",  # operands of multiplications: float32 | bfloat16 (training only)
            },
            "quant": {
                "bits": (32, 8, 5, 4, 2),  # any subset of 2..8 plus 32; the order of all per-bit arrays
                "scale": "learned",  # learned (trained step sizes) | observed (channel maximum; running maximum)
                "norm": "per_bit",  # per_bit | shared_affine (statistics per bit) | shared (neither)
                "norm_stats": "pooled",  # running statistics learn from clean and patched images | clean ones only
                "act_signed": False,  # symmetric signed codes after a ReLU too, the literal text; wastes half the levels
                "edge_bits": 8,  # first convolution and classifier; 0 means the network's own bits
                "branch_bits": 8,  # residual branch that is added; 0 means the network's own bits
                "residual_bits": 8,  # residual stream; 0 means the network's own bits
                "round_bias": True,  # round biases to the integer accumulator's grid, in training from the last BACT stage
            },
            "loss": {
                "method": "triqdef",  # triqdef | patch_ce | qat | pbat
                "alpha": 0.5,  # weight of the edge overlap in FDP and GPDP
                "beta": 1.0,  # weight of the orientation cosine in FDP and GPDP
                "lambda_adv": 1.0,  # weight of the cross-entropy on patched images
                "lambda_fdp": 0.8,  # weight of the penalty on features
                "lambda_gpdp": 0.5,  # weight of the penalty on input gradients
                "patched_frac": 0.5,  # rho, patched share of the batch, p/q with q at most 16
                "reduction": "mean",  # over pairs and layers: mean | sum (the literal formula, over ordered pairs)
                "feature_layers": ("stage1", "stage2"),  # where FDP reads features: stem, stage1, ...
                "map_reduction": "mean",  # channels to one map: mean | max | per_channel
                "gpdp_soft_edges": True,  # soft threshold in GPDP too; False is the literal formula
                "centered_hog": False,  # subtract the mean from orientation histograms (chance level near 0)
                "hinge": "none",  # none | chance: penalise only what exceeds the chance level
                "penalty_warmup_frac": 0.0,  # share of the run over which the penalties rise to full weight
                "min_bit_gap": 0,  # leave pairs of bit-widths closer than this out of the penalties
            },
            "train": {
                "batch_size": 64,  # clean images per step, over all devices
                "epochs": 30,  # passes over the training images
                "plan": "auto",  # per_bit (compile once, one device) | fused (compile per stage) | auto
                "log_every_steps": 20,  # steps per line of metrics.jsonl
                "checkpoint_every_steps": 200,  # steps between checkpoints; stages and the end save as well
                "keep_checkpoints": 3,  # newest checkpoints kept
            },
            "optim": {
                "lr": 0.1,  # peak learning rate
                "momentum": 0.9,  # of SGD
                "weight_decay": 1e-4,  # on convolution and classifier weights only
                "schedule": "step",  # step (times gamma at milestones) | cosine (to zero)
                "milestones": (0.5, 0.75),  # fractions of the run
                "gamma": 0.1,  # factor at each milestone
                "warmup_epochs": 0.0,  # linear rise of the learning rate from zero
                "clip_norm": 0.0,  # largest global gradient norm; 0 means no clipping
            },
            "bact": {
                "enabled": True,  # False trains all bit-widths from the first step
                "starts": (0.3, 0.45, 0.6),  # fraction of the run at which each bit-width below 8 joins, descending
                "affine": "copy",  # norm affine of a new bit-width: copy (nearest wider active one) | reset
            },
            "patches": {
                "sizes_px": (5,),  # sides of the patches in the pool (seen sizes); 3 px fool 2 % of digits, 5 px 15 %
                "unseen_sizes_px": (4, 6),  # sides that evaluation alone meets
                "shape": "square",  # square | circle
                "families": ("lavan", "gap"),  # how the pool is made, alternating
                "pool_size": 64,  # patches; the last quarter is held out from training
                "eval_pool_size": 16,  # patches per evaluation pool of the second source network
                "steps": 100,  # optimisation steps of a patch
                "batch_images": 16,  # images per patch and step
                "source_images": 1024,  # training images on which patches are optimised; 128 of them judge the patches
                "rotation_deg": 22.5,  # largest rotation when pasted in training and evaluation
                "scale_jitter": 0.1,  # largest relative change of size when pasted
                "source_epochs": 20,  # training of the full-precision source networks
                "online_steps": 0,  # > 0: make patches in each training step instead of a pool (steps per patch)
                "online_step_size": 0.1,  # change of a pixel per online step
                "attack_steps": 10,  # inner steps of pbat
                "attack_step_size": 0.1,  # change of a pixel per inner step of pbat
                "shared_dir": "runs/shared",  # source networks and pools that several runs use
            },
            "eval": {
                "batch_size": 256,  # images per forward
                "images": 0,  # first so many test images under attack; 0 means all
            },
        }
    ).lock()


def image_size_px(config: ConfigDict) -> int:
    """Return the side of the network's input in pixels."""
    return config.data.image_size_px or DATASETS[config.data.name][0]


def join_variants(file: str, variants: dict[str, dict], joined: str) -> dict:
    """Return the fields that the variants `joined` by commas set, from {variant: {field: value}} of a config file.

    Raises ValueError for an unknown variant, and for two that set the same field.
    """
    changes = {}
    for name in joined.split(",") if joined else ():
        if name not in variants:
            raise ValueError(f"{file} has the variants {', '.join(variants)}, alone or joined by commas; got {name!r}")
        for field in changes.keys() & variants[name].keys():
            raise ValueError(f"{file}:{joined} sets {field} twice; keep one of the variants that set it")
        changes |= variants[name]
    return changes


def num_classes(config: ConfigDict) -> int:
    """Return the number of classes of the data set."""
    return DATASETS[config.data.name][1]


def make_network(config: ConfigDict, bits: tuple[int, ...] | None = None) -> MultiBitNetwork:
    """Return the network of the run, or the same network under other `bits`."""
    options = LayerOptions(scale=config.quant.scale, dtype=config.model.dtype)
    quant = config.quant
    return MultiBitNetwork(
        make_model(config.model.name, num_classes=num_classes(config), width=config.model.width, options=options),
        tuple(bits or quant.bits),
        norm=quant.norm,
        edge_bits=quant.edge_bits,
        branch_bits=quant.branch_bits,
        residual_bits=quant.residual_bits,
        act_signed=quant.act_signed,
    )


def make_training_method(config: ConfigDict) -> Method:
    """Return the method of the run."""
    loss, patches = config.loss, config.patches
    names = PenaltySettings.__dataclass_fields__
    jitter = patches.scale_jitter
    settings = MethodSettings(
        lambda_adv=loss.lambda_adv,
        feature_layers=tuple(loss.feature_layers),
        penalties=PenaltySettings(**{name: loss[name] for name in names}),
        patching=PatchingSettings(
            patched_frac=loss.patched_frac,
            rotation_deg=patches.rotation_deg,
            scale_range=(1 - jitter, 1 + jitter),
            size_px=patches.sizes_px[0],
            shape=patches.shape,
            online_steps=patches.online_steps,
            online_step_size=patches.online_step_size,
            attack_steps=patches.attack_steps,
            attack_step_size=patches.attack_step_size,
        ),
    )
    return make_method(loss.method, settings)


def validate(config: ConfigDict) -> None:
    """Raise ValueError, one line, for a value or combination that cannot run; reads no data and starts no device."""
    _validate_choices(config)
    _validate_counts(config)
    _validate_quant(config.quant)
    _validate_loss(config)
    _validate_train(config)
    _validate_patches(config)


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
    }
    for field, known in choices.items():
        group, name = field.split(".")
        if config[group][name] not in known:
            raise ValueError(f"{field} must be one of {', '.join(known)}, got {config[group][name]!r}")


def _validate_counts(config):
    for field in ("image_size_px", "train_images", "num_workers", "prefetch"):
        _require(config.data[field] >= 0, f"data.{field} must be at least 0", config.data[field])
    _require(config.model.width >= 0, "model.width must be at least 0", config.model.width)
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
    unknown = set(patches.families) - set(PATCH_FAMILIES)
    _require(
        bool(patches.families) and not unknown,
        f"patches.families must name at least one of {', '.join(PATCH_FAMILIES)}",
        tuple(patches.families),
    )


def _require(condition, expectation, value):
    if not condition:
        raise ValueError(f"{expectation}, got {value!r}")


def _named(field, check, value):
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
