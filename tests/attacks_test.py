"""Tests of the attacks' losses, optimisers, loop and registry, of universal patches, and of what attacks find on digits."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.tree_util import Partial
from scipy.special import log_softmax, softmax
from sklearn import datasets

from triqdef_jax import attacks, metrics, patches
from triqdef_jax.attacks import loop, losses, patch_pgd, universal

NUM_TRACES = {"conv": 0}


def _linear(params, images):
    return images.reshape(images.shape[0], -1) @ params


def _conv_net(params, images):
    NUM_TRACES["conv"] += 1
    features = 2.0 * images - 1.0
    for kernel in params["convs"]:
        layout = ("NHWC", "HWIO", "NHWC")
        features = jax.nn.relu(jax.lax.conv_general_dilated(features, kernel, (2, 2), "SAME", dimension_numbers=layout))
    return features.mean(axis=(1, 2)) @ params["dense"]


@pytest.fixture(scope="module")
def digits():
    """Real digits as 16 x 16 x 1 images, and a small network trained on them; gradients of 5-px kernels would take 30 seconds on a CPU."""
    data = datasets.load_digits()
    images = jnp.asarray(data.images.repeat(2, 1).repeat(2, 2)[..., None] / 16.0, jnp.float32)
    labels = jnp.asarray(data.target, jnp.int32)
    rng = np.random.default_rng(0)
    draw = lambda scale, *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    params = {"convs": [draw(0.3, 3, 3, 1, 8), draw(0.1, 4, 4, 8, 16)], "dense": draw(0.2, 16, 10)}
    optimizer = optax.adam(0.02)

    @jax.jit
    def train(params, state, rows):
        loss = lambda p: losses.cross_entropy(_conv_net(p, images[rows]), labels[rows]).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(150):
        params, state = train(params, state, rng.integers(0, 1000, 256))
    accuracy = (jax.jit(_conv_net)(params, images[1000:]).argmax(-1) == labels[1000:]).mean()
    assert accuracy > 0.8  # otherwise the attacks below would prove nothing
    return images[1000:1500], labels[1000:1500], params


@pytest.fixture(scope="module")
def gap_run(digits):
    images, labels, params = digits
    return universal.attack(jax.random.key(1), Partial(_conv_net, params), images, labels, _gap_settings())


def _gap_settings(**changes):
    fields = dict(size_px=(7, 5), target=(5, 3), num_steps=60, step_size=0.1, eval_every_steps=20, num_eval_images=200)
    return attacks.make_settings("gap", **{**fields, **changes})


# Losses, optimisers, loop


def test_losses_match_the_hand():
    logits = jnp.array([[2.0, 1.0, -1.0], [0.0, 3.0, 3.0]])
    labels, targets = jnp.array([0, 1]), jnp.array([2, 0])
    log_probs = log_softmax(np.array(logits, float), axis=1)
    expected = {
        "ce_target": [-log_probs[0, 2], -log_probs[1, 0]],
        "lavan": [2.0 - -1.0, 3.0 - 0.0],
        "untargeted": [log_probs[0, 0], log_probs[1, 1]],
        "cross_entropy": [-log_probs[0, 2], -log_probs[1, 0]],
        "margin": [2.0 - -1.0, 3.0 - 0.0],
    }
    assert expected.keys() == losses.LOSSES.keys()
    for name, loss in losses.LOSSES.items():
        # Sums of three exponentials of order 1 in float32.
        np.testing.assert_allclose(loss(logits, labels, targets), expected[name], rtol=1e-6, err_msg=name)
    nowhere = jnp.array([-1, -1])
    np.testing.assert_array_equal(losses.margin(logits, labels, nowhere), [1.0, 0.0])
    without = losses.LOSSES["cross_entropy"](logits, labels, nowhere)
    np.testing.assert_array_equal(without, losses.untargeted(logits, labels, nowhere))


def test_margin_gradient_is_shared_at_a_tie_and_finite():
    gradient = jax.grad(lambda z: losses.margin(z, jnp.array([0]), jnp.array([-1])).sum())(jnp.array([[1.0, 2.0, 2.0]]))
    np.testing.assert_array_equal(gradient, [[1.0, -0.5, -0.5]])


def test_cross_entropy_is_finite_for_huge_logits():
    logits = jnp.array([[1e4, -1e4]])
    value, gradient = jax.value_and_grad(lambda z: losses.cross_entropy(z, jnp.array([1])).sum())(logits)
    assert value == 2e4
    np.testing.assert_array_equal(gradient, [[1.0, -1.0]])


def test_adam_is_the_adam_of_optax():
    gradients = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    reference, moments = optax.adam(1.0), (jnp.zeros((2, 4)), jnp.zeros((2, 4)))
    state = reference.init(moments[0])
    for index, gradient in enumerate(gradients):
        direction, moments = losses.adam(jnp.array(gradient), moments, jnp.int32(index))
        update, state = reference.update(jnp.array(gradient), state)
        np.testing.assert_allclose(direction, -update, rtol=1e-4)  # 1 - 0.999**t loses three digits in float32


def test_sign_momentum_averages_normalised_gradients_and_rests_at_zero():
    zeros = (jnp.zeros((2, 2)), jnp.zeros((2, 2)))
    direction, moments = losses.sign_momentum(jnp.array([[3.0, -1.0], [0.0, 0.0]]), zeros, jnp.int32(0))
    np.testing.assert_array_equal(direction, [[1, -1], [0, 0]])
    np.testing.assert_array_equal(moments[0], [[1.5, -0.5], [0, 0]])
    # Mean size 100 and still weight 1: 0.9 * 1.5 - 0.5 > 0 keeps its direction.
    direction, _ = losses.sign_momentum(jnp.array([[-50.0, 150.0], [0.0, 1e-20]]), moments, jnp.int32(1))
    np.testing.assert_array_equal(direction, [[1, 1], [0, 1]])


def test_loops_pick_the_plan_of_the_backend_and_agree(monkeypatch):
    step = lambda index, carry, factor: carry * factor + index
    assert not loop.is_rolled()  # the tests run on CPU
    host = loop.run_loop(step, jnp.float32(1.0), (jnp.float32(2.0),), 1, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert loop.is_rolled()
    rolled = loop.run_loop(step, jnp.float32(1.0), (jnp.float32(2.0),), 1, 4)
    assert host == rolled == ((1 * 2 + 1) * 2 + 2) * 2 + 3


# Universal patches


@pytest.mark.parametrize("name", ["lavan", "gap"])
def test_first_steps_match_a_slow_numpy_twin(name):
    rng = np.random.default_rng(4)
    images, labels = rng.uniform(size=(6, 6, 6, 1)).astype(np.float32), np.array([0, 1, 2, 1, 0, 1])
    weights = rng.normal(size=(36, 3)).astype(np.float32)
    settings = attacks.make_settings(
        name, size_px=(2, 3), target=(2, 0), batch_images=4, rotation_deg=0.0, scale_range=(1.0, 1.0), num_steps=3
    )
    problem, state = _prepared(settings, Partial(_linear, jnp.array(weights)), images, labels)
    rule = universal._rule_of(settings)
    step, twin = jax.jit(universal.make_step(rule)), _Twin(np.asarray(state.values, float), settings)
    images, labels = np.asarray(problem.images, float), np.asarray(problem.labels)  # in the order that was drawn
    for index in range(3):
        state = step(index, state, problem)
        draw_key, place_key = jax.random.split(jax.random.fold_in(problem.key, index))
        rows = np.asarray(jax.random.randint(draw_key, (2, 4), 0, 5))  # one of the six images is held out
        places = universal._place(rule, place_key, (2, 4), problem)
        loss = twin.step(index, images, labels, weights, rows, places)
        # Float32 against float64 through logits of order 5.
        np.testing.assert_allclose(state.losses[index], loss, rtol=1e-4)
        np.testing.assert_allclose(state.values, twin.values, atol=1e-4)


def _prepared(settings, net, images, labels):
    problem, _, state = universal._prepare(
        jax.random.key(5),
        net,
        jnp.array(images),
        jnp.array(labels),
        masks=np.stack([patches.make_mask(size, settings.canvas) for size in settings.size_px]),
        size_px=np.array(settings.size_px),
        target=np.array(settings.target),
        step_size=settings.step_size,
        held=np.arange(1),
        kept=np.arange(1, images.shape[0]),
        num_steps=settings.num_steps,
    )
    return problem, state


class _Twin:
    """Loops over patches, images and pixels; the gradient in closed form; float64."""

    def __init__(self, values, settings):
        self.values, self.settings = values, settings
        self.first, self.second = np.zeros_like(values), np.zeros_like(values)

    def step(self, index, images, labels, weights, rows, places):
        results = []
        for p, (size, target) in enumerate(zip(self.settings.size_px, self.settings.target, strict=True)):
            gradient, loss, top = np.zeros_like(self.values[p]), 0.0, (3 - size) // 2
            for n, row in enumerate(rows[p]):
                corner = (np.array([places.center_row[p, n], places.center_col[p, n]]) - (size - 1) / 2).astype(int)
                i, j = (slice(start, start + size) for start in corner)
                image = images[row].copy()
                image[i, j] = self.values[p, top : top + size, top : top + size]
                logits = image.reshape(-1) @ weights
                to_logits, value = softmax(logits), -log_softmax(logits)[target]
                if self.settings.loss == "lavan":
                    to_logits, value = 0 * to_logits, logits[labels[row]] - logits[target]
                    to_logits[labels[row]] += 1
                to_logits[target] -= 1
                to_image = (weights @ to_logits).reshape(6, 6, 1)
                gradient[top : top + size, top : top + size] += to_image[i, j] / rows.shape[1]
                loss += value / rows.shape[1]
            self._move(p, gradient, index)
            results.append(loss)
        return results

    def _move(self, p, gradient, index):
        if self.settings.optimizer == "sign_momentum":
            self.first[p] = 0.9 * self.first[p] + gradient / max(np.abs(gradient).mean(), 1e-30)
            direction = np.sign(self.first[p])
        else:
            self.first[p] = 0.9 * self.first[p] + 0.1 * gradient
            self.second[p] = 0.999 * self.second[p] + 0.001 * gradient**2
            square = self.second[p] / (1 - 0.999 ** (index + 1))
            direction = self.first[p] / (1 - 0.9 ** (index + 1)) / (np.sqrt(square) + 1e-8)
        self.values[p] = np.clip(self.values[p] - self.settings.step_size * direction, 0, 1)


@pytest.fixture(scope="module")
def noise_run(digits):
    images, labels, params = digits
    settings = attacks.get("noise").settings(size_px=(7,) * 5, target=(5,) * 5, num_eval_images=200)
    return attacks.get("noise").attack(jax.random.key(1), Partial(_conv_net, params), images, labels, settings)


def _interval(count, index):
    return metrics.wilson(int(count.num[index]), int(count.den[index]))


@pytest.mark.parametrize("name", ["gap", "lavan"])
def test_a_universal_patch_beats_noise_of_its_size(name, gap_run, noise_run, digits):
    images, labels, params = digits
    if name == "gap":
        info = gap_run[1]
    else:  # at random places, as the noise
        settings = attacks.get(name).settings(
            size_px=(7,), target=(5,), num_steps=60, num_eval_images=200, location="random"
        )
        _, info = attacks.get(name).attack(jax.random.key(1), Partial(_conv_net, params), images, labels, settings)
    best_noise = max(_interval(noise_run[1]["success"]["tsr"], p).high for p in range(5))
    assert _interval(info["success"]["tsr"], 0).low > best_noise
    assert np.all(info["best_loss"] < info["eval_losses"][0, 0] - 0.2)  # look 0 is noise, too, at the same places


def test_the_best_look_is_what_comes_back(gap_run, digits):
    patch, info = gap_run
    images, _, params = digits
    np.testing.assert_array_equal(info["best_loss"], info["eval_losses"].min(axis=(0, 1)))
    np.testing.assert_array_equal(info["eval_steps"], [0, 20, 40, 60])
    assert info["losses"].shape == (60, 1, 2) and np.all(info["losses"] != 0)
    assert patch.size_px.tolist() == [7, 5] and patch.target.tolist() == [5, 3]
    np.testing.assert_array_equal(patches.round_to_uint8(patch.values) / 255.0, patch.values)
    assert not np.any(patch.values * (1 - patch.masks[..., None])) and patch.masks.sum((1, 2)).tolist() == [49, 25]
    held = info["eval_index"]
    assert len(set(held.tolist())) == 200
    for p in range(2):
        place = jax.tree.map(lambda field, p=p: jnp.array(field[p]), info["eval_placements"])
        spread = lambda array, p=p: jnp.repeat(array[p][None], 200, axis=0)
        pasted = jax.jit(patches.apply_patches)(images[held], spread(patch.values), spread(patch.masks), place)
        logits = _conv_net(params, pasted)
        np.testing.assert_array_equal(logits.argmax(-1), info["predictions"][p])
        loss = losses.cross_entropy(logits, jnp.full(200, patch.target[p])).mean()
        np.testing.assert_allclose(loss, info["best_loss"][p], rtol=1e-4)  # another order of summation


def test_same_key_same_patch_and_no_retrace_for_new_params_or_targets(gap_run, digits):
    images, labels, params = digits
    before = NUM_TRACES["conv"]
    again, _ = universal.attack(jax.random.key(1), Partial(_conv_net, params), images, labels, _gap_settings())
    np.testing.assert_array_equal(again.values, gap_run[0].values)
    other = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    settings = _gap_settings(target=(1, 2), size_px=(5, 7), step_size=0.01)
    _, info = universal.attack(jax.random.key(2), Partial(_conv_net, other), images, labels, settings)
    assert NUM_TRACES["conv"] == before + 2  # the abstract shape check of each call, and nothing else
    assert not np.array_equal(info["best_loss"], gap_run[1]["best_loss"])


def test_rolled_and_host_driven_attacks_agree(gap_run, digits, monkeypatch):
    images, labels, params = digits
    monkeypatch.setattr(loop, "is_rolled", lambda: True)
    settings = dataclasses.replace(_gap_settings(), num_steps=3)
    _, info = universal.attack(jax.random.key(1), Partial(_conv_net, params), images, labels, settings)
    # Three steps of Adam divide by small roots of squares: rounding of sums grows a hundredfold, to 1e-5.
    np.testing.assert_allclose(info["losses"], gap_run[1]["losses"][:3], rtol=1e-4)


def test_restarts_keep_the_best_of_each_patch_at_its_fixed_place_and_refuse_nan():
    rng = np.random.default_rng(7)
    images, labels = rng.uniform(size=(40, 6, 6, 1)).astype(np.float32), rng.integers(0, 3, 40).astype(np.int32)
    settings = attacks.make_settings(
        "lavan", size_px=(2, 3), target=(2, 0), num_steps=4, eval_every_steps=2, num_eval_images=10, num_restarts=3
    )
    net = Partial(_linear, jnp.array(rng.normal(size=(36, 3)), jnp.float32))
    patch, info = universal.attack(jax.random.key(0), net, images, labels, settings)
    assert info["eval_losses"].shape == (3, 3, 2) and patch.values.shape == (2, 3, 3, 1)
    per_restart = info["eval_losses"].min(axis=0)
    np.testing.assert_array_equal(info["best_loss"], per_restart.min(axis=0))
    np.testing.assert_array_equal(info["best_restart"], per_restart.argmin(axis=0))
    places = np.stack(info["eval_placements"][:2])
    assert np.all(places == places[..., :1])
    with pytest.raises(ValueError, match="never finite"):
        broken = Partial(_linear, jnp.full((36, 3), jnp.nan))
        universal.attack(jax.random.key(0), broken, images, labels, settings)
    problem, _ = _prepared(dataclasses.replace(settings, num_restarts=1), net, images, labels)
    rule = universal._rule_of(settings)
    place = jax.jit(lambda key: universal._place(rule, key, (2, 4), problem))
    first, second = place(jax.random.key(1)), place(jax.random.key(2))
    np.testing.assert_array_equal(first.center_row, second.center_row)
    np.testing.assert_array_equal(first.center_col, second.center_col)


def test_a_random_network_draws_a_fresh_key_in_every_step():
    images, labels = jnp.full((6, 4, 4, 1), 0.5), jnp.zeros(6, jnp.int32)

    def logits_fn(key, images):  # one of two networks: the loss tells which
        sign = jnp.where(jax.random.bernoulli(key), 3.0, -3.0)
        return jnp.broadcast_to(jnp.array([0.0, 1.0]) * sign, (images.shape[0], 2)) + 0.0 * images.sum()

    settings = attacks.PatchSettings(
        size_px=(2,), target=(1,), num_steps=12, num_eval_images=2, batch_images=1, random_logits=True
    )
    _, info = universal.attack(jax.random.key(0), logits_fn, images, labels, settings)
    assert len(set(np.round(info["losses"].ravel(), 3))) == 2


# Image-specific patches


def test_patch_pgd_beats_noise_and_restarts_only_help(digits, noise_run):
    images, labels, params = digits
    net, key = Partial(_conv_net, params), jax.random.key(2)
    settings = attacks.get("patch_pgd").settings(size_px=5, num_steps=8, grid_stride_px=5, num_restarts=2)
    _, info = patch_pgd.attack(key, net, images[:64], labels[:64], settings)
    counts = metrics.success_counts(info["clean_predictions"], info["predictions"], labels[:64])["asr_correct"]
    noise = noise_run[1]["success"]["asr_correct"]  # larger patches, 7 px
    assert metrics.wilson(int(counts.num), int(counts.den)).low > max(_interval(noise, p).high for p in range(5))
    alone = dataclasses.replace(settings, num_restarts=1)
    _, single = patch_pgd.attack(jax.random.fold_in(key, 0), net, images[:64], labels[:64], alone)
    # Rounding to the stored grid comes after the choice: it may cost the better of two 1e-2.
    assert np.all(info["loss"] <= single["loss"] + 1e-2) and np.any(info["loss"] < single["loss"])


def test_a_whole_image_patch_fools_every_image_and_reaches_every_target(digits):
    images, labels, params = digits
    for target in (-1, 3):
        settings = attacks.get("patch_pgd").settings(size_px=16, num_steps=8, num_restarts=1, target=target)
        _, info = patch_pgd.attack(jax.random.key(2), Partial(_conv_net, params), images[:64], labels[:64], settings)
        assert info["success"].all()


# Registry


def test_every_attack_is_found_by_name_and_builds_settings():
    for name, entry in attacks.ATTACKS.items():
        is_universal = entry.kind == "universal"
        settings = entry.settings(size_px=(3,) if is_universal else 3, **({"target": (1,)} if is_universal else {}))
        assert settings.size_px == ((3,) if is_universal else 3)
        assert attacks.get(name) is entry and entry.access in ("gradient", "query", "none")
    with pytest.raises(ValueError, match=r"^attack: expected one of lavan, gap, .*crop, got 'drp'$"):
        attacks.get("drp")


# Refusals

_IMAGES, _LABELS = np.full((6, 4, 4, 1), 0.5, np.float32), np.zeros(6, np.int32)
_SMALL = dict(size_px=(2,), target=(1,), num_eval_images=2)


def _attack(images=_IMAGES, labels=_LABELS, **fields):
    settings = attacks.PatchSettings(**{**_SMALL, **fields})
    return universal.attack(jax.random.key(0), Partial(_linear, jnp.zeros((16, 2))), images, labels, settings)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attacks.make_settings("drp", size_px=(2,), target=(1,)), "name: expected one of ('lavan', 'gap')"),
        (lambda: attacks.PatchSettings(**_SMALL, loss="hinge"), "loss: expected one of"),
        (lambda: attacks.PatchSettings(**_SMALL, optimizer="sgd"), "optimizer: expected one of"),
        (lambda: attacks.PatchSettings(**_SMALL, step_size=0.0), "step_size: expected a positive number"),
        (lambda: attacks.PatchSettings(**_SMALL, canvas_px=1), "size_px: expected sizes from 1 to canvas_px=1"),
        (lambda: attacks.PatchSettings(**_SMALL, scale_range=(2.0, 1.0)), "rotation_deg, scale_range"),
        (lambda: attacks.PatchSettings(size_px=(2, 3), target=(1,)), "one class per patch"),
        (lambda: attacks.PatchSettings(size_px=(), target=()), "one class per patch"),
        (lambda: attacks.PatchSettings(size_px=(2,), target=(-1,)), "'ce_target' needs a class >= 0"),
        (lambda: attacks.PatchSettings(**_SMALL, loss="untargeted"), "'untargeted' needs -1"),
        (lambda: attacks.PatchSettings(size_px=(2,), target=(-2,), loss="margin"), "-1 for untargeted"),
        (lambda: _attack(images=(255 * _IMAGES).astype(np.uint8)), "images: expected float32"),
        (lambda: _attack(images=3 * _IMAGES), "divide pixels by 255"),
        (lambda: _attack(labels=_LABELS[:3]), "labels: expected int32 (6,)"),
        (lambda: _attack(num_eval_images=6), "more than num_eval_images=6, got 6"),
        (lambda: _attack(size_px=(5,)), "size_px: expected patches that fit into 4 px"),
        (lambda: _attack(target=(2,)), "target: expected classes below the number of logits"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
