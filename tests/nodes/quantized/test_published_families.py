"""Published files of other families and dialects in ComfyUI's own models: the same output, bit for
bit, as from Nibble's own file.
"""

import comfy.ldm.modules.diffusionmodules.openaimodel as openai
import comfy.model_detection
import comfy.sd
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

from flux_runs import loaded, run, sampled
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.nodes.bridge.quantized.linear import NibbleOperations
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.interop.opening import open_4bit
from published_files import (
    METADATA,
    RandomFlux,
    _folded,
    _stored,
    awq,
    random_linear,
    random_w4a16,
    svdquant,
)
from published_others import LiteFlux, fused_flux, sdxl_file, sdxl_modules

SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 128,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 1, 1],
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 2,
    "num_head_channels": 64,
    "context_dim": 64,
    "adm_in_channels": 128,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "use_checkpoint": False,
}


def load(path):
    return loading.load(path, verify=False)


def saved(tensors, path, metadata=None):
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata
    )
    return path


@pytest.fixture(scope="module")
def lite_paths(tmp_path_factory):
    flux, folder = LiteFlux(), tmp_path_factory.mktemp("lite")
    return saved(flux.lite(), folder / "lite.safetensors"), saved(
        flux.nibble(), folder / "own.safetensors", METADATA
    )


def test_diffusers_dialect_draws_what_our_own_file_draws(lite_paths):
    published, own = map(load, lite_paths)
    assert torch.equal(run(loaded(published)), run(loaded(own)))
    assert torch.equal(sampled(published), sampled(own))


def test_linears_of_several_smoothings_are_their_pieces_take_loras_and_go_back_to_files(lite_paths):
    patcher, name = load(lite_paths[0]), "single_blocks.0.linear1"
    linear = loaded(patcher).model.diffusion_model.get_submodule(name)
    x, base = torch.randn(2, 5, 128), layouts.unpack(linear.weight, linear.bias)
    assert linear.weight.params.smooth_rows == (128, 128, 128, 512)
    assert torch.equal(linear(x), base.forward(x))
    exact = torch.nn.functional.linear(x, base.dequantize(), base.effective_bias())
    assert 10 * torch.log10(exact.square().mean() / (exact - linear(x)).square().mean()) > 15
    draw = torch.Generator().manual_seed(3)
    up, down, stem = (
        torch.randn(896, 4, generator=draw) * 0.1,
        torch.randn(4, 128, generator=draw) / 12,
        "lora_unet_" + name.replace(".", "_"),
    )
    before = linear(x)
    loaded(
        comfy.sd.load_lora_for_models(
            patcher, None, {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, 1.0, 0
        )[0]
    )
    change, expected = (
        patcher.model.diffusion_model.get_submodule(name)(x) - before,
        x @ down.t() @ up.t(),
    )
    assert (change - expected).norm() < 0.02 * expected.norm()
    loaded(patcher)
    state = patcher.model.diffusion_model.state_dict()
    assert b'"smooth_rows": [128, 128, 128, 512]' in bytes(state[f"{name}.comfy_quant"].tolist())
    assert torch.equal(
        state[f"{name}.weight_smooth_factor"],
        open_quantized(lite_paths[1]).layer(name)[f"{name}.weight_smooth_factor"],
    )


def test_fused_smoothing_draws_the_same_and_a_lora_on_its_layers_fits(tmp_path):
    s = 2.0 ** torch.randint(-2, 3, (128,), generator=torch.Generator().manual_seed(0))
    flux = RandomFlux()
    fused = load(saved(fused_flux(flux, s), tmp_path / "fused.safetensors"))
    for part in flux.parts:  # the same model, its smoothing written out
        if part.rpartition(".")[2].startswith("out_proj"):
            flux.parts[part]["weight_smooth_factor"] = s.bfloat16()
    plain = load(saved(flux.nibble(), tmp_path / "own.safetensors", METADATA))
    assert torch.equal(run(loaded(fused)), run(loaded(plain)))


@pytest.mark.parametrize(
    "name, channels, guidance, kind",
    [("schnell", 64, False, "FluxSchnell"), ("Fill", 384, True, "FluxInpaint")],
)
def test_other_models_of_the_family_are_detected_as_such(tmp_path, name, channels, guidance, kind):
    flux = RandomFlux(guidance=guidance)
    flux.plain["img_in.weight"] = torch.randn(flux.hidden, channels).bfloat16() / channels**0.5
    blocks, others = flux.nunchaku()
    published = load(saved(blocks | others, tmp_path / f"svdq-int4-{name}.safetensors"))
    own = load(saved(flux.nibble(), tmp_path / "own.safetensors", METADATA))
    assert (
        type(published.model.model_config).__name__ == kind == type(own.model.model_config).__name__
    )
    assert published.model.model_config.unet_config == own.model.model_config.unet_config
    state, other = published.model.state_dict(), own.model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key].float(), other[key].float()) for key in state)


# ---- Qwen-Image


def qwen_files(state):
    """(a published file, Nibble's own) of a Qwen-Image: random numbers in its block, its own
    everywhere else.
    """
    block, h = "transformer_blocks.0", 128
    published = {
        key: tensor.bfloat16()
        for key, tensor in state.items()
        if not key.startswith(block) or ".norm_" in key
    }
    own = dict(published)
    for i, (fused, names) in enumerate(
        {
            "to_qkv": ("to_q", "to_k", "to_v"),
            "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }.items()
    ):
        part = random_linear(3 * h, h, 50 + i)
        published |= svdquant(f"{block}.attn.{fused}", part, True)
        for j, name in enumerate(names):
            rows = slice(j * h, (j + 1) * h)
            own |= _stored(
                f"{block}.attn.{name}",
                part
                | {
                    "weight": part["weight"][rows],
                    "weight_scale": part["weight_scale"][:, rows],
                    "weight_proj_up": part["weight_proj_up"][rows],
                    "bias": part["bias"][rows],
                },
            )
    for i, (name, n, k) in enumerate(
        (f"{s}_mlp.net.{n}", *shape)
        for s in ("img", "txt")
        for n, shape in (("0.proj", (4 * h, h)), ("2", (h, 4 * h)))
    ):
        part, behind_gelu = random_linear(n, k, 60 + i), name.endswith("2")
        part = _folded(part) if behind_gelu else part
        published |= svdquant(f"{block}.{name}", part, True)
        own |= _stored(f"{block}.{name}", part, {"act_unsigned": True} if behind_gelu else {})
    for i, name in enumerate(("attn.to_out.0", "attn.to_add_out")):
        part = random_linear(h, h, 70 + i)
        published, own = (
            published | svdquant(f"{block}.{name}", part, True),
            own | _stored(f"{block}.{name}", part),
        )
    for i, name in enumerate(("img_mod.1", "txt_mod.1")):
        part = random_w4a16(6 * h, h, 80 + i)
        published, own = (
            published | awq(f"{block}.{name}", part, 6),
            own | _stored(f"{block}.{name}", part),
        )
    return published, own


def test_a_qwen_image_file_computes_what_our_own_file_of_the_same_weights_does(tmp_path):
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    config = {
        "num_layers": 1,
        "num_attention_heads": 1,
        "joint_attention_dim": 64,
        "device": "cpu",
        "dtype": torch.float32,
    }
    dense, draw = (
        QwenImageTransformer2DModel(**config, operations=comfy.ops.disable_weight_init),
        torch.Generator().manual_seed(1),
    )
    for tensor in dense.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) / max(1, tensor.shape[-1]) ** 0.5)
    published, own = qwen_files(dense.state_dict())
    published = open_4bit(saved(published, tmp_path / "svdq-int4-qwen.safetensors"))
    own = open_quantized(saved(own, tmp_path / "own.safetensors", METADATA))
    assert published.family == "Qwen-Image"
    assert published.layers == own.layers
    outputs = []
    for file in (published, own):
        model = QwenImageTransformer2DModel(**config, operations=NibbleOperations)
        missing, unexpected = model.load_state_dict(
            {
                name: t if layouts.is_ours(t) else t.float()
                for name, t in loading.packed(
                    dict(file.tensors()), file.layers, torch.float32
                ).items()
            },
            strict=False,
        )
        assert not missing
        assert not unexpected
        x, context = (
            torch.randn(shape, generator=torch.Generator().manual_seed(3))
            for shape in ((1, 16, 1, 8, 8), (1, 7, 64))
        )
        with torch.no_grad():
            outputs.append(model(x, torch.tensor([0.5]), context))
    assert outputs[0].isfinite().all()
    assert outputs[0].std() > 1e-3
    assert torch.equal(*outputs)


# ---- SDXL


@pytest.fixture(scope="module")
def unet_files(tmp_path_factory):
    torch.manual_seed(0)
    unet = openai.UNetModel(
        **SDXL, device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init
    )
    draw = torch.Generator().manual_seed(1)
    for tensor in unet.state_dict().values():
        tensor.copy_(
            torch.randn(tensor.shape, generator=draw)
            / max(1, tensor[0].numel() if tensor.dim() > 1 else 4) ** 0.5
        )
    published, own = sdxl_file(unet.state_dict())
    folder = tmp_path_factory.mktemp("sdxl")
    return saved(published, folder / "svdq-int4-sdxl.safetensors"), saved(
        own, folder / "own.safetensors", METADATA
    )


def unet_of(state, layers):
    unet = openai.UNetModel(**SDXL, device="cpu", dtype=torch.float32, operations=NibbleOperations)
    missing, unexpected = unet.load_state_dict(
        {
            name: t if layouts.is_ours(t) else t.float()
            for name, t in loading.packed(state, layers, torch.float32).items()
        },
        strict=False,
    )
    assert not missing
    assert not unexpected
    return unet


def noise_of(unet):
    draw = torch.Generator().manual_seed(2)
    x, context, y = (
        torch.randn(shape, generator=draw) for shape in ((1, 4, 16, 16), (1, 7, 64), (1, 128))
    )
    with torch.no_grad():
        return unet(x, torch.tensor([500.0]), context=context, y=y)


def test_an_sdxl_file_computes_what_our_own_file_of_the_same_weights_does(unet_files):
    published, own = open_4bit(unet_files[0]), open_quantized(unet_files[1])
    assert published.family == "SDXL"
    assert published.layers == own.layers
    out = noise_of(unet_of(dict(published.tensors()), published.layers))
    assert out.isfinite().all()
    assert out.std() > 1e-3
    assert torch.equal(out, noise_of(unet_of(dict(own.tensors()), own.layers)))


def test_an_sdxl_file_goes_to_nibble_and_back_bit_for_bit(unet_files, tmp_path):
    from safetensors.torch import load_file

    from nibble.quant.interop.convert import convert

    convert(unet_files[0], tmp_path / "own.safetensors", "nibble")
    convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", "nunchaku")
    before, after = load_file(unet_files[0]), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        for name in before
    )


def test_every_name_of_the_real_sdxl_is_the_one_that_comfyui_gives_it():
    config = SDXL | {
        "model_channels": 320,
        "channel_mult": [1, 2, 4],
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    }
    theirs = {
        name.rpartition(".")[0]: ours.rpartition(".")[0]
        for name, ours in comfy.utils.unet_to_diffusers(config).items()
    }
    assert all(
        theirs[name] == ours
        for name, ours in sdxl_modules().items()
        if "conv_shortcut" not in name or name in theirs
    )
    unet = openai.UNetModel(
        **config, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
    )
    from nibble.quant.interop.names import families

    family = next(family for family in families() if family.name == "SDXL")
    real = {name.rpartition(".")[0] for name in unet.state_dict()}
    # ComfyUI's table has a shortcut for every resnet
    theirs = {name: ours for name, ours in theirs.items() if ours in real}
    fused = {
        name.replace("attn1.to_q", "attn1.to_qkv")
        for name in theirs
        if not name.endswith(("attn1.to_k", "attn1.to_v"))
    }
    assert family.resolve(fused).keys() == real
    assert (
        type(comfy.model_detection.model_config_from_unet(unet.state_dict(), "")).__name__ == "SDXL"
    )
