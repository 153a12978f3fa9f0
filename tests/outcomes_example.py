"""Outcomes made by hand for the tests of what cells and runs say together: one bit-width, 40 images that are right without a patch."""

import numpy as np

from triqdef_jax import results
from triqdef_jax.results import Cell, Outcomes

NUM = 40
LABELS = np.zeros(NUM, int)


def make_cell(name, num_fooled, *, access="transfer", surrogate="fp", first=0, patches=1, **about):
    """One bit-width; each patch fools `num_fooled` images from `first` on."""
    predictions = np.zeros((1, patches, NUM), np.int32)
    predictions[..., first : first + num_fooled] = 1
    about = {"attack": name, "surrogate": surrogate, "access": access, "settings": {"steps": 1}, "size_px": 5, **about}
    return Cell(name, about, predictions, np.full(patches, -1), np.arange(NUM), f"digest of {name}")


def make_outcomes(*cells):
    return Outcomes(("4",), LABELS, np.arange(NUM), np.zeros((1, NUM), np.int32), cells)


def record_of(outcomes, name="one", seed=0):
    fixed = {
        "name": name,
        "data": "digits",
        "seed": seed,
        "method": "qat",
        "model": "m",
        "forward": "f",
        "preset": "quick",
    }
    return fixed | results.summarise(outcomes, seed=0)
