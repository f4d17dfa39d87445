"""One random 4-bit FLUX, and the files that hold it in each published form."""

import pytest
import torch
from safetensors.torch import save_file

from published_files import METADATA, RandomFlux


@pytest.fixture(scope="session")
def flux() -> RandomFlux:
    return RandomFlux()


def _save(tensors: dict[str, torch.Tensor], path, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="session")
def files(flux, tmp_path_factory) -> dict:
    """Form → path: the folder of Nunchaku's first version, a file with its first names, one with
    today's, and Nibble's own.
    """
    folder = tmp_path_factory.mktemp("svdq-int4-flux")
    blocks, others = flux.nunchaku()
    _save(blocks, folder / "transformer_blocks.safetensors")
    _save(others, folder / "unquantized_layers.safetensors")
    (folder / "config.json").write_text('{"num_layers": 1}')
    single = _save(
        blocks | others,
        folder.parent / "first.safetensors",
        {"quantization_config": '{"rank": 16}', "model_class": "NunchakuFlux"},
    )
    blocks, others = flux.nunchaku(modern=True)
    modern = _save(
        {f"model.diffusion_model.{name}": tensor for name, tensor in (blocks | others).items()},
        folder.parent / "modern.safetensors",
    )
    return {
        "folder": folder,
        "first": single,
        "modern": modern,
        "nibble": _save(flux.nibble(), folder.parent / "own.safetensors", METADATA),
    }
