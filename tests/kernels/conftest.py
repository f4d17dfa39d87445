"""Fixtures of the kernels' tests."""

import getpass
import tempfile
from pathlib import Path

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


@pytest.fixture(scope="session")
def built_library():
    """The C library of the CPU's kernels: the package's, or one built by the compiler at hand and
    kept by its sources' hash; skips with its reason where neither can be.
    """
    from nibble.kernels.backends import cpu_library, cpu_library_build, native

    try:
        return cpu_library.load(native.ABI)
    except cpu_library.Unavailable:
        folder = Path(tempfile.gettempdir()) / f"nibble-cpu-library-{getpass.getuser()}"
        folder /= cpu_library.sources_hash()[:20]
    try:
        if not (folder / "manifest.json").exists():
            cpu_library_build.write_package(folder, [cpu_library.here()])
        return cpu_library.load(native.ABI, folder)
    except (ValueError, KeyError, cpu_library.Unavailable) as reason:
        pytest.skip(str(reason))


# ---- layers that are remembered: test_eager_*.py -------------------------------------------------


@pytest.fixture(params=["linear_w4a4", "linear_w4a8", "linear_w4a16", "linear_vq"])
def op(request) -> str:
    return request.param


@pytest.fixture
def layer(op):
    """(call, x, parameters): a layer that has been called, so that it is remembered."""
    from cases import make_input
    from eager_layers import CASE, make
    from nibble.kernels import ops

    x, parameters = make_input(CASE), make(op)
    call = getattr(ops, op)
    for _ in range(2):
        call(x, **parameters)
    return call, x, parameters


@pytest.fixture
def dispatched(op, monkeypatch):
    """The calls that took torch's dispatcher."""
    from eager_layers import EAGER

    seen = []
    real = EAGER[op].op
    monkeypatch.setattr(EAGER[op], "op", lambda *a: seen.append(a) or real(*a))
    return seen
