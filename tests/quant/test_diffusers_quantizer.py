"""diffusers' own interface: quantized while it loads, saved, loaded again; LoRAs beside 4 bits."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import nibble
from nibble.quant.files.errors import FileRefused

pytest.importorskip("accelerate", reason="diffusers loads quantized models with accelerate alone")
models = pytest.importorskip("nibble.quant.diffusers")
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel  # noqa: E402

from compare import assert_same_state  # noqa: E402
from nibble.quant.weights.base import StoredLinear  # noqa: E402
from random_flux import IN_DIFFUSERS  # noqa: E402

PEFT = importlib.util.find_spec("peft") is not None
OPTIONS = {"rank": 16, "solver": "svd", "seed": 3}
INPUTS = (
    torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.full((1,), 0.5),
    torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)),
    torch.randn(1, 64, generator=torch.Generator().manual_seed(3)),
    torch.full((1,), 3.5),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 16-bit FLUX.1 as diffusers saves it, and the same in ComfyUI's names."""
    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(0)
    flux = FluxTransformer2DModel(**IN_DIFFUSERS).bfloat16()
    flux.save_pretrained(folder / "16bit", max_shard_size="1MB")  # parts of a layer in two files
    names = {key: t.contiguous() for key, t in models.to_flux_names(flux.state_dict()).items()}
    save_file(names, folder / "m.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(folder):
    """Quantized by Nibble's own file, loaded."""
    target = folder / "q.safetensors"
    nibble.quantize(folder / "m.safetensors", target, memory_cap=0, quiet=True, **OPTIONS)
    return nibble.load(target)


@torch.no_grad()
def drawn(model):
    dtype = model.x_embedder.weight.dtype
    return models.velocity(model, *(tensor.to(dtype) for tensor in INPUTS)).float()


def load(path, **options):
    return FluxTransformer2DModel.from_pretrained(path, torch_dtype=torch.bfloat16, **options)


def test_a_model_quantized_while_it_loads_is_that_of_nibbles_file(folder, made):
    model = load(folder / "16bit", quantization_config=nibble.NibbleConfig(**OPTIONS))
    assert model.config.quantization_config.layers
    assert_same_state(dict(model.state_dict()), dict(made.state_dict()))


def test_a_saved_model_is_loaded_as_it_was(folder, made, tmp_path):
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "nibble"
    again = load(tmp_path)
    assert_same_state(dict(made.state_dict()), dict(again.state_dict()))
    assert_same_state(
        load_file(tmp_path / "diffusion_pytorch_model.safetensors"), dict(made.state_dict())
    )
    assert not [t for t in [*again.parameters(), *again.buffers()] if t.is_meta]
    again.save_pretrained(tmp_path / "again")
    assert_same_state(dict(load(tmp_path / "again").state_dict()), dict(made.state_dict()))


def test_a_model_saved_in_several_files_is_loaded(made, tmp_path):
    made.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_state(dict(load(tmp_path).state_dict()), dict(made.state_dict()))


def test_a_saved_model_that_lacks_a_tensor_is_refused_in_a_sentence(made, tmp_path):
    made.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["transformer_blocks.0.attn.to_q.weight_scale"]
    save_file(tensors, path, {"format": "pt"})
    said = "lacks transformer_blocks.0.attn.to_q.weight_scale"
    with pytest.raises(ValueError, match=said):
        load(tmp_path)


def test_layers_are_kept_on_request_and_wrong_options_refused(folder):
    config = nibble.NibbleConfig(**OPTIONS, keep=["single_blocks.*"])
    model = load(folder / "16bit", quantization_config=config)
    kinds = {name.split(".")[0] for name, m in model.named_modules() if isinstance(m, StoredLinear)}
    assert "transformer_blocks" in kinds
    assert "single_transformer_blocks" not in kinds
    with pytest.raises(ValueError, match="rank=20 is not a multiple of 16"):
        nibble.NibbleConfig(rank=20)
    with pytest.raises(ValueError, match="a recipe has no ranks"):
        nibble.NibbleConfig(ranks=16)


def test_a_model_is_dequantized_to_the_matrices_that_it_stands_for(folder):
    model = load(folder / "16bit", quantization_config=nibble.NibbleConfig(**OPTIONS))
    weight = model.get_submodule("transformer_blocks.0.ff.net.2").quantized()
    before = drawn(model)
    model.dequantize()
    assert torch.equal(
        model.get_submodule("transformer_blocks.0.ff.net.2").weight, weight.dequantize().bfloat16()
    )
    after = drawn(model.float())
    # only the rounding of activations to 4 bits is left
    assert 10 * torch.log10(after.square().mean() / (after - before).square().mean()) > 14


def test_another_model_is_quantized_layer_by_layer(tmp_path):
    sizes = dict(patch_size=2, in_channels=64, out_channels=16, num_layers=2)
    sizes |= dict(attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64)
    torch.manual_seed(0)
    qwen = QwenImageTransformer2DModel(**sizes, axes_dims_rope=(16, 56, 56)).bfloat16()
    qwen.save_pretrained(tmp_path)
    kind = QwenImageTransformer2DModel
    model = kind.from_pretrained(tmp_path, quantization_config=nibble.NibbleConfig(**OPTIONS))
    found = dict(model.named_modules())
    assert isinstance(found["transformer_blocks.1.attn.to_q"], StoredLinear)
    assert not isinstance(found["img_in"], StoredLinear)
    matrix = qwen.get_submodule("transformer_blocks.1.attn.to_q").weight.float()
    error = found["transformer_blocks.1.attn.to_q"].quantized().dequantize() - matrix
    assert 10 * torch.log10(matrix.square().mean() / error.square().mean()) > 17


def test_a_model_that_is_no_diffusion_transformer_is_refused(tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8, 8, 8, 8)).save_pretrained(tmp_path)
    with pytest.raises(FileRefused, match="AutoencoderTiny"):
        AutoencoderTiny.from_pretrained(tmp_path, quantization_config=nibble.NibbleConfig())


needs_peft = pytest.mark.skipif(not PEFT, reason="peft is not installed")


@needs_peft
def test_a_lora_is_added_beside_the_layers(folder, made):
    """y = Q(x) + alpha / r * B A x, on a layer and in the whole model."""
    from peft import LoraConfig

    model = nibble.load(folder / "q.safetensors")
    before, name = drawn(model), "transformer_blocks.0.attn.to_q"
    model.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["attn.to_q"]), "style")
    assert torch.equal(drawn(model), before)  # B is 0 in the beginning
    layer = model.get_submodule(name)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.lora_B["style"].weight.copy_(torch.randn(128, 2, generator=draw))
    x = torch.randn(3, 128, generator=draw)
    a, b = layer.lora_A["style"].weight, layer.lora_B["style"].weight
    expected = made.get_submodule(name)(x) + 3 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(drawn(model), before)
    with pytest.raises(ValueError, match="unload_lora_weights first"):
        model.save_pretrained(folder / "with-lora")
    with pytest.raises(ValueError, match="cannot be merged exactly"):
        layer.merge()
    model.disable_adapters()
    assert torch.equal(drawn(model), before)


@needs_peft
def test_a_lora_learns_and_the_layers_stay(folder):
    from peft import LoraConfig

    model = nibble.load(folder / "q.safetensors")
    codes = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q", "ff.net.2"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 3  # A and B; both kinds of block have an attn.to_q
    models.velocity(model, *(tensor.bfloat16() for tensor in INPUTS)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    found = {name.replace("base_layer.", ""): tensor for name, tensor in model.named_buffers()}
    assert all(torch.equal(found[name], tensor) for name, tensor in codes.items())


@needs_peft
def test_a_lora_file_is_loaded_as_pipelines_do_it_and_removed(folder, tmp_path):
    """`load_lora_adapter` is what `pipe.load_lora_weights` calls of its transformer."""
    from diffusers.utils import recurse_remove_peft_layers

    model = nibble.load(folder / "q.safetensors")
    before, draw = drawn(model), torch.Generator().manual_seed(0)
    name = "transformer.single_transformer_blocks.0.proj_mlp"
    state = {
        f"{name}.lora_A.weight": torch.randn(4, 128, generator=draw),
        f"{name}.lora_B.weight": torch.randn(512, 4, generator=draw),
    }
    model.load_lora_adapter(state, adapter_name="style")
    assert not torch.equal(drawn(model), before)
    recurse_remove_peft_layers(model)
    assert torch.equal(drawn(model), before)


@needs_peft
def test_dora_is_refused_in_a_sentence(folder):
    from peft import LoraConfig

    model = nibble.load(folder / "q.safetensors")
    with pytest.raises(ValueError, match="DoRA needs the 16-bit weights"):
        model.add_adapter(LoraConfig(r=2, target_modules=["attn.to_q"], use_dora=True))
