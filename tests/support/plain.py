"""Switches the compiled module off for a while, to compare with plain torch in the same process."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from nibble.kernels.backends import choose, native


@contextmanager
def plain_torch() -> Iterator[None]:
    """As if nibble_kernels were not installed."""
    with mock.patch.object(native, "module", lambda: (None, "left out for a comparison")):
        _forget()
        yield
    _forget()


def _forget() -> None:
    for cache in (choose.choose, native.serving, native._gpu):
        cache.cache_clear()
