"""Sets prepared from small archives of the official form are what TFDS would have made, or are not there at all."""

import contextlib
import hashlib
import io
import pathlib
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import shard_utils

from triqdef_jax import archives as archives_lib
from triqdef_jax import files, prepare_data
from triqdef_jax.archives import Archive

ROOT = pathlib.Path(__file__).resolve().parent.parent
CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, contents in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            archive.addfile(info, io.BytesIO(contents))
    return path


def cifar_members(images, labels, num_test):
    """The files of the binary version: five training batches, one test batch, class names."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    records = np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1)
    parts = [*np.array_split(records[:-num_test], 5), records[-num_test:]]
    files = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    members = {f"cifar-10-batches-bin/{file}": part.tobytes() for file, part in zip(files, parts, strict=True)}
    return {"cifar-10-batches-bin/batches.meta.txt": ("\n".join(CIFAR_NAMES) + "\n\n").encode(), **members}


def random_cifar(num):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num, 32, 32, 3), np.uint8), np.arange(num) % 10


def write_cifar(folder, *, num_train=40, num_test=10):
    """Write a small archive; return its path and the arrays in it, training images first."""
    images, labels = random_cifar(num_train + num_test)
    path = pathlib.Path(folder) / "cifar-10-binary.tar.gz"
    return write_tar(path, cifar_members(images, labels, num_test), "w:gz"), images, labels


def jpeg(image):
    return cv2.imencode(".jpg", image)[1].tobytes()


def synsets():
    return tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


def validation_name(number):
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_imagenet(folder, *, num_train=26, num_val=7):
    """Write small archives with one smooth JPEG per class; return the paths by flag name."""
    rng = np.random.default_rng(0)
    picture = lambda: jpeg(cv2.resize(rng.integers(0, 256, (3, 4, 3), np.uint8), (40, 30)))
    classes = {}
    for name in synsets()[:num_train]:
        inner = write_tar(pathlib.Path(folder) / "inner.tar", {f"{name}_1.JPEG": picture()})
        classes[f"{name}.tar"] = inner.read_bytes()
    validation = {validation_name(number): picture() for number in range(1, num_val + 1)}
    return {
        "archive_train": write_tar(pathlib.Path(folder) / "train.tar", classes),
        "archive_val": write_tar(pathlib.Path(folder) / "val.tar", validation),
    }


def read(data_dir, name, split):
    return tfds.builder(name, data_dir=data_dir, file_format="array_record").as_data_source(split)


def encoded(data_dir, split):
    """The records of ImageNet in their order, the images as bytes."""
    builder = tfds.builder("imagenet2012", data_dir=data_dir, file_format="array_record")
    return list(builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()}))


def is_prepared(data_dir):
    return tfds.builder("cifar10", data_dir=data_dir, file_format="array_record").is_prepared()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare_cifar(data_dir, archive, **options):
    return prepare_data.prepare("cifar10", data_dir, {"archive": archive}, skip_checksum=True, **options)


def test_cifar10_keeps_every_pixel_label_and_id_and_needs_no_tensorflow(tmp_path, capsys):
    archive, images, labels = write_cifar(tmp_path)
    final = prepare_cifar(tmp_path / "sets", archive)
    assert final == tmp_path / "sets/cifar10/3.0.2"
    assert capsys.readouterr().out == f"prepared cifar10 in {final}: train 40, test 10 images\n"
    for split, first, num in (("train", 0, 40), ("test", 40, 10)):
        source = read(tmp_path / "sets", "cifar10", split)
        assert len(source) == num
        for record in source:
            row = first + int(record["id"].decode().removeprefix(f"{split}_"))
            np.testing.assert_array_equal(record["image"], images[row])
            assert record["label"] == labels[row]
    info = tfds.builder("cifar10", data_dir=tmp_path / "sets").info
    assert info.features["label"].names == CIFAR_NAMES
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["cifar10"]
    assert "tensorflow" not in sys.modules


def test_a_prepared_set_is_left_alone_unless_overwrite_is_asked_for(tmp_path, capsys):
    archive, *_ = write_cifar(tmp_path)
    final = prepare_cifar(tmp_path, archive)
    before = contents(final)
    archive, *_ = write_cifar(tmp_path, num_train=50)
    capsys.readouterr()
    assert prepare_cifar(tmp_path, archive) == final
    assert capsys.readouterr().out == f"cifar10 is already prepared in {final}; --overwrite replaces it\n"
    assert contents(final) == before
    assert prepare_cifar(tmp_path, archive, overwrite=True) == final
    assert len(read(tmp_path, "cifar10", "train")) == 50


def test_a_failed_overwrite_keeps_the_old_set(tmp_path):
    archive, images, labels = write_cifar(tmp_path)
    final = prepare_cifar(tmp_path, archive)
    before = contents(final)
    members = cifar_members(images, labels, 10)
    members["cifar-10-batches-bin/test_batch.bin"] += b"x"
    with pytest.raises(ValueError, match="test files must hold records of 3073 bytes, got 30731"):
        prepare_cifar(tmp_path, write_tar(archive, members, "w:gz"), overwrite=True)
    assert contents(final) == before
    assert not list(tmp_path.glob(".prepare-*"))


SMALL_SHARDS = 3000  # bytes, in place of 64 MiB: 26 images of 1 kB make eight shards


def killed_preparation(archives, data_dir):
    """Prepare ImageNet in another process that is killed before it reads its 15th image; the archives' digests are right ones."""
    code = (
        "import os, sys; sys.path.insert(0, 'tests'); import prepare_data_test as test\n"
        "from triqdef_jax import archives, prepare_data\n"
        "from tensorflow_datasets.core.utils import shard_utils\n"
        "read, calls = archives.read, []\n"
        "def killed(*args):\n"
        "    calls.append(0)\n"
        "    return os.kill(os.getpid(), 9) if len(calls) == 15 else read(*args)\n"
        "archives.read = killed\n"
        "shard_utils.ShardConfig.min_shard_size = test.SMALL_SHARDS\n"
        "paths = dict(zip(('archive_train', 'archive_val'), sys.argv[2:], strict=True))\n"
        "prepare_data.ARCHIVES['imagenet2012'] = test.with_digests(paths)\n"
        "prepare_data.prepare('imagenet2012', sys.argv[1], paths)\n"
    )
    command = [sys.executable, "-c", code, data_dir, *archives.values()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def with_digests(paths):
    digest = lambda path: hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    return {flag: Archive(pathlib.Path(path).name, digest(path)) for flag, path in paths.items()}


def test_a_killed_preparation_looks_incomplete_and_the_same_command_repeats_one_shard_at_most(
    tmp_path, monkeypatch, capsys
):
    archives = write_imagenet(tmp_path)
    killed = killed_preparation(archives, tmp_path / "sets")
    assert killed.returncode == -9 and killed.stderr.count("checking") == 2, killed.stderr
    (staging,) = (tmp_path / "sets").iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in staging.rglob("*-of-00008")}
    assert 1 < len(written) < 8, (
        "killed before or after the shards of the training images: the test would prove nothing"
    )

    monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", SMALL_SHARDS)
    monkeypatch.setitem(prepare_data.ARCHIVES, "imagenet2012", with_digests(archives))
    names, read_member = [], archives_lib.read
    monkeypatch.setattr(archives_lib, "read", lambda path, member: names.append(member) or read_member(path, member))
    final = prepare_data.prepare("imagenet2012", tmp_path / "sets", archives)
    said = capsys.readouterr().err
    assert "checking" not in said and "reading the headers" not in said
    after = {path.name: path.stat().st_mtime_ns for path in final.glob("*-of-00008")}
    assert len(after) == 8 and written.items() <= after.items()
    repeated = 14 + len(names) - (26 + 7)
    assert 0 <= repeated <= 4, "three or four images make a shard"
    expected = prepare_data.prepare("imagenet2012", tmp_path / "undisturbed", archives, skip_checksum=True)
    assert sorted(contents(final)) == sorted(contents(expected))
    for split in ("train", "validation"):
        ours, theirs = (encoded(tmp_path / name, split) for name in ("sets", "undisturbed"))
        assert len(ours) > 0 and ours == theirs
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["imagenet2012"]


def test_what_was_written_from_other_archives_is_dropped(tmp_path, capsys):
    archive, *_ = write_cifar(tmp_path)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(prepare_data, "_encode", InterruptedAt(45, prepare_data._encode))  # in the second split
        prepare_cifar(tmp_path / "sets", archive)
    assert list((tmp_path / "sets/.prepare-cifar10").rglob("*train*")) and not is_prepared(tmp_path / "sets")
    write_cifar(tmp_path, num_train=50)
    prepare_cifar(tmp_path / "sets", archive)
    assert "beginning anew" in capsys.readouterr().err
    assert len(read(tmp_path / "sets", "cifar10", "train")) == 50


class InterruptedAt:
    """A function that meets Ctrl-C at one of its calls."""

    def __init__(self, call, function):
        self.calls, self.call, self.function = 0, call, function

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.call:
            raise KeyboardInterrupt
        return self.function(*args)


def test_a_set_that_another_process_prepares_is_refused(tmp_path):
    archive, *_ = write_cifar(tmp_path)
    with files.exclusive(tmp_path / ".prepare-cifar10/.lock"):
        with pytest.raises(ValueError, match=r"another process is at work in .*prepare-cifar10; wait for it"):
            prepare_cifar(tmp_path, archive)


def test_an_incomplete_directory_is_refused_and_not_deleted(tmp_path):
    archive, *_ = write_cifar(tmp_path)
    precious = tmp_path / "cifar10/3.0.2/precious"
    precious.mkdir(parents=True)
    with pytest.raises(ValueError, match="exists but is no complete data set; move it away or pass --overwrite"):
        prepare_cifar(tmp_path, archive)
    assert precious.exists()


def test_a_wrong_checksum_ends_the_program_with_one_line_and_code_2(tmp_path):
    archive, *_ = write_cifar(tmp_path)
    command = [sys.executable, "-m", "triqdef_jax.prepare_data", "--dataset=cifar10"]
    result = subprocess.run(
        [*command, f"--data_dir={tmp_path / 'sets'}", f"--archive={archive}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    expected = prepare_data.ARCHIVES["cifar10"]["archive"].sha256
    assert said == [f"error: wrong checksum of {archive}: SHA-256 is {found}, expected {expected}; download it anew"]
    assert "Traceback" not in result.stderr
    assert not is_prepared(tmp_path / "sets")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "no complete tar archive"),
        (lambda raw: b"not an archive", "no complete tar archive"),
        (lambda raw: raw[:-8] + bytes(8), "no complete tar archive"),  # gzip's checksum of the contents
    ],
)
def test_a_damaged_archive_is_refused_and_nothing_is_left(tmp_path, damage, message):
    archive, *_ = write_cifar(tmp_path)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=message):
        prepare_cifar(tmp_path / "sets", archive)
    assert not list((tmp_path / "sets").iterdir())


def test_bad_requests_say_what_to_do(tmp_path):
    archive, images, labels = write_cifar(tmp_path)
    members = cifar_members(images, labels, 10)
    del members["cifar-10-batches-bin/data_batch_3.bin"]
    other = write_tar(tmp_path / "other.tar", members)
    cases = [
        ("mnist", {}, ValueError, "--dataset must be one of cifar10, imagenet2012; got 'mnist'"),
        ("cifar10", {"archive_val": archive}, ValueError, "--archive_val does not belong to cifar10"),
        ("cifar10", {"archive": tmp_path / "absent.tar"}, FileNotFoundError, "no such archive: .*absent.tar"),
        ("cifar10", {"archive": other}, ValueError, "has no cifar-10-batches-bin/data_batch_3.bin; the binary version"),
        ("imagenet2012", {"archive_train": other}, ValueError, "--archive_val=FILE is needed for imagenet2012"),
    ]
    for dataset, archives, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            prepare_data.prepare(dataset, tmp_path / "sets", archives, skip_checksum=True)
        assert "\n" not in str(caught.value)


def test_imagenet_keeps_file_bytes_and_takes_labels_from_classes_and_numbers(tmp_path):
    archives = write_imagenet(tmp_path)
    prepare_data.prepare("imagenet2012", tmp_path, archives, skip_checksum=True)
    train = encoded(tmp_path, "train")
    assert {record["file_name"].decode() for record in train} == {f"{name}_1.JPEG" for name in synsets()[:26]}
    assert all(synsets()[record["label"]] in record["file_name"].decode() for record in train)
    truth = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with tarfile.open(archives["archive_val"]) as archive:
        originals = {name: archive.extractfile(name).read() for name in archive.getnames()}
    validation = {record["file_name"].decode(): record for record in encoded(tmp_path, "validation")}
    assert len(validation) == 7
    for number in range(1, 8):
        record = validation[validation_name(number)]
        assert synsets()[record["label"]] == truth[number - 1]
        assert record["image"] == originals[validation_name(number)]


def test_the_odd_files_of_imagenet_become_rgb_jpegs(tmp_path):
    image = np.full((20, 30, 3), (10, 120, 230), np.uint8)
    png = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    example = prepare_data._imagenet_example("n02105855_2933.JPEG", png, label="n02105855")
    assert example["file_name"] == "n02105855_2933.JPEG" and example["label"] == "n02105855"
    encoded = example["image"].read()
    assert encoded[:3] == b"\xff\xd8\xff", "no JPEG"
    decoded = prepare_data.images.decode(encoded).astype(int)
    assert abs(decoded - image).max() <= 2, "rounding to YCbCr and back costs up to two levels on a flat image"


def test_validation_images_of_unknown_number_are_refused(tmp_path):
    archives = write_imagenet(tmp_path)
    write_tar(archives["archive_val"], {"ILSVRC2012_val_00050001.JPEG": b"", "cat.JPEG": b""})
    with pytest.raises(ValueError, match=r"ILSVRC2012_val_00050001.JPEG', expected ILSVRC2012_val_00000001.JPEG"):
        prepare_data.prepare("imagenet2012", tmp_path / "sets", archives, skip_checksum=True)
    assert not list((tmp_path / "sets").iterdir())
