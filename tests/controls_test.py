"""Tests of the patches that nobody optimised: what they are made of, where they may come from, how they are measured."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from triqdef_jax import attacks, metrics, patches
from triqdef_jax.attacks import controls

NUM, SIDE = 30, 8
LABELS = (np.arange(NUM) % 3).astype(np.int32)
# Image i has one level in red and its own codes of place in green, so that a crop says which image it comes from.
IMAGES = np.zeros((NUM, SIDE, SIDE, 2), np.float32)
IMAGES[..., 0] = np.arange(NUM)[:, None, None] / 255.0
IMAGES[..., 1] = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) / 255.0


def _brightness(images):
    """A plain function as a classifier: which third of the range the mean of green lies in."""
    mean = images[..., 1].mean(axis=(1, 2))
    return jnp.stack([-jnp.abs(mean - level) for level in (0.1, 0.15, 0.4)], axis=1)


def _run(kind, *, key=0, images=IMAGES, labels=LABELS, logits_fn=_brightness, **fields):
    settings = controls.ControlSettings(**{"kind": kind, "size_px": (5, 3), "num_eval_images": 10, **fields})
    return controls.attack(jax.random.key(key), logits_fn, images, labels, settings)


def test_grey_is_one_half_and_noise_covers_the_range_on_the_stored_grid():
    grey, _ = _run("grey")
    inside = np.asarray(grey.masks)[..., None] > 0
    assert set(np.unique(np.asarray(grey.values))) == {0.0, np.float32(128 / 255)}
    assert np.all((np.asarray(grey.values) > 0) == np.broadcast_to(inside, grey.values.shape))
    noise, _ = _run("noise", size_px=(8, 8))
    # XLA divides by 255 within one unit in the last place of NumPy's quotient.
    np.testing.assert_allclose(patches.round_to_uint8(noise.values) / 255.0, noise.values, rtol=2e-7)
    # 256 uniform draws: the mean has standard deviation 0.018.
    assert 0.4 < float(noise.values.mean()) < 0.6 and float(noise.values.max() - noise.values.min()) > 0.9
    assert np.any(noise.values[0] != noise.values[1])


def test_a_crop_is_a_square_of_an_image_that_is_not_measured():
    patch, info = _run("crop", size_px=(5, 3) * 6)
    assert set(info["source_index"]) <= set(range(NUM)) - set(info["eval_index"].tolist())
    assert len(set(info["source_index"].tolist())) > 3
    for values, size, source in zip(np.asarray(patch.values), patch.size_px, info["source_index"], strict=True):
        first = (5 - int(size)) // 2
        square = np.round(255 * values[first : first + size, first : first + size]).astype(int)
        np.testing.assert_array_equal(square[..., 0], source)
        row, col = divmod(square[0, 0, 1], SIDE)
        original = np.round(255 * IMAGES[source, row : row + size, col : col + size]).astype(int)
        np.testing.assert_array_equal(square, original)


def test_figures_are_those_of_the_pasted_patches_and_another_target_changes_no_pixel():
    patch, info = _run("noise")
    held = info["eval_index"]
    assert len(set(held.tolist())) == 10 and info["predictions"].shape == (2, 10)
    for p in range(2):
        place = jax.tree.map(lambda field, p=p: jnp.asarray(field[p]), info["eval_placements"])
        spread = lambda array, p=p: jnp.repeat(array[p][None], 10, axis=0)
        pasted = patches.apply_patches(jnp.array(IMAGES[held]), spread(patch.values), spread(patch.masks), place)
        np.testing.assert_array_equal(_brightness(pasted).argmax(-1), info["predictions"][p])
    expected = metrics.success_counts(info["clean_predictions"], info["predictions"], LABELS[held], np.array([-1, -1]))
    assert {k: (v.num.tolist(), v.den.tolist()) for k, v in expected.items()} == {
        k: (v.num.tolist(), v.den.tolist()) for k, v in info["success"].items()
    }
    aimed, other = _run("noise", target=(2, 0))
    np.testing.assert_array_equal(aimed.values, patch.values)
    assert other["success"]["tsr"].den.tolist() == [int((LABELS[held] != t).sum()) for t in (2, 0)]


def test_places_follow_the_settings_and_a_random_network_is_asked_with_a_key():
    keyed = lambda key, images: _brightness(images) + 0.0 * jax.random.uniform(key)
    _, info = _run("grey", location="fixed", logits_fn=keyed, random_logits=True)
    places = np.stack(info["eval_placements"][:2])
    assert np.all(places == places[..., :1])
    _, turned = _run("grey", rotation_deg=20.0, scale_range=(0.9, 1.1))
    assert len(np.unique(turned["eval_placements"].angle_deg)) == 20


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: controls.ControlSettings(kind="black", size_px=(2,)),
            "kind: expected one of ('grey', 'noise', 'crop')",
        ),
        (lambda: controls.ControlSettings(kind="grey", size_px=()), "size_px: expected one side"),
        (lambda: controls.ControlSettings(kind="grey", size_px=(2,), target=(1, 2)), "one class per patch"),
        (lambda: controls.ControlSettings(kind="grey", size_px=(2,), location="grid"), "location: expected one of"),
        (lambda: _run("grey", num_eval_images=NUM), "more than num_eval_images=30, got 30"),
        (lambda: _run("crop", size_px=(9,)), "size_px: expected patches that fit into 8 px"),
        (lambda: _run("grey", images=IMAGES[:, :6]), "images: expected square ones"),
        (lambda: _run("grey", target=(3, 0)), "target: expected classes below the number of logits"),
        (lambda: _run("grey", labels=LABELS[:3]), "labels: expected int32 (30,)"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_registry_builds_every_control():
    for kind in controls.KINDS:
        assert attacks.get(kind).settings(size_px=(2,)).kind == kind
        assert attacks.get(kind).access == "none"
