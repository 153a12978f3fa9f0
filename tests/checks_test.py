"""Checks say ok of a machine that can train, and name what is missing and what to do on one that cannot."""

import importlib.metadata
import pathlib

import jax
import pytest

from triqdef_jax import checks, sharding
from triqdef_jax.checks import FIX, OK, WARN

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSTALLED = {"jax": "0.12.0.1", "flax": "0.12.12", "odd": "2.0rc1+cu13"}


def version_of(name):
    if name not in INSTALLED:
        raise importlib.metadata.PackageNotFoundError(name)
    return INSTALLED[name]


@pytest.mark.parametrize(
    "lines, level, said",
    [
        (["# tested", "", "jax>=0.10.2,<0.13", "flax>=0.12.8,<0.13  # newest", "odd"], OK, "all 3 within"),
        (["jax>=0.10.2,<0.12"], WARN, "jax 0.12.0.1 (tested: >=0.10.2,<0.12)"),
        (["flax>=0.12.13"], WARN, "flax 0.12.12 (tested: >=0.12.13)"),
        (["odd==2.1"], WARN, "odd 2.0rc1+cu13"),
        (["jax>=0.10.2", "grain>=0.2.18,<0.3"], FIX, "missing: pip install 'grain>=0.2.18,<0.3'"),
    ],
)
def test_packages_are_held_against_the_ranges_that_are_tested(lines, level, said):
    found = checks.packages(lines, version_of)
    assert found.level == level and said in found.text


def test_the_packages_of_this_environment_are_within_requirements():
    found = checks.packages((ROOT / "requirements.txt").read_text().splitlines())
    assert found.level == OK and f"jax {jax.__version__}" in found.text


@pytest.mark.parametrize(
    "present, environ, level",
    [((), {}, OK), (("/dev/nvidia0",), {}, WARN), (("/dev/nvidia0",), {"JAX_PLATFORMS": "cpu"}, OK)],
)
def test_an_accelerator_left_alone_is_told_unless_it_is_wanted_so(present, environ, level):
    found = checks.devices(jax.devices(), jax.local_device_count(), present, environ)
    assert found.level == level and f"{jax.device_count()} x cpu" in found.text
    assert ("pip install 'jax[cuda13]==" in found.text) == (level == WARN)


class Card:
    def __init__(self, used):
        self.used = used

    def memory_stats(self):
        return {"bytes_limit": 80_000_000_000, "bytes_in_use": self.used}


def test_memory_is_the_devices_or_else_the_hosts():
    assert checks.memory(Card(0)).text == "80.0 GB per device, 80.0 GB free"
    assert checks.memory(Card(79_500_000_000)) == (WARN, "memory", "80.0 GB per device, 0.5 GB free")
    assert "of the host" in checks.memory(jax.devices()[0]).text


def test_a_collective_is_timed_and_its_sum_is_checked(monkeypatch):
    mesh = sharding.data_mesh()
    found = checks.collective(mesh, repeats=3)
    assert found.level == OK and "4 MiB over" in found.text and "median of 3" in found.text
    right = checks._numbered_rows
    monkeypatch.setattr(checks, "_numbered_rows", lambda index: right(index) + 1)
    found = checks.collective(mesh, repeats=1)
    assert found.level == FIX and f"{2 * mesh.size:g} for {mesh.size:g}" in found.text


def test_data_are_ready_or_it_is_said_how_to_prepare_them(tiny_config, tmp_path):
    found, num_train = checks.dataset(tiny_config().data)
    assert (found.level, num_train) == (OK, 256) and "digits embedded" in found.text
    found, num_train = checks.dataset(tiny_config(**{"data.name": "cifar10", "data.dir": str(tmp_path)}).data)
    assert (found.level, num_train) == (FIX, 0)
    assert f"python -m triqdef_jax.prepare_data --dataset=cifar10 --data_dir={tmp_path}" in found.text


def test_a_config_is_held_against_data_and_devices(tiny_config):
    mesh = sharding.data_mesh()
    assert checks.run(tiny_config(), 256, mesh)[::2] == (OK, f"8 steps of 64 images, {64 // mesh.size} per device")
    found = checks.run(tiny_config(), 63, mesh)
    assert found.level == FIX and "train.batch_size must be at most the 63 training images" in found.text
    assert checks.run(tiny_config(), 0, mesh).level == WARN


def test_a_disk_is_written_to_measured_and_left_as_it_was(tmp_path):
    workdir = tmp_path / "runs" / "one"
    assert checks.disk(workdir, min_free_gb=1e-6).level == OK
    found = checks.disk(workdir, min_free_gb=1e9)
    assert found.level == FIX and "below --min_free_gb=1e+09; make room or name another --workdir" in found.text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").write_text("a file where a folder should be")
    found = checks.disk(workdir, min_free_gb=1e-6)
    assert found.level == FIX and f"cannot write to {tmp_path / 'runs'} (Not a directory)" in found.text


@pytest.mark.parametrize(
    "changes, here, level, said",
    [
        ({}, 1, OK, "none (data.num_workers=0), 4 cores"),
        ({"num_workers": 2, "prefetch": 2}, 1, OK, "2 on 4 cores, up to 0.14 of 0.60 GB"),  # 2 (2 x 2 + 3) 10 MB
        ({"num_workers": 2, "prefetch": 2}, 3, WARN, "6 on 4 cores"),
        ({"num_workers": 4, "prefetch": 8}, 1, FIX, "4 on 4 cores, up to 0.76 of 0.60 GB in /dev/shm: enlarge it"),
    ],
)
def test_workers_need_cores_and_shared_memory(tiny_config, changes, here, level, said):
    settings = tiny_config(**{f"data.{name}": value for name, value in changes.items()}).data
    found = checks.workers(settings, 10_000_000, here, cores=4, shared_bytes=600_000_000)
    assert found.level == level and said in found.text


def test_a_batch_of_images_has_its_bytes(tiny_config):
    assert checks.batch_bytes(tiny_config(), 3) == 22 * 8 * 8 * 3  # 64 images over three processes
    assert checks.batch_bytes(tiny_config(**{"data.image_size_px": 0}), 1) == 64 * 224 * 224 * 3


def test_a_compile_cache_is_counted_or_missed(tmp_path):
    assert checks.compile_cache(None).level == WARN
    (tmp_path / "program").write_bytes(bytes(20_000_000))
    assert checks.compile_cache(str(tmp_path)).text == f"{tmp_path}, 1 files, 0.02 GB"
    assert checks.compile_cache(str(tmp_path / "program" / "below")).level == WARN
    assert checks.compile_cache(str(tmp_path / "new")).level == OK


@pytest.mark.parametrize(
    "environ, num, level", [({"HTTPS_PROXY": "x"}, 1, OK), ({"HTTPS_PROXY": "x"}, 2, WARN), ({}, 2, OK)]
)
def test_proxies_matter_to_several_processes(environ, num, level):
    found = checks.proxies(environ, num)
    assert found.level == level and ("HTTPS_PROXY" in found.text) == bool(environ)
