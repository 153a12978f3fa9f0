"""Targets: what a row predicts is what the named network computes, fake-quant or in integers, bare or behind a defence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import defenses, deploy, targets
from triqdef_jax.defenses import diffpure, patchcleanser, smoothing


def test_a_trained_bit_width_predicts_what_its_network_does(trained):
    run, loaded = trained
    images = loaded.test.images[:16]
    target = targets.make(run, loaded, "4")
    expected = run.logits_fn(4)(jnp.asarray(images) / 255.0)
    np.testing.assert_array_equal(target.predict(images), expected.argmax(-1))
    # Two programs, float32 sums in another order.
    np.testing.assert_allclose(target.logits_fn(jnp.asarray(images) / 255.0), expected, rtol=1e-3, atol=1e-3)
    assert target.is_trained and target.predict(images).dtype == np.int32


def test_the_deployed_forward_is_the_integer_one_below_32_bits(trained):
    run, loaded = trained
    images = loaded.test.images[:16]
    model = deploy.lower(run.network.module, run.variables(4), run.spec(4), loaded.image_size_px)
    target = targets.make(run, loaded, "4", deployed=True)
    np.testing.assert_array_equal(target.query(images), deploy.integer_forward(model, images))
    whole = targets.make(run, loaded, "32", deployed=True)
    np.testing.assert_array_equal(whole.predict(images), targets.make(run, loaded, "32").predict(images))


def test_untrained_and_requantized_rows_are_networks_of_their_own(trained):
    run, loaded = trained
    images = loaded.test.images[:16]
    rows = [targets.make(run, loaded, name) for name in ("4", "6", "ptq:minmax:4", "ptq:mse:4")]
    logits = [np.asarray(row.query(images)) for row in rows]
    assert not any(row.is_trained for row in rows[1:]) and [row.bits for row in rows] == [4, 6, 4, 4]
    for i, one in enumerate(logits):
        assert all(not np.array_equal(one, other) for other in logits[i + 1 :])


@pytest.fixture
def shared(trained, tmp_path, monkeypatch):
    """The run with a shared folder of its own, and defences that are fitted within a second."""
    small = {
        "diffpure": {"width": 8, "num_levels": 1, "train_steps": 2, "batch_images": 8, "num_steps": 1},
        "patchcleanser": {"num_masks": 2},
    }
    for name, fields in small.items():
        known = defenses.get(name)
        make = lambda *args, make=known.make_settings, fields=fields: make(*args, **fields)
        monkeypatch.setitem(defenses.DEFENSES, name, known._replace(make_settings=make))
    config = trained[0].config.copy_and_resolve_references()
    config.patches.shared_dir = str(tmp_path)
    return trained[0]._replace(config=config), trained[1]


def test_a_defended_row_predicts_the_filtered_image_in_floats_and_in_integers(shared):
    run, loaded = shared
    images = loaded.test.images[:16]
    floats = jnp.asarray(images) / 255.0
    filtered = smoothing.median(floats, smoothing.MedianSettings())
    row = targets.make(run, loaded, "median:4")
    # Two programs, float32 sums in another order.
    np.testing.assert_allclose(row.query(images), run.logits_fn(4)(filtered), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(row.logits_fn(floats), run.logits_fn(4)(filtered), rtol=1e-3, atol=1e-3)
    assert (row.name, row.bits, row.is_trained, row.is_random, row.certify) == ("median:4", 4, False, False, None)
    model = deploy.lower(run.network.module, run.variables(4), run.spec(4), loaded.image_size_px)
    pixels = np.uint8(np.round(255 * np.asarray(filtered)))  # a median of pixels is one of them
    deployed = targets.make(run, loaded, "median:4", deployed=True)
    np.testing.assert_array_equal(deployed.query(images), deploy.integer_forward(model, pixels))


def test_a_random_row_repeats_by_image_and_draws_anew_for_queries(shared):
    run, loaded = shared
    images = loaded.test.images[:8]
    row = targets.make(run, loaded, "diffpure:32")  # at 4 bits the codes of a small network may outlive other noise
    assert row.is_random and isinstance(defenses.get("diffpure").make_settings(8, 3), diffpure.DiffpureSettings)
    first = np.asarray(row.query(images))
    np.testing.assert_array_equal(first, row.query(images))
    # Batches of another size are another program.
    np.testing.assert_allclose(first[:4], row.query(images[:4]), rtol=1e-3, atol=1e-3)
    assert (np.abs(first - row.ask(images)).max(axis=1) > 1e-3).all()
    assert jax.eval_shape(row.logits_fn, jax.random.key(0), jnp.zeros((8, 8, 8, 3))).shape == (8, 10)


def test_a_random_bit_width_is_drawn_for_each_image_and_repeats(trained):
    run, loaded = trained
    images = loaded.test.images[:32]
    row = targets.make(run, loaded, "random")
    assert (row.name, row.bits, row.is_trained, row.is_random) == ("random", 0, False, True)
    logits = np.stack([np.asarray(targets.make(run, loaded, name).query(images)) for name in ("32", "4")])
    measured, asked = row.query(images), row.ask(images)
    np.testing.assert_array_equal(measured, row.query(images))
    draws = []
    for found in (measured, asked):
        is_narrow = (found == logits[1]).all(axis=1)
        assert ((found == logits[0]).all(axis=1) != is_narrow).all()  # one or the other
        assert 8 <= is_narrow.sum() <= 24  # a fair coin leaves this once in 300 salts; these are fixed
        draws.append(is_narrow)
    assert (draws[0] != draws[1]).any()
    np.testing.assert_allclose(row.query(images[5:9]), measured[5:9], rtol=1e-3, atol=1e-3)  # another program
    integers = targets.make(run, loaded, "random", deployed=True).query(images)
    exact = targets.make(run, loaded, "4", deployed=True).query(images)
    np.testing.assert_array_equal(integers[draws[0]], exact[draws[0]])
    assert jax.eval_shape(row.logits_fn, jax.random.key(0), jnp.zeros((8, 8, 8, 3))).shape == (8, 10)


def test_patchcleanser_decides_by_its_masks_and_certifies(shared):
    run, loaded = shared
    images, labels = loaded.test.images[:8], loaded.test.labels[:8]
    row = targets.make(run, loaded, "patchcleanser:4")
    settings = patchcleanser.PatchcleanserSettings(patch_px=max(run.config.patches.sizes_px), num_masks=2)
    bare = targets.make(run, loaded, "4").logits_fn
    decided = patchcleanser.decide(bare, jnp.asarray(images) / 255.0, settings).argmax(-1)
    np.testing.assert_array_equal(row.predict(images), decided)
    assert not (row.certify(images, labels) & (decided != labels)).any()


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "blur:4",
            "perhaps behind one of median, gaussian, tv, jedi, diffpure, patchcleanser as in median:4, got 'blur:4'",
        ),
        ("median:ptq:mean:4", "one of minmax, mse, got 'mean'"),
        ("9", "9"),
        ("four", "a bit-width like 4"),
        ("ptq:mean:4", "one of minmax, mse, got 'mean'"),
        ("ptq:mse:1", "1"),
    ],
)
def test_unknown_rows_are_refused_in_one_line(name, said):
    with pytest.raises(ValueError, match=said) as refusal:
        targets.parse(name)
    assert "\n" not in str(refusal.value)
