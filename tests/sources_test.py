"""Source networks and pools: what determines them, that runs share them, that a preempted one makes no patches."""

import os
import signal

import numpy as np
import pytest

from triqdef_jax import config as config_lib
from triqdef_jax import data, loop, sources


def make_config(shared_dir="nowhere", **changes):
    config = config_lib.default()
    config.update_from_flattened_dict(
        {
            "data.image_size_px": 8,
            "data.train_images": 136,  # 8 to make patches on, 128 to judge them
            "model.name": "tiny",
            "model.width": 2,
            "train.batch_size": 34,
            "patches.sizes_px": (2,),
            "patches.unseen_sizes_px": (3,),
            "patches.families": ("lavan",),
            "patches.pool_size": 8,
            "patches.eval_pool_size": 8,
            "patches.steps": 2,
            "patches.source_epochs": 1,
            "patches.shared_dir": str(shared_dir),
        }
        | changes
    )
    return config


class InterruptedData:
    """Data that send SIGTERM to this process with batch `at`, as a scheduler would in the middle of a run."""

    def __init__(self, loaded, at):
        self.loaded, self.at = loaded, at

    def __getattr__(self, name):
        return getattr(self.loaded, name)

    def train_batches(self, *, start_step, **settings):
        for step, batch in enumerate(self.loaded.train_batches(start_step=start_step, **settings), start_step):
            if step == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The shared folder after a preempted run, and the pools that the second run then made, by name."""
    folder = tmp_path_factory.mktemp("shared")
    config = make_config(folder)
    loaded = data.load(config.data)
    with pytest.raises(loop.PreemptedError, match=r"preempted: step 2 of 4 of source network 1 is saved in .*the same"):
        sources.train_pool(config, InterruptedData(loaded, at=1))
    assert [path.name.split("-")[0] for path in folder.iterdir()] == ["source"]  # no pool of an unfinished network
    return folder, loaded, sources.eval_pools(config, loaded)


def test_evaluation_meets_the_held_out_quarter_another_source_and_unseen_sizes(shared):
    folder, _, pools = shared
    assert list(pools) == ["held-out", "other source", "unseen size 3 px"]
    assert [len(pool.values) for pool in pools.values()] == [2, 8, 8]
    assert [set(pool.size_px.tolist()) for pool in pools.values()] == [{2}, {2}, {3}]
    assert len({pool.digest for pool in pools.values()}) == 3
    assert len(list(folder.glob("source-*"))) == 2 and len(list(folder.glob("pool-*"))) == 3


def test_training_and_evaluation_split_one_pool(shared):
    folder, loaded, pools = shared
    pool = sources.train_pool(make_config(folder), loaded)
    assert pool.digest == pools["held-out"].digest
    np.testing.assert_array_equal(pool.values[6:], pools["held-out"].values)


def test_runs_of_other_methods_and_bits_read_the_same_pools_and_train_nothing(shared):
    folder, loaded, pools = shared
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    changes = {"loss.method": "pbat", "quant.bits": (32, 2), "bact.enabled": False, "train.epochs": 7}
    again = sources.eval_pools(make_config(folder, **changes), loaded)
    assert {name: pool.digest for name, pool in again.items()} == {name: pool.digest for name, pool in pools.items()}
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times


def test_the_interrupted_source_network_was_trained_to_its_end(shared):
    folder, loaded, _ = shared
    trained = sources.train_source(make_config(folder), 0, loaded, is_quiet=True)
    assert trained.step == 4 and trained.network.bits == (32,)
    steps = [
        line for line in (folder / sources.source_name(make_config(), 0) / "metrics.jsonl").read_text().split("\n")
    ]
    assert [line.split(",")[0] for line in steps if line] == ['{"step": 2', '{"step": 4']


@pytest.mark.parametrize(
    "field, value",
    [
        ("seed", 1),
        ("data.train_images", 140),
        ("model.width", 4),
        ("optim.lr", 0.2),
        ("train.batch_size", 17),
        ("patches.source_epochs", 2),
    ],
)
def test_what_trains_the_source_determines_it(field, value):
    assert sources.source_name(make_config(**{field: value}), 0) != sources.source_name(make_config(), 0)


@pytest.mark.parametrize(
    "field, value",
    [
        ("loss.method", "qat"),
        ("quant.bits", (8, 4)),
        ("bact.enabled", False),
        ("data.dir", "/elsewhere"),
        ("data.num_workers", 3),
        ("patches.steps", 9),
        ("train.epochs", 1),
    ],
)
def test_what_does_not_train_the_source_leaves_its_name(field, value):
    assert sources.source_name(make_config(**{field: value}), 0) == sources.source_name(make_config(), 0)


def test_source_networks_have_seeds_of_their_own():
    seeds = {sources.source_config(make_config(seed=seed), index).seed for seed in (0, 1) for index in (0, 1)}
    assert len(seeds) == 4 and not seeds & {0, 1}


@pytest.mark.parametrize(
    "field, value", [("source_images", 140), ("batch_images", 3), ("steps", 3), ("shape", "circle")]
)
def test_patch_settings_determine_the_pool(field, value):
    names = [
        sources.request(make_config(**changes), 0, (2,), 8).folder_name for changes in ({}, {f"patches.{field}": value})
    ]
    assert names[0] != names[1]
