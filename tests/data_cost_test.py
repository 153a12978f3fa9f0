"""The input is measured by itself: real records through the real pipeline, real batches beside a real step."""

import json

import cv2
import numpy as np
import pytest
from absl import flags
from benchmark_example import tiny

from triqdef_jax import benchmark, data, data_cost
from triqdef_jax import config as config_lib


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_cost, "_NUM_PICTURES", 4)
        data_cost.write_stand_ins(folder, 16)
    flags.FLAGS.mark_as_parsed()  # grain's workers inherit the flags of their parent
    return str(folder)


def stream_config(folder, **changes):
    config = config_lib.default()
    config.data.name, config.data.dir, config.data.image_size_px = "imagenet", folder, 64
    config.data.heldout_images, config.train.batch_size = 0, 4
    config.data.update(changes)
    return config


def test_stand_ins_are_as_large_as_the_mean_image_of_imagenet(stand_ins):
    records = data.load(stream_config(stand_ins).data).train
    assert len(records) == 16 and records[0]["image"].shape == (375, 500, 3)
    sizes = [len(records.source[row]["image"]) for row in range(16)]
    assert 90_000 < np.mean(sizes) < 120_000, "110 kB is ImageNet's mean"
    decoded = [records[row]["image"].astype(np.float32) for row in range(16)]
    pixels = min(decoded, key=lambda image: image.std())
    smooth = cv2.blur(pixels, (9, 9))
    assert pixels.std() > 30 and smooth.std() > 10, "textured at the scale of pixels and of objects"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_pipeline_stands_beside_decoding_alone_of_the_same_records(stand_ins, monkeypatch, num_workers):
    monkeypatch.setattr(data_cost, "_SETTLE_S", 0.01)
    monkeypatch.setattr(data_cost, "MIN_IMAGES", 16)
    config = stream_config(stand_ins, num_workers=num_workers)
    figures = json.loads(json.dumps(data_cost.measure(config, lambda: None, rounds=1)))
    assert (figures["images"], figures["num_workers"], figures["records"]) == (16, num_workers, "ImageNet")
    for name in ("pipeline", "alone"):
        assert all(speed["min"] > 0 for speed in figures[f"{name}_images_per_second"].values())
    cpu = [figures[f"{name}_images_per_second"]["cpu"]["median"] for name in ("pipeline", "alone")]
    assert figures["cpu_share"]["median"] == pytest.approx(cpu[0] / cpu[1])
    lines = data_cost.text(figures).splitlines()
    assert lines[0].startswith("imagenet, 64 px, batch 4; ") and f"{num_workers} workers, prefetch 2" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["pipeline", "alone", "pipeline"]


def test_without_imagenet_stand_ins_are_made_named_and_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_cost, "_SETTLE_S", 0.01)
    monkeypatch.setattr(data_cost, "MIN_IMAGES", 12)
    monkeypatch.setattr(data_cost, "_NUM_PICTURES", 2)
    monkeypatch.setattr(data_cost.tempfile, "tempdir", str(tmp_path))
    figures = data_cost.measure(stream_config(str(tmp_path / "nowhere")), lambda: None, rounds=1)
    assert "records: stand-ins, made for this measurement; 12 of 1" in data_cost.text(figures)
    assert f"no ImageNet in {tmp_path}/nowhere: making 12 stand-ins" in capsys.readouterr().err
    assert not list(tmp_path.glob("stand-ins-*"))


def test_batches_of_a_set_in_memory_stand_beside_a_training_step():
    config = tiny("qat")
    config.model.name, config.data.image_size_px, config.loss.feature_layers = "tiny", 8, ()
    config.quant.bits, config.bact.starts, config.train.batch_size = (8,), (), 64
    figures = json.loads(json.dumps(benchmark.measure_data(config, rounds=2)))
    assert figures["batches"] == (1347 - 128) // 64
    for clock in ("cpu", "wall"):
        batch, step = (figures[f"{name}_seconds"][clock] for name in ("batch", "step"))
        assert 0 < batch["min"] and batch["min"] / step["max"] <= figures["share"][clock]["median"]
    lines = data_cost.text(figures).splitlines()
    assert lines[0].startswith("digits, 8 px, batch 64; ")
    assert [line.split()[0] for line in lines[2:]] == ["batch", "step,", "batch"]


def test_an_input_without_rounds_is_refused():
    with pytest.raises(ValueError, match="--rounds must be at least 1, got 0"):
        data_cost.measure(tiny(), lambda: None, rounds=0)
