"""Evaluation: what is predicted, under which patches, and that printed numbers can be recomputed from the files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import deploy, evaluate, results, runs
from triqdef_jax.patch_pool import PatchPool

BITS = (32, 4)


@pytest.fixture(scope="module")
def trained(tiny_run):
    workdir, loaded = tiny_run
    return runs.load_trained(workdir), loaded


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (3, 4, 4, 3)).astype(np.float32) / 255
    ones = np.ones((3, 4, 4), np.float32)
    return PatchPool(values, ones, np.full(3, 4, np.int32), np.array([1, 2, 3], np.int32), "digest")


@pytest.fixture(scope="module")
def outcomes(trained, pool):
    return evaluate.evaluate(*trained, {"held-out": pool}, bits=(*BITS, 3), deployed=False)


def test_predictions_are_those_of_the_network_on_the_test_images(trained, outcomes):
    run, loaded = trained
    images = jnp.asarray(loaded.test.images[:50]) / 255.0
    for row, bits in enumerate(BITS):
        np.testing.assert_array_equal(outcomes.clean[row], run.logits_fn(bits)(images).argmax(-1))
    np.testing.assert_array_equal(outcomes.labels, loaded.test.labels[:50])
    np.testing.assert_array_equal(outcomes.ids, loaded.test.ids[:50])


def test_patched_predictions_have_a_row_per_bit_patch_and_image(outcomes):
    assert outcomes.pools["held-out"].predictions.shape == (3, 3, 50)  # 32, 4 and the untrained 3 bits
    assert outcomes.clean.shape == (3, 50)


def test_the_deployed_forward_is_the_integer_one_below_32_bits(trained):
    run, loaded = trained
    images = loaded.test.images[:16]
    model = deploy.lower(run.network.module, run.variables(4), run.spec(4), loaded.image_size_px)
    expected = np.asarray(deploy.integer_forward(model, images)).argmax(-1)
    predict = evaluate.make_predictor(run, loaded, 4, deployed=True)
    np.testing.assert_array_equal(predict(images), expected)


def test_places_depend_on_seed_patch_and_image_only(trained, pool):
    run, loaded = trained
    images, rows = loaded.test.images[:6], np.arange(6)
    whole = np.asarray(evaluate.make_paste(pool, 1, run.config)(images, rows))
    parts = [evaluate.make_paste(pool, 1, run.config)(images[i : i + 2], rows[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole != images).any(axis=(1, 2, 3)).all()
    other = run.config.copy_and_resolve_references()
    other.seed = 1
    assert (whole != np.asarray(evaluate.make_paste(pool, 1, other)(images, rows))).any()


def test_a_patch_changes_only_the_pixels_under_it(trained, pool):
    run, loaded = trained
    images = loaded.test.images[:8]
    patched = np.asarray(evaluate.make_paste(pool, 0, run.config)(images, np.arange(8)))
    changed = (patched != images).any(axis=-1).sum(axis=(1, 2))
    assert changed.max() <= 36  # a 4-px square, 10 % larger and turned, touches at most 6 x 6 pixels


def test_printed_numbers_can_be_recomputed_from_the_saved_outcomes(trained, outcomes, tmp_path):
    run, _ = trained
    summary = results.summarise(outcomes, (*BITS, 3), seed=0)
    record = results.describe(run.config, summary, workdir="runs/tiny", step=run.step, deployed=False)
    path = results.save(tmp_path, "evaluation", record, outcomes)
    stored = json.loads(path.read_text())
    with np.load(tmp_path / "evaluation_outcomes.npz", allow_pickle=False) as arrays:
        accuracy = (arrays["clean"] == arrays["labels"]).mean(axis=1)
    for row, bits in enumerate(("32", "4", "3")):
        assert stored["clean_accuracy"][bits]["rate"] == pytest.approx(accuracy[row])
        assert f"{100 * accuracy[row]:.1f} %" in results.table(stored)


def test_evaluating_twice_gives_the_same_predictions(trained, pool, outcomes):
    again = evaluate.evaluate(*trained, {"held-out": pool}, bits=(*BITS, 3), deployed=False)
    jax.tree.map(
        np.testing.assert_array_equal, again.pools["held-out"].predictions, outcomes.pools["held-out"].predictions
    )
