"""The operators' backend, set for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from sanctl.errors import UserError
from sanctl_ops import BackendError, requested_backend, use_backend


@contextmanager
def backend_set(name: str | None = None) -> Iterator[None]:
    """Set the operators' backend for a block, after which it is again what it was before.

    Args:
        name: "auto", "torch" or "cupy"; None for what is set already.

    Raises:
        UserError: The environment asks for a backend that there is not.
    """
    try:
        requested_backend()
    except BackendError as error:
        raise UserError(str(error)) from None
    with use_backend(name):
        yield
