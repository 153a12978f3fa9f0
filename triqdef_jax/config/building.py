"""From config groups to the plain settings of lower layers: the network and the training method of a run."""

from ml_collections import ConfigDict

from triqdef_jax.config.defaults import num_classes
from triqdef_jax.models import make_model
from triqdef_jax.models.layers import LayerOptions
from triqdef_jax.models.multibit import MultiBitNetwork
from triqdef_jax.objectives.methods import BaselineSettings, Method, MethodSettings, PatchingSettings, make_method
from triqdef_jax.objectives.penalties import PenaltySettings


def make_network(
    config: ConfigDict, bits: tuple[int, ...] | None = None, *, dtype: str | None = None
) -> MultiBitNetwork:
    """Return the network of the run, or the same network under other `bits` or with operands of another `dtype`."""
    options = LayerOptions(config.quant.scale, dtype or config.model.dtype, norm_group=config.model.norm_group)
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
    loss = config.loss
    settings = MethodSettings(
        lambda_adv=loss.lambda_adv,
        feature_layers=tuple(loss.feature_layers),
        penalties=PenaltySettings(**{name: loss[name] for name in PenaltySettings.__dataclass_fields__}),
        patching=make_patching_settings(config),
        baselines=BaselineSettings(**config.baselines),
    )
    return make_method(loss.method, settings)


def make_patching_settings(config: ConfigDict) -> PatchingSettings:
    """Return how training images get patches."""
    patches, jitter = config.patches, config.patches.scale_jitter
    taken = ("rotation_deg", "shape", "protected_frac", *(f"online_{x}" for x in ("steps", "step_size")))
    taken += tuple(f"attack_{x}" for x in ("steps", "step_size", "location", "stride_px"))
    return PatchingSettings(
        patched_frac=config.loss.patched_frac,
        scale_range=(1 - jitter, 1 + jitter),
        size_px=patches.sizes_px[0],
        **{name: patches[name] for name in taken},
    )
