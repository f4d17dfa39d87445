"""Fixtures of the kernels' tests."""

import pytest


@pytest.fixture(scope="session")
def emulated():
    """The CUDA kernels, run on the CPU: emulator/emulated.py, built; skips with its reason where
    that cannot be.
    """
    from emulator import build, emulated

    reason = build.unavailable()
    if reason:
        pytest.skip(reason)
    emulated.library()
    return emulated
