"""Pictures are valid PNG files whose content follows patch, bit-width and image; their list names each of them."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from triqdef_jax import drawing, pictures, probes, runs
from triqdef_jax.patch_pool import PatchPool


@pytest.fixture(scope="module")
def trained(tiny_run):
    workdir, loaded = tiny_run
    return runs.load_trained(workdir), loaded


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (4, 4, 4, 3)).astype(np.float32) / 255
    masks = np.zeros((4, 4, 4), np.float32)
    masks[:, :3, :3] = 1
    return PatchPool(values, masks, np.full(4, 3, np.int32), np.array([0, 1, 2, -1], np.int32), "digest")


@pytest.fixture(scope="module")
def drawn(trained, pool):
    return pictures.draw(*trained, pool, num_images=4)


def test_every_kind_of_picture_is_drawn(drawn):
    assert [picture.name for picture in drawn] == [
        "patches-training",
        "patches-held-out",
        "grad-cam-clean",
        "grad-cam-patched",
        "maps-0",
        "maps-1",
    ]
    assert {picture.group for picture in drawn} == {"patches", "grad_cam", "maps"}
    assert len({picture.image.tobytes() for picture in drawn}) == len(drawn)


def test_saved_pictures_are_png_files_that_the_list_names(drawn, tmp_path):
    path = pictures.save(tmp_path / "run", drawn, {"step": 8})
    record = json.loads(path.read_text())
    assert (record["kind"], record["name"], record["step"]) == ("pictures", "run", 8)
    for picture, listed in zip(drawn, record["pictures"], strict=True):
        content = (path.parent / listed["file"]).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        read = cv2.cvtColor(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        np.testing.assert_array_equal(read, picture.image)
        assert (listed["title"], listed["caption"], listed["group"]) == (picture.title, picture.caption, picture.group)


def test_a_patch_is_drawn_as_it_is_with_grey_outside_its_mask(pool):
    sheet = pictures.patch_sheet(pool, name="x", title="x").image
    top, left, side = 6 + 16, 6, 96
    tile = sheet[top : top + side, left : left + side]
    np.testing.assert_array_equal(tile[::24, ::24][:3, :3], np.uint8(np.rint(255 * pool.values[0, :3, :3])))
    assert (tile[80, 80] == 128).all()


def test_pictures_of_patched_images_change_with_the_patch(trained, pool, drawn):
    run, loaded = trained
    images, labels = probes.first_test_images(loaded, 4)
    other = pool._replace(values=1.0 - pool.values)
    networks = [probes.one_bit(run, b) for b in (32, 4)]
    patched = probes.patched(other.split()[1], images, run.config)
    cam = pictures.cam_sheet(networks, patched, labels, layer="stage1", image_set="patched").image
    maps = pictures.map_sheets(networks, patched, labels, layers=("stage1",))[0].image
    assert cam.shape == drawn[3].image.shape and (cam != drawn[3].image).any()
    assert maps.shape == drawn[4].image.shape and (maps != drawn[4].image).any()
    again = probes.patched(pool.split()[1], images, run.config)
    same = pictures.cam_sheet(networks, again, labels, layer="stage1", image_set="patched").image
    np.testing.assert_array_equal(same, drawn[3].image)


def test_a_map_tile_is_the_map_of_its_bit_width(trained, pool):
    run, loaded = trained
    images, labels = probes.first_test_images(loaded, 4)
    network = probes.one_bit(run, 4)
    sheet = pictures.map_sheets([network], images, labels, layers=("stage1",))[0].image
    feature = np.abs(np.asarray(probes.probe(network, images, labels).maps["stage1"][0])).mean(-1)
    expected = drawing.heat_colours(feature / feature.max())
    row = 6 + (96 + 16 + 6) + 16  # below the image, under the label
    tile = sheet[row : row + 96 : 12, 6 : 6 + 96 : 12]  # 8 px, enlarged 12 times
    assert np.abs(tile.astype(int) - expected).max() <= 6  # one step of 8-bit heat moves a colour by up to 6


def test_an_unknown_layer_or_no_image_is_refused(trained, pool):
    with pytest.raises(ValueError, match="layer of stem, stage1 and 1 image or more, got 'stage9'"):
        pictures.draw(*trained, pool, num_images=1, layer="stage9")
    with pytest.raises(ValueError, match="got '' and 0"):
        pictures.draw(*trained, pool, num_images=0)


def test_a_directory_without_a_run_is_one_line_and_exit_code_two(tmp_path):
    command = [sys.executable, "-m", "triqdef_jax.pictures", f"--workdirs={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and f"no run in {tmp_path}" in done.stderr
