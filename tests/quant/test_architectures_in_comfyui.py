"""ComfyUI recognises a 4-bit file as it recognised its source: checked on its own model classes,
built without memory, on the meta device.
"""

import pytest
import torch

import comfyui_in_process
from nibble.quant.files.architectures import GROUP, families, plan, recognise
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.svdquant.quantize import layout
from nibble.quant.svdquant.recipe import Recipe

FAST = Recipe.from_preset("fast")


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, on the CPU."""
    if not comfyui_in_process.COMFYUI:
        pytest.skip("COMFYUI_PATH is not set: ComfyUI's model detection is not at hand")
    comfyui_in_process.start()
    import comfy.model_detection
    import comfy.ops

    return comfy


FLUX_CONFIG = dict(
    axes_dim=[16, 56, 56],
    num_heads=2,
    mlp_ratio=4.0,
    theta=10000,
    out_channels=16,
    qkv_bias=True,
    txt_ids_dims=[],
    in_channels=16,
    hidden_size=256,
    context_in_dim=4096,
    patch_size=2,
    depth=2,
    depth_single_blocks=2,
)

FLUX2_CONFIG = FLUX_CONFIG | dict(
    axes_dim=[32, 32, 32, 32],
    mlp_ratio=3.0,
    theta=2000,
    in_channels=128,
    out_channels=128,
    patch_size=1,
    context_in_dim=7680,
    global_modulation=True,
    mlp_silu_act=True,
    qkv_bias=False,
    ops_bias=False,
    vec_in_dim=None,
    txt_ids_dims=[3],
)

COSMOS_CONFIG = dict(
    max_img_h=240,
    max_img_w=240,
    max_frames=128,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=2048,
    num_blocks=2,
    num_heads=16,
    concat_padding_mask=True,
    crossattn_emb_channels=1024,
    pos_emb_cls="rope3d",
    pos_emb_learnable=True,
    pos_emb_interpolation="crop",
    min_fps=1,
    max_fps=30,
    use_adaln_lora=True,
    adaln_lora_dim=256,
    extra_per_block_abs_pos_emb=False,
)

HUNYUAN_CONFIG = dict(
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
    axes_dim=[16, 56, 56],
    context_in_dim=4096,
    hidden_size=256,
    mlp_ratio=4.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    theta=256,
    qkv_bias=True,
    guidance_embed=True,
    vec_in_dim=768,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)

LUMINA_CONFIG = dict(patch_size=2, in_channels=16, n_layers=2, qk_norm=True)

MODELS = {  # class in comfy.ldm, its family, settings of a small model
    "flux1": ("flux.model.Flux", "FLUX.1", FLUX_CONFIG | dict(vec_in_dim=768, guidance_embed=True)),
    "flux1-schnell": (
        "flux.model.Flux",
        "FLUX.1",
        FLUX_CONFIG | dict(vec_in_dim=768, guidance_embed=False),
    ),
    "ovis": (
        "flux.model.Flux",
        "FLUX.1",
        FLUX_CONFIG | dict(vec_in_dim=None, guidance_embed=False, yak_mlp=True, txt_norm=True),
    ),
    "flux2": ("flux.model.Flux", "FLUX.2", FLUX2_CONFIG | dict(guidance_embed=True)),
    "flux2-klein": ("flux.model.Flux", "FLUX.2", FLUX2_CONFIG | dict(guidance_embed=False)),
    "chroma": (
        "chroma.model.Chroma",
        "Chroma",
        FLUX_CONFIG
        | dict(
            in_channels=64,
            out_channels=64,
            in_dim=64,
            out_dim=3072,
            hidden_dim=256,
            n_layers=5,
            vec_in_dim=None,
        ),
    ),
    "qwen": (
        "qwen_image.model.QwenImageTransformer2DModel",
        "Qwen-Image",
        dict(num_layers=2, attention_head_dim=64, num_attention_heads=4),
    ),
    "z-image": (
        "lumina.model.NextDiT",
        "Z-Image / Lumina 2",
        LUMINA_CONFIG
        | dict(
            dim=3840,
            n_heads=30,
            n_kv_heads=30,
            cap_feat_dim=2560,
            axes_dims=[32, 48, 48],
            ffn_dim_multiplier=8 / 3,
            z_image_modulation=True,
            pad_tokens_multiple=32,
        ),
    ),
    "lumina2": (
        "lumina.model.NextDiT",
        "Z-Image / Lumina 2",
        LUMINA_CONFIG
        | dict(dim=2304, n_heads=24, n_kv_heads=8, cap_feat_dim=2304, axes_dims=[32, 32, 32]),
    ),
    "wan-t2v": (
        "wan.model.WanModel",
        "Wan 2.x",
        dict(model_type="t2v", dim=256, ffn_dim=512, num_heads=2, num_layers=2),
    ),
    "wan-i2v": (
        "wan.model.WanModel",
        "Wan 2.x",
        dict(model_type="i2v", in_dim=36, dim=256, ffn_dim=512, num_heads=2, num_layers=2),
    ),
    "wan-vace": (
        "wan.model.VaceWanModel",
        "Wan 2.x",
        dict(
            model_type="vace",
            vace_layers=1,
            vace_in_dim=96,
            dim=256,
            ffn_dim=512,
            num_heads=2,
            num_layers=2,
        ),
    ),
    "sd3": (
        "modules.diffusionmodules.mmdit.MMDiT",
        "SD3 / SD3.5",
        dict(
            input_size=None,
            pos_embed_scaling_factor=None,
            pos_embed_max_size=192,
            num_patches=36864,
            patch_size=2,
            depth=4,
            adm_in_channels=2048,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 256},
            },
            qk_norm="rms",
            x_block_self_attn_layers=[0],
        ),
    ),
    "hunyuan-video": (
        "hunyuan_video.model.HunyuanVideo",
        "HunyuanVideo / HunyuanImage",
        HUNYUAN_CONFIG,
    ),
    "hidream": (
        "hidream.model.HiDreamImageTransformer2DModel",
        "HiDream",
        dict(
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            num_single_layers=2,
            num_attention_heads=2,
            caption_channels=[4096, 4096],
            axes_dims_rope=[64, 32, 32],
            llama_layers=[0],
        ),
    ),
    "ltxv": (
        "lightricks.model.LTXVModel",
        "LTX-Video",
        dict(num_layers=2, cross_attention_dim=2048, attention_head_dim=64),
    ),
    "ltxav": ("lightricks.av_model.LTXAVModel", "LTX-Video", dict(num_layers=2)),
    "cosmos-predict2": ("cosmos.predict2.MiniTrainDIT", "Cosmos Predict2 / Anima", COSMOS_CONFIG),
    "anima": (
        "anima.model.Anima",
        "Cosmos Predict2 / Anima",
        COSMOS_CONFIG | dict(image_model="anima"),
    ),
    "auraflow": ("aura.mmdit.MMDiT", "AuraFlow", dict(n_double_layers=2, n_layers=4)),
    "pixart": ("pixart.pixartms.PixArtMS", "PixArt", dict(depth=2)),
    "hunyuan-dit": (
        "hydit.models.HunYuanDiT",
        "Hunyuan-DiT",
        dict(depth=4, hidden_size=1408, num_heads=16),
    ),
    "krea2": ("krea2.model.SingleStreamDiT", "Krea 2", dict(layers=2)),
    "ernie": ("ernie.model.ErnieImageModel", "ERNIE-Image", dict(num_layers=2)),
    "mochi": (
        "genmo.joint_model.asymm_models_joint.AsymmDiTJoint",
        "Mochi",
        dict(
            depth=2,
            patch_size=2,
            num_heads=24,
            hidden_size_x=3072,
            hidden_size_y=1536,
            in_channels=12,
            use_t5=True,
            mlp_ratio_x=4.0,
            mlp_ratio_y=4.0,
            qk_norm=True,
            qkv_bias=False,
            t5_feat_dim=4096,
            t5_token_length=256,
        ),
    ),
    "kandinsky5": (
        "kandinsky5.model.Kandinsky5",
        "Kandinsky 5",
        dict(num_text_blocks=1, num_visual_blocks=2),
    ),
    "cogvideox": ("cogvideo.model.CogVideoXTransformer3DModel", "CogVideoX", dict(num_layers=2)),
}


def model_shapes(comfy, name):
    """(linears' names, names and shapes of all tensors) of ComfyUI's own class."""
    import importlib

    path, _, config = MODELS[name]
    module, _, cls = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(f"comfy.ldm.{module}"), cls)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"this ComfyUI cannot import {path}: {error}")
    model = cls(
        device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init, **config
    )
    linears = {name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return linears, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def detected(comfy, tensors):
    return comfy.model_detection.detect_unet_config(tensors, "")


@pytest.mark.parametrize(
    "recipe",
    [FAST, Recipe.from_preset("fast", w4a16=["*"])],
    ids=["preset", "everything asked for"],
)
@pytest.mark.parametrize("name", MODELS)
def test_comfyui_recognises_the_4_bit_file_as_its_source(comfy, name, recipe):
    linears, shapes = model_shapes(comfy, name)
    family = recognise(shapes, name)
    assert family.name == MODELS[name][1]
    layers = plan(shapes, family, recipe)
    before = {
        key: torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for key, shape in shapes.items()
    }
    after = {
        spec.name: torch.empty(spec.shape, device="meta", dtype=spec.dtype)
        for spec in layout(shapes, layers, 32)
    }
    quantized = [layer for layer in layers if layer.action != "keep"]
    assert all(
        after[f"{layer.name}.weight"].shape == (layer.N, layer.K // 2) for layer in quantized
    )
    assert detected(comfy, before) is not None
    assert detected(comfy, after) == detected(comfy, before)


@pytest.mark.parametrize("name", MODELS)
def test_only_linears_are_quantized_and_most_weights_are(comfy, name):
    linears, shapes = model_shapes(comfy, name)
    layers = plan(shapes, recognise(shapes, name), FAST)
    assert {layer.name for layer in layers if layer.action != "keep"} <= linears
    forgotten = [
        layer.name
        for layer in layers
        if ".0." in layer.name
        and layer.why == "not part of a transformer block"
        and layer.name in linears
    ]
    assert not forgotten
    assert all(layer.K % GROUP == 0 for layer in layers if layer.action != "keep")


def test_every_pattern_names_a_layer_of_some_model(comfy):
    from fnmatch import fnmatchcase

    found = {name: model_shapes(comfy, name) for name in MODELS}
    # HunyuanVideo's own, converted when loaded
    old_names = (
        "_attn_qkv",
        "_attn_proj",
        "_mlp.fc1",
        "_mlp.fc2",
        "_mod.linear",
        "modulation.linear",
    )
    for family in families():
        modules = [
            key.removesuffix(".weight")
            for name, (_, shapes) in found.items()
            if MODELS[name][1] == family.name
            for key in shapes
        ]
        if modules:
            for pattern in (
                *family.modulation,
                *family.post_gelu,
                *(p for group in family.shared_input for p in group),
            ):
                found_one = any(fnmatchcase(module, pattern) for module in modules)
                assert found_one or pattern.endswith(
                    (*old_names, "mlp.w1", "mlp.w3", ".ff_i.w1", ".ff_i.w3")
                ), (family.name, pattern)


def test_comfyui_reads_the_written_file(comfy, tmp_path):
    import comfy.utils
    from safetensors.torch import save_file

    from nibble.quant.svdquant.quantize import quantize_checkpoint

    shapes = flux1_shapes(1, 1, 128, 64, 768)
    save_file(
        {name: torch.randn(shape).bfloat16() * 0.05 for name, shape in shapes.items()},
        tmp_path / "m.safetensors",
    )
    quantize_checkpoint(
        tmp_path / "m.safetensors",
        tmp_path / "q.safetensors",
        Recipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=1),
    )
    tensors, metadata = comfy.utils.load_torch_file(
        str(tmp_path / "q.safetensors"), return_metadata=True
    )
    assert metadata["format"] == "nibble"
    assert tensors["single_blocks.0.linear1.weight"].shape == (896, 64)
    original = comfy.utils.load_torch_file(str(tmp_path / "m.safetensors"))
    assert detected(comfy, tensors) == detected(comfy, original)
