"""Evaluation: what is predicted, under which patches, and that printed numbers can be recomputed from the files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import deploy, evaluate, metrics, results, runs
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


def with_eval(trained, **changes):
    """The run and its data under other `eval` settings."""
    run, loaded = trained
    config = run.config.copy_and_resolve_references()
    config.eval.update(changes)
    return run._replace(config=config), loaded


def test_batch_size_and_number_of_images_change_no_prediction(trained, pool, outcomes):
    few = evaluate.evaluate(*with_eval(trained, batch_size=7, images=20), {"held-out": pool}, bits=BITS, deployed=False)
    np.testing.assert_array_equal(few.ids, outcomes.ids[:20])
    np.testing.assert_array_equal(few.clean, outcomes.clean[:2, :20])
    expected = outcomes.pools["held-out"].predictions[:2, :, :20]
    np.testing.assert_array_equal(few.pools["held-out"].predictions, expected)


def test_predictions_under_a_patch_are_those_of_the_network_on_the_pasted_images(trained, pool, outcomes):
    run, loaded = trained
    pasted = np.asarray(evaluate.make_paste(pool, 2, run.config)(loaded.test.images[:50], np.arange(50)))
    for row, bits in enumerate(BITS):
        expected = run.logits_fn(bits)(jnp.asarray(pasted) / 255.0).argmax(-1)
        np.testing.assert_array_equal(outcomes.pools["held-out"].predictions[row, 2], expected)


def test_every_count_of_the_record_is_that_of_the_stored_predictions(trained, pool, tmp_path):
    """With bits 3 and 6, which were never trained."""
    bits = (*BITS, 3, 6)
    outcomes = evaluate.evaluate(*with_eval(trained, images=16), {"held-out": pool}, bits=bits, deployed=False)
    record = results.describe(
        trained[0].config, results.summarise(outcomes, bits, seed=0), workdir="x", step=0, deployed=False
    )
    path = results.save(tmp_path, "evaluation", record, outcomes)
    with np.load(path.with_name("evaluation_outcomes.npz"), allow_pickle=False) as stored:
        arrays = dict(stored)
    for row, b in enumerate(bits):
        predictions = (
            arrays["clean"][row],
            arrays["predictions:held-out"][row],
            arrays["labels"],
            arrays["target:held-out"],
        )
        masks = metrics.success_masks(*predictions)
        for name, count in metrics.success_counts(*predictions).items():
            rate = record["pools"]["held-out"]["bits"][str(b)][name]
            assert (rate["num"], rate["den"]) == (count.num.sum(), count.den.sum())
            np.testing.assert_array_equal(masks[name].num.sum(axis=1), count.num)
            np.testing.assert_array_equal(masks[name].den.sum(axis=1), count.den)


def test_progress_names_every_patch_of_every_pool(trained, pool):
    said = []
    pools = {"a": pool, "b": pool.rows([0])}
    evaluate.evaluate(*with_eval(trained, images=2), pools, bits=(32,), deployed=False, progress=said.append)
    assert said == ["a: patch 1/3", "a: patch 2/3", "a: patch 3/3", "b: patch 1/1"]
