"""Nibble: 4-bit diffusion transformers for ComfyUI. Here is the front door for ComfyUI; `python -m
nibble` is the one for a terminal.
"""

WEB_DIRECTORY = "./web"

# ComfyUI loads a folder of custom_nodes under its path as the name. Imported as the library
# `nibble`, or collected by pytest, nothing
# of ComfyUI's may be touched: it need not be installed.
if __package__ and ("/" in __package__ or "\\" in __package__):
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
