"""Sets that are missing, incomplete or damaged are told in one line, at once, without the network."""

import pathlib
import resource
import shutil
import socket
import subprocess
import sys

import pytest
from data_example import settings
from prepare_data_test import write_cifar

from triqdef_jax import data, prepare_data

ROOT = pathlib.Path(__file__).resolve().parent.parent


COMMANDS = {
    "cifar10": "python -m triqdef_jax.prepare_data --dataset=cifar10",
    "imagenet2012": "python -m triqdef_jax.prepare_data --dataset=imagenet2012 "
    "--archive_train=ILSVRC2012_img_train.tar --archive_val=ILSVRC2012_img_val.tar",
}


@pytest.mark.parametrize(("name", "builder"), [("cifar10", "cifar10"), ("imagenet", "imagenet2012")])
def test_missing_data_are_told_in_one_line_without_touching_the_network(tmp_path, monkeypatch, name, builder):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    advice = f"run: {COMMANDS[builder]} --data_dir={tmp_path}"
    with pytest.raises(FileNotFoundError) as caught:
        data.load(settings(name))
    assert str(caught.value) == f"{builder} is not prepared in {tmp_path}; {advice}"
    (tmp_path / builder).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{builder} is not completely prepared") as caught:
        data.load(settings(name, dir=str(tmp_path)))
    assert str(caught.value).endswith(advice) and "\n" not in str(caught.value)


MAX_CPU_S = 10  # CPU time, because a busy machine stretches the clock

WITHOUT_NETWORK = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.__init__ = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = "train"
runpy.run_module("triqdef_jax.train", run_name="__main__")
"""


def test_training_on_missing_data_ends_in_seconds_with_the_command_and_opens_no_socket(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    flags = ["--config=configs/imagenet.py", f"--config.data.dir={tmp_path}/nowhere", f"--workdir={tmp_path}/run"]
    done = subprocess.run([sys.executable, "-c", WITHOUT_NETWORK, *flags], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout) == (2, "")
    said = f"error: imagenet2012 is not prepared in {tmp_path}/nowhere; run: {COMMANDS['imagenet2012']} --data_dir="
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_CPU_S
    assert not (tmp_path / "run").exists()


def cut(share):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        (
            "*-train.array_record*",
            cut(0.0),
            "is damaged: imagenet2012-train.array_record-00000-of-00001 cannot be read",
        ),
        (
            "*-train.array_record*",
            cut(0.5),
            "is damaged: imagenet2012-train.array_record-00000-of-00001 cannot be read",
        ),
        (
            "*-train.array_record*",
            cut(0.99),
            "is damaged: imagenet2012-train.array_record-00000-of-00001 cannot be rea",
        ),
        ("*-validation.array_record*", pathlib.Path.unlink, "cannot be read (open() failed: No such file or directory"),
        ("dataset_info.json", cut(0.5), "is damaged or not in array_record format"),
        (
            "dataset_info.json",
            lambda path: path.write_text(path.read_text().replace('"26"', '"27"')),
            "26 records, exp",
        ),
    ],
)
def test_damaged_files_are_told_in_one_line_before_training_starts(imagenet_dir, tmp_path, file, damage, said):
    shutil.copytree(imagenet_dir, tmp_path / "sets")
    (path,) = (tmp_path / "sets").rglob(file)
    damage(path)
    with pytest.raises(ValueError) as caught:
        data.load(settings("imagenet", dir=str(tmp_path / "sets")))
    assert said in str(caught.value) and str(tmp_path / "sets") in str(caught.value)
    assert str(caught.value).endswith(f"{COMMANDS['imagenet2012']} --data_dir={tmp_path}/sets --overwrite")


def test_a_set_in_another_file_format_is_refused(tmp_path):
    archive, *_ = write_cifar(tmp_path)
    info = prepare_data.prepare("cifar10", tmp_path, {"archive": archive}, skip_checksum=True) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"not in array_record format; run: .* --overwrite$"):
        data.load(settings("cifar10", dir=str(tmp_path)))
