"""The seam for the compiled extension `nibble_kernels`: found if installed, never required.

The module offers `ABI` (an integer, equal to the one here), `__version__`, `DEVICES` (a tuple such as ("cpu", "cuda")) and,
under the ops' own names, callables with the signatures of `reference`. An op that it lacks simply falls through.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

MODULE = "nibble_kernels"
ABI = 1
OPS = ("quantize_down", "gemm_w4a4_up", "gemv_w4a16")

log = logging.getLogger("nibble")


@functools.lru_cache(maxsize=1)
def module() -> tuple[ModuleType | None, str]:
    """The extension, or None, and the reason in one sentence. Looked for once; what is missing is logged once."""
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
        "%s: 4-bit layers run through comfy_kitchen where it is faster and in plain torch elsewhere, with the same numbers.", why,
    )
    return None, why


@functools.lru_cache(maxsize=8)
def table(device_type: str) -> dict[str, Callable]:
    """op name -> compiled callable, for the ops that the extension has on this kind of device; empty without it."""
    found, _ = module()
    if found is None or device_type not in found.DEVICES:
        return {}
    return {op: getattr(found, op) for op in OPS if hasattr(found, op)}
