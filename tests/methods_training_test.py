"""Every method trains through the one loop, on real steps of the smallest network, and resumes bit for bit; what each logs and carries on the way."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from triqdef_jax import checkpoints, loop, metric_window
from triqdef_jax import config as config_lib
from triqdef_jax.data.splits import Split
from triqdef_jax.models.multibit import Weights
from triqdef_jax.objectives import orthogonality
from triqdef_jax.objectives.methods import METHODS, Inputs
from triqdef_jax.objectives.penalties import INPUT_GRADIENT
from triqdef_jax.patch_pool import PatchPool

NUM_STEPS, SAVED_AT = 4, 2
BITS = (4, 2)
# The full method is killed and resumed in `loop_test.py`, `qat` and `patch_ce` are parts of it; the others train here.
RUNS = {
    **{name: {"loss.method": name} for name in METHODS if name not in ("triqdef", "qat", "patch_ce", "trs")},
    "trs_max": {"loss.method": "trs", "baselines.trs_steps": 1},
}


@pytest.fixture(scope="module", autouse=True)
def steps_compiled_once():
    """Steps of equal settings are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        shared = functools.cache(loop.make_step)
        patch.setattr(loop, "make_step", lambda settings, *, compile_piece=None, **place: shared(settings, **place))
        yield


def make_config(**changes):
    config = config_lib.default()
    config.update_from_flattened_dict(
        {
            "data.image_size_px": 8,
            "data.calibration_images": 8,
            "model.name": "stem",
            "model.width": 2,
            "quant.bits": BITS,
            "bact.enabled": False,
            "loss.feature_layers": ("stem",),
            "train.batch_size": 8,
            "train.epochs": 2,
            "train.plan": "per_bit",
            "train.log_every_steps": 1,
            "train.checkpoint_every_steps": SAVED_AT,
            "train.keep_best": False,  # nothing here reads it, and its program would be compiled for every method
            "optim.lr": 0.02,
            "patches.sizes_px": (3,),
            "patches.attack_steps": 2,
            "baselines.dwq_steps": 2,
            "baselines.pbcat_steps": 2,
            "baselines.mat_patches": 5,
            "baselines.mat_steps": 2,
        }
        | changes
    )
    return config


class Batches:
    """Sixteen images in their order, eight a step; the sets of the package would compile their augmentation for every run."""

    def __init__(self):
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 10, 24).astype(np.int32)
        images = np.clip(rng.normal(25.0 * labels[:, None, None, None], 40.0, (24, 8, 8, 3)), 0, 255).astype(np.uint8)
        self.images, self.labels = images[:16], labels[:16]
        self.heldout = Split(images[16:], labels[16:], np.arange(8))

    def train_batches(self, *, seed, batch_size, start_step, sharding):
        del seed
        for step in itertools.count(start_step):
            rows = np.arange(batch_size * step, batch_size * (step + 1)) % 16
            yield jax.device_put({"images": self.images[rows], "labels": self.labels[rows]}, sharding)


def make_pool():
    rng = np.random.default_rng(1)
    masks, sizes = np.ones((4, 3, 3), np.float32), np.full(4, 3, np.int32)
    return PatchPool(rng.random((4, 3, 3, 3), np.float32), masks, sizes, np.zeros(4, np.int32), "digest")


@functools.cache
def finished(name, folder):
    """(run, its final state, its metrics by line) of a method or variant trained to the end."""
    run = loop.make_run(make_config(**RUNS[name]), folder / name, 16)
    pool = make_pool() if run.method.needs_pool else None
    assert loop.train(run, Batches(), pool, is_quiet=True) == NUM_STEPS
    return run, state_of(run.workdir), metrics_of(run.workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def state_of(workdir):
    with checkpoints.Checkpointer(workdir / loop.CHECKPOINTS) as checkpointer:
        return checkpointer.restore_raw()[0]


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_method_trains_and_a_resumed_run_ends_bit_identical(name, folder, tmp_path):
    run, state, lines = finished(name, folder)
    assert len(lines) == NUM_STEPS and all(np.isfinite(list(line.values())).all() for line in lines)
    start = jax.device_get(loop.init_state(run))
    moved = [
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (state["weights"]["params"], start.weights.params)), strict=True)
    ]
    assert all(moved)

    workdir = tmp_path / name
    shutil.copytree(run.workdir, workdir)
    shutil.rmtree(workdir / loop.CHECKPOINTS / str(NUM_STEPS))
    resumed = dataclasses.replace(run, workdir=workdir)
    pool = make_pool() if run.method.needs_pool else None
    assert loop.train(resumed, Batches(), pool, is_quiet=True) == NUM_STEPS
    jax.tree.map(np.testing.assert_array_equal, state_of(workdir), state)
    assert metrics_of(workdir) == lines


def test_meta_patches_move_are_saved_and_belong_to_mat_alone(folder):
    run, state, _ = finished("mat", folder)
    start = loop.init_state(run).extra
    moved = np.abs(state["extra"]["values"] - np.asarray(start.values)).max(axis=(1, 2, 3))
    assert (moved > 0).sum() >= 2  # of five meta-patches; four images a step choose among them
    np.testing.assert_array_equal(state["extra"]["step_size"], start.step_size)
    assert "extra" not in finished("pbat", folder)[1]


def test_a_checkpoint_of_another_method_is_refused_by_mat_in_one_line(folder, tmp_path):
    shutil.copytree(finished("pbat", folder)[0].workdir, tmp_path / "run")
    run = dataclasses.replace(finished("mat", folder)[0], workdir=tmp_path / "run")
    with pytest.raises(checkpoints.CheckpointError) as refusal:
        loop.train(run, Batches(), None, is_quiet=True)
    assert "was made with another config: extra/" in str(refusal.value) and "\n" not in str(refusal.value)


def test_dwq_draws_a_precision_per_step_and_runs_it_alone(folder):
    run, _, lines = finished("dwq", folder)
    drawn = [loop.active_bits(run, run.stages[0], step) for step in range(NUM_STEPS)]
    assert {len(bits) for bits in drawn} == {1} and set(drawn) == {(4,), (2,)}
    for line, bits in zip(lines, drawn, strict=True):
        (ran,) = bits
        assert {name for name in line if name.startswith("ce_patched/")} == {f"ce_patched/{ran}"}
        assert {b: line[f"drawn/{b}"] for b in BITS if f"drawn/{b}" in line} == {ran: 1.0}


def test_the_attack_and_the_update_of_dwq_meet_the_same_precision(folder, monkeypatch):
    run, _, _ = finished("dwq", folder)
    stepped, attacked = [], []
    step_fn = loop.make_step(run.settings, plan=run.plan, mesh=run.mesh)
    make_logits = loop.drawn_bit_logits

    def record_attack(network, weights, stats, slots, specs):
        attacked.append([int(slot.stats) for slot in slots])
        return make_logits(network, weights, stats, slots, specs)

    def record_step(state, inputs, bits, slots, specs, ramp):
        stepped.append([int(slot.stats) for slot in slots])
        assert inputs.images is None and inputs.patched_images.shape[0] == 8  # the whole batch, attacked
        return step_fn(state, inputs, bits, slots, specs, ramp)

    monkeypatch.setattr(loop, "drawn_bit_logits", record_attack)
    monkeypatch.setattr(loop, "make_step", lambda *_, **__: record_step)
    assert loop.train(
        dataclasses.replace(run, workdir=run.workdir.with_name("dwq-again")), Batches(), None, is_quiet=True
    )
    assert stepped == attacked and {len(slots) for slots in stepped} == {1} and len(set(map(tuple, stepped))) == 2


def test_means_of_drawn_bits_are_over_the_steps_that_ran_them():
    steps = [
        ({"loss": 1.0, "ce_clean": [2.0]}, [0]),
        ({"loss": 2.0, "ce_clean": [4.0]}, [2]),
        ({"loss": 6.0, "ce_clean": [6.0]}, [2]),
    ]
    zeros = {name: np.zeros(1, np.float32) for name in metric_window.PER_BIT}
    spread = [
        metric_window.spread(
            {**zeros, "loss": np.float32(m["loss"]), "ce_clean": np.float32(m["ce_clean"]), "similarity": {}},
            np.array(at),
            3,
        )
        for m, at in steps
    ]
    sums = jax.device_get(jax.tree.map(lambda *x: sum(x), *spread))
    scalars = metric_window.name_scalars(metric_window.means(sums, 3), (8, 4, 2))
    assert scalars["loss"] == 3.0
    assert {name: value for name, value in scalars.items() if name.startswith("ce_clean")} == {
        "ce_clean/8": 2.0,
        "ce_clean/2": pytest.approx(5.0),
    }  # a division by 2/3
    assert scalars["drawn/8"] == pytest.approx(1 / 3) and scalars["drawn/2"] == pytest.approx(2 / 3)


def test_gal_and_trs_log_cosines_beside_those_of_different_images(folder):
    for name in ("gal", "trs_max"):
        last = finished(name, folder)[2][-1]
        assert {key for key in last if key.startswith("gradient_cosine/")} == {"gradient_cosine/4-2"}
        assert -1 <= last["gradient_cosine/4-2"] <= 1 and "gradient_cosine_chance/4-2" in last
    assert finished("gal", folder)[2][0]["penalty"] > 0


def test_the_budget_counts_forward_equivalents_over_the_curriculum():
    config = make_config(
        **{"bact.enabled": True, "bact.starts": (0.25, 0.5), "train.epochs": 16, "quant.bits": (32, 4, 2)}
    )
    run = loop.make_run(config, "unused", 16)  # 32 steps: 8 of one bit-width, 8 of two, 16 of three
    # Of 8 images: 3 clean passes each, half of them patched, 6 with their input gradient.
    assert run.forward_equivalents == 8 * (8 * 1 + 8 * 2 + 16 * 3) * (3 + 0.5 * 6)


def at_start(name, folder):
    """(run, compiled pieces of its step, (weights, statistics, slot, spec) of its bit-widths at step 0, images and labels of that step)."""
    run = finished(name, folder)[0]
    with checkpoints.Checkpointer(run.workdir / loop.CHECKPOINTS) as checkpointer:
        raw = checkpointer.restore_raw(0)[0]
    pieces = loop.make_step(run.settings, plan=run.plan, mesh=run.mesh).args[1]
    arrays = jax.device_put((Weights(**raw["weights"]), raw["stats"]))
    places = [(*arrays, run.network.slot(b), run.network.spec(b, round_bias=True)) for b in BITS]
    batch = next(Batches().train_batches(seed=0, batch_size=8, start_step=0, sharding=None))
    return run, pieces, places, (loop.unit_range(batch["images"]), batch["labels"])


def test_a_penalty_on_the_weights_adds_its_value_to_the_loss_and_its_gradient_once(folder):
    _, pieces, places, batch = at_start("defensive", folder)
    values, _, pullbacks = zip(*(pieces.forward(*place, Inputs(*batch)) for place in places), strict=True)
    halves = [pieces.backward(pullback, np.float32(0.5), {}) for pullback in pullbacks]
    penalty, slope = jax.value_and_grad(lambda p: orthogonality.orthogonality(p, weight=0.002))(places[0][0].params)
    gradient = jax.tree.map(np.add, *halves)
    gradient = gradient._replace(params=jax.tree.map(np.add, gradient.params, slope))
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    logged = finished("defensive", folder)[2][0]
    # Float32 sums in another order; without the penalty, or with it once per bit-width, the norm differs by more.
    assert logged["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert logged["penalty"] == pytest.approx(float(penalty), rel=1e-5) and float(penalty) > 1e-3
    mean = np.mean([float(loss) for loss, _ in values])
    assert logged["loss"] == pytest.approx(mean + float(penalty), rel=1e-5)
    plain = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.tree.map(np.add, *halves))))
    assert abs(plain / norm - 1) > 1e-4


def test_raw_maps_are_the_input_gradients_of_each_images_own_cross_entropy(folder):
    run, pieces, places, (images, labels) = at_start("gal", folder)
    weights, stats, slot, spec = places[1]
    (_, maps), _, _ = pieces.forward(*places[1], Inputs(images, labels, images[::2], labels[::2]))

    @jax.jit
    def own(images):
        def total(images):
            logits, _, _ = run.network.train_forward(run.network.slice(weights, stats, slot), spec, images)
            return -jax.nn.log_softmax(logits)[jnp.arange(4), labels[::2]].sum()

        return jax.grad(total)(images)

    assert maps.keys() == {INPUT_GRADIENT} and maps[INPUT_GRADIENT].shape == (4, 8, 8, 3)
    expected = np.asarray(own(images[::2]))
    np.testing.assert_allclose(maps[INPUT_GRADIENT], expected, atol=1e-5 * np.abs(expected).max())  # float32


def test_without_clean_images_loss_and_statistics_are_those_of_the_attacked_ones(folder):
    _, attacked, places, (images, labels) = at_start("dwq", folder)
    (loss, maps), report, _ = attacked.forward(*places[1], Inputs(None, None, images, labels))
    _, clean, places, _ = at_start("defensive", folder)
    (expected, _), clean_report, _ = clean.forward(*places[1], Inputs(images, labels))
    assert float(loss) == pytest.approx(float(expected), rel=1e-6) and loss == report.ce_patched
    assert report.ce_clean == 0 and maps == {}
    # Two programs of the same forward: float32 sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), report.moments, clean_report.moments
    )
