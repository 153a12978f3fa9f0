"""Tests run on the CPU, compile everything themselves, and turn on 64-bit floats only inside the tests that ask for it."""

import os

import compiling

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", compiling.XLA_FLAGS)
os.environ.update(compiling.shared_cache())

import jax
import pytest
import small_networks

from triqdef_jax import config as config_lib
from triqdef_jax import data, loop, runs

small_networks.register()


@pytest.fixture
def x64():
    """Give a test float64, in which two right implementations agree to 1e-10 and a rounding code never flips between them."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def tiny_config():
    """Return a function that builds the config of a run of a few seconds on real digits at 8 px, with changed fields."""

    def build(**changes):
        config = config_lib.default()
        fields = {
            "data.image_size_px": 8,
            "data.train_images": 256,
            "model.name": "tiny",
            "model.width": 4,
            "quant.bits": (32, 4),
            "bact.starts": (0.5,),
            "loss.method": "qat",
            "loss.feature_layers": ("stage1",),
            "train.epochs": 2,
            "train.batch_size": 64,
            "eval.images": 50,
            "eval.batch_size": 16,
        }
        config.update_from_flattened_dict(fields | changes)
        return config

    return build


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tmp_path_factory):
    """Return (workdir, data) of a finished run of `tiny_config`: 8 steps, bit-widths 32 and 4."""
    workdir = tmp_path_factory.mktemp("run") / "tiny"
    config = tiny_config()
    loaded = data.load(config.data)
    runs.open_workdir(workdir, config)
    assert loop.train(loop.make_run(config, workdir, loaded.num_train), loaded, None, is_quiet=True) == 8
    return workdir, loaded


@pytest.fixture(scope="module")
def trained(tiny_run):
    """Return (`runs.Trained`, data) of that run, read anew for each module, which may change its config."""
    workdir, loaded = tiny_run
    return runs.load_trained(workdir), loaded


@pytest.fixture(scope="session")
def imagenet_dir(tmp_path_factory):
    """Return the root of a prepared ImageNet of 26 training images, one per class, and 7 for validation."""
    from absl import flags
    from prepare_data_test import write_imagenet

    from triqdef_jax import prepare_data

    folder = tmp_path_factory.mktemp("imagenet")
    prepare_data.prepare("imagenet2012", folder, write_imagenet(folder, num_train=26, num_val=7), skip_checksum=True)
    flags.FLAGS.mark_as_parsed()  # grain's workers inherit the flags of their parent
    return str(folder)
