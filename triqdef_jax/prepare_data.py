"""Program: write CIFAR-10 or ImageNet from the official archives in TensorFlow Datasets' array_record layout.

    python -m triqdef_jax.prepare_data --dataset=cifar10 [--data_dir=DIR] [--archive=cifar-10-binary.tar.gz]
    python -m triqdef_jax.prepare_data --dataset=imagenet2012 --archive_train=ILSVRC2012_img_train.tar \
        --archive_val=ILSVRC2012_img_val.tar

Interrupted or killed, the same command goes on and writes no finished shard again, reads no checked archive again. A set
appears under its final name only when it is complete. The stock TFDS builders decide on features and example keys;
nothing is unpickled, and TensorFlow is not needed.
"""

import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from absl import flags

from triqdef_jax import archives as archives_lib
from triqdef_jax import data, entry, files, shards
from triqdef_jax.archives import ARCHIVES, Member
from triqdef_jax.data import images
from triqdef_jax.shards import Examples

_CIFAR_SIDE_PX = 32
_CIFAR_RECORD_BYTES = 1 + 3 * _CIFAR_SIDE_PX**2  # label, then the red, green and blue plane
_CIFAR_FOLDER = "cifar-10-batches-bin/"
_CIFAR_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_ARCHIVES_FILE = "archives.json"  # of a preparation: which archives it is made from, and whether they are checked
_INDEX_FILE = "index.npz"  # of a preparation: where in the archives the images lie
_COLUMNS = {"label": "S", "name": "S", "offset": np.int64, "size": np.int64}  # of the index, a row per image


def prepare(
    dataset: str,
    data_dir: str | os.PathLike,
    archives: Mapping[str, str | os.PathLike],
    *,
    overwrite: bool = False,
    skip_checksum: bool = False,
) -> pathlib.Path:
    """Write a data set, unless it is there already; go on where an interrupted call of the same archives ended.

    Args:
        dataset: key of `ARCHIVES`.
        data_dir: root of TFDS data sets; made where missing.
        archives: paths by flag name; an archive that has a URL is fetched when not given.
        overwrite: replace a prepared set; it stays in place until the new one is complete.
        skip_checksum: take archives as they are, small or mirrored ones too.

    Returns:
        Directory of the prepared set, `data_dir/dataset/version`.

    Raises:
        ValueError: unknown data set or archive, wrong checksum, contents that are not what they should be, or another
            process prepares the same set.
        FileNotFoundError: an archive is missing or cannot be fetched.
    """
    import tensorflow_datasets as tfds

    if dataset not in ARCHIVES:
        raise ValueError(f"--dataset must be one of {', '.join(ARCHIVES)}; got {dataset!r}")
    data_dir = pathlib.Path(data_dir)
    staging = data_dir / f".prepare-{dataset}"  # hidden, so that no reader takes it for a data set
    builder = tfds.builder(dataset, data_dir=staging, file_format="array_record")
    final = data_dir / dataset / str(builder.version)
    if final.exists() and not overwrite:
        _check_complete(final)
        print(f"{dataset} is already prepared in {final}; --overwrite replaces it")
        return final
    paths = _find_archives(dataset, data_dir, archives)
    with files.exclusive(staging / ".lock"):
        _check_archives(dataset, paths, archives, staging, skip_checksum)
        try:
            shards.write(builder, _SPLITS[dataset](builder, paths, staging))
        except ValueError:  # of contents that cannot become right; whatever else ends this leaves what is written
            shutil.rmtree(staging)
            raise
        _publish(pathlib.Path(builder.data_dir), final, staging)
    counts = ", ".join(f"{split} {info.num_examples}" for split, info in builder.info.splits.items())
    print(f"prepared {dataset} in {final}: {counts} images")
    return final


def _check_complete(final: pathlib.Path) -> None:
    if not (final / "dataset_info.json").is_file():  # written last
        raise ValueError(f"{final} exists but is no complete data set; move it away or pass --overwrite")


def _publish(written: pathlib.Path, final: pathlib.Path, staging: pathlib.Path) -> None:
    """Move the finished set to its name, and remove `staging` with what was there before."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(staging / "replaced")
    written.rename(final)
    shutil.rmtree(staging)


def _find_archives(
    dataset: str, data_dir: pathlib.Path, given: Mapping[str, str | os.PathLike]
) -> dict[str, pathlib.Path]:
    known = ARCHIVES[dataset]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"--{unknown[0]} does not belong to {dataset}, which takes --{', --'.join(known)}")
    for flag, archive in known.items():
        if flag not in given and archive.url is None:
            raise ValueError(f"--{flag}=FILE is needed for {dataset}: {archive.file_name}, see https://image-net.org")
    paths = {flag: pathlib.Path(path).expanduser().resolve() for flag, path in given.items()}
    for path in paths.values():
        archives_lib.check_file(path, None)
    fetched = known.keys() - paths.keys()
    return paths | {flag: data_dir / "downloads" / known[flag].file_name for flag in fetched}


def _check_archives(dataset, paths, given, staging, skip_checksum):
    """Fetch or check what an interrupted call has not; drop what that one wrote if it was made from other archives."""
    state = staging / _ARCHIVES_FILE
    seen = json.loads(state.read_text()) if state.exists() else {}
    kept = {flag: entry for flag, entry in seen.items() if entry["file"] == _identity(paths[flag])}
    if kept != seen:
        print("the archives are not those of the interrupted preparation; beginning anew", file=sys.stderr)
        shutil.rmtree(staging / dataset, ignore_errors=True)
        (staging / _INDEX_FILE).unlink(missing_ok=True)
    for flag, archive in ARCHIVES[dataset].items():
        if not kept.get(flag, {}).get("is_checked"):
            expected = None if skip_checksum else archive.sha256
            if flag in given:
                archives_lib.check_file(paths[flag], expected)
            else:
                archives_lib.fetch(archive.url, paths[flag], expected)
            kept[flag] = {"file": _identity(paths[flag]), "is_checked": not skip_checksum}
        files.atomic_write_json(state, kept)


def _identity(path):
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def _cifar10_splits(builder: Any, paths: Mapping[str, pathlib.Path], staging: pathlib.Path) -> dict[str, Examples]:
    del staging  # one archive that is read in a second
    path = paths["archive"]
    contents = {
        name.removeprefix("./").removeprefix(_CIFAR_FOLDER): raw for name, raw in archives_lib.contents(path).items()
    }
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

    def read(row: int) -> dict[str, Any]:
        return {"id": f"{split}_{row:05d}", "image": _encode(pixels[row], ".png"), "label": int(records[row, 0])}

    return Examples(range(len(records)), len(whole) * 3 // 4, read)  # what PNG makes of them


def _imagenet_splits(builder: Any, paths: Mapping[str, pathlib.Path], staging: pathlib.Path) -> dict[str, Examples]:
    """Return both splits as places in their archives, found once: the training archive holds 1.3 million headers."""
    del builder  # class names come with TFDS
    path = staging / _INDEX_FILE
    if not path.exists():
        print("reading the headers of the archives", file=sys.stderr)
        rows = {"train": _imagenet_train(paths["archive_train"]), "validation": _imagenet_val(paths["archive_val"])}
        files.atomic_savez(
            path, **{f"{split}.{name}": v for split in rows for name, v in _columns(rows[split]).items()}
        )
    with np.load(path) as index:
        columns = {split: [index[f"{split}.{name}"] for name in _COLUMNS] for split in ("train", "validation")}
    return {
        "train": _imagenet_examples(paths["archive_train"], *columns["train"]),
        "validation": _imagenet_examples(paths["archive_val"], *columns["validation"]),
    }


def _columns(rows: list[tuple]) -> dict[str, np.ndarray]:
    arrays = (np.array(values, dtype) for values, dtype in zip(zip(*rows, strict=True), _COLUMNS.values(), strict=True))
    return dict(zip(_COLUMNS, arrays, strict=True))


def _imagenet_train(path: pathlib.Path) -> list[tuple]:
    """Return (label, name, offset, size) of the images of an archive of archives, one 'n01440764.tar' per class."""
    found = [
        (pathlib.PurePosixPath(folder.name).stem, *image)
        for folder in archives_lib.members(path)
        for image in archives_lib.members(path, folder)
    ]
    return _some(path, found)


def _imagenet_val(path: pathlib.Path) -> list[tuple]:
    """Return (label, name, offset, size) of the validation images; the labels lie in TFDS, by the number in the name."""
    import tensorflow_datasets as tfds

    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    found = []
    for member in archives_lib.members(path):
        name = pathlib.PurePosixPath(member.name).name
        number = name.removeprefix("ILSVRC2012_val_").removesuffix(".JPEG")
        if not number.isdigit() or not 1 <= int(number) <= len(labels):
            raise ValueError(f"{path} holds {member.name!r}, expected ILSVRC2012_val_00000001.JPEG and so on")
        found.append((labels[int(number) - 1], name, member.offset, member.size))
    return _some(path, found)


def _some(path, found):
    if not found:
        raise ValueError(f"{path} holds no images; download it anew")
    return found


def _imagenet_examples(path: pathlib.Path, labels, names, offsets, sizes) -> Examples:
    names = [name.decode() for name in names]

    def read(row: int) -> dict[str, Any]:
        encoded = archives_lib.read(path, Member(names[row], int(offsets[row]), int(sizes[row])))
        return _imagenet_example(names[row], encoded, label=labels[row].decode())

    return Examples(names, int(sizes.sum()), read)


def _imagenet_example(file_name: str, encoded: bytes, *, label: str) -> dict[str, Any]:
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as stock

    image = io.BytesIO(encoded)
    if file_name in stock.CMYK_IMAGES or file_name in stock.PNG_IMAGES:  # 23 files; the stock builder mends them too
        image = _encode(images.decode(encoded), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 100])
    return {"file_name": file_name, "image": image, "label": label}


def _encode(image: np.ndarray, suffix: str, options: list[int] | None = None) -> io.BytesIO:
    """Encode uint8 [H, W, 3], RGB; TFDS stores encoded bytes as they are."""
    return io.BytesIO(cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options or [])[1].tobytes())


_SPLITS: dict[str, Callable[[Any, Mapping[str, pathlib.Path], pathlib.Path], dict[str, Examples]]] = {
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
