"""Streamed batches are a pure function of (seed, step) on any number of processes and workers; configs/imagenet.py trains on them."""

import importlib.util
import json
import multiprocessing
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest
from data_example import assert_equal, first, imagenet, numbered
from several_processes import CONNECTED, run_processes

from triqdef_jax import config as config_lib
from triqdef_jax import data, loop, models
from triqdef_jax.data import images, stream
from triqdef_jax.models.resnet import ResNet, ResNetPlan
from triqdef_jax.patch_pool import PatchPool

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_a_streamed_run_resumes_exactly_and_every_epoch_is_another_permutation(imagenet_dir):
    source = imagenet(imagenet_dir)
    whole = first(source.train_batches(seed=1, batch_size=4, start_step=0), 13)  # two epochs of 26
    assert_equal(whole[5:], first(source.train_batches(seed=1, batch_size=4, start_step=5), 8))
    epochs = np.concatenate([batch["labels"] for batch in whole]).reshape(2, 26)
    assert all(sorted(epoch) == list(range(26)) for epoch in epochs.tolist())
    assert (epochs[0] != epochs[1]).any()
    assert whole[0]["images"].shape == (4, 16, 16, 3) and whole[0]["images"].dtype == np.uint8
    pixels = np.concatenate([batch["images"] for batch in whole])
    one, two = pixels[epochs.ravel() == 0]
    assert (one != two).any(), "another epoch, another crop"


def test_neither_workers_nor_signals_to_them_change_the_batches(imagenet_dir):
    expected = first(imagenet(imagenet_dir).train_batches(seed=1, batch_size=4, start_step=2), 6)
    batches = imagenet(imagenet_dir, num_workers=2).train_batches(seed=1, batch_size=4, start_step=2)
    found = [next(batches), next(batches)]  # one of each worker, so both have started
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:  # Ctrl-C, and some schedulers, signal every process of a run
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    found += [next(batches) for _ in range(4)]
    assert_equal(expected, jax.device_get(found))
    batches.close()
    assert not multiprocessing.active_children()


def test_held_out_images_are_never_trained_on(imagenet_dir):
    source = imagenet(imagenet_dir, heldout_images=6, train_images=15)
    assert source.num_train == 15 and source.heldout.images.shape == (6, 16, 16, 3)
    trained = np.concatenate([b["labels"] for b in first(source.train_batches(seed=0, batch_size=5, start_step=0), 6)])
    assert len(set(trained.tolist())) == 15, "two epochs of 15 images"
    assert not set(trained.tolist()) & set(source.heldout.labels.tolist()), "every class has one image"
    for row, index in enumerate(source.heldout.ids):
        original = images.decode(source.train.source[int(index)]["image"])
        np.testing.assert_array_equal(source.heldout.images[row], images.centre_crop(original, 16))


def test_streamed_evaluation_counts_every_image_once(imagenet_dir):
    source = imagenet(imagenet_dir, heldout_images=2)
    for split, num in (("test", 7), ("train", 24), ("heldout", 2)):
        batches = list(source.eval_batches(split, 5))
        assert all(batch["images"].shape == (5, 16, 16, 3) for batch in batches)
        masks, ids = (np.concatenate([batch[name] for batch in batches]) for name in ("mask", "ids"))
        assert masks.sum() == num and len(set(ids[masks == 1].tolist())) == num and (ids[masks == 0] == -1).all()


def test_a_record_that_is_no_image_is_named():
    broken = stream.Records([{"image": b"no image", "label": 0}], np.array([0]))
    source = stream.StreamData("broken", 1, 8, broken, numbered(1).train, broken, 0, 1)
    with pytest.raises(ValueError, match="record 0: expected a JPEG or PNG image, got 8 bytes that are none"):
        next(source.eval_batches("test", 1))


def test_a_record_with_a_flipped_byte_is_named_by_threads_and_by_workers_alike(imagenet_dir, tmp_path):
    shutil.copytree(imagenet_dir, tmp_path / "sets")
    (shard,) = (tmp_path / "sets").rglob("*train.array_record*")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1  # within the fifth record or so of 1 kB
    shard.write_bytes(content)
    for num_workers in (0, 1):
        batches = imagenet(str(tmp_path / "sets"), num_workers=num_workers).train_batches(
            seed=0, batch_size=26, start_step=0
        )
        with pytest.raises(stream.RecordError, match=r"record \d+ cannot be read \(.*\); prepare the data anew"):
            next(batches)


def test_the_config_of_imagenet_trains_three_steps_on_prepared_jpegs(imagenet_dir, tmp_path, monkeypatch):
    plan = lambda width: ResNetPlan((), width, is_imagenet=True)  # ImageNet's stem alone, to compile in seconds
    build = lambda name, *, num_classes, width, options: ResNet(plan(width), num_classes, options)
    monkeypatch.setitem(models.MODELS, "tiny", build)
    config = load_config("configs/imagenet.py").get_config()
    changes = {
        "data.dir": imagenet_dir,
        "data.image_size_px": 64,
        "data.heldout_images": 8,
        "data.calibration_images": 8,
        "data.train_images": 12,
        "model.name": "tiny",
        "model.width": 4,
        "quant.bits": (32, 4),
        "bact.starts": (0.5,),
        "loss.feature_layers": ("stem",),
        "train.batch_size": 4,
        "train.epochs": 1,
        "train.log_every_steps": 1,
        "patches.sizes_px": (14,),
        "patches.unseen_sizes_px": (20,),
    }
    config.update_from_flattened_dict(changes)
    config_lib.validate(config)
    loaded = data.load(config.data)
    size, num = 14, 4
    pool = PatchPool(
        np.full((num, size, size, 3), 0.5, np.float32),
        np.ones((num, size, size), np.float32),
        np.full(num, size, np.int32),
        np.zeros(num, np.int32),
        "digest",
    )
    run = loop.make_run(config, tmp_path, loaded.num_train)
    assert loop.train(run, loaded, pool, is_quiet=True) == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert 4 < lines[0]["ce_clean/32"] < 12, "a new network over 1,000 classes: about ln 1000 = 6.9"
    assert "fdp/stem/32-4" in lines[2] and "gpdp/32-4" in lines[2]


def load_config(file):
    spec = importlib.util.spec_from_file_location("config_file", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHARES = """
def main(rank, folder, found):
    import stream_test
    from absl import flags
    flags.FLAGS.mark_as_parsed()
    rows, by_rows = {}, jax.sharding.NamedSharding(sharding.data_mesh(), jax.sharding.PartitionSpec("data"))
    for name, source in stream_test.topology_sources(folder, num_workers=1):
        iterator = source.train_batches(seed=5, batch_size=8, start_step=2, sharding=by_rows)
        for step in range(2):
            for field, array in next(iterator).items():
                assert array.shape[0] == 8 and array.sharding == by_rows, array.sharding
                for shard in array.addressable_shards:
                    rows[f"{name}/{field}/{step}/{shard.index[0].start}"] = np.asarray(shard.data)
        iterator.close()
    np.savez(f"{found}/rank{rank}.npz", **rows)
"""


def topology_sources(folder, *, num_workers):
    return [
        ("memory", numbered(20, augment="crop_flip")),
        ("stream", imagenet(folder, num_workers=num_workers)),
    ]


def test_the_shares_of_any_number_of_processes_are_one_global_batch(imagenet_dir):
    source = imagenet(imagenet_dir)
    whole = first(source.train_batches(seed=5, batch_size=8, start_step=2), 3)  # across the end of the first epoch
    for num in (1, 2, 4):
        shares = [first(source.local_batches(5, 8 // num, 2, rank, num), 3) for rank in range(num)]
        joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*shares, strict=True)]
        assert_equal(joined, whole)


def test_two_processes_of_two_devices_and_a_worker_each_meet_the_batches_of_one_device(imagenet_dir, tmp_path):
    for code, _, error in run_processes(SHARES + CONNECTED, imagenet_dir, tmp_path, num_devices=2):
        assert code == 0, error
    ranks = [np.load(tmp_path / f"rank{rank}.npz") for rank in range(2)]
    assert all(key.endswith(("/0", "/2")) for key in ranks[0]) and all(key.endswith(("/4", "/6")) for key in ranks[1])
    for name, source in topology_sources(imagenet_dir, num_workers=0):
        for step, batch in enumerate(first(source.train_batches(seed=5, batch_size=8, start_step=2), 2)):
            for field, array in batch.items():
                parts = [ranks[start // 4][f"{name}/{field}/{step}/{start}"] for start in (0, 2, 4, 6)]
                np.testing.assert_array_equal(np.concatenate(parts), array)
