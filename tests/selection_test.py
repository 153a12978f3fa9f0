"""A run is judged on held-out images alone, clean and patched, the same way at every checkpoint; that costs one program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_example as example

from triqdef_jax import loop, selection
from triqdef_jax.objectives.methods import Pool


@pytest.fixture(scope="module")
def subject():
    """(run, state, data) of an untrained network whose accuracy differs between bit-widths."""
    run = loop.make_run(example.make_config(), "unused", 32)
    state = loop.init_state(run)
    weights = state.weights._replace(scales=jax.tree.map(lambda x: 0.2 * x, state.weights.scales))
    return run, state._replace(weights=weights), example.make_data()


def judge(subject, pool, **changes):
    run, state, data = subject
    config = example.make_config(**changes)
    return selection.make_judge(config, run.network, run.mesh, data, pool)(state.weights, state.stats)


def whole_image_pool(value):
    """One patch of one colour that covers every image."""
    return Pool(jnp.full((1, 8, 8, 3), value), jnp.ones((1, 8, 8)), jnp.full(1, 8, jnp.int32))


def predicted(subject, bits, images):
    run, state, _ = subject
    spec = run.network.spec(bits, round_bias=run.config.quant.round_bias)
    return np.argmax(loop.bit_logits(run.network, state.weights, state.stats, bits, spec)(images), axis=-1)


def test_clean_and_patched_shares_are_those_counted_by_hand(subject):
    _, _, data = subject
    labels, images = data.heldout.labels, data.heldout.images / np.float32(255)
    still = {"patches.rotation_deg": 0.0, "patches.scale_jitter": 0.0}
    found = judge(subject, whole_image_pool(51 / 255), **still)
    expected = {}
    for bits in example.BITS:
        expected[f"heldout_clean/{bits}"] = np.mean(predicted(subject, bits, images) == labels)
        expected[f"heldout_patched/{bits}"] = np.mean(predicted(subject, bits, np.full_like(images, 0.2)) == labels)
    assert found == expected | {"heldout_score": pytest.approx(np.mean(list(expected.values())), abs=1e-15)}
    assert len({found[f"heldout_clean/{bits}"] for bits in example.BITS}) > 1
    assert selection.score_entry(found) == {"score": found["heldout_score"]}


def test_batches_change_nothing_and_every_image_counts_once(subject):
    pool = Pool(*(jnp.asarray(x) for x in example.make_pool()[:3]))
    whole = judge(subject, pool)  # one batch of 8
    assert judge(subject, pool, **{"eval.batch_size": 3}) == whole  # two of 3, one of 2 and a filled row
    assert all(share * 8 == round(share * 8) for name, share in whole.items() if name != "heldout_score")


def test_neither_training_nor_test_images_are_looked_at(subject):
    run, state, data = subject
    blind = dataclasses.replace(data, train=None, test=None)
    assert judge((run, state, blind), None) == judge(subject, None)


def test_without_a_pool_the_score_is_clean_accuracy_and_without_keep_best_there_is_none(subject):
    found = judge(subject, None)
    assert found.keys() == {"heldout_score", *(f"heldout_clean/{bits}" for bits in example.BITS)}
    assert judge(subject, None, **{"train.keep_best": False}) == {} == selection.score_entry({})


def test_patch_and_place_of_an_image_depend_on_seed_and_image_alone(subject):
    run, _, data = subject
    pool = Pool(*(jnp.asarray(x) for x in example.make_pool()[:3]))
    ids = np.arange(8, dtype=np.int32)
    rows = selection.sharding.batch_sharding(run.mesh)
    paste = lambda seed, some: selection._paste(
        rows, 10.0, 0.1, np.uint32(seed), pool, data.heldout.images[some], ids[some]
    )
    whole = np.asarray(paste(0, slice(8)))
    np.testing.assert_array_equal(whole[2:5], paste(0, slice(2, 5)))
    differs = (whole != data.heldout.images).any(axis=-1)
    assert differs.any(axis=(1, 2)).all() and differs.sum(axis=(1, 2)).max() <= 9  # a 2-px patch, turned and scaled
    assert (whole != np.asarray(paste(1, slice(8)))).any()
