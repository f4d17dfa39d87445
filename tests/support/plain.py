"""Switches the compiled module off for a while, to compare with plain torch in the same process."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from nibble.kernels import dispatch, native


@contextmanager
def plain_torch() -> Iterator[None]:
    """As if nibble_kernels were not installed."""
    with mock.patch.object(native, "module", lambda: (None, "left out for a comparison")):
        dispatch.choose.cache_clear()
        yield
    dispatch.choose.cache_clear()
