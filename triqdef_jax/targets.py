"""What is attacked: one trained run as its own bit-widths, as bit-widths it never trained, re-quantized as a vendor would, behind a defence.

A target is named '4' (a bit-width, trained or calibrated for the purpose), 'ptq:minmax:4' or 'ptq:mse:4' (`ptq.py`), 'jedi:4', a defence of
`defenses` around any of these, or 'random', a trained bit-width drawn for each image. It predicts from raw uint8 images through the fake-quant
graph or, deployed, through integers.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from triqdef_jax import defenses, deploy, guards, loop, patches, ptq, quantize
from triqdef_jax.runs import Trained
from triqdef_jax.surrogates import RANDOM

EOT_SAMPLES = 4  # draws of a random defence that an attack averages in each of its steps, every step anew
MEASURED, ASKED = 0, 1  # salts of a random defence's draws: a query attack must not keep a draw that is then measured


class Target(NamedTuple):
    """One row of the evaluation.

    Attributes:
      name: as above. is_trained: a bit-width that the run trained, without a defence around it. bits: its bit-width.
      logits_fn: images float32 `[B, H, W, 3]` in [0, 1] -> logits `[B, K]`, differentiable, a `jax.tree_util.Partial`; takes
        (key, images) where `is_random`.
      query: images uint8 `[B, H, W, 3]` -> logits `[B, K]` of the forward that is measured.
      ask: the same for query attacks; another draw where the defence draws, else `query` itself.
      is_random: whether `logits_fn` takes a key. certify: (images uint8, labels) -> bool `[B]`, where the defence has a certificate.
    """

    name: str
    is_trained: bool
    bits: int
    logits_fn: Callable
    query: Callable
    ask: Callable
    is_random: bool = False
    certify: Callable | None = None

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return int32 `[B]` of uint8 images `[B, H, W, 3]`."""
        return np.asarray(_argmax(self.query(images)))


class Name(NamedTuple):
    """A target's name taken apart: defence and observer, '' where there is none, and bit-width, 0 of 'random'."""

    defense: str
    observer: str
    bits: int


def parse(name: str) -> Name:
    """Take a target's name apart.

    Raises:
      ValueError: no such target.
    """
    if name == RANDOM:
        return Name("", "", 0)
    defense, _, rest = name.partition(":")
    if defense not in defenses.DEFENSES:
        defense, rest = "", name
    observer = ""
    if rest.startswith("ptq:"):
        observer, _, rest = rest.removeprefix("ptq:").partition(":")
        if observer not in ptq.OBSERVERS:
            raise ValueError(
                f"target: expected ptq:OBSERVER:BITS with one of {', '.join(ptq.OBSERVERS)}, got {observer!r}"
            )
    if not rest.isdigit():
        raise ValueError(
            f"target: expected a bit-width like 4, {RANDOM}, or ptq:minmax:4, perhaps behind one of {', '.join(defenses.DEFENSES)} "
            f"as in median:4, got {name!r}"
        )
    return Name(defense, observer, quantize.check_bits(int(rest)))


def make(trained: Trained, data, name: str, *, deployed: bool = False) -> Target:
    """Build one target of a trained run; a defence that learns is fitted first where the shared folder has none.

    Args:
      data: held-out images of it calibrate bit-widths that were not trained. deployed: measure the integer forward below 32 bits.

    Raises:
      ValueError: no such target, or a network without an integer lowering.
    """
    if name == RANDOM:
        return draw(trained, [make(trained, data, str(bits), deployed=deployed) for bits in trained.network.bits])
    defense, observer, bits = parse(name)
    variables, module, spec = _variables(trained, data, observer, bits), trained.network.module, trained.spec(bits)
    logits_fn = jax.tree_util.Partial(_logits_of(module), variables, spec)
    is_deployed = deployed and bits != quantize.FLOAT_BITS
    model = deploy.lower(module, variables, spec, data.image_size_px) if is_deployed else None
    if defense:
        measured = jax.tree_util.Partial(_on_pixel_grid, model) if is_deployed else logits_fn
        return defend(name, bits, guards.get(trained.config, data, defense), logits_fn, measured)
    if is_deployed:
        query = functools.partial(deploy.integer_forward, model)
    else:
        query = functools.partial(_from_pixels(module), variables, spec)
    return Target(name, not observer and bits in trained.network.bits, bits, logits_fn, query, query)


def integer_model(trained: Trained, data, bits: int) -> deploy.IntegerModel:
    """Return what a deployed target of this bit-width measures; arguments and errors as in `make`."""
    variables = _variables(trained, data, "", bits)
    return deploy.lower(trained.network.module, variables, trained.spec(bits), data.image_size_px)


def _variables(trained, data, observer, bits):
    """Return a bit-width's variables: trained, calibrated on held-out images, or re-quantized by an observer."""
    images = loop.unit_range(jnp.asarray(data.heldout.images[: trained.config.data.calibration_images]))
    if observer:
        return ptq.requantize(trained, bits, observer, images)
    return trained.variables(bits, None if bits in trained.network.bits else images)


def defend(name: str, bits: int, guard: guards.Guard, logits_fn: Callable, measured: Callable) -> Target:
    """Put a defence around a network.

    Args:
      name, bits: of the row. guard: the defence. logits_fn, measured: images float32 `[B, H, W, 3]` in [0, 1] -> logits, Partials: the
        network that gradients go through, and the one that predicts.
    """
    entry, settings, fitted = guard.entry, guard.settings, guard.fitted
    attacked = entry.wrap(logits_fn, fitted, settings)
    if entry.is_random:
        attacked = defenses.averaged(attacked, EOT_SAMPLES)
    predicts = entry.measure(measured, fitted, settings)
    salts = (MEASURED, ASKED) if entry.draws else (None, None)
    query, ask = (query_of(predicts if salt is None else defenses.per_image(predicts, salt)) for salt in salts)
    certify = functools.partial(_certify, entry.certify, measured, settings) if entry.certify else None
    return Target(name, False, bits, attacked, query, ask, entry.is_random, certify)


def draw(trained: Trained, rows: list[Target]) -> Target:
    """Return the row that predicts each image at one of the run's bit-widths, all equally likely.

    The draw is a hash of the image and a salt, so that a prediction can be repeated; queries ask under another salt than is measured. Gradients are
    those of one bit-width for all images of a call, drawn by the key: an attack that draws anew in every step follows the expectation.

    Args:
      rows: one per trained bit-width, in the order of `trained.network.bits`.

    Reference: random precision inference of Fu et al., Double-Win Quant, ICML 2021.
    """
    network = trained.network
    slots, specs = [network.slot(b) for b in network.bits], [trained.spec(b) for b in network.bits]
    logits_fn = loop.drawn_bit_logits(network, trained.weights, trained.stats, slots, specs)
    query, ask = (functools.partial(_drawn_logits, rows, salt) for salt in (MEASURED, ASKED))
    return Target(RANDOM, False, 0, logits_fn, query, ask, is_random=True)


def _drawn_logits(rows, salt, images):
    pixels = np.asarray(images)
    drawn = [zlib.crc32(image.tobytes(), salt) % len(rows) for image in pixels]
    logits = np.stack([np.asarray(row.query(images)) for row in rows])
    return logits[drawn, np.arange(len(pixels))]


def query_of(predicts: Callable) -> Callable:
    """Return images uint8 `[B, H, W, 3]` -> logits of a function of float images, compiled where that is a `jax.tree_util.Partial`."""
    return functools.partial(_from_uint8, predicts)


def _from_uint8(predicts, images):
    """What decides on the host compiles its own pieces."""
    call = _compiled if isinstance(predicts, jax.tree_util.Partial) else _plainly
    return call(predicts, np.asarray(images))


def _plainly(predicts, images):
    return predicts(jnp.asarray(images, jnp.float32) / 255.0)


_compiled = jax.jit(_plainly)


def _certify(certify, measured, settings, images, labels):
    return certify(measured, jnp.asarray(images, jnp.float32) / 255.0, labels, settings)


def _on_pixel_grid(model, images):
    """Logits of the integer network, whose input is what a defence hands on, rounded to uint8."""
    return deploy.integer_forward(model, patches.round_to_uint8(images))


@functools.cache
def _logits_of(module) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """One function object per network, so that jitted attacks compile once for all its bit-widths."""
    return lambda variables, spec, images: module.apply(variables, images, spec, "eval")[0]


@functools.cache
def _from_pixels(module):
    logits_of = _logits_of(module)
    return jax.jit(lambda variables, spec, images: logits_of(variables, spec, images.astype(jnp.float32) / 255.0))


@jax.jit
def _argmax(logits):
    return logits.argmax(axis=-1).astype(jnp.int32)
