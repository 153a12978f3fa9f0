"""Program: write CIFAR-10 or ImageNet from the official archives in TensorFlow Datasets' array_record layout.

    python -m triqdef_jax.prepare_data --dataset=cifar10 [--data_dir=DIR] [--archive=cifar-10-binary.tar.gz]
    python -m triqdef_jax.prepare_data --dataset=imagenet2012 --archive_train=ILSVRC2012_img_train.tar \
        --archive_val=ILSVRC2012_img_val.tar

The stock TFDS builders decide on features, example keys, order and shards; only their generators, which would need
TensorFlow, are replaced. Nothing is unpickled. A set appears under its final name only when it is complete.
"""

import contextlib
import gzip
import hashlib
import io
import os
import pathlib
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from absl import flags

from triqdef_jax import data, entry
from triqdef_jax.data import images

_DOWNLOAD_TIMEOUT_S = 60
_CIFAR_SIDE_PX = 32
_CIFAR_RECORD_BYTES = 1 + 3 * _CIFAR_SIDE_PX**2  # label, then the red, green and blue plane
_CIFAR_FOLDER = "cifar-10-batches-bin/"
_CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}

Examples = Iterator[tuple[int | str, dict[str, Any]]]


@dataclass(frozen=True)
class Archive:
    """An official archive.

    Attributes:
        file_name: as its publisher calls it.
        sha256: hexadecimal, as listed by TFDS.
        url: where it may be fetched without an account, or None.
    """

    file_name: str
    sha256: str
    url: str | None = None


# By data set, then by the flag that names the file.
ARCHIVES: dict[str, dict[str, Archive]] = {
    "cifar10": {
        "archive": Archive(
            "cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        )
    },
    "imagenet2012": {
        "archive_train": Archive(
            "ILSVRC2012_img_train.tar", "b08200a27a8e34218a0e58fde36b0fe8f73bc377f4acea2d91602057c3ca45bb"
        ),
        "archive_val": Archive(
            "ILSVRC2012_img_val.tar", "c7e06a6c0baccf06d8dbeb6577d71efff84673a5dbdd50633ab44f8ea0456ae0"
        ),
    },
}


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    archives: Mapping[str, str | os.PathLike],
    *,
    overwrite: bool = False,
    skip_checksum: bool = False,
) -> pathlib.Path:
    """Write a data set, unless it is there already.

    Args:
        dataset: key of `ARCHIVES`.
        data_dir: root of TFDS data sets; made where missing.
        archives: paths by flag name; an archive that has a URL is fetched when not given.
        overwrite: replace a prepared set; it stays in place until the new one is complete.
        skip_checksum: take archives as they are, small or mirrored ones too.

    Returns:
        Directory of the prepared set, `data_dir/dataset/version`.

    Raises:
        ValueError: unknown data set or archive, wrong checksum, or contents that are not what they should be.
        FileNotFoundError: an archive is missing or cannot be fetched.
    """
    import tensorflow_datasets as tfds

    if dataset not in ARCHIVES:
        raise ValueError(f"--dataset must be one of {', '.join(ARCHIVES)}; got {dataset!r}")
    data_dir = pathlib.Path(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    _tell_leftovers(data_dir, dataset)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=_staging_prefix(dataset)) as staging:
        builder = tfds.builder(dataset, data_dir=staging, file_format="array_record")
        final = data_dir / dataset / str(builder.version)
        if final.exists() and not overwrite:
            _check_complete(final)
            print(f"{dataset} is already prepared in {final}; --overwrite replaces it")
            return final
        paths = _find_archives(dataset, data_dir, archives, skip_checksum)
        _write(builder, _SPLITS[dataset](builder, paths))
        _publish(pathlib.Path(builder.data_dir), final, pathlib.Path(staging))
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"prepared {dataset} in {final}: {counts} images")
    return final


def _staging_prefix(dataset: str) -> str:
    return f".prepare-{dataset}-"  # hidden, so that no reader takes it for a data set


def _tell_leftovers(data_dir: pathlib.Path, dataset: str) -> None:
    for leftover in data_dir.glob(f"{_staging_prefix(dataset)}*"):
        print(f"left by an interrupted preparation, delete it if none is running: {leftover}", file=sys.stderr)


def _check_complete(final: pathlib.Path) -> None:
    if not (final / "dataset_info.json").is_file():  # TFDS writes it last
        raise ValueError(f"{final} exists but is no complete data set; move it away or pass --overwrite")


def _write(builder: Any, splits: Mapping[str, Examples]) -> None:
    """Run the stock builder on our examples."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder._split_generators = lambda dl_manager: splits  # the stock one downloads, and decodes with TensorFlow
    with contextlib.redirect_stdout(io.StringIO()):  # its announcement names the staging directory
        builder.download_and_prepare()


def _publish(written: pathlib.Path, final: pathlib.Path, staging: pathlib.Path) -> None:
    """Move the finished set to its name; what was there goes into `staging`, which the caller removes."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(staging / "replaced")
    written.rename(final)


def _find_archives(
    dataset: str, data_dir: pathlib.Path, given: Mapping[str, str | os.PathLike], skip_checksum: bool
) -> dict[str, pathlib.Path]:
    known = ARCHIVES[dataset]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"--{unknown[0]} does not belong to {dataset}, which takes --{', --'.join(known)}")
    paths = {}
    for flag, archive in known.items():
        if flag not in given and archive.url is None:
            raise ValueError(f"--{flag}=FILE is needed for {dataset}: {archive.file_name}, see https://image-net.org")
        expected = None if skip_checksum else archive.sha256
        if flag in given:
            paths[flag] = pathlib.Path(given[flag]).expanduser()
            check_file(paths[flag], expected)
        else:
            paths[flag] = fetch(archive.url, data_dir / "downloads" / archive.file_name, expected)
    return paths


def check_file(path: pathlib.Path, sha256: str | None) -> None:
    """Check that a file is there and, unless `sha256` is None, that it has this digest.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the digest differs.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such archive: {path}")
    if sha256 is None:
        return
    print(f"checking {path}", file=sys.stderr)  # minutes for ImageNet
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"wrong checksum of {path}: SHA-256 is {found}, expected {sha256}; download it anew")


def fetch(url: str, path: pathlib.Path, sha256: str | None) -> pathlib.Path:
    """Download `url` to `path`, or keep the file that is there; it appears only when complete and checked.

    Args:
        url: address.
        path: file to write; its directory is made.
        sha256: expected digest, hexadecimal, or None.

    Returns:
        `path`.

    Raises:
        FileNotFoundError: the address cannot be reached.
        ValueError: the digest differs.
    """
    if path.exists():
        check_file(path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        part = pathlib.Path(folder) / path.name
        print(f"fetching {url}", file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_S) as source, part.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        except OSError as error:  # URLError, time-outs and broken connections are OSErrors
            raise FileNotFoundError(f"cannot fetch {url} ({error}); get the file and pass --archive=FILE") from error
        check_file(part, sha256)
        part.rename(path)
    return path


@contextlib.contextmanager
def _open_tar(source: pathlib.Path | io.BytesIO, name: str) -> Iterator[tarfile.TarFile]:
    where = {"fileobj": source} if isinstance(source, io.BytesIO) else {"name": source}
    try:
        with tarfile.open(**where) as archive:
            yield archive
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} is no complete tar archive ({error}); download it anew") from error


def _files(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    return ((member.name, archive.extractfile(member).read()) for member in archive if member.isfile())


def _cifar10_splits(builder: Any, paths: Mapping[str, pathlib.Path]) -> dict[str, Examples]:
    path = paths["archive"]
    with _open_tar(path, str(path)) as archive:
        contents = {name.removeprefix("./").removeprefix(_CIFAR_FOLDER): raw for name, raw in _files(archive)}
        archive.fileobj.read()  # to the very end, where gzip keeps its own checksum
    needed = ["batches.meta.txt", *_CIFAR_FILES["train"], *_CIFAR_FILES["test"]]
    missing = [name for name in needed if name not in contents]
    if missing:
        raise ValueError(f"{path} has no {_CIFAR_FOLDER}{missing[0]}; the binary version of CIFAR-10 is needed")
    builder.info.features["label"].names = contents["batches.meta.txt"].decode().split()
    return {
        split: _cifar10_examples(split, [contents[name] for name in names]) for split, names in _CIFAR_FILES.items()
    }


def _cifar10_examples(split: str, batches: list[bytes]) -> Examples:
    whole = b"".join(batches)
    if len(whole) % _CIFAR_RECORD_BYTES:
        raise ValueError(f"CIFAR-10 {split} files must hold records of {_CIFAR_RECORD_BYTES} bytes, got {len(whole)}")
    records = np.frombuffer(whole, np.uint8).reshape(-1, _CIFAR_RECORD_BYTES)
    pixels = records[:, 1:].reshape(-1, 3, _CIFAR_SIDE_PX, _CIFAR_SIDE_PX).transpose(0, 2, 3, 1)
    for index, (label, image) in enumerate(zip(records[:, 0], pixels, strict=True)):
        yield index, {"id": f"{split}_{index:05d}", "image": _encode(image, ".png"), "label": int(label)}


def _imagenet_splits(builder: Any, paths: Mapping[str, pathlib.Path]) -> dict[str, Examples]:
    del builder  # class names and validation labels come with TFDS
    return {"train": _imagenet_train(paths["archive_train"]), "validation": _imagenet_validation(paths["archive_val"])}


def _imagenet_train(path: pathlib.Path) -> Examples:
    """Yield the images of an archive of archives, one 'n01440764.tar' per class."""
    with _open_tar(path, str(path)) as outer:
        for name, contents in _files(outer):
            with _open_tar(io.BytesIO(contents), f"{name} in {path}") as inner:
                for file_name, encoded in _files(inner):
                    yield _imagenet_example(file_name, encoded, label=name.removesuffix(".tar"))


def _imagenet_validation(path: pathlib.Path) -> Examples:
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with _open_tar(path, str(path)) as archive:
        for name, encoded in _files(archive):
            file_name = pathlib.PurePosixPath(name).name
            number = file_name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
            if not number.isdigit() or not 1 <= int(number) <= len(labels):
                raise ValueError(f"{path} holds {name!r}, expected ILSVRC2012_val_00000001.JPEG and so on")
            yield _imagenet_example(file_name, encoded, label=labels[int(number) - 1])


def _imagenet_example(file_name: str, encoded: bytes, *, label: str) -> tuple[str, dict[str, Any]]:
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as stock

    image = io.BytesIO(encoded)
    if file_name in stock.CMYK_IMAGES or file_name in stock.PNG_IMAGES:  # 23 files; the stock builder mends them too
        image = _encode(images.decode(encoded), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 100])
    return file_name, {"file_name": file_name, "image": image, "label": label}


def _encode(image: np.ndarray, suffix: str, options: list[int] | None = None) -> io.BytesIO:
    """Encode uint8 [H, W, 3], RGB; TFDS stores encoded bytes as they are."""
    return io.BytesIO(cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options or [])[1].tobytes())


_SPLITS: dict[str, Callable[[Any, Mapping[str, pathlib.Path]], dict[str, Examples]]] = {
    "cifar10": _cifar10_splits,
    "imagenet2012": _imagenet_splits,
}


def define_flags() -> None:
    """Define the program's flags; only where it is the program, for other programs have flags of these names."""
    flags.DEFINE_enum("dataset", None, list(ARCHIVES), "Data set to prepare.", required=True)
    flags.DEFINE_string("data_dir", "", "Root of TFDS data sets; default $TFDS_DATA_DIR, else ~/tensorflow_datasets.")
    flags.DEFINE_string("archive", None, "cifar10: the binary version; fetched to DATA_DIR/downloads when not given.")
    flags.DEFINE_string("archive_train", None, "imagenet2012: ILSVRC2012_img_train.tar.")
    flags.DEFINE_string("archive_val", None, "imagenet2012: ILSVRC2012_img_val.tar.")
    flags.DEFINE_bool("overwrite", False, "Replace a prepared set.")
    flags.DEFINE_bool("skip_checksum", False, "Take archives as they are.")


def main(argv: list[str]) -> None:
    """Prepare what the flags name; exit codes as of `entry.run_program`."""
    del argv
    values = flags.FLAGS.flag_values_dict()
    archives = {flag: values[flag] for flag in ("archive", "archive_train", "archive_val") if values[flag]}
    with entry.user_errors():
        prepare(
            values["dataset"],
            data.resolve_dir(values["data_dir"]),
            archives,
            overwrite=values["overwrite"],
            skip_checksum=values["skip_checksum"],
        )


if __name__ == "__main__":
    define_flags()
    entry.run_program(main)
