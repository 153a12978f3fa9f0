"""The cause of a failed save or restore fits on one line and is the one a person can act on."""

import errno
import subprocess
import sys

import pytest

from triqdef_jax import orbax_failures


def caused(outer, inner):
    """An error as it is when it was raised from another."""
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device", "ck/3"), "No space left on device: ck/3"),
        (caused(ValueError("handler failed"), OSError(errno.EROFS, "Read-only file system")), "Read-only file system"),
        (caused(KeyError("a"), caused(RuntimeError("b"), PermissionError(errno.EACCES, "Denied", "x"))), "Denied: x"),
        (RuntimeError("RESOURCE_EXHAUSTED: write\n [os_error_code='28']"), "No space left on device"),
        (ValueError("two\n  lines"), "ValueError: two lines"),
        (ValueError("x" * 500), f"ValueError: {'x' * 160}"),
    ],
)
def test_the_cause_is_what_the_operating_system_said_or_else_the_error_itself(error, said):
    assert orbax_failures.cause(error) == said


def test_only_what_orbax_drops_is_kept_quiet():
    script = (
        "from triqdef_jax import orbax_failures; orbax_failures.quiet(); orbax_failures.quiet()\n"
        "class Noisy:\n    def __del__(self): raise RuntimeError(self.text)\n"
        "for text in ('Event loop is closed', 'a bug of ours'):\n    Noisy.text = text; Noisy()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "a bug of ours" in done.stderr and "loop is closed" not in done.stderr
