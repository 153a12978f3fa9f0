"""Cells: what is pasted where, who predicts it, what is kept on disk; on a run of seconds."""

import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import attacks, cells, evaluate, inference, runs
from triqdef_jax.cells import CellPlan
from triqdef_jax.patch_pool import PatchPool


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (3, 4, 4, 3)).astype(np.float32) / 255
    ones = np.ones((3, 4, 4), np.float32)
    return PatchPool(values, ones, np.full(3, 4, np.int32), np.array([1, 2, 3], np.int32), "digest")


@pytest.fixture(scope="module")
def trained(tiny_run):
    return runs.load_trained(tiny_run[0])


@pytest.fixture
def subject(trained, tmp_path):
    """The tiny run, its bit-widths 32 and 4 as targets, results in a folder of their own."""
    trained.config.patches.shared_dir = str(tmp_path / "shared")
    return evaluate.make_subject(trained, tmp_path / "run", "pools")


def arrays_of(pool):
    return {"values": pool.values, "masks": pool.masks, "size_px": pool.size_px}


def pasted(pool, index, subject, rows, **options):
    return np.asarray(
        inference.make_paste(arrays_of(pool), index, subject.config, **options)(subject.images[rows], rows)
    )


def test_a_pool_cell_holds_the_predictions_of_every_target_under_every_patch(subject, pool):
    cell = cells.pool_cell("held-out", pool, subject)
    assert cell.predictions.shape == (2, 3, 50) and cell.about["access"] == "transfer"
    np.testing.assert_array_equal(cell.target, pool.target)
    images = pasted(pool, 2, subject, np.arange(50))
    for row, target in enumerate(subject.targets):
        np.testing.assert_array_equal(cell.predictions[row, 2], target.predict(images))


def test_batch_size_changes_no_prediction(subject, pool):
    expected = cells.pool_cell("held-out", pool, subject).predictions
    config = subject.config.copy_and_resolve_references()
    config.eval.batch_size = 7
    other = subject._replace(trained=subject.trained._replace(config=config), workdir=subject.workdir / "other")
    np.testing.assert_array_equal(cells.pool_cell("held-out", pool, other).predictions, expected)


UNIVERSAL = CellPlan("gap", "self:4", 4, is_targeted=True, num_patches=2, fields=(("num_steps", 2),))
QUERY = CellPlan("sparse_rs", "self:4", 4, "", num_images=8, fields=(("num_queries", 10),))


def test_a_universal_cell_meets_all_test_images_with_a_patch_per_class(subject):
    cell = cells.run(UNIVERSAL, subject)
    assert cell.predictions.shape == (2, 2, 50) and cell.name == "gap|self:4|random"
    np.testing.assert_array_equal(cell.target, [0, 1])
    assert (cell.about["access"], cell.about["goal"]) == ("white-box", "targeted")
    assert cell.about["settings"]["num_steps"] == 2 and cell.about["seen"]["family"]


def test_a_query_cell_counts_its_queries_and_meets_its_own_images(subject):
    cell = cells.run(QUERY, subject)
    assert cell.predictions.shape == (2, 1, 8) and cell.name == "sparse_rs|self:4"
    assert (
        cell.about["access"] == "query" and 0 < cell.about["queries"]["mean"] <= 10 == cell.about["queries"]["budget"]
    )
    crafted = cells.craft(QUERY, subject)
    changed = (crafted.arrays["images"] != subject.images[:8]).any(axis=-1).sum(axis=(1, 2))
    assert changed.max() <= 16  # a square of 4 px, and nothing else
    np.testing.assert_array_equal(cell.predictions[1, 0], subject.targets[1].predict(crafted.arrays["images"]))


def test_a_cell_with_gradients_attacks_its_images_in_even_batches(subject, monkeypatch):
    seen, entry = [], attacks.get("patch_pgd")

    def attack(key, network, images, *others):
        seen.append(images.shape)
        return entry.attack(key, network, images, *others)

    monkeypatch.setitem(attacks.ATTACKS, "patch_pgd", entry._replace(attack=attack))
    fields = (("location", "random"), ("num_restarts", 1), ("num_steps", 2))
    plan = CellPlan("patch_pgd", "self:4", 4, "", num_images=20, fields=fields)
    cell = cells.run(plan, subject)
    assert seen == [(10, 8, 8, 3)] * 2  # batches of at most 16
    assert cell.predictions.shape == (2, 1, 20) and cell.about["access"] == "white-box"
    changed = (cells.craft(plan, subject).arrays["images"] != subject.images[:20]).any(axis=-1).sum(axis=(1, 2))
    assert 0 < changed.min() and changed.max() <= 16
    assert np.isfinite(cell.about["mean_loss"]) and 0 <= cell.about["mean_zero_gradient"] <= 1


def test_the_adaptive_attack_is_made_on_the_bit_widths_that_its_surrogate_names(subject):
    images = jnp.asarray(subject.images[:4]) / 255.0
    network = cells.adaptive_outputs("self:4", subject)["clipped"]
    expected = jnp.stack([subject.trained.logits_fn(b)(images) for b in (32, 4)])
    np.testing.assert_array_equal(network(images)[0], expected[1:])
    np.testing.assert_array_equal(cells.adaptive_outputs("self:all", subject)["clipped"](images)[0], expected)


def test_a_finished_cell_is_read_and_not_attacked_again(subject, monkeypatch):
    first = cells.run(QUERY, subject)

    def refuse(*args, **kwargs):
        raise AssertionError("attacked again")

    monkeypatch.setitem(attacks.ATTACKS, "sparse_rs", attacks.get("sparse_rs")._replace(attack=refuse))
    again = cells.run(QUERY, subject)
    np.testing.assert_array_equal(first.predictions, again.predictions)
    assert first.digest == again.digest and first.about == again.about
    (next((subject.results / "crafted").glob("*.json"))).unlink()  # as if killed between arrays and mark
    with pytest.raises(AssertionError, match="attacked again"):
        cells.run(QUERY, subject)


def test_controls_are_the_same_patches_for_every_run(subject, tmp_path):
    plan = CellPlan("grey", "", 4, num_patches=2)
    one = cells.run(plan, subject)
    other = cells.run(plan, subject._replace(workdir=tmp_path / "other"))
    assert one.digest == other.digest and one.about["access"] == "control"
    assert len(list((tmp_path / "shared" / "crafted").glob("grey-*.npz"))) == 1


@pytest.mark.parametrize(
    "plan, said",
    [
        (CellPlan("fgsm", "self:4", 4), "attack: expected one of lavan, gap"),
        (CellPlan("gap", "teacher", 4), "a surrogate is one of fp"),
        (CellPlan("gap", "self:4", 9, is_targeted=True), "size_px: expected patches that fit into 8 px"),
        (CellPlan("sparse_rs", "fp", 4), "queries a target of the run itself"),
    ],
)
def test_impossible_cells_are_refused_in_one_line(subject, plan, said):
    with pytest.raises(ValueError, match=said) as refusal:
        cells.run(plan, subject)
    assert "\n" not in str(refusal.value)
