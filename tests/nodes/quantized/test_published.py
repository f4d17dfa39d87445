"""Published files in ComfyUI's own FLUX: the same output, bit for bit, as from Nibble's own file of
the same weights.
"""

import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from checkout import ROOT
from flux_runs import loaded, run, sampled
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.quant.files.errors import FileRefused
from published_files import METADATA, RandomFlux

LINEAR1, LINEAR2, MODULATION = (
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
    "single_blocks.0.modulation.lin",
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict:
    flux, folder = RandomFlux(), tmp_path_factory.mktemp("svdq-int4-random")
    blocks, others = flux.nunchaku()
    save_file(blocks, folder / "transformer_blocks.safetensors")
    save_file(others, folder / "unquantized_layers.safetensors")
    save_file(blocks | others, folder / "first.safetensors")
    save_file(
        {
            name: tensor.contiguous()
            for part in flux.nunchaku(modern=True)
            for name, tensor in part.items()
        },
        folder / "modern.safetensors",
    )
    save_file(flux.nibble(), folder / "own.safetensors", METADATA)
    save_file(flux.nibble(), folder / "kitchen.safetensors")
    return {"folder": folder / "transformer_blocks.safetensors"} | {
        n: folder / f"{n}.safetensors" for n in ("first", "modern", "own", "kitchen")
    }


def load(path):
    return loading.load(path, verify=False)


@pytest.fixture(scope="module")
def own(paths):
    """Output and sampled latent of Nibble's own file."""
    patcher = load(paths["own"])
    return run(loaded(patcher)), sampled(patcher)


@pytest.mark.parametrize("form", ["folder", "first", "modern", "kitchen"])
def test_every_form_draws_the_same_picture(paths, own, form):
    patcher = load(paths[form])
    assert type(patcher.model).__name__ == "Flux"
    assert own[0].isfinite().all()
    assert own[0].std() > 1e-3
    assert torch.equal(run(loaded(patcher)), own[0])
    assert torch.equal(sampled(patcher), own[1])


def test_it_is_close_to_its_own_weights_in_16_bit(paths, own, tmp_path):
    """The dequantized matrices of every layer, in ComfyUI's own 16-bit FLUX."""
    model = load(paths["first"]).model.diffusion_model
    state = {}
    for name, module in model.named_modules():
        if layouts.is_ours(getattr(module, "weight", None)):
            base = layouts.unpack(module.weight, module.bias)
            state |= {f"{name}.weight": base.dequantize(), f"{name}.bias": base.effective_bias()}
    quantized = {name.rpartition(".")[0] for name in state}
    state |= {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in quantized
    }
    patcher = comfy.sd.load_diffusion_model_state_dict(
        {name: tensor.float().contiguous() for name, tensor in state.items()}
    )
    exact = run(loaded(patcher))
    assert 10 * torch.log10(exact.square().mean() / (exact - own[0]).square().mean()) > 12


def test_the_modulation_has_its_zero_points(paths):
    linear, part = (
        load(paths["first"]).model.diffusion_model.get_submodule(MODULATION),
        RandomFlux().mods["single_transformer_blocks.0.norm.linear"],
    )
    assert torch.equal(linear.weight.params.zeros, part["weight_zeros"])
    x = torch.randn(2, 128)
    raw = part["weight"].view(torch.uint8)
    codes = torch.stack([raw & 15, raw >> 4], -1).flatten(1).float()
    dense = (codes - 8) * part["weight_scale"].float().t().repeat_interleave(64, 1) + part[
        "weight_zeros"
    ].float().t().repeat_interleave(64, 1)
    assert torch.allclose(
        linear(x), torch.nn.functional.linear(x, dense, part["bias"].float()), atol=1e-5
    )


def test_a_linear_of_two_signs_computes_the_sum_of_its_halves(paths):
    linear = load(paths["first"]).model.diffusion_model.get_submodule(LINEAR2)
    p, x = linear.weight.params, torch.randn(2, 5, 640)
    x[..., 128:] = torch.nn.functional.gelu(x[..., 128:], approximate="tanh")
    assert p.unsigned_from == 128
    base = layouts.unpack(linear.weight, linear.bias)
    exact = torch.nn.functional.linear(x, base.dequantize(), base.effective_bias())
    assert torch.equal(linear(x), base.forward(x))
    assert 10 * torch.log10(exact.square().mean() / (exact - linear(x)).square().mean()) > 15


@pytest.mark.parametrize("name", [LINEAR1, LINEAR2, MODULATION])
def test_a_layer_compiles_without_a_graph_break(paths, name):
    torch._dynamo.reset()
    linear = load(paths["first"]).model.diffusion_model.get_submodule(name)
    x = torch.randn(4, linear.in_features)
    with torch.no_grad():
        assert torch.equal(torch.compile(linear, backend="aot_eager", fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("name", [LINEAR1, LINEAR2, "double_blocks.0.img_attn.qkv", MODULATION])
def test_a_stock_lora_changes_the_output_by_just_its_product(paths, name):
    patcher = load(paths["first"])
    n, k = patcher.model.diffusion_model.get_submodule(name).weight.shape
    draw = torch.Generator().manual_seed(3)
    up, down = torch.randn(n, 4, generator=draw) * 0.1, torch.randn(4, k, generator=draw) / k**0.5
    stem = "lora_unet_" + name.replace(".", "_")
    lora = {
        f"{stem}.lora_up.weight": up,
        f"{stem}.lora_down.weight": down,
        f"{stem}.alpha": torch.tensor(4.0),
    }
    x = torch.rand(3, k, generator=draw)
    loaded(patcher)
    linear = patcher.model.diffusion_model.get_submodule(name)
    before, codes = linear(x), linear.weight._qdata.clone()
    patched = comfy.sd.load_lora_for_models(patcher, None, lora, 0.8, 0)[0]
    loaded(patched)
    change, expected = linear(x) - before, 0.8 * x @ down.t() @ up.t()
    assert torch.equal(linear.weight._qdata, codes)
    assert (change - expected).norm() < 0.02 * expected.norm()
    loaded(patcher)
    assert torch.equal(linear(x), before)


def test_partly_loaded_it_gives_the_same_bits(paths, own):
    patcher = load(paths["first"])
    patcher.patch_model(patcher.load_device, lowvram_model_memory=patcher.model_size() // 3)
    assert patcher.model.model_lowvram
    assert torch.equal(run(patcher), own[0])
    patcher.detach()


def test_a_deep_clone_is_loaded_from_the_published_file_again(paths, own):
    clone = load(paths["folder"]).clone(force_deepcopy=True)
    assert torch.equal(run(loaded(clone)), own[0])


def test_the_model_s_state_dict_has_the_options_of_its_layers(paths):
    model = load(paths["first"]).model.diffusion_model
    state = model.state_dict()
    assert b'"unsigned_from": 128' in bytes(state[f"{LINEAR2}.comfy_quant"].tolist())
    other = load(paths["own"]).model.diffusion_model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name].float(), other[name].float()) for name in state)


def test_a_file_without_one_block_s_layer_is_refused(paths, tmp_path):
    from safetensors.torch import load_file

    tensors = {
        name: t
        for name, t in load_file(paths["first"]).items()
        if not name.startswith("transformer_blocks.0.mlp_fc1")
    }
    save_file(tensors, tmp_path / "hole.safetensors")
    with pytest.raises(
        FileRefused,
        match="hole.safetensors lacks the layer double_blocks.0.img_mlp.0; download it again",
    ):
        load(tmp_path / "hole.safetensors")


def test_the_list_of_the_load_node_shows_published_files(paths, monkeypatch):
    import folder_paths

    folder = paths["own"].parent
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        loading.FOLDER,
        ([str(folder.parent)], {".safetensors"}),
    )
    folder_paths.filename_list_cache.clear()
    listed = {
        name.rpartition("/")[2]
        for name in loading.quantized_files()
        if name.startswith(folder.name)
    }
    assert listed == {
        "transformer_blocks.safetensors",
        "first.safetensors",
        "modern.safetensors",
        "own.safetensors",
        "kitchen.safetensors",
    }
    folder_paths.filename_list_cache.clear()


def test_the_demo_model_draws_the_same_in_every_form(tmp_path):
    """Quantized from its 16-bit weights, written for the other programs and read back."""

    from nibble.quant.interop.convert import convert
    from nibble.quant.svdquant.quantize import quantize_checkpoint
    from nibble.quant.svdquant.recipe import Recipe

    source = ROOT / "demo" / "weights" / "diffusion_models" / "flux-demo.safetensors"
    keep = ("final_layer.*", "guidance_in.*", "vector_in.*")
    quantize_checkpoint(
        source,
        tmp_path / "own.safetensors",
        Recipe.from_preset("fast", rank=16, rotation="off", solver="svd", keep=keep),
    )
    convert(tmp_path / "own.safetensors", tmp_path / "kitchen.safetensors", "kitchen")
    convert(tmp_path / "own.safetensors", tmp_path / "nunchaku.safetensors", "nunchaku")
    convert(tmp_path / "nunchaku.safetensors", tmp_path / "back.safetensors", "nibble")
    pictures = {
        form: sampled(load(tmp_path / f"{form}.safetensors"))
        for form in ("own", "kitchen", "nunchaku", "back")
    }
    assert torch.equal(pictures["kitchen"], pictures["own"])
    assert torch.equal(pictures["back"], pictures["nunchaku"])
    exact = sampled(comfy.sd.load_diffusion_model(str(source)))
    own_error, their_error = ((exact - pictures[form]).norm() for form in ("own", "nunchaku"))
    # finer inputs behind the GELUs, coarser biases of modulation
    assert their_error < 1.1 * own_error
