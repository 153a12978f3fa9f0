"""Ship one bit-width: `python -m triqdef_jax.export --workdir=runs/digits --bits=4 [--format=onnx,stablehlo,npz,c] [--out=DIR]`.

Writes integer models into DIR (default `<workdir>/export/<bits>bit`), runs each of them on test images and noise, and compares all with the carrier
forward, which `evaluate --deployed` measures. One differing row, or an operator that computes in float, fails the export and leaves nothing
behind. Beside the models: `verification.json` with every figure, and `MODEL_CARD.md`. `--checkpoint=best` (on held-out images) or a step ships
another checkpoint than the newest, into `<bits>bit-step<step>`. Exit codes: 0 done, 1 not proven, 2 bad input.

    python -m triqdef_jax.export --workdir=runs/digits --bits=2 --format=onnx --packing=int --layout=nchw
"""

import functools
import hashlib
import importlib.metadata
import pathlib
import platform
import shutil
import sys
import tempfile
from typing import Any, NamedTuple

from absl import flags

from triqdef_jax import entry

VERIFICATION, CARD = "verification.json", "MODEL_CARD.md"


def main(argv):
    del argv
    from triqdef_jax import data, targets
    from triqdef_jax.shipping import artefacts, card, runtimes

    options = flags.FLAGS
    if not options.workdir:
        raise entry.UserError("--workdir=DIR is needed: the directory of a trained run")
    with entry.user_errors():
        trained = _load(options)
        named, out = _free_folder(trained, options)
        loaded = data.load(trained.config.data)
        model = targets.integer_model(trained, loaded, options.bits)
        about = describe(trained, model, options)
        content = artefacts.make(model, options.format, about, layout=options.layout, packing=options.packing)
        record = card.find_record(pathlib.Path(options.workdir) / trained.results, about)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    with temporary as folder:
        export = Export(pathlib.Path(folder), trained, loaded, model, about, content, record, options)
        try:
            return _write(export, named, out)
        except runtimes.BrokenFileError as error:
            print(f"error: {error}; nothing was written", file=sys.stderr)
            return entry.EXIT_FAILED


class Export(NamedTuple):
    """What one export works on: a temporary folder, the run, its data, the integer model, what files say of it and hold, the evidence, flags."""

    folder: pathlib.Path
    trained: Any
    loaded: Any
    model: Any
    about: dict
    content: dict[str, bytes]
    record: dict | None
    options: Any


def _load(options):
    """Return the trained run; a --config that is not its own is refused."""
    from triqdef_jax import runs

    runs.read_config(options.workdir)
    if _CONFIG.value is not None:
        runs.open_workdir(options.workdir, _CONFIG.value)
    return runs.load_trained(options.workdir, options.checkpoint)


def _free_folder(trained, options):
    """Return the path of the folder to make, as it was named and free of links; it may exist if it is empty."""
    own = f"{options.bits}bit{'' if options.checkpoint == 'last' else f'-step{trained.step}'}"
    named = pathlib.Path(options.out or pathlib.Path(options.workdir) / "export" / own)
    out = named.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{named} is in use; name another --out, or remove it first")
    return named, out


def describe(trained, model, options) -> dict:
    """Return what the files say about themselves, JSON types."""
    from triqdef_jax import results
    from triqdef_jax.shipping import artefacts

    config, bits = trained.config, options.bits
    described = results.describe(config, workdir=options.workdir, step=trained.step, deployed=True)
    kept = {key: described[key] for key in ("name", "model", "method", "data", "seed", "step", "config_hash")}
    own = {f"{name}_bits": config.quant[f"{field}_bits"] or bits for name, field in BIT_FIELDS.items()}
    side = model.image_size_px
    onnx_shape = "" if options.layout == "nhwc" else f" (model.onnx: [batch, 3, {side}, {side}])"
    return {
        **kept,
        "bits": bits,
        **own,
        "is_trained": bits in trained.network.bits,
        "input": f"raw uint8 RGB pixels 0..255, [batch, {side}, {side}, 3]{onnx_shape}, no normalisation",
        "digest": artefacts.digest(model),
        "versions": results.versions() | shipping_versions(),
    }


def _write(export, named, out):
    """Write all files into the temporary folder, prove them there, and give the folder its name."""
    from triqdef_jax import files
    from triqdef_jax.shipping import card

    ready, options = export.folder / "export", export.options
    with entry.user_errors():
        for name, value in export.content.items():
            with files.atomic_open(ready / name) as file:
                file.write(value)
    verified = _verify(export) if options.verify else None
    measured = _measure(export) if "onnx" in options.format else None
    if fault := _fault(verified, measured, options):
        print(f"error: {fault}; nothing was written", file=sys.stderr)
        return entry.EXIT_FAILED
    hashes = {name: hashlib.sha256(value).hexdigest() for name, value in export.content.items()}
    record = {"kind": "export", "about": export.about, "processor": platform.processor() or platform.machine()}
    record |= {"files_sha256": hashes, "verification": verified, "onnx": measured}
    with entry.user_errors():
        files.atomic_write_json(ready / VERIFICATION, record)
        with files.atomic_open(ready / CARD) as file:
            file.write(card.text(export.about, verified, measured, export.record).encode())
        if out.exists():
            out.rmdir()
        shutil.move(ready, out)
    if not export.about["is_trained"]:
        print(f"{options.bits} bits were not trained: scales and statistics were calibrated for this export")
    print(f"written to {named}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _fault(verified, measured, options):
    """Say what forbids the export, '' if nothing does."""
    if verified and not verified["is_exact"]:
        names = " and ".join(verified["not_exact"])
        return (
            f"logits of {names} are not those of the carrier forward (rows above); on processors other than x86-64 this is known, "
            "see docs/deploy.md"
        )
    if options.verify and measured and measured["ran"]["float_operators"]:
        names = ", ".join(sorted(set(measured["ran"]["float_operators"])))
        return f"onnxruntime computes {names} in float on this machine; --verify=false ships it all the same"
    return ""


def _verify(export) -> dict:
    """Run the written files and the forwards of this package on test images and noise; returns the record of `verification.verify`."""
    from triqdef_jax import data, deploy, targets
    from triqdef_jax.shipping import runtimes, verification

    classifier, options = export.model.operations[-1], export.options
    logits = classifier.scale, classifier.weights.shape[1]
    found = runtimes.open_all(export.folder / "export", export.folder, options.format, *logits, options.layout)
    runners = {
        verification.CARRIER: functools.partial(deploy.integer_forward, export.model),
        verification.FAKE_QUANT: targets.make(export.trained, export.loaded, str(options.bits)).query,
        **found,
    }
    images, labels, _ = data.test_arrays(export.loaded, verification.BATCH, options.verify_images)
    noise = verification.noise_images(options.noise_images, export.model.image_size_px)
    not_run = {} if "c" in runners or "c" not in options.format else {"c": "no C compiler on this machine"}
    record = verification.verify(runners, images, labels, noise) | {"not_run": not_run}
    if options.attack_images and "onnxruntime" in runners:
        record = _attack(export, record, runners, images, labels)
    print(verification.table(record))
    return record


def _attack(export, record, runners, images, labels):
    """Add the same query attack on the ONNX file and on the carrier; other outcomes count as a runtime that differs."""
    from triqdef_jax.shipping import probe, verification

    few = slice(export.options.attack_images)
    budget = {"size_px": export.trained.config.patches.sizes_px[0], "num_queries": export.options.attack_queries}
    pair = runners["onnxruntime"], runners[verification.CARRIER]
    record |= {"attack": probe.compare(*pair, images[few], labels[few], **budget)}
    if not record["attack"]["is_equal"]:
        record |= {"is_exact": False, "not_exact": [*record["not_exact"], "the query attack"]}
    return record


def _measure(export) -> dict:
    """Return size, latency and operators of the ONNX file beside its float and `quantize_static` versions; printed too."""
    from triqdef_jax.shipping import artefacts, speed

    images = export.loaded.heldout.images[: export.options.calibration_images]
    rivals = speed.contenders(export.model, export.content[artefacts.ONNX], images, layout=export.options.layout)
    figures = speed.figures(rivals)
    print(f"\n{speed.table(**figures)}")
    return figures


def shipping_versions() -> dict[str, str]:
    """Return the versions of the packages that read what is written."""
    return {name: importlib.metadata.version(name) for name in ("onnx", "onnxruntime")}


BIT_FIELDS = {"edge": "edge", "branch": "branch", "stream": "residual"}

if __name__ == "__main__":
    _CONFIG, _ = entry.define_config_flags(default=None)
    flags.DEFINE_string("checkpoint", "last", "Which checkpoint: last, best (on held-out images), or a step.")
    flags.DEFINE_integer("bits", 4, "Bit-width to ship: 2 to 8.", lower_bound=2, upper_bound=8)
    flags.DEFINE_list("format", ["onnx", "stablehlo", "npz", "c"], "Formats: onnx, stablehlo, npz, c, tflite.")
    flags.DEFINE_string("out", "", "Directory to write, new or empty; by default <workdir>/export/<bits>bit.")
    flags.DEFINE_enum("layout", "nhwc", ["nhwc", "nchw"], "Layout of the ONNX input.")
    flags.DEFINE_enum(
        "packing", "planes", ["planes", "int", "none"], "ONNX weights: bit planes, INT4/INT2, or one byte each."
    )
    flags.DEFINE_bool("verify", True, "Run every exported file and compare it with the carrier forward.")
    flags.DEFINE_integer("verify_images", 1000, "Test images to verify on; 0: all.", lower_bound=0)
    flags.DEFINE_integer("noise_images", 500, "Images of uniform noise to verify on; 0: none.", lower_bound=0)
    flags.DEFINE_integer(
        "attack_images", 16, "Images on which a query attack meets the ONNX file; 0: none.", lower_bound=0
    )
    flags.DEFINE_integer("attack_queries", 300, "Queries of that attack, per image.", lower_bound=1)
    flags.DEFINE_integer("calibration_images", 256, "Images that calibrate quantize_static.", lower_bound=1)
    entry.run_program(main)
