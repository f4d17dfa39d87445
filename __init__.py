"""Nibble: 4-bit diffusion transformers for ComfyUI.

Here are the front doors for ComfyUI and for scripts (api.py, imported when it is first used);
__main__.py is the one for a terminal.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import inspect as inspect
    from .api import load as load
    from .api import quantize as quantize

    __version__: str

WEB_DIRECTORY = "./web"
COMFYUI = "0.33.0"  # the oldest that has what the nodes use; pyproject.toml says it to the Registry
_SCRIPTS = ("inspect", "load", "quantize")
_PROJECT = Path(__file__).parent / "pyproject.toml"


def __getattr__(name: str) -> Any:
    """What scripts use; torch is not imported before."""
    if name == "__version__":
        return _version()
    if name in _SCRIPTS:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SCRIPTS, "__version__"})


def _version() -> str:
    """As pyproject.toml has it: that of this folder, or of what pip installed."""
    if _PROJECT.is_file():
        found = re.search(r'^version = "(.+)"$', _PROJECT.read_text(encoding="utf-8"), re.M)
        assert found, f"{_PROJECT} has no version"
        return found[1]
    from importlib.metadata import version

    return version("nibble")


def check_comfyui() -> None:
    """Raises ImportError for an older ComfyUI, which would fail in the middle of the nodes."""
    try:
        from comfyui_version import __version__ as version
    except ImportError:  # it is as old as that
        version = "older still"
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    if numbers < [int(number) for number in COMFYUI.split(".")]:
        raise ImportError(f"Nibble needs ComfyUI {COMFYUI} or newer, this is {version}; update it.")


# ComfyUI loads a folder of custom_nodes under its path as the name. Imported as the library
# `nibble`, or collected by pytest, nothing
# of ComfyUI's may be touched: it need not be installed.
if __package__ and ("/" in __package__ or "\\" in __package__):
    check_comfyui()
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
