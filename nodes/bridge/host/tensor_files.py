"""Files of tensors as ComfyUI reads them: .safetensors, mapped into memory, and its older kinds."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import torch

from ....quant.files.errors import reading


def read(
    path: Path, remedy: str = "download or copy it again"
) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """(tensors, metadata). remedy: what to do with a damaged one. Raises FileRefused."""
    with reading(path, remedy):
        try:
            return comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:
            # safetensors' own, and those of unpickling, are none that `reading` knows
            raise ValueError(str(error)) from error
