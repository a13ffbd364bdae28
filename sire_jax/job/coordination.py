"""JAX's coordination service: small values that all processes of a job see.

The one place that knows where JAX keeps it: there is no public way to it. All of JAX 0.10.2 to 0.12
is understood.
"""

from typing import Protocol


class Service(Protocol):
    """What is used of the service; a call that fails raises a ``RuntimeError``."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Sets a value."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Waits for a value, and returns it."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """Returns all keys that begin so, with their values."""

    def key_value_delete(self, key: str) -> None:
        """Deletes a value, or, of a key that ends with a slash, all that begin so."""


def service() -> Service:
    """Returns the service of the job that ``jax.distributed.initialize`` has connected.

    Raises:
        RuntimeError: If it has not been called in this process.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("There is no job; call jax.distributed.initialize first.")
    return client
