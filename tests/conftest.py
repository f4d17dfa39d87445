"""Loads this checkout as the package `nibble`, installed or not, and says which device the tests
run on.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_checkout() -> None:
    """Imports the repository's root folder under the name `nibble` (its folder may be called
    anything).
    """
    spec = importlib.util.spec_from_file_location(
        "nibble", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["nibble"] = package
    spec.loader.exec_module(package)


_load_checkout()


def pytest_addoption(parser):
    parser.addoption(
        "--without-extension",
        action="store_true",
        help="run as if nibble_kernels were not installed: plain torch",
    )


def pytest_configure(config):
    if config.getoption("--without-extension"):
        sys.modules["nibble_kernels"] = None  # importing it raises ImportError


def pytest_collection_modifyitems(config, items):
    """Emulated GPU kernels do not ask what is installed: run once is enough."""
    if config.getoption("--without-extension"):
        items[:] = [item for item in items if "emulated" not in item.fixturenames]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every device there is; a missing GPU skips with its reason."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device in this machine")
    return request.param
