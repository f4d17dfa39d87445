"""This checkout as the package `nibble`, and its tests' own modules on the path.

A script of the tests begins with
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
    import checkout
and can then import `nibble`, every module of tests/support and `bench`; pytest has these folders on
its path already (pyproject.toml).
"""

import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent


def load() -> None:
    """Imports the repository's root folder, whatever it is called, under the name `nibble`."""
    spec = importlib.util.spec_from_file_location(
        "nibble", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules["nibble"] = package
    spec.loader.exec_module(package)


if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))  # for `bench`
if "nibble" not in sys.modules:
    load()
