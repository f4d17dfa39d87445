"""The seam for the compiled extension `nibble_kernels`: found if installed, never required.

The module takes bare pointers and sizes, knows no torch, and serves any torch; `launch` flattens
tensors for it. It offers `ABI` (an integer, equal to the one here), `__version__`, `DEVICES` (a
tuple such as ("cpu", "cuda")), the ops under their own names, and answers about them (`capability`,
`codes`, `route`, `workspace_bytes`, `cpu_isas`, `build_info`).
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType

MODULE = "nibble_kernels"
ABI = 3

log = logging.getLogger("nibble")


@functools.lru_cache(maxsize=1)
def module() -> tuple[ModuleType | None, str]:
    """The extension, or None, and the reason in one sentence. Looked for once; what is missing is
    logged once, in one line.
    """
    try:
        found = importlib.import_module(MODULE)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == MODULE
        why = f"{MODULE} is not installed" if absent else f"{MODULE} cannot be loaded: {error}"
    else:
        if getattr(found, "ABI", None) == ABI:
            return found, f"{MODULE} {found.__version__} is installed"
        why = f"{MODULE} has interface {getattr(found, 'ABI', None)} and this version needs {ABI}"
    log.info(
        "%s: 4-bit layers run through comfy_kitchen where it is faster and in plain torch"
        " elsewhere, with the same numbers; a wheel from the release page, or `pip install"
        " ./kernels` in the clone, makes them fast.",
        why,
    )
    return None, why
