"""Compiled programs: kept on disk for the next start, and counted with the time that they take."""

import contextlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from sire_jax import files

# Below, reading a program back is not much faster than compiling it.
_WORTH_KEEPING = 0.2
_DIRECTORY = "jax_compilation_cache_dir"


def keep(directory: str) -> None:
    """Keeps compiled programs in a directory, from where the next start loads them.

    Any program of any run finds its own there; the directory can be removed at any time.

    Args:
        directory: Where; "" for nowhere. One that can't be written is reported, and not used.
    """
    path = None
    if directory:
        try:
            path = str(files.expanded(directory))
            Path(path).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            warnings.warn(
                f"Compiled programs can't be kept in {directory} ({error.strerror or error}); the"
                " next start compiles again. Choose another --config.compilation_cache.",
                stacklevel=2,
            )
            path = None
    if path == getattr(jax.config, _DIRECTORY):
        return
    jax.config.update(_DIRECTORY, path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
    # It remembers the directory that it began with.
    compilation_cache.reset_cache()
    if path is not None:
        _mend_entries(path)


def kept() -> bool:
    """Tells whether compiled programs are kept."""
    return getattr(jax.config, _DIRECTORY) is not None


def _mend_entries(path: str) -> None:
    """Has entries that can't be used be as if absent, and replaced.

    JAX warns of one that a kill or a full disk cut off, and leaves it there for ever. There is no
    public way to its entries; where a version has them otherwise, that is how it stays.

    Args:
        path: The directory.
    """
    try:
        from jax._src import compilation_cache as cache

        entries, _ = cache.get_file_cache(path) or (None, None)
        wrapped: Any = entries and _Entries(entries, Path(path), cache.decompress_executable)
        cache._cache, cache._cache_initialized = wrapped, True
    except (AttributeError, ImportError, TypeError, ValueError):
        compilation_cache.reset_cache()


class _Entries:
    """Entries of JAX's cache, of which those that can't be used are as if absent, and removed.

    Args:
        entries: JAX's own.
        path: Their directory.
        decompress: Raises for an entry that is cut off or damaged.
    """

    def __init__(self, entries: Any, path: Path, decompress: Callable[[bytes], Any]):
        self._entries, self._path, self._decompress = entries, path, decompress

    def get(self, key: str) -> bytes | None:
        """Returns an entry; ``None`` if there is none that can be used."""
        try:
            entry = self._entries.get(key)
        except Exception:  # Another user's, or the system fails for once: it is as if absent.
            return None
        try:
            if entry is not None:
                self._decompress(entry)
            return entry
        except Exception:  # Of whichever library compresses.
            self._remove(key)
            return None

    def put(self, key: str, value: bytes) -> None:
        """Adds an entry, or nothing."""
        try:
            self._entries.put(key, value)
        except OSError:
            self._remove(key)
            raise

    def _remove(self, key: str) -> None:
        # In a directory of others it may have to stay.
        with contextlib.suppress(OSError):
            (self._path / f"{key}-cache").unlink(missing_ok=True)


@dataclass
class Counts:
    """How many programs this process has compiled and loaded, and the seconds that it took.

    >>> before = Counts(compiled=2, seconds=1.5)
    >>> Counts(compiled=3, loaded=4, seconds=2.0, loading=0.25).since(before)
    '1 program compiled in 0.2 s, 4 loaded in 0.2 s'

    Attributes:
        compiled: Programs compiled.
        loaded: Programs loaded from where ``keep`` keeps them.
        seconds: Of both.
        loading: Of loading alone.
    """

    compiled: int = 0
    loaded: int = 0
    seconds: float = 0.0
    loading: float = 0.0

    def since(self, before: "Counts") -> str:
        """Says what has been compiled and loaded since ``before``."""
        loaded, loading = self.loaded - before.loaded, self.loading - before.loading
        compiled = self.compiled - before.compiled
        seconds = self.seconds - before.seconds - loading
        return (
            f"{compiled} program{'s' * (compiled != 1)} compiled in {seconds:.1f} s,"
            f" {loaded} loaded in {loading:.1f} s"
        )


_counts = Counts()


def counts() -> Counts:
    """Returns the counts so far."""
    return replace(_counts)


# JAX does not document the names of its events; these are those of all of JAX 0.10.2 to 0.12.
_BACKEND = "/jax/core/compile/backend_compile_duration"
_RETRIEVAL = "/jax/compilation_cache/cache_retrieval_time_sec"


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _BACKEND:
        # Loaded or compiled, as the retrieval, which comes first, has told.
        _counts.compiled += 1
        _counts.seconds += duration_secs
    elif event == _RETRIEVAL:
        _counts.compiled -= 1
        _counts.loaded += 1
        _counts.loading += duration_secs


jax.monitoring.register_event_duration_secs_listener(_note)
