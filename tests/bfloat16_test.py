"""A run trained with bfloat16 multiplications: it learns, everything it keeps is float32, and so is all that is measured of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import loop, runs, targets
from triqdef_jax.data.memory import ImageData
from triqdef_jax.data.splits import Split
from triqdef_jax.objectives.methods import Inputs
from triqdef_jax.patch_pool import PatchPool


def make_data():
    """Images that are the brighter the higher their class."""
    rng = np.random.default_rng(0)

    def split(num):
        labels = rng.integers(0, 10, num).astype(np.int32)
        images = 25 * labels[:, None, None, None] + rng.integers(0, 25, (num, 8, 8, 3))
        return Split(images.astype(np.uint8), labels, np.arange(num))

    return ImageData("digits", 10, 8, split(256), split(128), split(16), augment="shift")


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    """(run, data) of a finished run of the full method: 64 steps, 4 bits join at 32."""
    fields = {"model.name": "stem", "loss.feature_layers": ("stem",), "model.dtype": "bfloat16"}
    fields |= {"loss.method": "triqdef", "patches.sizes_px": (2,), "train.keep_best": False}
    config = tiny_config(
        **fields, **{"train.epochs": 4, "train.batch_size": 16, "train.log_every_steps": 8, "optim.lr": 0.02}
    )
    workdir, loaded = tmp_path_factory.mktemp("run") / "bfloat16", make_data()
    runs.open_workdir(workdir, config)
    run = loop.make_run(config, workdir, loaded.num_train)
    rng = np.random.default_rng(0)
    masks, sizes = np.ones((4, 2, 2), np.float32), np.full(4, 2, np.int32)
    pool = PatchPool(rng.random((4, 2, 2, 3), np.float32), masks, sizes, np.zeros(4, np.int32), "digest")
    assert loop.train(run, loaded, pool, is_quiet=True) == 64
    return run, loaded


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def test_it_learns(finished):
    lines = [json.loads(line) for line in (finished[0].workdir / "metrics.jsonl").read_text().splitlines()]
    assert all(lines[-1][name] < 0.8 * lines[0][name] for name in ("ce_clean/32", "ce_patched/32"))
    assert lines[-1]["ce_clean/4"] < 0.8 * lines[0]["ce_clean/32"]


def test_weights_statistics_scales_losses_maps_and_gradients_are_float32_around_bfloat16_products(finished):
    run, _ = finished
    with loop.Checkpointer(run.workdir / loop.CHECKPOINTS) as checkpointer:
        saved, _ = checkpointer.restore_raw()
    assert int(saved.pop("step")) == 64
    assert dtypes({name: saved[name] for name in ("weights", "stats")}) == {"float32"}
    assert dtypes(saved["opt_state"]) <= {"float32", "int32"}  # the optimiser counts its steps
    state = jax.eval_shape(lambda: loop.init_state(run))
    images, labels = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    forward = loop.make_step(run.settings, plan="per_bit", mesh=run.mesh).args[1].forward
    arguments = (
        state.weights,
        state.stats,
        run.network.slot(4),
        run.network.spec(4),
        Inputs(images, labels, images, labels),
    )
    (loss, maps), report, _ = jax.eval_shape(forward, *arguments)
    assert dtypes((loss, maps, report)) == {"float32"}
    assert "bf16" in forward.lower(*arguments).as_text()


def test_it_is_evaluated_calibrated_and_shipped_in_float32(finished):
    run, loaded = finished
    trained = runs.load_trained(run.workdir)
    assert trained.config.model.dtype == "bfloat16" and trained.network.module.options.dtype == "float32"
    images = loop.unit_range(jnp.asarray(loaded.test.images[:4]))
    for bits in (4, 3):  # 3 bits are calibrated for the purpose
        target = targets.make(trained, loaded, str(bits))
        assert "bf16" not in jax.jit(lambda logits_fn, x: logits_fn(x)).lower(target.logits_fn, images).as_text()
    assert targets.integer_model(trained, loaded, 4)
