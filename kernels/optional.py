"""Packages that can be done without.

One that is installed can still be unusable: diffusers beside a torchvision of another torch raises
RuntimeError, a library that does not load OSError. Whoever can do without asks here, and is told
why.
"""

import importlib
from types import ModuleType


def optional(name: str, package: str | None = None) -> tuple[ModuleType | None, str]:
    """(a module, ""), or (None, why it cannot be used, as half a sentence). Arguments: as
    `importlib.import_module` takes them.
    """
    try:
        return importlib.import_module(name, package), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except Exception as error:  # whatever a package of somebody else's raises while it is imported
        said = str(error).strip().partition("\n")[0]
        return None, f"{name.lstrip('.')} cannot be loaded: {said or type(error).__name__}"
