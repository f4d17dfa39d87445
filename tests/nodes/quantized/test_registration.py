"""Low-bit files in ComfyUI's own loaders: the model is the one that Nibble's node loads, bit for
bit, and behaves like it.
"""

import json
import shutil

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, save_file

import nodes
import tiny_models
from flux_loras import lora_file, with_lora
from flux_runs import loaded, run, sampled
from nibble.nodes.bridge.intlora import merge
from nibble.nodes.bridge.quantized import loading, registration
from nibble.quant.files.errors import FileRefused
from published_files import RandomFlux
from random_flux import quantize

FILES = ("quantized_file", "rotated_file", "table_file", "float_file", "codeword_file")


@pytest.fixture(autouse=True)
def registered():
    """ComfyUI with the pack."""
    table = list(comfy.supported_models.models)
    registration.register()
    yield
    comfy.supported_models.models[:] = table


@pytest.fixture(params=FILES)
def path(request):
    """A file of each format."""
    return request.getfixturevalue(request.param)


def stock(path, **options):
    """What *Load Diffusion Model* does."""
    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def stored(patcher) -> dict[str, torch.Tensor]:
    """What ComfyUI saves of a model."""
    state = loaded(patcher).model_state_dict("diffusion_model.")
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_the_model_is_the_same(path):
    ours, theirs = loading.load(path), stock(path)
    assert type(theirs.model) is type(ours.model)
    assert theirs.model.get_dtype() == ours.model.get_dtype()
    assert theirs.model.manual_cast_dtype == ours.model.manual_cast_dtype
    assert theirs.model.model_config.unet_config == ours.model.model_config.unet_config
    assert theirs.model_size() == ours.model_size()
    assert_same(stored(ours), stored(theirs))
    assert torch.equal(run(loaded(ours)), run(loaded(theirs)))
    assert torch.equal(sampled(ours), sampled(theirs))


def test_a_lora_does_the_same_whole_and_partly_loaded(path):
    pictures, saved = [], []
    for model in (loading.load(path), stock(path)):
        patched = with_lora(model, lora_file(model))
        pictures.append(sampled(patched))
        saved.append(stored(patched))
        patched.detach()
        patched.patch_model(patched.load_device, lowvram_model_memory=1)
        pictures.append(run(patched))
        patched.detach()
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[1], pictures[3])
    assert_same(*saved)


def test_what_model_save_writes_opens_again(path, tmp_path):
    model, saved = stock(path), str(tmp_path / "saved.safetensors")
    patched = with_lora(model, lora_file(model))
    picture = sampled(patched)
    comfy.sd.save_checkpoint(saved, patched)
    patched.detach()
    assert torch.equal(sampled(stock(saved)), picture)
    assert torch.equal(sampled(loading.load(saved)), picture)


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"])
def test_the_node_opens_it_whatever_its_weight_dtype(folder, quantized_file, dtype):
    """A 4-bit model has no weights for an 8-bit float to make smaller."""
    shutil.copy(quantized_file, folder / "four.safetensors")
    (model,) = nodes.UNETLoader().load_unet("four.safetensors", dtype)
    assert_same(stored(loading.load(quantized_file)), stored(model))
    assert torch.equal(run(loaded(model)), run(loaded(loading.load(quantized_file))))


def test_another_dtype_that_is_asked_for_is_heeded(quantized_file):
    ours, theirs = (
        loading.load(quantized_file, dtype="fp16"),
        stock(quantized_file, dtype=torch.float16),
    )
    assert theirs.model.get_dtype() == ours.model.get_dtype() == torch.float16
    assert torch.equal(run(loaded(ours)), run(loaded(theirs)))


def test_a_deep_copy_is_made_by_the_same_loader(quantized_file):
    model = stock(quantized_file)
    copy = model.clone(force_deepcopy=True)
    assert copy.model is not model.model
    assert_same(stored(model), stored(copy))


def test_it_can_be_merged_and_saved_as_one_of_nibble_s_loader(quantized_file, dense_model):
    assert merge.origin(stock(quantized_file)) == ((str(quantized_file), False), ())
    with pytest.raises(FileRefused, match="does not come from Load SVDQuant Model"):
        merge.origin(dense_model)


def test_an_all_in_one_file_opens_in_load_checkpoint(quantized_file, tmp_path):
    parts = load_file(quantized_file)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in parts.items()}
    save_file(whole | {"vae.left.alone": torch.zeros(3)}, tmp_path / "all.safetensors")
    model, *_ = comfy.sd.load_checkpoint_guess_config(
        str(tmp_path / "all.safetensors"), output_vae=False, output_clip=False
    )
    assert_same(stored(loading.load(quantized_file)), stored(model))


def test_a_published_file_of_comfy_kitchen_s_names_opens(tmp_path):
    save_file(RandomFlux().nibble(), tmp_path / "kitchen.safetensors")
    ours, theirs = (load(tmp_path / "kitchen.safetensors") for load in (loading.load, stock))
    assert_same(stored(ours), stored(theirs))
    assert torch.equal(sampled(ours), sampled(theirs))


def test_a_model_that_is_configured_by_shapes_and_metadata_is_the_same(tmp_path):
    """LTX's width of the text is read off a weight that holds codes, half as wide; its heads are in
    the metadata alone.
    """
    state = tiny_models.build("ltxv").model.diffusion_model.state_dict()
    config = {"num_attention_heads": 2, "attention_head_dim": 32, "caption_channels": 24}
    metadata = {"config": json.dumps({"transformer": config})}
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, tmp_path / "ltx.safetensors", metadata)
    path = quantize(tmp_path / "ltx.safetensors", "four.safetensors")
    ours, theirs = loading.load(path), stock(path)
    assert theirs.model.model_config.unet_config == ours.model.model_config.unet_config
    assert theirs.model.model_config.unet_config["cross_attention_dim"] == 64
    assert_same(stored(ours), stored(theirs))


# ---- what is refused, and what is left alone


def nan(state, layer):
    state[f"{layer}.weight_scale"].view(-1)[3] = float("nan")


def no_scale(state, layer):
    del state[f"{layer}.weight_scale"]


def of_fp8(state, layer):
    text = json.dumps({"format": "float8_e4m3fn"}).encode()
    state[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)


def no_layer(state, layer):
    for name in [name for name in state if name.startswith(f"{layer}.")]:
        del state[name]


@pytest.mark.parametrize(
    "damage, words",
    [
        (nan, "The model holds NaN or infinity in double_blocks.0.img_mlp.0.weight_scale;"),
        (no_scale, "The model lacks double_blocks.0.img_mlp.0.weight_scale"),
        (of_fp8, "The model stores double_blocks.0.img_mlp.0 as float8_e4m3fn beside SVDQuant"),
        (no_layer, "The model lacks the layer double_blocks.0.img_mlp.0;"),
    ],
)
def test_a_damaged_one_is_refused_in_words(quantized_file, tmp_path, damage, words):
    state = load_file(quantized_file)
    damage(state, "double_blocks.0.img_mlp.0")
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(FileRefused, match=words):
        stock(tmp_path / "damaged.safetensors")


def test_other_models_are_left_to_comfyui(flux_file, quantized_file, tmp_path):
    assert type(stock(flux_file).model.model_config) is comfy.supported_models.Flux
    state = load_file(flux_file)
    of_fp8(state, "double_blocks.0.img_mlp.0")
    state["double_blocks.0.img_mlp.0.weight_scale"] = torch.tensor(0.5)
    save_file(state, tmp_path / "mixed.safetensors")
    config = stock(tmp_path / "mixed.safetensors").model.model_config
    assert type(config) is comfy.supported_models.Flux
    assert config.quant_config


def test_4_bit_weights_that_comfyui_can_read_are_left_to_it(monkeypatch, quantized_file):
    """As of ComfyUI 0.38: with zero points, and nothing else in the file."""
    modulation = "double_blocks.0.img_mod.lin"
    state = {name: t for name, t in load_file(quantized_file).items() if modulation in name}
    assert registration._is_for_us(state, "")
    monkeypatch.setitem(registration.QUANT_ALGOS, "awq_w4a16", {})
    assert registration._is_for_us(state, "")  # it has no zero points
    state[f"{modulation}.weight_zeros"] = torch.zeros_like(state[f"{modulation}.weight_scale"])
    assert not registration._is_for_us(state, "")


def test_it_is_in_the_table_once():
    registration.register()
    entries = [e for e in comfy.supported_models.models if getattr(e, "NAME", "") == "nibble"]
    assert entries == [registration.LowBitModel] == comfy.supported_models.models[:1]


def test_a_loader_that_makes_its_patcher_last_gets_a_model_that_works(quantized_file, caplog):
    state = load_file(quantized_file)
    config = comfy.model_detection.model_config_from_unet(state, "")
    config.set_inference_dtype(torch.bfloat16, None, device=torch.device("cpu"))
    model = config.get_model(state, "")
    model.load_model_weights(state, "")
    assert "makes its model's patcher after loading" in caplog.text
    cpu = torch.device("cpu")
    patcher = ModelPatcher(model, load_device=cpu, offload_device=cpu)
    same = loading.load(quantized_file, dtype="bf16")
    assert torch.equal(run(loaded(patcher)), run(loaded(same)))
