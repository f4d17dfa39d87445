"""Which program wrote a 4-bit file, and that file opened: Nibble's own, Nunchaku's or
comfy-kitchen's.
"""

import os
from pathlib import Path

from ..files.checkpoint import FileRefused, QuantizedFile, open_quantized, read_header
from .kitchen import KitchenFile, is_kitchen
from .model import PublishedFile
from .nunchaku_read import BLOCKS, OTHERS, is_nunchaku, open_nunchaku


def is_4bit(path: str | os.PathLike) -> bool:
    """Whether a file holds a 4-bit model in any format that can be read, from its header alone;
    False for what cannot be read.

    Of a folder of the first version, the file with the transformer blocks stands for the whole.
    """
    try:
        header = read_header(path)
        return (
            header.metadata.get("format") == "nibble" or is_nunchaku(header) or is_kitchen(header)
        )
    except (FileRefused, OSError):
        return False


def open_4bit(path: str | os.PathLike) -> QuantizedFile | PublishedFile:
    """Opens a 4-bit model, whoever wrote it: a file, or a folder of Nunchaku's first version.
    Raises FileRefused with the reason.
    """
    path = Path(path)
    if path.is_dir() or path.name == OTHERS:
        return open_nunchaku(path)
    header = read_header(path)
    if header.metadata.get("format") == "nibble":
        return open_quantized(path)
    if is_nunchaku(header):
        return open_nunchaku(path, None if path.name == BLOCKS else header)
    if is_kitchen(header):
        return KitchenFile(header)
    return open_quantized(path)  # which says that it is none of these
