"""Transfer matrices read from records are the records' numbers; those computed here are what the patches do."""

import json

import flax.linen as nn
import numpy as np
import pytest
from jax import numpy as jnp

from triqdef_jax import data, inference, probes, transfer
from triqdef_jax.attacks import universal

BITS = (32, 4)


def cell(attack, surrogate, rates, **changes):
    success = {target: {"asr_correct": {"num": 0, "den": 1, "rate": rate}} for target, rate in rates.items()}
    about = {"placement": "random", "size_px": 5, "goal": "targeted"}
    return (
        {"name": f"{attack}|{surrogate}", "attack": attack, "surrogate": surrogate, "success": success}
        | about
        | changes
    )


def write(folder, **changes):
    record = {"kind": "evaluation", "config_hash": "abc", "num_images": 450, "cells": CELLS} | changes
    (folder / "evaluation.json").write_text(json.dumps(record))


CELLS = [
    cell("gap", "self:32", {"32": 0.5, "4": 0.3, "ptq:mse:4": 0.9}),
    cell("gap", "self:4", {"32": 0.1, "4": 0.7, "ptq:mse:4": 0.9}),
    cell("lavan", "self:32", {"32": 0.3, "4": 0.1}),
    cell("lavan", "self:4", {"32": 0.3, "4": 0.3}),
    cell("sparse_rs", "self:32", {"32": 1.0, "4": 1.0}),  # no such cell for 4 bits
    cell("lavan", "fp", {"32": 1.0, "4": 1.0}),
    cell("gap", "self:all", {"32": 1.0, "4": 1.0}),
    cell("gap", "self:4", {"32": 1.0, "4": 1.0}, doubles="gap|self:4"),
]


def test_a_record_gives_the_mean_of_the_attacks_made_on_every_bit_width(tmp_path):
    write(tmp_path)
    found = transfer.from_records(tmp_path, BITS, "abc")
    np.testing.assert_allclose(found.matrix, [[0.4, 0.2], [0.2, 0.5]])
    assert found.origin == (
        "evaluation.json, 450 test images, patches of: gap random 5 px targeted, lavan random 5 px targeted"
    )
    np.testing.assert_allclose(found.symmetric(), [[0.4, 0.2], [0.2, 0.5]])


def test_the_two_directions_of_a_pair_are_averaged():
    found = transfer.Transfer(np.array([[0.9, 0.2], [0.6, 0.8]]), "")
    np.testing.assert_allclose(found.symmetric(), [[0.9, 0.4], [0.4, 0.8]])


@pytest.mark.parametrize(
    "changes", [{"config_hash": "other"}, {"kind": "alignment"}, {"cells": CELLS[:1]}, {"cells": CELLS[4:7]}]
)
def test_records_of_other_runs_and_kinds_and_with_gaps_are_passed_by(tmp_path, changes):
    write(tmp_path, **changes)
    assert transfer.from_records(tmp_path, BITS, "abc") is None
    assert transfer.from_records(tmp_path / "none", BITS, "abc") is None


def test_cells_without_a_rate_are_gaps(tmp_path):
    nothing_counted = cell("gap", "self:4", {"32": None, "4": 0.5})
    write(tmp_path, cells=[CELLS[0], nothing_counted])
    assert transfer.from_records(tmp_path, BITS, "abc") is None


class Linear(nn.Module):
    """A network of one layer, which compiles in no time."""

    @nn.compact
    def __call__(self, images, spec, mode):
        del spec, mode
        return nn.Dense(10, name="dense")(images.reshape(images.shape[0], -1)), {}


def linear_networks(loaded):
    """Least squares on the training images, and the same with coarse weights."""
    pixels = np.reshape(loaded.train.images / np.float32(255), (len(loaded.train.labels), -1))
    kernel = np.linalg.lstsq(pixels, np.eye(10, dtype=np.float32)[loaded.train.labels], rcond=1e-3)[0]
    kernels = (kernel, np.round(10 * kernel) / 10)
    params = [{"params": {"dense": {"kernel": jnp.asarray(k), "bias": jnp.zeros(10)}}} for k in kernels]
    return [probes.OneBit(bits, Linear(), variables, None) for bits, variables in zip(BITS, params, strict=True)]


def test_patches_made_on_each_bit_width_are_tried_on_every_one(tiny_config):
    config = tiny_config()
    loaded = data.load(config.data)
    networks = linear_networks(loaded)
    images, labels = probes.first_test_images(loaded, 20)
    arguments = dict(images=images, labels=labels, config=config, num_steps=2)
    made, attack = [], universal.attack
    with pytest.MonkeyPatch.context() as patched:  # the real attack, overheard
        patched.setattr(universal, "attack", lambda *args: made.append(attack(*args)) or made[-1])
        found = transfer.by_attack(networks, loaded, **arguments)
    patch = {name: np.asarray(array) for name, array in made[1][0]._asdict().items()}  # made on 4 bits, tried on 32
    wrong = counted = 0
    clean = networks[0].predict(images)
    for index, target in enumerate(patch["target"]):
        pasted = inference.make_paste(patch, index, config)(images, np.arange(20))
        counts = (clean == labels) & (labels != target)
        wrong += (counts & (networks[0].predict(np.asarray(pasted)) != labels)).sum()
        counted += counts.sum()
    assert counted > 100  # of 10 patches on 20 images
    assert found.matrix[1, 0] == pytest.approx(wrong / counted)
    assert "10 gap patches of 5 px" in found.origin and "2 steps, 20 test images" in found.origin
