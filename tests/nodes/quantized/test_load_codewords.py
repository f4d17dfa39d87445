"""Files of codewords loaded into ComfyUI's own model: the same tensors, the same output as of the
dequantized weights, and a stock LoRA.
"""

import shutil

import comfy.memory_management
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from codewords import LAYER, relative
from flux_runs import loaded, run
from nibble.nodes.bridge.quantize import sources
from nibble.nodes.bridge.quantized import linear as ops
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files import checkpoint
from nibble.quant.weights.vq import VQWeight


def output(patcher, seed: int = 0) -> torch.Tensor:
    """One call of the diffusion model, loaded as a sampler loads it."""
    comfy.model_management.load_models_gpu([patcher])
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw)

    with torch.no_grad():
        return patcher.model.diffusion_model(
            random(1, 16, 8, 8),
            torch.tensor([0.7]),
            random(1, 6, 64),
            random(1, 64),
            torch.tensor([3.5]),
        )


def test_the_loaded_model_is_comfyui_s_own_and_saves_the_file_s_tensors(codeword_file):
    patcher, file = loading.load(codeword_file), checkpoint.open_quantized(codeword_file)
    saved = patcher.model.diffusion_model.state_dict()
    for name in file.layers:
        for key, tensor in file.layer(name).items():
            if not key.endswith("comfy_quant"):
                assert torch.equal(saved[key], tensor), key
    module = patcher.model.diffusion_model.get_submodule(LAYER)
    assert type(module) is ops.NibbleOperations.Linear
    assert (
        patcher.model_size()
        < 0.5 * checkpoint.open_quantized(codeword_file).fact("source")["bytes"]
    )


def test_its_output_is_that_of_the_dequantized_weights(codeword_file, flux_file, tmp_path):
    file, state = checkpoint.open_quantized(codeword_file), load_file(flux_file)
    for name in file.layers:
        state[f"{name}.weight"] = VQWeight.from_tensors(file.layer(name), name).dequantize()
    save_file(state, tmp_path / "dense.safetensors")
    dense = comfy.sd.load_diffusion_model(
        str(tmp_path / "dense.safetensors"), {"dtype": torch.float32}
    )
    ours = loading.load(codeword_file, dtype="fp32")
    assert relative(output(ours), output(dense)) < 1e-4


@pytest.mark.parametrize("memory", [0, 1], ids=["whole", "streamed"])
def test_a_stock_lora_acts_as_on_the_dequantized_model_and_leaves_no_trace(codeword_file, memory):
    draw = torch.Generator().manual_seed(2)
    name = f"diffusion_model.{LAYER}"
    up, down = torch.randn(512, 4, generator=draw), torch.randn(4, 128, generator=draw) * 0.1
    patch = {
        f"{name}.lora_up.weight": up,
        f"{name}.lora_down.weight": down,
        f"{name}.alpha": torch.tensor(4.0),
    }
    base = loading.load(codeword_file, dtype="fp32", disable_dynamic=True)
    module, given = (
        base.model.diffusion_model.get_submodule(LAYER),
        torch.randn(3, 128, generator=draw),
    )
    with torch.no_grad():
        plain, codes = module(given), module.weight._qdata.clone()
        patched, _ = comfy.sd.load_lora_for_models(base, None, patch, 0.7, 0)
        patched.patch_model(patched.load_device, lowvram_model_memory=memory)
        assert bool(module.weight_function) == bool(memory), (
            "attached to a streamed layer, else in its low-rank branch"
        )
        assert relative(module(given) - plain, given @ (0.7 * up @ down).T) < 1e-2
        assert torch.equal(module.weight._qdata, codes)
        patched.detach()
        assert torch.equal(module(given), plain), (
            "taken away, the output is the old one bit for bit"
        )


def test_one_loader_takes_either_kind_and_the_other_names_it_for_what_it_does_not_take(
    folder, codeword_file, quantized_file
):
    from nibble.nodes import svdquant
    from nibble.nodes import vq4dit as nodes

    shutil.copy(codeword_file, folder / "codes.safetensors")
    shutil.copy(quantized_file, folder / "four.safetensors")
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    assert loading.quantized_files("vq") == ["codes.safetensors"]
    assert loading.quantized_files("svdquant") == ["four.safetensors"]
    assert sources.listed() == ["flux.safetensors"]
    assert loading.quantized_files() == ["codes.safetensors", "four.safetensors"]
    assert svdquant.NibbleLoadSVDQuant.validate_inputs("codes.safetensors") is True
    assert svdquant.NibbleLoadSVDQuant.validate_inputs("four.safetensors") is True
    same = [
        node.execute("codes.safetensors", True, "default")
        for node in (svdquant.NibbleLoadSVDQuant, nodes.NibbleLoadVQ)
    ]
    assert same[0].ui == same[1].ui
    assert torch.equal(*(run(loaded(output.result[0])) for output in same))
    assert "load it with the node Load SVDQuant Model" in nodes.NibbleLoadVQ.validate_inputs(
        "four.safetensors"
    )
    assert nodes.NibbleLoadVQ.validate_inputs("codes.safetensors") is True
    assert nodes.NibbleInspectVQ.validate_inputs("codes.safetensors") is True
