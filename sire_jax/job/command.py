"""What all command line programs have in common."""

import argparse
import errno
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sire_jax import files

# Exit statuses: an error that its message explains, as argparse has it; ended by Ctrl-C; another
# process was lost, and ended by the system after saving: the same command goes on.
EXPLAINED, INTERRUPTED, PEER, AGAIN = 2, 130, 75, 85
# Nobody read what it printed, as a shell has it of what ended by SIGPIPE.
UNREAD = 141


def parser(documentation: str | None, overrides: bool = True) -> argparse.ArgumentParser:
    """Makes the argument parser of a program.

    Args:
        documentation: The docstring of the program's module.
        overrides: Whether it takes overrides of a config.

    Returns:
        A parser; with overrides, what it does not know (``--config.a.b=value``) is left to
        ``configuration.load``.
    """
    epilog = "Every value of the config can be overridden: --config.a.b=value." * overrides
    return argparse.ArgumentParser(description=documentation, epilog=epilog, allow_abbrev=False)


@contextmanager
def readable_errors(*errors: type[Exception], goes_on: bool = False) -> Iterator[None]:
    """Ends the program with one message, not a traceback, where the user can mend the cause.

    Where nobody reads the output any more (``| head``), the program ends without a word, or goes on
    without one if it has more to do than to print.

    Args:
        *errors: Exceptions that speak to the user, beside ``ValueError`` and ``OSError``.
        goes_on: Whether the program goes on when its output can't be written.
    """
    _guard_output(goes_on)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            yield
    except KeyboardInterrupt:
        print("SIGINT: ended.", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if isinstance(error, (ValueError, OSError, *errors)) and _raised_here(error):
            print(f"Error: {error}", file=sys.stderr, flush=True)
            sys.exit(EXPLAINED)
        raise


class _Output(io.FileIO):
    """Standard output or error of a program, which may lose its reader.

    Args:
        descriptor: Its number.
        goes_on: Whether what can't be written is left out; else the program ends where nobody
            reads any more.
    """

    def __init__(self, descriptor: int, goes_on: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._goes_on = goes_on

    def write(self, data: Any) -> int:
        """Writes bytes, or says that it has."""
        try:
            return super().write(data)
        except OSError as error:
            if self._goes_on:
                return len(data)
            if error.errno == errno.EPIPE:
                # Without what runs at exit, which would write to the same stream again.
                os._exit(UNREAD)
            raise


def _guard_output(goes_on: bool) -> None:
    """Has the standard streams lose their readers in order; others, as of tests, are left alone."""
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:
            # Closed by whoever started the program (`>&-`).
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif stream is original and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            output: Any = _Output(stream.fileno(), goes_on)
            if isinstance(stream.buffer, io.BufferedWriter):  # Not with `python -u`.
                output = io.BufferedWriter(output)
            text = io.TextIOWrapper(output, stream.encoding, stream.errors)
            text.reconfigure(
                line_buffering=stream.line_buffering, write_through=stream.write_through
            )
            setattr(sys, name, text)


def _show(message: Warning | str, *where: Any, **settings: Any) -> None:
    """Shows a warning as what it says, without the line of code."""
    print(f"Warning: {message}", file=sys.stderr, flush=True)


def check_new(path: str | Path, option: str = "--out") -> Path:
    """Checks, before any work, that a file can be written that is not there yet.

    Args:
        path: The file.
        option: The argument that names it.

    Returns:
        Its path.

    Raises:
        FileExistsError: If it is there.
        OSError: If it can't be written (``files.check_writable``).
    """
    path = files.expanded(path)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} exists; choose another {option}, or remove it.")
    return files.check_writable(path, option)


def check_picture(path: str | Path) -> Path:
    """Checks, before any work, that a picture can be drawn there; one that is there is replaced.

    Args:
        path: The picture.

    Returns:
        Its path.

    Raises:
        ValueError: If its name ends as that of no picture.
        OSError: If it can't be written (``files.check_writable``).
    """
    # Only the programs that draw wait for this import.
    from matplotlib.backend_bases import FigureCanvasBase

    path = files.check_writable(path)
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(
            f"{path} ends as no picture that can be drawn; --out should end with one of"
            f" .{', .'.join(kinds)}."
        )
    return path


def _raised_here(error: BaseException) -> bool:
    """Tells whether this project raised an error, for the user; others are bugs, shown whole."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return Path(last[0].f_code.co_filename).is_relative_to(files.PACKAGE)
