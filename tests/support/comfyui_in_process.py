"""ComfyUI's own library in this process, on the CPU: imported from COMFYUI_PATH."""

import os
import sys

from comfyui_launch import make_torchvision_importable

COMFYUI = os.environ.get("COMFYUI_PATH", "")


def start(path: str = COMFYUI) -> None:
    """Puts ComfyUI on the path and makes it use the CPU, once a process."""
    if path in sys.path:
        return
    make_torchvision_importable()
    sys.path.insert(0, path)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd  # noqa: F401  (its import order matters: it must come before its submodules)
