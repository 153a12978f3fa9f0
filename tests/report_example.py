"""Result files of every kind for the tests of the report: counts drawn at random, intervals by `metrics.wilson`.

The runs are made up; what is under test is that the page shows what the files say. Names hold characters that HTML, Markdown and LaTeX
would read as their own.
"""

import functools
import json
import pathlib
import struct
import zlib

import numpy as np

from triqdef_jax import grids, metrics

TARGETS = ("32", "8", "5", "4", "2", "3", "6", "ptq:minmax:4", "ptq:mse:4")
NAMES = ("asr_correct", "robust_acc", "asr_all", "tsr", "tsr_clean")
NASTY = "<b>&\"_%$#{}~^|'"  # markup to HTML, Markdown or LaTeX
CELLS = (  # attack, surrogate, placement, px, access, expected success, all of it seen in training
    ("lavan", "fp", "random", 5, "transfer", 0.12, True),
    ("lavan", "qat:4", "random", 5, "transfer", 0.14, True),
    ("gap", "fp", "random", 5, "transfer", 0.11, False),
    ("gap", "qaa", "corner", 5, "transfer", 0.04, False),
    ("lavan", "fp", "random", 6, "transfer", 0.19, False),
    ("lavan", "retrained", "random", 5, "transfer", 0.2, True),
    ("lavan", "self:32", "random", 5, "white-box", 0.3, True),
    ("lavan", "self:4", "random", 5, "white-box", 0.31, True),
    ("lavan", "self:2", "random", 5, "white-box", 0.27, True),
    ("patch_pgd", "self:4", "random", 5, "white-box", 0.44, False),
    ("adaptive", "self:all", "random", 5, "adaptive", 0.41, False),
    ("sparse_rs", "self:4", "random", 5, "query", 0.33, False),
    ("grey", "none", "random", 5, "control", 0.03, True),
    ("noise", "none", "random", 5, "control", 0.05, True),
    ("noise", "none", "random", 6, "control", 0.07, True),
)


def rate(num, den):
    """Return a rate as result files hold it."""
    estimate = _wilson(num, den)
    share = None if den == 0 else num / den
    low, high = (None, None) if den == 0 else (estimate.low, estimate.high)
    return {"num": num, "den": den, "rate": share, "low": low, "high": high}


_wilson = functools.cache(metrics.wilson)  # the same counts come back in every test


def evaluation(name, *, seed=0, images="a" * 64, factor=1.0):
    """Return an evaluation record; `factor` scales every success."""
    rng = np.random.default_rng(seed)
    cells = [_cell(*row, rng, factor) for row in CELLS]
    attacks = [cell for cell in cells if cell["access"] != "control"]
    best = {target: max(attacks, key=lambda cell: cell["success"][target]["asr_correct"]["rate"]) for target in TARGETS}
    return {
        "kind": "evaluation",
        "name": name,
        "preset": "quick",
        "forward": "fake-quant",
        "step": 570,
        "config_hash": "bfb31c6a35ea22dd",
        "method": "triqdef",
        "data": "digits",
        "model": "resnet8, width 16",
        "seed": 0,
        "quant": {"bits": [32, 8, 5, 4, 2], "scale": "learned"},
        "threat_model": {
            "attacker": "knows data and architecture",
            "patch": "one square, values in [0, 1]",
            "odd": NASTY,
        },
        "definitions": {"asr_correct": "wrong with patch / right without", "interval": "95 %"},
        "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
        "device": "cpu",
        "commit": "7a34835",
        "image_ids_sha256": images,
        "num_images": 450,
        "targets": list(TARGETS),
        "clean_accuracy": {target: rate(int(rng.integers(436, 449)), 450) for target in TARGETS},
        "cells": cells,
        "worst": {t: {"cell": best[t]["name"], **best[t]["success"][t]["asr_correct"]} for t in TARGETS},
        "worst_transfer": {
            t: {"cell": "lavan|retrained|random", **attacks[5]["success"][t]["asr_correct"]} for t in TARGETS
        },
        "checks": ["no attack beats patch_pgd (30 pairs)"],
        "robust_all": {target: rate(int(rng.integers(200, 260)), 450) for target in TARGETS},
        "flags": [
            {"flag": "transfer beats white-box", "target": "2", "detail": "lavan on retrained beats lavan on self:2"}
        ],
        "not_run": [{"attack": "patchattack", "reason": f"not in the quick preset {NASTY}"}],
    }


def _cell(attack, surrogate, placement, size_px, access, success, is_seen, rng, factor):
    num_patches = 1 if access == "query" else 10
    num_images = 64 if access == "query" else 450
    den = num_patches * num_images * 9 // 10
    return {
        "name": "|".join((attack, surrogate, placement, *(["6 px"] if size_px == 6 else []))),
        "attack": attack,
        "surrogate": surrogate,
        "placement": placement,
        "size_px": size_px,
        "goal": "targeted",
        "access": access,
        "seen": {"size": size_px == 5, "family": is_seen, "placement": placement == "random"},
        "num_patches": num_patches,
        "num_images": num_images,
        "queries": {"budget": 2000, "mean": 812.5} if access == "query" else None,
        "settings": {"steps": 100},
        "digest": "0123456789abcdef",
        "seconds": 12.3,
        "success": {
            target: {name: rate(int(rng.binomial(den, factor * success)), den) for name in NAMES} for target in TARGETS
        },
    }


def curves():
    """Return success against the patch's side and against steps."""
    sides = [
        {"x": side, "success": {t: rate(min(400, 25 * side), 400) for t in ("32", "4", "2")}} for side in (2, 5, 8, 16)
    ]
    steps = [{"x": 2**i, "success": {"4": rate(40 * i, 400)}} for i in range(1, 8)]
    named = [
        {"title": "success against patch size", "x": "patch side (px)", "points": sides},
        {"title": "success against steps", "x": "steps", "points": steps},
    ]
    return {"kind": "curves", "name": "digits", "curves": named}


def alignment():
    """Return similarities of all pairs of four bit-widths in three maps, and their prediction of transfer."""
    rng = np.random.default_rng(1)
    pairs = []
    for images in ("clean", "patched"):
        for name in ("stage1", "stage2", "input_gradient"):
            for a, b in (("32", "8"), ("32", "4"), ("32", "2"), ("8", "4"), ("8", "2"), ("4", "2")):
                for measure, chance in (("hog_cosine", 0.75), ("cosine", 0.3), ("centred_hog_cosine", 0.02)):
                    value = float(np.clip(chance + rng.normal(0.08, 0.08), -1, 0.97))
                    ends = {"value": value, "low": value - 0.03, "high": value + 0.03, "chance": chance}
                    kind = "fp-b" if a == "32" else "b-b"
                    where = {"a": a, "b": b, "kind": kind, "network": "shared", "images": images, "map": name}
                    pairs.append(where | {"measure": measure} | ends)
    groups = [
        {"kind": kind, "num_pairs": 3, "network": "shared", "images": "clean", "map": "stage1", "measure": "cosine"}
        | {"value": 0.6, "low": 0.5, "high": 0.7, "chance": 0.3, "excess": 0.3, "excess_low": low, "excess_high": 0.4}
        for kind, low in (("fp-b", -0.1), ("b-b", 0.2))
    ]
    prediction = [
        {"map": "stage1", "measure": "cosine", "rho": 0.41, "low": -0.2, "high": 0.8, "num_pairs": 6, "p": 0.31}
        | {"weakest": 0.17}
    ]
    moved = {"network": "shared", "bits": ["32", "4"], "success": [[0.9, 0.2], [0.25, 0.8]], "origin": "quick.json"}
    zero = [
        {"network": "shared", "images": images, "share": {"32": 0.0, "2": z}}
        for images, z in (("clean", 0.25), ("patched", 0.0))
    ]
    return {
        "kind": "alignment",
        "name": "digits",
        "num_images": 128,
        "pairs": pairs,
        "groups": groups,
        "prediction": prediction,
        "transfer": [moved],
        "zero_gradient": zero,
        "definitions": {"edge_iou": "overlap of edges"},
    }


def comparison():
    """Return three paired tests: one for each run, one undecided."""
    counts = ((300, 60, 5, 85, 1e-9, 3e-9), (310, 20, 22, 98, 0.88, 1.0), (290, 4, 50, 106, 1e-6, 2e-6))
    names = ("both", "only_a", "only_b", "neither", "p_value", "p_adjusted")
    pairs = [
        {"cell": "lavan|fp|random", "target": t} | dict(zip(names, c, strict=True))
        for t, c in zip("842", counts, strict=True)
    ]
    return {"kind": "comparison", "name_a": "digits", "name_b": "digits-qat", "pairs": pairs}


def seeds():
    """Return the spread over three seeds."""
    spread = {"mean": 0.12, "sd": 0.02, "low": 0.08, "high": 0.16, "num_seeds": 3}
    success = {"lavan|fp|random": {target: spread for target in ("32", "4", "2")}}
    clean = {target: spread | {"mean": 0.98, "low": 0.97, "high": 0.99} for target in ("32", "4", "2")}
    return {"kind": "seeds", "names": ["s0", "s1", "s2"], "clean_accuracy": clean, "success": success}


def sensitivity():
    """Return a grid of a base with two more seeds and two points, the second far beyond what seeds make of it."""
    targets = ("32", "4", "2")
    grid = (({}, 40), ({"seed": 1}, 44), ({"seed": 2}, 38), ({"loss.alpha": 0.0}, 46))
    points = [
        {
            "changes": changes,
            "clean_accuracy": {target: rate(440, 450) for target in targets},
            "success": {target: rate(num, 400) for target in targets},
        }
        for changes, num in (*grid, ({"loss.lambda_fdp": 8.0, "loss.alpha": 0}, 133))
    ]
    return {"kind": "sensitivity", "points": points, "against_seeds": grids.against_seeds(points)}


def pictures():
    """Return a record of two pictures, one of which has no file."""
    rows = [
        {"file": "pictures/patch.png", "title": "patch 0", "caption": f"made on fp {NASTY}", "group": "patches"},
        {"file": "pictures/gone.png", "title": "patch 1", "caption": "", "group": "patches"},
    ]
    return {"kind": "pictures", "pictures": rows}


def png():
    """Return an 8 x 8 image of grey levels as PNG."""
    rows = b"".join(b"\0" + bytes(range(32 * i, 32 * i + 8)) for i in range(8))

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def metric_lines():
    """Return lines of metrics.jsonl; the last one is torn, as a kill leaves it."""
    lines = [
        json.dumps({"step": 20 * i, "loss": 5 / i, "acc_clean/32": 1 - 1 / (i + 1), "acc_clean/2": 1 - 2 / (i + 2)})
        for i in range(1, 31)
    ]
    return "\n".join([*lines, '{"step": 620, "lo'])


def write_run(folder, records, *, metrics_text=None, pictures_by_name=None):
    """Write a workdir with records by file name; returns its path."""
    folder = pathlib.Path(folder)
    (folder / "results" / "pictures").mkdir(parents=True)
    for name, record in records.items():
        (folder / "results" / f"{name}.json").write_text(json.dumps(record))
    for name, content in (pictures_by_name or {}).items():
        (folder / "results" / "pictures" / name).write_bytes(content)
    if metrics_text is not None:
        (folder / "metrics.jsonl").write_text(metrics_text)
    return folder


def full_run(folder, name="digits", **changes):
    """Write a workdir that holds every kind of record; returns its path."""
    records = {
        "evaluation": evaluation(name, **changes),
        "curves": curves(),
        "alignment": alignment(),
        "comparison": comparison(),
        "seeds": seeds(),
        "sensitivity": sensitivity(),
        "pictures": pictures(),
    }
    return write_run(folder, records, metrics_text=metric_lines(), pictures_by_name={"patch.png": png()})
