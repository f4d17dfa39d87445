"""Every model class of ComfyUI in its published size, on the meta device: names and shapes without
memory.

    shapes, linears = build("Flux")       of `comfy.supported_models.Flux`
"""

from __future__ import annotations

from typing import Any

import torch

import stable_audio

FLUX: dict[str, Any] = dict(
    image_model="flux", axes_dim=[16, 56, 56], num_heads=24, mlp_ratio=4.0, theta=10000,
    in_channels=16, out_channels=16, hidden_size=3072, context_in_dim=4096, vec_in_dim=768,
    qkv_bias=True, txt_ids_dims=[], patch_size=2, depth=19, depth_single_blocks=38,
    guidance_embed=True,
)  # fmt: skip
FLUX2 = FLUX | dict(
    image_model="flux2",
    axes_dim=[32, 32, 32, 32],
    num_heads=48,
    mlp_ratio=3.0,
    theta=2000,
    out_channels=128,
    qkv_bias=False,
    ops_bias=False,
    txt_ids_dims=[3],
    in_channels=128,
    hidden_size=6144,
    context_in_dim=15360,
    vec_in_dim=None,
    patch_size=1,
    depth=8,
    depth_single_blocks=48,
    global_modulation=True,
    mlp_silu_act=True,
)
CHROMA = {key: value for key, value in FLUX.items() if key != "guidance_embed"} | dict(
    image_model="chroma",
    in_channels=64,
    out_channels=64,
    in_dim=64,
    out_dim=3072,
    hidden_dim=5120,
    n_layers=5,
    vec_in_dim=None,
)
HUNYUAN: dict[str, Any] = dict(
    image_model="hunyuan_video",
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
    axes_dim=[16, 56, 56],
    context_in_dim=4096,
    hidden_size=3072,
    mlp_ratio=4.0,
    num_heads=24,
    depth=20,
    depth_single_blocks=40,
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
HUNYUAN15 = HUNYUAN | dict(
    context_in_dim=3584,
    hidden_size=2048,
    num_heads=16,
    depth=54,
    depth_single_blocks=0,
    vec_in_dim=None,
    guidance_embed=False,
    byt5=True,
    use_cond_type_embedding=True,
    vision_in_dim=1152,
)
COSMOS: dict[str, Any] = dict(
    max_img_h=240,
    max_img_w=240,
    max_frames=128,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    concat_padding_mask=True,
    pos_emb_cls="rope3d",
    pos_emb_interpolation="crop",
    use_adaln_lora=True,
    adaln_lora_dim=256,
)
COSMOS1 = COSMOS | dict(
    image_model="cosmos",
    model_channels=4096,
    num_blocks=28,
    num_heads=32,
    block_config="FA-CA-MLP",
    pos_emb_learnable=False,
    block_x_format="THWBD",
    affline_emb_norm=True,
    extra_per_block_abs_pos_emb=True,
    extra_per_block_abs_pos_emb_type="learnable",
)
COSMOS2 = COSMOS | dict(
    image_model="cosmos_predict2",
    model_channels=2048,
    num_blocks=28,
    num_heads=16,
    crossattn_emb_channels=1024,
    pos_emb_learnable=True,
    min_fps=1,
    max_fps=30,
    extra_per_block_abs_pos_emb=False,
)
LUMINA: dict[str, Any] = dict(
    image_model="lumina2",
    patch_size=2,
    in_channels=16,
    qk_norm=True,
    dim=2304,
    cap_feat_dim=2304,
    n_layers=26,
    n_heads=24,
    n_kv_heads=8,
    axes_dims=[32, 32, 32],
    ffn_dim_multiplier=4.0,
)
ZIMAGE = LUMINA | dict(
    dim=3840,
    cap_feat_dim=2560,
    n_layers=30,
    n_heads=30,
    n_kv_heads=30,
    axes_dims=[32, 48, 48],
    ffn_dim_multiplier=8 / 3,
    z_image_modulation=True,
    pad_tokens_multiple=32,
)
ZIMAGE_PIXEL = ZIMAGE | dict(
    image_model="zimage_pixel",
    patch_size=16,
    in_channels=3,
    decoder_in_channels=768,
    decoder_hidden_size=3840,
    decoder_num_res_blocks=4,
    decoder_max_freqs=8,
)
WAN: dict[str, Any] = dict(
    image_model="wan2.1", dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16
)
WAN_SMALL = dict(
    image_model="wan2.1", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16
)
SD3: dict[str, Any] = dict(
    input_size=None,
    pos_embed_scaling_factor=None,
    pos_embed_max_size=192,
    num_patches=36864,
    patch_size=2,
    depth=24,
    adm_in_channels=2048,
    context_embedder_config={
        "target": "torch.nn.Linear",
        "params": {"in_features": 4096, "out_features": 1536},
    },
    qk_norm="rms",
    x_block_self_attn_layers=list(range(13)),
)
STABLE_AUDIO = dict(audio_model="dit1.0", global_cond_dim=1536, embed_dim=1536, io_channels=64)
KANDINSKY = dict(image_model="kandinsky5", axes_dims=(16, 24, 24))
MOCHI = dict(
    image_model="mochi_preview",
    depth=48,
    patch_size=2,
    num_heads=24,
    hidden_size_x=3072,
    hidden_size_y=1536,
    mlp_ratio_x=4.0,
    mlp_ratio_y=4.0,
    learn_sigma=False,
    in_channels=12,
    qk_norm=True,
    qkv_bias=False,
    out_bias=True,
    attn_drop=0.0,
    patch_embed_bias=True,
    posenc_preserve_area=True,
    timestep_mlp_bias=True,
    attend_to_padding=False,
    timestep_scale=1000.0,
    use_t5=True,
    t5_feat_dim=4096,
    t5_token_length=256,
    rope_theta=10000.0,
)
HIDREAM = dict(
    image_model="hidream",
    attention_head_dim=128,
    axes_dims_rope=[64, 32, 32],
    caption_channels=[4096, 4096],
    in_channels=16,
    out_channels=16,
    llama_layers=list(range(48)),
    num_attention_heads=20,
    num_layers=16,
    num_single_layers=32,
    patch_size=2,
    text_emb_dim=2048,
)
ACE = dict(
    audio_model="ace",
    attention_head_dim=128,
    inner_dim=2560,
    mlp_ratio=2.5,
    num_attention_heads=20,
    num_layers=24,
    max_width=32768,
    ssl_encoder_depths=[8, 8],
    lyric_encoder_vocab_size=6693,
)
OMNIGEN = dict(
    image_model="omnigen2",
    axes_dim_rope=[40, 40, 40],
    axes_lens=[1024, 1664, 1664],
    ffn_dim_multiplier=None,
    hidden_size=2520,
    in_channels=16,
    multiple_of=256,
    norm_eps=1e-05,
    num_attention_heads=21,
    num_kv_heads=7,
    num_layers=32,
    num_refiner_layers=2,
    out_channels=None,
    patch_size=2,
    text_feat_dim=2048,
)
SEEDVR = dict(
    image_model="seedvr2",
    vid_dim=2560,
    heads=20,
    num_layers=32,
    norm_eps=1e-5,
    mlp_type="swiglu",
    vid_out_norm=True,
)
SDXL = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    num_res_blocks=[2, 2, 2],
    channel_mult=[1, 2, 4],
    num_classes="sequential",
    num_heads=-1,
    num_head_channels=64,
    use_spatial_transformer=True,
    legacy=False,
    model_channels=320,
    use_linear_in_transformer=True,
    transformer_depth=[0, 0, 2, 2, 10, 10],
    context_dim=2048,
    adm_in_channels=2816,
    transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10],
    transformer_depth_middle=10,
)

# class in comfy.supported_models → what its checkpoints say beyond the class itself. Classes that
# differ in their latents, text encoders or schedules alone stand for one another.
SIZES: dict[str, dict[str, Any]] = {
    "SDXL": SDXL,
    "SD3": SD3,
    "StableAudio": STABLE_AUDIO,
    "AuraFlow": dict(max_seq=36, cond_seq_dim=2048, n_layers=36, n_double_layers=4),
    "PixArtAlpha": dict(image_model="pixart_alpha", depth=28, micro_condition=True),
    "PixArtSigma": dict(image_model="pixart_sigma", depth=28),
    "HunyuanDiT": dict(depth=40, hidden_size=1408, num_heads=16, mlp_ratio=4.3637),
    "Flux": FLUX,
    "FluxInpaint": FLUX | dict(in_channels=96),
    "FluxSchnell": FLUX | dict(guidance_embed=False),
    "LongCatImage": FLUX | dict(vec_in_dim=None, context_in_dim=3584, guidance_embed=False),
    "GenmoMochi": MOCHI,
    "LTXV": dict(
        image_model="ltxv", num_layers=48, cross_attention_dim=4096, attention_head_dim=128
    ),
    "LTXAV": dict(image_model="ltxav", num_layers=48),
    "MiniMaxH3": dict(image_model="minimax_h3"),
    "HunyuanVideo15": HUNYUAN15 | dict(in_channels=32, out_channels=32),
    "HunyuanImage21": HUNYUAN | dict(patch_size=[1, 1], vec_in_dim=None, byt5=True, in_channels=64),
    "HunyuanVideo": HUNYUAN,
    "CosmosT2V": COSMOS1,
    "CosmosT2IPredict2": COSMOS2,
    "ZImagePixelSpace": ZIMAGE_PIXEL,
    "ZImage": ZIMAGE,
    "PiD": dict(image_model="pid"),
    "PixelDiTT2I": dict(image_model="pixeldit_t2i"),
    "Lumina2": LUMINA,
    "WAN21_T2V": WAN | dict(model_type="t2v"),
    "WAN22_T2V": WAN
    | dict(
        model_type="t2v",
        in_dim=48,
        out_dim=48,
        dim=3072,
        ffn_dim=14336,
        num_heads=24,
        num_layers=30,
    ),
    "WAN21_CausalAR_T2V": WAN_SMALL | dict(model_type="t2v"),
    "WAN21_I2V": WAN | dict(model_type="i2v", in_dim=36),
    "WAN21_Vace": WAN | dict(model_type="vace", vace_layers=8, vace_in_dim=96),
    "WAN21_Camera": WAN_SMALL | dict(model_type="camera", in_dim=32),
    "WAN22_Camera": WAN | dict(model_type="camera_2.2", in_dim=36),
    "WAN22_S2V": WAN | dict(model_type="s2v"),
    "WAN21_HuMo": WAN | dict(model_type="humo", in_dim=36),
    "WAN22_Animate": WAN | dict(model_type="animate", in_dim=36),
    "WAN_Animate2": WAN | dict(model_type="animate2", in_dim=36),
    "WAN21_SCAIL": WAN | dict(model_type="scail", in_dim=20),
    "WAN21_SCAIL2": WAN | dict(model_type="scail2", in_dim=20),
    "WAN22_WanDancer": WAN | dict(model_type="wandancer", in_dim=36),
    "Hunyuan3Dv2": dict(image_model="hunyuan3d2"),
    "Hunyuan3Dv2_1": dict(image_model="hunyuan3d2_1", guidance_cond_proj_dim=None),
    "TripoSplat": dict(image_model="triposplat"),
    "HiDream": HIDREAM,
    "HiDreamO1": dict(image_model="hidream_o1"),
    "Chroma": CHROMA,
    "ChromaRadiance": CHROMA
    | dict(
        image_model="chroma_radiance",
        in_channels=3,
        out_channels=3,
        patch_size=16,
        nerf_hidden_size=64,
        nerf_mlp_ratio=4,
        nerf_depth=4,
        nerf_max_freqs=8,
        nerf_tile_size=512,
        nerf_final_head_type="conv",
        nerf_embedder_dtype=torch.float32,
        use_x0=False,
        use_sequential_txt_ids=False,
    ),
    "SeedVR2": SEEDVR,
    "ACEStep": ACE,
    "ACEStep15": dict(audio_model="ace1.5"),
    "MiniMaxMusic3": dict(audio_model="minimax_music3"),
    "Omnigen2": OMNIGEN,
    "Boogu": dict(image_model="boogu"),
    "MageFlow": dict(image_model="mage_flow"),
    "QwenImage": dict(image_model="qwen_image", num_layers=60, in_channels=64),
    "JoyImage": dict(
        image_model="joyimage", num_layers=40, hidden_size=4096, num_attention_heads=32
    ),
    "Ideogram4": dict(image_model="ideogram4"),
    "Krea2": dict(image_model="krea2"),
    "Flux2": FLUX2,
    "Lens": dict(image_model="lens"),
    "Kandinsky5": KANDINSKY,
    "Anima": COSMOS2 | dict(image_model="anima"),
    "ErnieImage": dict(image_model="ernie"),
    "CogVideoX_T2V": dict(image_model="cogvideox", num_layers=42, num_attention_heads=48),
}

COUNTS_WHILE_BUILT = ("ACEStep15",)


def build(name: str) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """(names and shapes of all tensors, names of the linears) of a class of
    comfy.supported_models in its published size.
    """
    device = "cpu" if name in COUNTS_WHILE_BUILT else "meta"  # empty weights take no memory there
    model = model_of(name, device=device)
    linears = {
        part for part, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return shapes, linears


def model_of(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **changes):
    """The model of a class of comfy.supported_models in its published size, with changes."""
    import comfy.supported_models

    options = SIZES[name] | changes
    config = getattr(comfy.supported_models, name)(dict(options))
    config.unet_config.update(options)
    config.set_inference_dtype(dtype, None)
    beside = stable_audio.tables() if name == "StableAudio" else {}
    return config.get_model(beside, "", device=device).diffusion_model
