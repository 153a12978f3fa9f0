"""How tests compile: quickly. What programs compute stays the same up to the rounding of fused multiplications; how fast they run is not tested.

conftest.py sets this before jax is imported.
"""

import tempfile

# No LLVM optimisation and XLA's older emitters of fused loops: a third of the time to compile the training step on a CPU.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def cache_in(folder) -> dict[str, str]:
    """Return the environment in which programs keep there what they compile."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def own_cache() -> dict[str, str]:
    """Return the environment that one pytest worker shares with the programs which it starts, and nobody with the worker after it."""
    global _folder
    _folder = tempfile.TemporaryDirectory(prefix="compiled-")  # gone when this process ends
    return cache_in(_folder.name)
