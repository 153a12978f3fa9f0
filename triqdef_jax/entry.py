"""The way into every program: flags parsed, mistakes told in one line, exit codes kept.

A program is ``if __name__ == "__main__": entry.run_program(main)``. What the user did wrong (a flag, a config field, a
missing file) ends as one line on stderr; what we did wrong keeps its traceback. No jax here, so mistakes show early.
"""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags, logging
from ml_collections import config_flags

from triqdef_jax import compile_cache

flags.disclaim_key_flags()  # so that --help lists the flags under the program that asked for them

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 42
EXIT_INTERRUPTED = 130

_CONFIG_FLAG = "config"
# What a disk does and no bug of ours: full (also by quota or the largest file allowed), read-only, broken, gone.
_DISK_ERRORS = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE")
}


class UserError(ValueError):
    """Something the user did or has to repair; the message is one line that says what to do."""


class LocalError(UserError):
    """The same, of which other processes of the run may know nothing, such as a disk that fails one of them (`processes.started`)."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the bad-input errors of the block into `UserError`.

    Put it around validation, loading and anything else whose failures are the user's to repair. Outside such a block a
    ValueError counts as our own bug and keeps its traceback.

    Raises:
      UserError: for a ValueError inside the block. LocalError: for an OSError (missing file, no permission, full disk).
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        kind = LocalError if isinstance(error, OSError) else UserError
        raise kind(_message(error)) from error


def define_config_flags(default: str | None = None) -> tuple[flags.FlagHolder, flags.FlagHolder]:
    """Defines ``--config`` and ``--workdir``.

    The config is locked and typed. The default is loaded when the flags are parsed and never on import, so that a
    mistake in it, or in an override of it, is told like any other.

    Args:
      default: config file used when ``--config`` is not given, or None: then the value is None.

    Returns:
      The holders of the two flags; ``.value`` is a `ConfigDict` and a path or None.
    """
    config = config_flags.DEFINE_config_file(
        _CONFIG_FLAG,
        None,
        "Config file, FILE.py or FILE.py:variant; --config.field=value overrides one field.",
        lock_config=True,
    )
    flags.FLAGS[config.name].deferred_default = default
    workdir = flags.DEFINE_string("workdir", None, "Directory of the run: config, metrics, checkpoints, results.")
    return config, workdir


def config_source(flag: flags.FlagHolder) -> tuple[str, str]:
    """Returns (file, variant) of a parsed ``--config``; the variant is '' where none was named."""
    path, _, variant = config_flags.get_config_filename(flags.FLAGS[flag.name]).partition(":")
    return path, variant


def config_overrides(flag: flags.FlagHolder) -> list[str]:
    """Returns the dotted names of the fields overridden on the command line, sorted: ``['optim.lr', 'seed']``."""
    return sorted(config_flags.get_override_values(flags.FLAGS[flag.name]))


def run_program(main: Callable[[list[str]], int | None], *, positional: bool = False) -> None:
    """Parses the flags, runs ``main(argv)`` and exits; never returns.

    Exit codes: what main returned (None is 0; 42 means preempted after saving); 2 and one line ``error: ...`` for bad
    flags, a bad config, a `UserError`, or a FileNotFoundError that carries a message of ours (one raised by the
    operating system counts as a bug unless met inside `user_errors`), or a disk that is full, read-only or broken; 130
    after Ctrl-C; 1 and the traceback for anything else. SystemExit passes.

    Args:
      main: the program; argv[0] is its name, the rest what is not a flag.
      positional: whether arguments that are not flags are accepted. By default they are refused, because a forgotten
        ``--`` would otherwise be ignored in silence.
    """
    app.run(lambda argv: _leave(_run_main(main, argv)), flags_parser=lambda argv: _parse_flags(argv, positional))


def _run_main(main: Callable[[list[str]], int | None], argv: list[str]) -> int | None:
    """Runs main; returns its exit code, or the one that stands for what it raised."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # app.run chose INFO, at which our libraries talk at every checkpoint
    compile_cache.turn_on()
    try:
        return main(argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        code = told(error)
        if code is None:
            raise
        return code


def told(error: Exception) -> int | None:
    """Tells what the user or the disk did wrong in one line and returns the exit code; None, and nothing told, for anything else."""
    if isinstance(error, UserError):
        return _tell(_message(error))
    if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
        return _tell(f"{_message(error)}; make room or access, then run the same command again")
    if isinstance(error, FileNotFoundError) and error.errno is None:
        return _tell(_message(error))
    return None


def _leave(code: int | None) -> int | None:
    """Returns the exit code, or ends a preempted program at once: it has little time, and all is saved.

    An orderly end waits for every thread, as for one that compiles, which may take a minute.
    """
    if code == EXIT_PREEMPTED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _parse_flags(argv: list[str], positional: bool) -> list[str]:
    """Parses the flags; whatever goes wrong here ends the program with one line and exit code 2."""
    try:
        rest = flags.FLAGS(_with_default_config(argv))
        _check_config()
        if rest[1:] and not positional:
            raise UserError(f"unexpected argument {rest[1]!r}: flags start with --, as in --config=FILE")
        return rest
    except SystemExit:
        sys.exit(0)  # --help was asked for and printed
    except Exception as error:  # a config file is code: it may raise anything
        sys.exit(_tell(_describe(error)))


def _with_default_config(argv: list[str]) -> list[str]:
    """Returns argv with ``--config=<default>`` put first where the flag is not given."""
    if _CONFIG_FLAG not in flags.FLAGS:
        return argv
    default = flags.FLAGS[_CONFIG_FLAG].deferred_default
    given = any(
        re.match(rf"--?{_CONFIG_FLAG}(=|$)", arg)
        for arg in flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
    )
    return argv if given or default is None else [argv[0], f"--{_CONFIG_FLAG}={default}", *argv[1:]]


def _check_config() -> None:
    """Raises what went wrong while the config was read, and refuses to replace a whole group of fields."""
    if _CONFIG_FLAG not in flags.FLAGS or flags.FLAGS[_CONFIG_FLAG].value is None:
        return
    hasattr(flags.FLAGS[_CONFIG_FLAG].value, "lock")  # a file that could not be read is an object that raises on touch
    for name, value in config_flags.get_override_values(flags.FLAGS[_CONFIG_FLAG]).items():
        if hasattr(value, "keys"):
            raise UserError(f"--config.{name} is a group of fields: override them one by one as --config.{name}.FIELD")


def _describe(error: Exception) -> str:
    """Says in one line what went wrong while flags and config were parsed."""
    root = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__
    missing = re.search(r"No such file or directory: '(.+?)'", str(root))
    if missing:
        return f"no such config file: {missing[1]} (looked for it from {os.getcwd()})"
    if isinstance(root, OSError):
        return f"cannot read the config: {_message(root)}"
    if "Error whilst parsing config file" in str(error):  # raised by get_config; the text holds its whole traceback
        return f"--config: {_message(root) if type(root) is ValueError else _with_place(root)}"
    if isinstance(error, flags.Error | UserError):
        return _message(error)
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if frames & {"_LoadConfigModule", "get_config"}:  # a bug in the config file, not a lookup for an override
        return f"--config: {_with_place(root)}"
    return f"--config has no such field: {_message(error)}"


def _with_place(error: BaseException) -> str:
    """Returns ``NameError: message (file.py line 3)``: a config file is code, and its author needs the line."""
    text = f"{type(error).__name__}: {_message(error)}"
    if isinstance(error, SyntaxError):  # says where by itself
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({place.filename} line {place.lineno})"


def _message(error: BaseException) -> str:
    """Returns the text of an error on one line."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def _tell(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_USER_ERROR
