"""Where programs keep what they compiled, so that the same program starts sooner next time. No jax is imported here.

JAX keys what it keeps by program, compiler options, versions and kind of device, CPU features included. Only the user may write to the
folder: what lies there is run.
"""

import os
import pathlib
import sys

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"  # JAX's own; one of `OFF` means no
OFF = ("false", "0", "no", "n", "f", "off")
# JAX keeps what took a second to compile; most of a short run on CPU is smaller programs, so 0.1 s is asked for.
FROM_S = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def turn_on() -> None:
    """Let JAX keep what it compiles in $JAX_COMPILATION_CACHE_DIR, else in `default_folder`; where that cannot be written it stays off."""
    chosen = choose()
    os.environ.update(chosen)  # JAX reads it when it is imported
    if "jax" in sys.modules:
        for name, value in chosen.items():
            sys.modules["jax"].config.update(name.lower(), value if name == VARIABLE else float(value))


def choose() -> dict[str, str]:
    """Return JAX's variables as `turn_on` sets them, {} for off; makes the default folder, for the user alone."""
    if os.environ.get(SWITCH, "").lower() in OFF:
        return {}
    folder = os.environ.get(VARIABLE) or _usable(default_folder())
    return {VARIABLE: folder, FROM_S: os.environ.get(FROM_S, "0.1")} if folder else {}


def default_folder() -> pathlib.Path | None:
    """Return the folder in the user's cache directory; None for a user without a home."""
    try:
        return (
            pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
            / "triqdef_jax"
            / "compiled"
        )
    except RuntimeError:
        return None


def inherited() -> dict[str, str]:
    """Return the environment for other programs: this one's, without the default folder, so that they may be given another."""
    return {name: value for name, value in os.environ.items() if (name, value) != (VARIABLE, str(default_folder()))}


def _usable(folder):
    """Return the folder as text; '' where it cannot be made or written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, AttributeError):
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""
