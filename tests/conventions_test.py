"""House rules as tests over the source: layers, docstrings, file sizes, a test per module, and imports that start nothing."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "triqdef_jax"
MAX_LINES = 400

# Imports run from a module to its own layer (never in a circle) or to a layer above it in this list. A folder is one entry.
LAYERS = (
    ("quantize", "perceptual", "patches", "curriculum"),
    ("models",),
    ("objectives", "attacks", "defenses", "deploy", "metrics", "similarity", "drawing"),
    (
        "across_runs",
        "compile_cache",
        "config",
        "data",
        "entry",
        "files",
        "grids",
        "optimizer",
        "patch_pool",
        "processes",
        "results",
        "sharding",
        "archives",
        "shards",
        "checkpoints",
        "retention",
        "orbax_failures",
        "collectives",
        "timing",
        "verdicts",
        "writer",
    ),
    (
        "ahead",
        "calibration",
        "selection",
        "metric_window",
        "micro_batches",
        "profiling",
        "train_step",
        "loop",
        "runs",
        "sources",
        "surrogates",
        "ptq",
        "guards",
        "stand_ins",
        "attack_cost",
        "data_cost",
        "step_model",
        "scaling",
        "latency",
        "targets",
        "inference",
        "cells",
        "presets",
        "spread",
        "probes",
        "transfer",
        "shipping",
        "report",  # its tables are also those of studies
        "studies",
        "checks",
    ),
    (
        "train",
        "evaluate",
        "alignment",
        "sensitivity",
        "pictures",
        "compare",
        "export",
        "prepare_data",
        "benchmark",
        "doctor",
    ),
)
LAYER_OF = {name: index for index, layer in enumerate(LAYERS) for name in layer}
NUM_PURE_LAYERS = 3  # The first so many know no config, flags, files, clock, logging.
IMPURE = {
    "absl",
    "ml_collections",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "os",
    "io",
    "pathlib",
    "shutil",
    "tempfile",
    "logging",
    "time",
}
NEVER = {"tensorflow", "clu", "torch"}

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
MODULES = [name for name in SOURCES if name != PACKAGE]


def unit(module):
    """The entry of the table that a module belongs to: `attacks` for `triqdef_jax.attacks.losses`."""
    return module.split(".")[1]


def layer(module):
    """Its place in `LAYERS`; a module without one counts as the topmost, and its own test fails."""
    return LAYER_OF.get(unit(module), len(LAYERS))


def imported(module):
    """Yield the dotted names that a module imports anywhere, also inside functions: `a.b` for `from a import b` too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, line {node.lineno}"
            for alias in node.names:
                is_module = f"{node.module}.{alias.name}" in SOURCES
                yield f"{node.module}.{alias.name}" if is_module else node.module


def dependencies(module):
    """The modules of this package that a module imports."""
    return {name for name in imported(module) if name in SOURCES and name != module}


def test_every_module_has_its_place_in_the_layers():
    assert {unit(module) for module in MODULES} <= LAYER_OF.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downward_only(module):
    upward = {name for name in dependencies(module) if name != PACKAGE and layer(name) > layer(module)}
    assert not upward, f"{module} may not import {', '.join(sorted(upward))}"


def test_programs_do_not_import_one_another():
    programs = [module for module in MODULES if layer(module) == len(LAYERS) - 1]
    pairs = [(module, name) for module in programs for name in dependencies(module) if name in programs]
    assert not [(module, name) for module, name in pairs if unit(module) != unit(name)]


def test_no_import_goes_in_a_circle():
    # An __init__ that gathers its folder and the modules of that folder count as one place each; functions' imports count too.
    done, path = set(), []

    def visit(module):
        assert module not in path, f"circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for name in sorted(dependencies(module)):
                visit(name)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) < NUM_PURE_LAYERS])
def test_numeric_layers_read_no_config_flags_files_or_clock(module):
    roots = {name.split(".")[0] for name in imported(module)}
    assert not roots & IMPURE
    used = [node for node in TREES[module].body if not isinstance(node, ast.If)]  # not what runs as a program alone
    calls = [node.func for top in used for node in ast.walk(top) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    methods = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    assert not names & {"open", "print", "input"}
    assert not methods & {
        "read_text",
        "write_text",
        "read_bytes",
        "write_bytes",
        "savez",
        "load",
        "save",
        "loadtxt",
        "fromfile",
        "tofile",
    }


@pytest.mark.parametrize("module", MODULES)
def test_tensorflow_and_its_like_are_never_imported(module):
    assert not {name.split(".")[0] for name in imported(module)} & NEVER


@pytest.mark.parametrize("module", MODULES)
def test_modules_and_their_public_functions_and_classes_have_docstrings(module):
    # A program's manual is the docstring of its module, so `main` needs none of its own.
    tree = TREES[module]
    assert not tree.body or ast.get_docstring(tree), f"{module} has no docstring"
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = [node for node in definitions if not node.name.startswith("_") and node.name != "main"]
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert not bare, f"{module}: no docstring on {', '.join(bare)}"


@pytest.mark.parametrize(
    "path", [*SOURCES.values(), *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.stem
)
def test_no_file_is_longer_than_four_hundred_lines(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_every_module_is_tested_by_a_file_of_its_name_or_its_folders():
    # An __init__ is part of its folder; `models` has a test file per module and no other.
    untested = []
    for module, path in SOURCES.items():
        parts = module.split(".")[1:]
        if path.stem == "__init__" and (not TREES[module].body or parts in ([], ["models"])):
            continue
        if not any((ROOT / "tests" / f"{name}_test.py").exists() for name in parts):
            untested.append(module)
    assert not untested, f"no tests for {', '.join(untested)}"


def test_no_module_is_a_drawer_for_odds_and_ends():
    names = {part for module in SOURCES for part in module.split(".")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc", "tools"}


IMPORT_ALL = f"""
import importlib, sys
for name in {[PACKAGE, *MODULES]}:
    importlib.import_module(name)
from jax._src import xla_bridge
from triqdef_jax import quantize
quantize.make_bit_spec(4)
assert not xla_bridge._backends, f"importing started {{list(xla_bridge._backends)}}"
assert "tensorflow" not in sys.modules
import jax.numpy as jnp
jnp.zeros(1)
assert xla_bridge._backends, "this check no longer sees a started backend"
"""


def test_importing_every_module_starts_no_backend_and_no_tensorflow():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
