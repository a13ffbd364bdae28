"""Finds, builds and loads the library through which XLA calls oneDNN."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jaxlib

# Set to 0, it turns oneDNN off.
SWITCH = "SIRE_JAX_ONEDNN"
TARGET = "sire_jax_convolution"
SOURCE = Path(__file__).with_name("convolution.cc")
# What `pip install 'sire_jax[onednn]'` brings: oneDNN itself, and its headers.
_PACKAGES = {"libdnnl.so.3": "onednn-cpu-gomp", "dnnl.hpp": "onednn-devel-cpu-gomp"}
_OPTIONS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-w")
# Seconds; it takes some four.
_LONGEST = 300


def _installed(name: str) -> Path | None:
    """Returns where pip put a file of the extra."""
    try:
        files = importlib.metadata.files(_PACKAGES[name]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == name]
    # A package may hold a header twice, in a folder and as one that includes it.
    return min(found, key=lambda path: len(path.parts)).resolve() if found else None


def file_name() -> str:
    """Returns the name of the library's file, another for all that it depends on."""
    about = (
        *_OPTIONS,
        jaxlib.__version__,
        importlib.metadata.version(_PACKAGES["libdnnl.so.3"]),
        platform.machine(),
        *platform.libc_ver(),
    )
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(about).encode())
    return f"convolution-{digest.hexdigest()[:16]}.so"


def build(path: Path) -> None:
    """Builds the library.

    Args:
        path: The file to write: whole or not at all, as other processes may begin at the same time.

    Raises:
        OSError: If there is no compiler, or the file can't be written.
        subprocess.SubprocessError: If it doesn't compile.
    """
    onednn, header = _installed("libdnnl.so.3"), _installed("dnnl.hpp")
    if onednn is None or header is None:
        raise FileNotFoundError("The library or the headers of oneDNN are not installed.")
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
    included = [f"-I{jax.ffi.include_dir()}", f"-I{header.parent}"]
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        command = [*compiler, *_OPTIONS, *included, str(SOURCE), str(onednn), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LONGEST)
        made.replace(path)


def _kept() -> Path:
    """Returns where the library is kept from one start to the next, a directory of one's own."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = given if given.is_absolute() else Path("~/.cache").expanduser()
    path = cache / "sire_jax" / "onednn"
    path.mkdir(parents=True, exist_ok=True)
    owned = path.stat()
    if owned.st_uid != os.getuid() or owned.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"Others can write to {path}, from where a library would be loaded.")
    return path


def _open(onednn: Path, path: Path) -> Any:
    # Ours finds oneDNN by its name, as it is loaded then. Each looks for functions in its own
    # first: PyTorch, in the same process, has a oneDNN of another version.
    mode = os.RTLD_LOCAL | os.RTLD_DEEPBIND
    ctypes.CDLL(str(onednn), mode)
    return ctypes.CDLL(str(path), mode)


def _found_or_built(onednn: Path) -> Any:
    """Returns the library: of the wheel, kept from before, or built."""
    shipped = SOURCE.with_name(file_name())
    if shipped.exists():
        return _open(onednn, shipped)
    path = _kept() / file_name()
    if path.exists():
        # One that can't be loaded, such as by a full disk, is built anew.
        with contextlib.suppress(OSError):
            return _open(onednn, path)
    build(path)
    return _open(onednn, path)


@functools.cache
def _registered() -> Any:
    """Returns the library, once XLA knows its function; ``None`` without one."""
    if os.environ.get(SWITCH) == "0":
        return None
    onednn = _installed("libdnnl.so.3")
    if onednn is None:
        return None
    try:
        library = _found_or_built(onednn)
        library.SireJaxHasBfloat16.restype = ctypes.c_bool
        # A backend that has not begun yet would not begin with a function of an interface that it
        # doesn't know.
        jax.local_devices(backend="cpu")
        call = jax.ffi.pycapsule(library.SireJaxConvolution)
        jax.ffi.register_ffi_target(TARGET, call, platform="cpu")
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            "oneDNN is installed, but convolutions are XLA's: the library that calls it can't be"
            " built or loaded. It needs a C++ compiler, and all of pip install 'sire_jax[onednn]';"
            f" {SWITCH}=0 does without. {said}",
            stacklevel=2,
        )
        return None
    return library


def load() -> bool:
    """Has XLA know oneDNN's convolutions.

    Returns:
        Whether it does: the extra is installed, and its library can be built. If it can't be, a
        warning says why.
    """
    return _registered() is not None


@functools.cache
def has_bfloat16() -> bool:
    """Returns whether oneDNN convolves bfloat16 on this processor."""
    return load() and bool(_registered().SireJaxHasBfloat16())


def version() -> str | None:
    """Returns which oneDNN convolves, as its package says; ``None`` where none does."""
    return importlib.metadata.version(_PACKAGES["libdnnl.so.3"]) if load() else None
