"""Which device the tests run on, and whether with the compiled module."""

import os
import sys

import pytest

import checkout  # noqa: F401  (loads this checkout as `nibble`)


def pytest_addoption(parser):
    parser.addoption(
        "--without-extension",
        action="store_true",
        help="run as if no kernels were compiled: plain torch",
    )
    parser.addoption(
        "--with-library",
        action="store_true",
        help="run the CPU's kernels through the package's library, not through nibble_kernels",
    )
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config):
    without = config.getoption("--without-extension")
    if without or config.getoption("--with-library"):
        sys.modules["nibble_kernels"] = None  # importing it raises ImportError
    if without:
        os.environ["NIBBLE_LIBRARY"] = "0"
    elif config.getoption("--with-library"):
        from nibble.kernels.backends import native

        found, why = native.module()
        assert found is not None, f"{why}: python -m nibble libraries"


def pytest_collection_modifyitems(config, items):
    """Emulated GPU kernels do not ask what is installed: run once is enough. Slow tests are run on
    request.
    """
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="it takes minutes: run with --slow"))
    if config.getoption("--without-extension"):
        items[:] = [item for item in items if "emulated" not in item.fixturenames]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers whatever ran before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every device there is; a missing GPU skips with its reason."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device in this machine")
    return request.param
