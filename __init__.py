"""Nibble: 4-bit diffusion transformers for ComfyUI.

Here are the front doors for ComfyUI and for scripts (api.py, imported when it is first used);
__main__.py is the one for a terminal.
"""

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import cache as cache
    from .api import calibrate_cache as calibrate_cache
    from .api import inspect as inspect
    from .api import load as load
    from .api import quantize as quantize
    from .quant.diffusers.quantizer import NibbleConfig as NibbleConfig

    __version__: str

WEB_DIRECTORY = "./web"
COMFYUI = "0.33.0"  # the oldest that has what the nodes use; pyproject.toml says it to the Registry
_SCRIPTS = (
    "NibbleConfig",
    "__version__",
    "cache",
    "calibrate_cache",
    "inspect",
    "load",
    "quantize",
)


def __getattr__(name: str) -> Any:
    """What scripts use; torch is not imported before."""
    if name in _SCRIPTS:
        from . import api

        return api.version() if name == "__version__" else getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SCRIPTS})


def check_comfyui() -> None:
    """Raises ImportError for an older ComfyUI, which would fail in the middle of the nodes."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:  # it is as old as that
        version = "older still"
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    if numbers < [int(number) for number in COMFYUI.split(".")]:
        raise ImportError(f"Nibble needs ComfyUI {COMFYUI} or newer, this is {version}; update it.")


# ComfyUI loads a folder of custom_nodes under its path as the name, before 2024 under the folder's
# name. Imported as the library `nibble`, or collected by pytest, nothing of ComfyUI's may be
# touched: it need not be installed.
BY_PATH = bool(__package__) and ("/" in __package__ or "\\" in __package__)
if BY_PATH or "folder_paths" in sys.modules:
    check_comfyui()
if BY_PATH:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
