"""Every field of a config with its default, meaning and unit. `default()` is the embedded digits run."""

from ml_collections import ConfigDict

DATASETS = {"digits": (16, 10), "cifar10": (32, 10), "imagenet": (224, 1000)}  # default image side in pixels, classes
# Fields younger than the first runs and caches on disk, see `RunConfig`.
YOUNG_FIELDS = (
    "train.keep_best",
    "patches.attack_location",
    "patches.attack_stride_px",
    "patches.protected_frac",
    "baselines",
    "model.norm_group",
    "train.accumulate_steps",
    "train.remat",
    "train.compile_ahead",
)


class RunConfig(ConfigDict):
    """A config whose plain form leaves out `YOUNG_FIELDS` that are at their defaults.

    Runs, source networks, pools and results are named and compared by hashes of that form: a field that is added later, and left alone, must
    rename none of them. Reading fills in what is missing with the same defaults.
    """

    def to_dict(self, *args, **kwargs) -> dict:
        """Return nested dicts, without young fields that are at their defaults."""
        plain = super().to_dict(*args, **kwargs)
        for field in YOUNG_FIELDS:
            group, _, name = field.partition(".")
            for key in [name] if name else list(plain.get(group, ())):
                if plain.get(group, {}).get(key) == _DEFAULTS[group][key]:
                    del plain[group][key]
            if not plain.get(group, True):
                del plain[group]
        return plain


def default() -> RunConfig:
    """Return the digits run: the full method on real images within minutes on two CPU cores. Locked: no field can be added."""
    return RunConfig(
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
                "norm_group": 0,  # images that share batch statistics in training, 0 means the whole batch
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
                "method": "triqdef",  # triqdef | patch_ce | qat | pbat | dwq | pbcat | mat | gal | trs | defensive
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
                "accumulate_steps": 1,  # micro-batches per step, for memory; norms see one of them at a time
                "remat": False,  # compute activations again for the gradient instead of keeping them, for memory
                "compile_ahead": True,  # fused: compile the next stage while the present one trains
                "log_every_steps": 20,  # steps per line of metrics.jsonl
                "checkpoint_every_steps": 200,  # steps between checkpoints; stages and the end save as well
                "keep_checkpoints": 3,  # newest checkpoints kept
                "keep_best": True,  # keep the best one on held-out images too (`selection.py`), from the last BACT stage on
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
                "attack_steps": 10,  # inner steps of pbat, and of dwq with patches
                "attack_step_size": 0.1,  # change of a pixel per inner step of pbat
                "attack_location": "random",  # of pbat: random | fixed | direction (one tried per step) | full (four)
                "attack_stride_px": 2,  # distance between a place of pbat and the next one tried
                "protected_frac": 10 / 32,  # side of the central box that pbat's patches stay off, share of the image's
                "shared_dir": "runs/shared",  # source networks and pools that several runs use
            },
            "baselines": {  # constants of one method each, as published where that is known (docs/baselines.md)
                "dwq_attack": "linf",  # linf (noise on all images, as published) | patch (the images of pbat)
                "dwq_epsilon": 8 / 255,  # largest change of a pixel
                "dwq_step_size": 2 / 255,  # change of a pixel per step
                "dwq_steps": 7,  # steps of the noise
                "pbcat_cell_epsilon": 64 / 255,  # largest change of a pixel in the chosen cells
                "pbcat_cell_step_size": 8 / 255,  # change per step there
                "pbcat_noise_epsilon": 4 / 255,  # largest change of a pixel elsewhere
                "pbcat_noise_step_size": 1 / 255,  # change per step there
                "pbcat_steps": 8,  # steps of both
                "mat_patches": 1000,  # meta-patches in the bank
                "mat_trials": 5,  # pairs of meta-patch and place that are tried on an image
                "mat_steps": 5,  # steps of the strongest of them
                "mat_step_range": (1e-4, 1e-1),  # each meta-patch has its own change per step, log-uniform in between
                "mat_rate": 0.25,  # how far the bank follows
                "lambda_gal": 0.5,  # weight of gal's log-sum-exp over pairs of the cosine of input gradients
                "lambda_trs": 0.5,  # weight of trs's mean absolute cosine
                "lambda_smooth": 0.1,  # weight of trs's mean length of an input gradient, in nats per unit of pixel value
                "trs_steps": 0,  # > 0: take that length where so many steps find its maximum
                "trs_epsilon": 8 / 255,  # within so much change of a pixel
                "lambda_orthogonal": 0.002,  # weight of defensive's distance of filters from orthonormal ones
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


def num_classes(config: ConfigDict) -> int:
    """Return the number of classes of the data set."""
    return DATASETS[config.data.name][1]


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


_DEFAULTS = {group: dict(fields) for group, fields in default().items() if group != "seed"}
