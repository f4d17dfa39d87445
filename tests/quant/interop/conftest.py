"""One random 4-bit FLUX, and the files that hold it in each published form."""

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
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


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A FLUX as the pipeline quantizes it, with what Nunchaku keeps in 16 bit kept; biases of
    modulations are exact with 1 added.
    """
    folder = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for name, shape in flux1_shapes(1, 1, 128, 64, 64).items()
    }
    state |= {
        name: (t * 128).round() / 128
        for name, t in state.items()
        if name.endswith(("mod.lin.bias", "modulation.lin.bias"))
    }
    save_file(state, folder / "m.safetensors")
    keep = ("final_layer.*", "guidance_in.*", "vector_in.*")
    quantize_checkpoint(
        folder / "m.safetensors",
        folder / "q.safetensors",
        Recipe.from_preset("fast", rank=16, rotation="off", solver="svd", keep=keep),
    )
    return folder / "q.safetensors"
