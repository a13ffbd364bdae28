"""Finds, builds and loads the library through which XLA calls oneDNN."""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import jax
import jaxlib

# Set to 0, it turns oneDNN off.
SWITCH = "SIRE_JAX_ONEDNN"
TARGET = "sire_jax_convolution"
SOURCE = Path(__file__).with_name("convolution.cc")
# What `pip install 'sire_jax[onednn]'` brings: oneDNN itself, and its headers.
_PACKAGES = {"libdnnl.so.3": "onednn-cpu-gomp", "dnnl.hpp": "onednn-devel-cpu-gomp"}
_CACHE = "XDG_CACHE_HOME"


def _installed(name: str) -> Path | None:
    """Returns where pip put a file of the extra."""
    try:
        files = importlib.metadata.files(_PACKAGES[name]) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == name]
    # A package may hold a header twice, in a folder and as one that includes it.
    return min(found, key=lambda path: len(path.parts)).resolve() if found else None


def version() -> str | None:
    """Returns which oneDNN convolves, as its package says; ``None`` where none does."""
    return importlib.metadata.version(_PACKAGES["libdnnl.so.3"]) if load() else None


def _shipped() -> Path | None:
    """Returns the library that a wheel for this platform brings along."""
    return next(iter(SOURCE.parent.glob("_convolution*.so")), None)


def command(output: Path, headers: Path, onednn: Path) -> list[str]:
    """Returns the command that builds the library.

    Args:
        output: The file to write.
        headers: The directory of oneDNN's headers.
        onednn: oneDNN.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    options = ["-O2", "-std=c++17", "-fPIC", "-shared", "-w"]
    included = [f"-I{jax.ffi.include_dir()}", f"-I{headers}"]
    return [compiler, *options, *included, str(SOURCE), str(onednn), "-o", str(output)]


def built(headers: Path, onednn: Path) -> Path:
    """Returns the library, which is built where it isn't kept from before: some four seconds.

    Args:
        headers: The directory of oneDNN's headers.
        onednn: oneDNN.

    Raises:
        OSError: If there is no compiler, or the library can't be written.
        subprocess.CalledProcessError: If it doesn't compile.
    """
    versions = f"{jaxlib.__version__} {headers}".encode()
    digest = hashlib.sha256(SOURCE.read_bytes() + versions).hexdigest()[:16]
    cache = Path(os.environ.get(_CACHE) or "~/.cache").expanduser()
    path = cache / "sire_jax" / "onednn" / f"{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            subprocess.run(
                command(made, headers, onednn), check=True, capture_output=True, text=True
            )
            # Whole or not at all: other processes may begin at the same time.
            made.replace(path)
    return path


@functools.cache
def load() -> bool:
    """Has XLA know oneDNN's convolutions.

    Returns:
        Whether it does: the extra is installed, and there is a library or a compiler to build it.
        One that can't be built is a warning, as the extra then serves nobody.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    onednn, header = _installed("libdnnl.so.3"), _installed("dnnl.hpp")
    if onednn is None:
        return False
    try:
        path = _shipped()
        if path is None:
            if header is None:
                return False
            path = built(header.parent, onednn)
        # Ours finds it by its name, as it is loaded then. Each looks for functions in its own
        # first: PyTorch, in the same process, has a oneDNN of another version.
        mode = os.RTLD_LOCAL | os.RTLD_DEEPBIND
        ctypes.CDLL(str(onednn), mode)
        library = ctypes.CDLL(str(path), mode)
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        warnings.warn(
            "oneDNN is installed, but convolutions are XLA's: the library that calls it can't be"
            f" built or loaded. Install a C++ compiler, or set {SWITCH}=0 to do without. {said}",
            stacklevel=2,
        )
        return False
    jax.ffi.register_ffi_target(
        TARGET, jax.ffi.pycapsule(library.SireJaxConvolution), platform="cpu"
    )
    return True
