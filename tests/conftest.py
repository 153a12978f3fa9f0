"""Tests run on the CPU, compile everything themselves, and turn on 64-bit floats only inside the tests that ask for it."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # no test may pass or fail by what an earlier run compiled

import jax
import pytest


@pytest.fixture
def x64():
    """Give a test float64, in which two right implementations agree to 1e-10 and a rounding code never flips between them."""
    with jax.enable_x64(True):
        yield
