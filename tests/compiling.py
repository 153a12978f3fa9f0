"""How tests compile: quickly. What programs compute stays the same up to the rounding of fused multiplications; how fast they run is not tested.

conftest.py sets this before jax is imported.
"""

import importlib.metadata
import os
import tempfile

XLA_FLAGS = "--xla_backend_optimization_level=0"
# XLA's older emitters of loops halve what is left. Asked of this version alone, for XLA ends a program at a flag that it no longer knows.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"


def cache_in(folder) -> dict[str, str]:
    """Return the environment in which programs keep there what they compile."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def shared_cache() -> dict[str, str]:
    """Return the environment in which pytest, its workers and the programs that they start share what they compile; it ends with pytest."""
    global _folder
    if "PYTEST_XDIST_WORKER" in os.environ:
        return {}  # that of the process which started this one
    _folder = tempfile.TemporaryDirectory(prefix="compiled-")
    return cache_in(_folder.name)
