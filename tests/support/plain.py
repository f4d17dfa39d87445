"""Switches the compiled module off for a while, to compare with plain torch in the same process."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from nibble.kernels.backends import choose, native


@contextmanager
def plain_torch() -> Iterator[None]:
    """As if nibble_kernels were not installed."""
    with mock.patch.object(native, "module", lambda: (None, "left out for a comparison")):
        choose.choose.cache_clear()
        yield
    choose.choose.cache_clear()
