"""Attacks on eight devices find what they find on one, each device on its own rows."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from compiling import XLA_FLAGS
from several_processes import CONNECTED, run_processes

from triqdef_jax import sharding, spread

ROOT = pathlib.Path(__file__).resolve().parent.parent

EIGHT_DEVICES = """
import collections
import jax, numpy as np
from jax import numpy as jnp
from jax.tree_util import Partial
from triqdef_jax import attacks, inference, sharding, spread

rng = np.random.default_rng(0)
images = rng.uniform(size=(19, 8, 8, 1)).astype(np.float32)
weights = rng.normal(size=(2, 64, 4)).astype(np.float32)
weights[1] = weights[0] + 0.5 * weights[1]
labels = (images.reshape(19, 64) @ weights[0]).argmax(axis=1).astype(np.int32)
linear = lambda w, x: x.reshape(len(x), -1) @ w
outputs = lambda w, x: (jnp.stack([linear(w[0], x), linear(w[1], x)]), {})
names = ("images", "loss", "zero_gradient", "best_loss")

def same(one, many):
    # Signs of gradients decide; a matrix product of other shape may round otherwise, and a pixel flips its last bit.
    assert one.keys() == many.keys() and len(one) >= 3
    for name in one:
        assert one[name].shape == many[name].shape
        np.testing.assert_allclose(one[name], many[name], atol=2e-2, err_msg=name)
    assert (one["images"] == many["images"]).mean() > 0.999

def both(name, network, num, **fields):
    entry = attacks.get(name)
    settings = entry.settings(size_px=3, num_steps=4, **fields)
    run = lambda devices: spread.attack_in_batches(
        entry.attack, jax.random.key(1), network, images[:num], labels[:num], settings, batch_size=16, names=names, mesh=sharding.data_mesh(devices)
    )
    same(run(1), run(8))

both("patch_pgd", Partial(linear, weights[0]), 19, num_restarts=2)  # two batches of 10 and 9
both("adaptive", {"a": Partial(outputs, weights), "b": Partial(outputs, weights)}, 16, estimators=("a", "b"))

layouts = []
def look(key, network, images, labels, settings):
    layouts.append((images.sharding, images.shape, network.args[0].sharding))
    return None, {"loss": np.asarray(labels)}
spread.attack_in_batches(
    look, jax.random.key(0), Partial(linear, weights[0]), images, labels, None, batch_size=64, names=("loss",)
)
mesh = sharding.data_mesh()
assert layouts == [(sharding.batch_sharding(mesh), (24, 8, 8, 1), sharding.replicated(mesh))], layouts

seen = []
def predict(batch):
    seen.append((batch.shape, len(batch.sharding.device_set)))
    return jax.jit(lambda x: x.reshape(len(x), -1).astype(np.int32).sum(axis=1))(batch)
named = collections.namedtuple("Named", "predict")(predict)
pixels = (255 * images).astype(np.uint8)
found = inference.predict([named], pixels, 10)[0]
np.testing.assert_array_equal(found, pixels.reshape(19, -1).astype(np.int32).sum(axis=1))
assert seen == [((16, 8, 8, 1), 8)] * 2, seen

plain = Partial(linear, weights[0])
split = spread.by_rows(plain)
text = jax.jit(split).lower(images).compile().as_text()
assert "f32[3,4]" in text and "f32[24,4]" not in text.split("dot(")[0][-20:], text  # three rows on each of eight devices
entry = attacks.get("gap")
settings = entry.settings(size_px=(3,) * 3, target=(0, 1, 2), num_steps=6, num_eval_images=9, batch_images=5)
one, many = (entry.attack(jax.random.key(1), network, images, labels, settings)[1] for network in (plain, split))
np.testing.assert_allclose(one["losses"], many["losses"], rtol=1e-4)
np.testing.assert_array_equal(one["predictions"], many["predictions"])
print("equal")
"""


def test_eight_devices_find_what_one_finds_each_on_its_own_rows():
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {XLA_FLAGS}",
    }
    command = [sys.executable, "-W", "error", "-c", EIGHT_DEVICES]
    child = subprocess.run(command, env=env, text=True, capture_output=True, timeout=240)
    assert child.returncode == 0 and child.stdout == "equal\n", child.stdout + child.stderr


@pytest.mark.parametrize("num_images, batch_size, expected", [(450, 256, 225), (256, 256, 256), (7, 3, 3), (2, 256, 2)])
def test_batches_are_few_and_even(num_images, batch_size, expected):
    assert spread.even_batch(num_images, batch_size) == expected


def test_batches_have_one_size_and_the_rows_that_fill_the_last_up_are_dropped():
    images, labels = np.arange(7, dtype=np.float32).reshape(7, 1, 1, 1), np.arange(7, dtype=np.int32)
    calls = []

    def attack(key, network, images, labels, settings):
        assert settings == "settings" and network == {"a": None}
        calls.append((jax.random.key_data(key).tolist(), np.asarray(labels).tolist()))
        images = np.asarray(images)
        loss = np.stack([labels, 10 * np.asarray(labels)])
        return None, {"images": images + 1, "best_loss": loss, "other": 0}

    key = jax.random.key(5)
    common = dict(batch_size=3, names=("images", "best_loss", "absent"), mesh=sharding.data_mesh(1))
    found = spread.attack_in_batches(attack, key, {"a": None}, images, labels, "settings", **common)
    assert [rows for _, rows in calls] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    folded = [jax.random.key_data(jax.random.fold_in(key, start)).tolist() for start in (3, 6)]
    assert [words for words, _ in calls] == [jax.random.key_data(key).tolist(), *folded]
    assert found.keys() == {"images", "best_loss"}
    np.testing.assert_array_equal(found["images"], images + 1)
    np.testing.assert_array_equal(found["best_loss"], [labels, 10 * labels])


def test_one_device_gets_the_network_as_it_is():
    network = jax.tree_util.Partial(len)
    assert spread.by_rows(network, mesh=sharding.data_mesh(1)) is network


SHARED = """
def main(rank, folder):
    from triqdef_jax import spread
    folder, made = pathlib.Path(folder), []
    def maker(number):
        def make():
            path = folder / str(number)
            if not path.exists():
                made.append(number)
                path.write_text(str(rank))
            return int(path.read_text())
        return make
    print(json.dumps([spread.shared([maker(number) for number in range(5)]), made]))
    assert spread.sharding.local_mesh().size == 2
"""


def test_processes_make_each_cell_once_and_read_all(tmp_path):
    for rank, (code, out, err) in enumerate(run_processes(SHARED + CONNECTED, tmp_path, num_devices=2)):
        assert code == 0, err
        assert json.loads(out) == [[0, 1, 0, 1, 0], list(range(5))[rank::2]]
