"""Tests of Sparse-RS on plain NumPy classifiers of real digits: budgets, bookkeeping, what it finds, what it refuses."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from sklearn import datasets

from triqdef_jax.attacks import queries, sparse_rs
from triqdef_jax.attacks.sparse_rs import SparseRsSettings

SETTINGS = SparseRsSettings(size_px=3, num_queries=150)


@pytest.fixture(scope="module")
def problem():
    """Real digits at 8 px and the nearest class mean, NumPy only: logits_fn, images, labels that it gets right."""
    data = datasets.load_digits()
    images, labels = (data.images[..., None] / 16.0).astype(np.float32), data.target.astype(np.int32)
    means = np.stack([images[:1000][labels[:1000] == label].mean(axis=0).ravel() for label in range(10)])
    bias = (means**2).sum(axis=1) / 2
    logits_fn = lambda images: np.asarray(images).reshape(len(images), -1) @ means.T - bias
    images, labels = images[1000:], labels[1000:]
    is_right = logits_fn(images).argmax(axis=1) == labels
    assert is_right.mean() > 0.8  # otherwise the attacks below would prove nothing
    return logits_fn, images[is_right], labels[is_right]


@pytest.fixture(scope="module")
def run(problem):
    logits_fn, images, labels = problem
    return sparse_rs.attack(jax.random.key(0), logits_fn, images[:40], labels[:40], SETTINGS)


def _noise_success(problem, num, size_px, *, target=-1, draws=20):
    """Share of images fooled by a patch of uniform noise at a random place, those of the target's class left out."""
    logits_fn, images, labels = problem
    rng, hits = np.random.default_rng(0), []
    for _ in range(draws):
        corners = rng.integers(0, 9 - size_px, (num, 2))
        noise = rng.uniform(size=(num, size_px, size_px, 1))
        predictions = logits_fn(queries.paste(images[:num], noise, corners)).argmax(axis=1)
        hits.append(queries.is_fooled(predictions, labels[:num], target)[labels[:num] != target])
    return np.mean(hits)


def test_it_fools_most_images_where_noise_fools_few(problem, run):
    _, info = run
    assert _noise_success(problem, 40, 3) < 0.25
    assert info["success"].mean() > 0.9
    np.testing.assert_array_equal(info["success"], info["predictions"] != problem[2][:40])


def test_patches_lie_on_the_pixel_grid_and_change_nothing_else(problem, run):
    images, (patch, info) = problem[1][:40], run
    differs = (info["images"] != images).any(axis=-1)
    for index, corner in enumerate(np.stack(info["placements"][:2], axis=1) - 1.0):
        row, col = corner.astype(int)
        differs[index, row : row + 3, col : col + 3] = False
    assert not differs.any()
    assert set(np.unique(patch.values)) == {0.0, 1.0}
    assert patch.masks.shape == (40, 3, 3) and np.all(patch.masks == 1.0) and patch.size_px.tolist() == [3] * 40


def test_queries_are_the_images_sent_and_stop_at_success(problem):
    logits_fn, images, labels = problem
    sent = []

    def counting(images):
        sent.append(len(images))
        return logits_fn(images)

    # One image a call: nothing is padded. One clean look and one measurement at the end are no part of the search.
    settings = SparseRsSettings(size_px=3, num_queries=60, batch_images=1)
    _, info = sparse_rs.attack(jax.random.key(1), counting, images[:12], labels[:12], settings)
    assert set(sent) == {1} and sum(sent) == info["queries"].sum() + 2 * 12
    assert info["success"].any() and not info["success"].all()
    assert (info["queries"][~info["success"]] == 60).all() and (info["queries"][info["success"]] < 60).any()


def test_the_best_patch_of_all_that_were_tried_is_kept(problem):
    logits_fn, images, labels = problem
    tried = []

    def recording(images):
        tried.append(queries.margin(logits_fn(images).astype(np.float32), labels[:1])[0])
        return logits_fn(images)

    settings = SparseRsSettings(size_px=2, num_queries=80, stop_when_fooled=False)
    _, info = sparse_rs.attack(jax.random.key(2), recording, images[:1], labels[:1], settings)
    search, final = tried[1:-1], tried[-1]
    assert len(search) == 80 and np.argmin(search) > 0
    assert info["loss"][0] == final == min(search)


def test_restarts_share_the_budget_and_the_best_of_them_is_kept(problem):
    logits_fn, images, labels = problem
    tried = []

    def recording(images):
        tried.append(queries.margin(logits_fn(images).astype(np.float32), labels[:20]))
        return logits_fn(images)

    settings = SparseRsSettings(size_px=2, num_queries=40, num_restarts=2, stop_when_fooled=False)
    _, info = sparse_rs.attack(jax.random.key(2), recording, images[:20], labels[:20], settings)
    search = np.stack(tried[1:-1])
    assert len(search) == 40 and info["queries"].tolist() == [40] * 20
    np.testing.assert_array_equal(info["loss"], search.min(axis=0))
    winners = search.argmin(axis=0) >= 20
    assert winners.any() and not winners.all()  # either start has won somewhere
    assert settings.side_px(3) == SparseRsSettings(size_px=2, num_queries=20).side_px(3)
    _, info = sparse_rs.attack(
        jax.random.key(2),
        logits_fn,
        images[:20],
        labels[:20],
        SparseRsSettings(size_px=3, num_queries=40, num_restarts=2),
    )
    assert ((info["queries"] == 40) | info["success"]).all() and (info["queries"][info["success"]] <= 40).all()


def test_the_same_key_gives_the_same_patches_and_another_key_others(problem, run):
    logits_fn, images, labels = problem
    patch, info = sparse_rs.attack(jax.random.key(0), logits_fn, images[:40], labels[:40], SETTINGS)
    np.testing.assert_array_equal(patch.values, run[0].values)
    np.testing.assert_array_equal(info["queries"], run[1]["queries"])
    other, _ = sparse_rs.attack(jax.random.key(1), logits_fn, images[:40], labels[:40], SETTINGS)
    assert np.any(np.asarray(other.values) != np.asarray(patch.values))


def test_a_target_is_reached_and_its_loss_is_the_cross_entropy(problem):
    logits_fn, images, labels = problem
    settings = SparseRsSettings(size_px=4, target=8, num_queries=300)
    patch, info = sparse_rs.attack(jax.random.key(3), logits_fn, images[:30], labels[:30], settings)
    others = labels[:30] != 8
    assert info["success"][others].mean() > 0.6 and _noise_success(problem, 30, 4, target=8) < 0.1
    np.testing.assert_array_equal(info["success"], info["predictions"] == 8)
    logits = logits_fn(info["images"])
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[:, 8]
    np.testing.assert_allclose(info["loss"], loss, rtol=1e-3, atol=1e-5)  # the search sees float32 logits
    assert patch.target.tolist() == [8] * 30


def test_a_universal_patch_beats_noise_on_images_it_never_saw():
    # Class 1 sees horizontal stripes, class 2 vertical ones, class 0 everything else; noise is neither.
    def logits_fn(images):
        rows, cols = (np.abs(np.diff(images, axis=axis)).sum(axis=(1, 2, 3)) for axis in (1, 2))
        return np.stack([np.full(len(images), 5.0), rows - cols, cols - rows], axis=1)

    rng = np.random.default_rng(0)
    images = np.broadcast_to(rng.uniform(size=(250, 1, 1, 1)), (250, 8, 8, 1)).astype(np.float32)
    labels = np.zeros(250, np.int32)
    noise = queries.paste(images, rng.uniform(size=(250, 4, 4, 1)), rng.integers(0, 5, (250, 2)))
    assert (logits_fn(noise).argmax(axis=1) == 1).mean() < 0.05
    settings = SparseRsSettings(
        size_px=4, target=1, is_universal=True, num_queries=150, num_batches=3, num_eval_images=200
    )
    patch, info = sparse_rs.attack(jax.random.key(4), logits_fn, images, labels, settings)
    assert info["success"]["tsr"].rate[0] > 0.9 and info["success"]["tsr_clean"].rate[0] == 0.0
    assert info["losses"].shape == (150, 1) and info["eval_losses"].shape == (4, 1)
    for batch in np.split(info["losses"][:, 0], 3):
        assert (np.diff(batch) <= 0.0).all()  # only a patch that is better on the batch replaces another
    assert info["best_loss"][0] == info["eval_losses"].min() < info["eval_losses"][0, 0]
    assert info["queries"].tolist() == [150 * 30 + 4 * 200]
    held, places = info["eval_index"], info["eval_placements"]
    corners = np.stack([places.center_row[0], places.center_col[0]], axis=1).astype(int) - 1
    pasted = queries.paste(images[held], np.asarray(patch.values), corners)
    np.testing.assert_array_equal(logits_fn(pasted).argmax(axis=1), info["predictions"][0])


def test_gradients_are_never_read(problem):
    weights = jnp.ones((64, 10)) * jnp.arange(10.0)

    @jax.custom_jvp
    def guarded(images):
        return images.reshape(images.shape[0], -1) @ weights

    @guarded.defjvp
    def _refuse(primals, tangents):
        raise AssertionError("a query attack differentiated the network")

    with pytest.raises(AssertionError, match="differentiated"):  # the guard works
        jax.grad(lambda images: guarded(images).sum())(jnp.ones((1, 8, 8, 1)))
    _, images, labels = problem
    settings = SparseRsSettings(size_px=2, num_queries=5)
    _, info = sparse_rs.attack(
        jax.random.key(0), jax.jit(guarded), jnp.array(images[:4]), jnp.array(labels[:4]), settings
    )
    assert info["queries"].max() <= 5


def test_a_patch_that_fools_is_not_given_up_for_a_lower_loss_that_does_not():
    # With two bright pixels class 1 is predicted at p = 0.35, with three its p is 0.48 but class 2 is predicted.
    def logits_fn(images):
        bright = images.sum(axis=(1, 2, 3)).astype(int)
        return np.array([[2.0, 0.0, -9.0], [1.8, 0.0, -9.0], [0.9, 1.0, 0.95], [-9.0, 1.0, 1.1], [-9.0, 1.0, 1.2]])[
            bright
        ]

    images, labels = np.zeros((8, 4, 4, 1), np.float32), np.zeros(8, np.int32)
    settings = SparseRsSettings(size_px=2, target=1, num_queries=100, stop_when_fooled=False)
    _, info = sparse_rs.attack(jax.random.key(5), logits_fn, images, labels, settings)
    assert info["success"].all()


def test_squares_shrink_as_published():
    settings = SparseRsSettings(size_px=50, num_queries=10_000)
    # alpha 0.4: 50 sqrt(0.4) = 31.6; divided by 2 after 10 queries, by 4 after 50 ... by 512 after 8,000: 1.4 px.
    marks = {0: 31, 10: 31, 11: 22, 51: 15, 201: 11, 501: 7, 1001: 5, 2001: 3, 4001: 2, 6001: 1, 8001: 1}
    assert {query: settings.side_px(query) for query in marks} == marks
    assert settings.first_channel_query() == 6001 + (10_000 - 6001) // 2
    scaled = SparseRsSettings(size_px=50, num_queries=1000)
    assert [scaled.side_px(query) for query in (1, 2, 5, 6, 20, 21)] == [31, 22, 22, 15, 15, 11]
    assert SparseRsSettings(size_px=50, target=1).side_px(0) == 15  # alpha 0.1
    assert SparseRsSettings(size_px=50, target=1, is_universal=True).side_px(0) == 27  # alpha 0.3


def test_pixels_always_change_colour_and_later_one_channel_alone():
    settings, rng = SparseRsSettings(size_px=3, num_queries=100), np.random.default_rng(0)
    values = rng.integers(0, 2, (200, 3, 3, 3)).astype(np.float32)
    first = settings.first_channel_query()
    changed = lambda query: (sparse_rs._repaint(rng, values, query, settings, first) != values).sum(axis=(1, 2))
    pixels, channels = changed(first - 1), changed(first)
    assert settings.side_px(first - 1) == 1
    assert set(pixels.sum(axis=1)) == {1, 2, 3} and (pixels <= 1).all()
    assert (channels.sum(axis=1) == 1).all() and (channels.sum(axis=0) > 0).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(size_px=0), "size_px: expected a positive number"),
        (dict(size_px=3, target=-2), "target: expected a class >= 0 or -1"),
        (dict(size_px=3, is_universal=True), "target: expected a class >= 0, got -1"),
        (dict(size_px=3, start_frac=1.5), "start_frac: expected a share"),
        (dict(size_px=3, move_every_queries=1), "move_every_queries: expected 2 or more"),
        (
            dict(size_px=3, num_queries=4, num_restarts=5),
            "num_restarts: expected 1 for a universal patch and at most num",
        ),
        (dict(size_px=3, num_queries=0), "num_queries: expected a positive number"),
        (dict(size_px=9), "size_px: expected a patch that fits into 8 x 8 px, got 9"),
        (dict(size_px=3, target=10), "target: expected classes below the network's 10 logits"),
        (
            dict(size_px=3, target=1, is_universal=True, num_eval_images=50),
            "images: expected more than num_eval_images=50",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(problem, fields, message):
    logits_fn, images, labels = problem
    with pytest.raises(ValueError, match=message) as caught:
        settings = SparseRsSettings(**fields)
        sparse_rs.attack(jax.random.key(0), logits_fn, images[:50], labels[:50], settings)
    assert "\n" not in str(caught.value)


def test_images_that_are_not_in_zero_to_one_are_refused(problem):
    logits_fn, images, labels = problem
    with pytest.raises(ValueError, match="divide pixels by 255"):
        sparse_rs.attack(jax.random.key(0), logits_fn, 16.0 * images[:4], labels[:4], SETTINGS)
    with pytest.raises(ValueError, match="labels: expected int32"):
        sparse_rs.attack(jax.random.key(0), logits_fn, images[:4], labels[:5], SETTINGS)
