"""Tiny random models of ComfyUI's transformer families, built through ComfyUI's own classes: what a
cache must survive.

    model = build("wan")                  a ModelPatcher on the CPU in float32
    picture = sample(model, "wan")        a run of ComfyUI's own sampler

A family's entry says how ComfyUI would configure it, in a few thousand parameters, and what a
prompt for it holds.
"""

from __future__ import annotations

import dataclasses

import torch

TOKENS = 7


@dataclasses.dataclass(frozen=True)
class Family:
    """How to build a tiny model of one architecture: ComfyUI's configuration class, its options,
    and the inputs that it takes.
    """

    config: str  # class in comfy.supported_models
    options: dict
    latent: tuple  # shape without the batch; several shapes for a model of several streams
    context: tuple[int, ...]  # of a prompt's embedding, without the batch
    # name → shape with batch, or a callable that makes the value
    extras: dict = dataclasses.field(default_factory=dict)


FLUX = dict(
    in_channels=16,
    out_channels=16,
    context_in_dim=24,
    hidden_size=64,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=[8, 12, 12],
    theta=10000,
    patch_size=2,
    qkv_bias=True,
    txt_ids_dims=[],
)
HUNYUAN = dict(
    image_model="hunyuan_video",
    in_channels=16,
    out_channels=16,
    patch_size=[1, 2, 2],
    vec_in_dim=20,
    axes_dim=[8, 12, 12],
    context_in_dim=24,
    hidden_size=64,
    mlp_ratio=2.0,
    num_heads=2,
    depth=2,
    depth_single_blocks=2,
    theta=256,
    qkv_bias=True,
    guidance_embed=True,
    byt5=False,
    meanflow=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
    meanflow_sum=False,
)
WAN = dict(
    image_model="wan2.1",
    model_type="t2v",
    dim=48,
    out_dim=16,
    num_heads=2,
    ffn_dim=96,
    num_layers=3,
    patch_size=(1, 2, 2),
    freq_dim=32,
    text_dim=24,
    text_len=16,
    window_size=(-1, -1),
    qk_norm=True,
    cross_attn_norm=True,
    eps=1e-6,
    in_dim=16,
)
LUMINA = dict(
    image_model="lumina2",
    patch_size=2,
    in_channels=16,
    dim=96,
    cap_feat_dim=24,
    n_layers=3,
    n_refiner_layers=1,
    qk_norm=True,
    n_heads=4,
    n_kv_heads=2,
    axes_dims=[8, 8, 8],
    axes_lens=[64, 64, 64],
    multiple_of=32,
    ffn_dim_multiplier=1.0,
    rope_theta=10000.0,
)
ZIMAGE = LUMINA | dict(
    dim=256,
    n_heads=8,
    n_kv_heads=8,
    axes_dims=[16, 8, 8],
    z_image_modulation=True,
    time_scale=1000.0,
    n_layers=2,
)
COSMOS = dict(
    max_img_h=32,
    max_img_w=32,
    max_frames=8,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    concat_padding_mask=True,
    model_channels=48,
    num_blocks=3,
    num_heads=2,
    crossattn_emb_channels=24,
    pos_emb_cls="rope3d",
    pos_emb_learnable=True,
    pos_emb_interpolation="crop",
    use_adaln_lora=True,
    adaln_lora_dim=16,
    extra_per_block_abs_pos_emb=False,
)
LTX = dict(
    image_model="ltxv",
    in_channels=128,
    num_layers=3,
    attention_head_dim=32,
    num_attention_heads=2,
    cross_attention_dim=64,
    caption_channels=24,
)
KANDINSKY = dict(
    image_model="kandinsky5",
    in_visual_dim=16,
    out_visual_dim=16,
    in_text_dim=24,
    in_text_dim2=20,
    time_dim=32,
    model_dim=64,
    ff_dim=128,
    visual_embed_dim=64,
    num_text_blocks=1,
    num_visual_blocks=3,
    axes_dims=(8, 12, 12),
)
PIXEL = dict(
    decoder_hidden_size=16, decoder_num_res_blocks=1, decoder_max_freqs=2, decoder_in_channels=12
)


def masks() -> torch.Tensor:
    return torch.ones(1, TOKENS, dtype=torch.long)


FAMILIES = {
    "flux": Family(
        "Flux",
        FLUX | dict(image_model="flux", guidance_embed=True, vec_in_dim=20),
        (16, 8, 12),
        (TOKENS, 24),
        {"pooled_output": (1, 20)},
    ),
    "flux2": Family(
        "Flux2",
        FLUX
        | dict(
            image_model="flux2",
            patch_size=1,
            in_channels=128,
            out_channels=128,
            axes_dim=[8, 8, 8, 8],
            guidance_embed=False,
            vec_in_dim=None,
            global_modulation=True,
            mlp_silu_act=True,
            qkv_bias=False,
            ops_bias=False,
            theta=2000,
            default_ref_method="index",
            ref_index_scale=10.0,
            txt_ids_dims=[3],
        ),
        (128, 4, 6),
        (TOKENS, 24),
    ),
    "longcat": Family(
        "LongCatImage",
        FLUX | dict(image_model="flux", guidance_embed=False, vec_in_dim=None, txt_ids_dims=[1, 2]),
        (16, 8, 12),
        (TOKENS, 24),
    ),
    "chroma": Family(
        "Chroma",
        FLUX
        | dict(
            image_model="chroma",
            in_channels=64,
            out_channels=64,
            vec_in_dim=None,
            in_dim=64,
            out_dim=64,
            hidden_dim=48,
            n_layers=2,
        ),
        (16, 8, 12),
        (TOKENS, 24),
    ),
    "chroma radiance": Family(
        "ChromaRadiance",
        FLUX
        | dict(
            image_model="chroma_radiance",
            in_channels=3,
            out_channels=3,
            patch_size=16,
            vec_in_dim=None,
            in_dim=64,
            out_dim=64,
            hidden_dim=48,
            n_layers=2,
            nerf_hidden_size=16,
            nerf_mlp_ratio=2,
            nerf_depth=1,
            nerf_max_freqs=4,
            nerf_tile_size=512,
            nerf_final_head_type="conv",
            nerf_embedder_dtype=torch.float32,
            use_x0=False,
            use_sequential_txt_ids=False,
        ),
        (3, 32, 48),
        (TOKENS, 24),
    ),
    "hunyuan video": Family(
        "HunyuanVideo", HUNYUAN, (16, 2, 8, 8), (TOKENS, 24), {"pooled_output": (1, 20)}
    ),
    "hunyuan image 2.1": Family(
        "HunyuanImage21",
        HUNYUAN
        | dict(
            in_channels=64, out_channels=64, patch_size=[1, 1], vec_in_dim=None, axes_dim=[16, 16]
        ),
        (64, 6, 6),
        (TOKENS, 24),
    ),
    "wan 2.1": Family("WAN21_T2V", WAN, (16, 2, 8, 8), (TOKENS, 24)),
    "wan 2.2 5b": Family(
        "WAN22_T2V", WAN | dict(out_dim=48, in_dim=48), (48, 2, 8, 8), (TOKENS, 24)
    ),
    "qwen-image": Family(
        "QwenImage",
        dict(
            image_model="qwen_image",
            in_channels=64,
            out_channels=16,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(8, 12, 12),
        ),
        (16, 1, 8, 12),
        (TOKENS, 24),
    ),
    "ltxv": Family("LTXV", LTX, (128, 2, 4, 4), (TOKENS, 24), {"attention_mask": masks}),
    "auraflow": Family(
        "AuraFlow",
        dict(
            max_seq=256,
            cond_seq_dim=24,
            n_layers=4,
            n_double_layers=2,
            dim=64,
            n_heads=2,
            global_conddim=64,
        ),
        (4, 8, 12),
        (TOKENS, 24),
    ),
    "kandinsky 5": Family(
        "Kandinsky5",
        KANDINSKY | dict(visual_embed_dim=132),
        (16, 2, 8, 8),
        (TOKENS, 24),
        {"pooled_output": (1, 20)},
    ),
    "kandinsky 5 image": Family(
        "Kandinsky5Image", KANDINSKY, (16, 8, 8), (TOKENS, 24), {"pooled_output": (1, 20)}
    ),
    "lens": Family(
        "Lens",
        dict(
            image_model="lens",
            in_channels=128,
            out_channels=32,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=32,
            enc_hidden_dim=24,
            axes_dims_rope=(8, 12, 12),
            multi_layer_encoder_feature=False,
            selected_layer_index=(0,),
        ),
        (128, 4, 6),
        (TOKENS, 24),
    ),
    "mage-flow": Family(
        "MageFlow",
        dict(
            image_model="mage_flow",
            in_channels=128,
            num_layers=3,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=24,
            axes_dims_rope=(8, 12, 12),
        ),
        (128, 4, 6),
        (TOKENS, 24),
    ),
    "joyimage": Family(
        "JoyImage",
        dict(
            image_model="joyimage",
            num_layers=3,
            hidden_size=64,
            num_attention_heads=2,
            text_dim=24,
            rope_dim_list=[8, 12, 12],
        ),
        (16, 1, 8, 8),
        (TOKENS, 24),
    ),
    "lumina 2": Family("Lumina2", LUMINA, (16, 8, 12), (TOKENS, 24)),
    "z-image": Family("ZImage", ZIMAGE | dict(pad_tokens_multiple=8), (16, 8, 12), (TOKENS, 24)),
    "z-image pixel": Family(
        "ZImagePixelSpace",
        ZIMAGE | PIXEL | dict(image_model="zimage_pixel", in_channels=3),
        (3, 8, 12),
        (TOKENS, 24),
    ),
    "hidream i1": Family(
        "HiDream",
        dict(
            image_model="hidream",
            attention_head_dim=32,
            axes_dims_rope=[16, 8, 8],
            caption_channels=[24, 24],
            max_resolution=[16, 16],
            in_channels=16,
            out_channels=16,
            llama_layers=[0, 1, 1, 1],
            num_attention_heads=2,
            num_routed_experts=2,
            num_activated_experts=1,
            num_layers=2,
            num_single_layers=2,
            patch_size=2,
            text_emb_dim=20,
        ),
        (16, 8, 8),
        (TOKENS, 24),
        {"pooled_output": (1, 20), "conditioning_llama3": (1, 2, TOKENS, 24)},
    ),
    "cosmos 1": Family(
        "CosmosT2V",
        COSMOS
        | dict(
            image_model="cosmos",
            block_config="FA-CA-MLP",
            block_x_format="THWBD",
            affline_emb_norm=True,
            pos_emb_learnable=False,
            extra_per_block_abs_pos_emb=True,
            extra_per_block_abs_pos_emb_type="learnable",
        ),
        (16, 2, 8, 8),
        (TOKENS, 24),
    ),
    "cosmos predict 2": Family(
        "CosmosT2IPredict2",
        COSMOS | dict(image_model="cosmos_predict2"),
        (16, 2, 8, 8),
        (TOKENS, 24),
    ),
    "krea 2": Family(
        "Krea2",
        dict(
            image_model="krea2",
            features=64,
            txtdim=24,
            heads=2,
            kvheads=1,
            multiplier=2,
            layers=3,
            patch=2,
            channels=16,
            txtlayers=2,
            txtheads=2,
            txtkvheads=2,
        ),
        (16, 1, 8, 8),
        (TOKENS, 48),
    ),
    "cogvideox": Family(
        "CogVideoX_T2V",
        dict(
            image_model="cogvideox",
            num_attention_heads=2,
            attention_head_dim=32,
            time_embed_dim=32,
            num_layers=3,
            in_channels=16,
            patch_size=2,
            text_embed_dim=24,
            use_rotary_positional_embeddings=True,
        ),
        (16, 2, 8, 8),
        (TOKENS, 24),
    ),
    "sd3": Family(
        "SD3",
        dict(
            in_channels=16,
            out_channels=16,
            patch_size=2,
            depth=2,
            input_size=None,
            adm_in_channels=20,
            num_patches=64,
            pos_embed_max_size=8,
            pos_embed_scaling_factor=None,
            qk_norm="rms",
            x_block_self_attn_layers=[],
            context_size=24,
            context_embedder_config={
                "target": "torch.nn.Linear",
                "params": {"in_features": 24, "out_features": 128},
            },
        ),
        (16, 8, 12),
        (TOKENS, 24),
        {"pooled_output": (1, 20)},
    ),
    "mochi": Family(
        "GenmoMochi",
        dict(
            image_model="mochi_preview",
            depth=2,
            patch_size=2,
            num_heads=2,
            hidden_size_x=64,
            hidden_size_y=32,
            mlp_ratio_x=192.0,
            mlp_ratio_y=2.0,
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
            t5_feat_dim=24,
            t5_token_length=TOKENS,
            rope_theta=10000.0,
        ),
        (12, 2, 8, 8),
        (TOKENS, 24),
        {"attention_mask": masks},
    ),
    "pixart": Family(
        "PixArtSigma",
        dict(
            image_model="pixart_sigma",
            num_heads=2,
            patch_size=2,
            hidden_size=64,
            in_channels=4,
            depth=3,
            micro_condition=False,
            caption_channels=24,
            model_max_length=TOKENS,
            input_size=16,
            pe_interpolation=1,
        ),
        (4, 40, 40),
        (TOKENS, 24),
    ),
    "omnigen 2": Family(
        "Omnigen2",
        dict(
            image_model="omnigen2",
            hidden_size=96,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            axes_dim_rope=[8, 8, 8],
            axes_lens=[64, 64, 64],
            text_feat_dim=24,
            in_channels=16,
            patch_size=2,
            timestep_scale=1000.0,
        ),
        (16, 8, 12),
        (TOKENS, 24),
        {"attention_mask": masks},
    ),
    "ernie-image": Family(
        "ErnieImage",
        dict(
            image_model="ernie",
            hidden_size=64,
            num_attention_heads=2,
            num_layers=3,
            ffn_hidden_size=96,
            in_channels=128,
            out_channels=128,
            text_in_dim=24,
            rope_axes_dim=(8, 12, 12),
        ),
        (128, 4, 6),
        (TOKENS, 24),
    ),
    "ideogram 4": Family(
        "Ideogram4",
        dict(
            image_model="ideogram4",
            in_channels=128,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=32,
            intermediate_size=96,
            adaln_dim=32,
            llm_features_dim=24,
            mrope_section=[6, 5, 5],
        ),
        (128, 4, 6),
        (TOKENS, 24),
    ),
    "pixeldit": Family(
        "PixelDiTT2I",
        dict(
            image_model="pixeldit_t2i",
            num_groups=2,
            hidden_size=64,
            pixel_hidden_size=8,
            pixel_attn_hidden_size=32,
            pixel_num_groups=2,
            patch_depth=3,
            pixel_depth=1,
            txt_embed_dim=24,
            txt_max_length=16,
        ),
        (3, 32, 48),
        (TOKENS, 24),
    ),
    "boogu": Family(
        "Boogu",
        dict(
            image_model="boogu",
            hidden_size=96,
            num_layers=2,
            num_double_stream_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=32,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(64, 64, 64),
            instruction_feat_dim=24,
        ),
        (16, 8, 12),
        (TOKENS, 24),
        {"attention_mask": masks},
    ),
    "hunyuan dit": Family(
        "HunyuanDiT",
        dict(
            image_model="hydit",
            depth=4,
            hidden_size=64,
            num_heads=2,
            text_states_dim=24,
            text_states_dim_t5=32,
            text_len=TOKENS,
            text_len_t5=TOKENS,
        ),
        (4, 8, 12),
        (TOKENS, 24),
        {
            "attention_mask": masks,
            "attention_mask_mt5xl": masks,
            "conditioning_mt5xl": (1, TOKENS, 32),
        },
    ),
    "ace-step 1.5": Family(
        "ACEStep15",
        dict(
            audio_model="ace1.5",
            hidden_size=64,
            text_hidden_dim=24,
            num_dit_layers=3,
            num_lyric_layers=1,
            num_timbre_layers=1,
            num_tokenizer_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=32,
            intermediate_size=96,
            fsq_dim=64,
            encoder_hidden_size=64,
            encoder_intermediate_size=96,
            encoder_num_heads=2,
        ),
        (64, 24),
        (TOKENS, 24),
        {"conditioning_lyrics": (1, 9, 24)},
    ),
    "wan 2.1 vace": Family(
        "WAN21_Vace",
        WAN | dict(model_type="vace", vace_in_dim=96, vace_layers=2, num_layers=4),
        (16, 2, 8, 8),
        (TOKENS, 24),
    ),
    "ltx-2 (video and sound)": Family(
        "LTXAV",
        LTX
        | dict(
            image_model="ltxav",
            audio_attention_head_dim=16,
            audio_num_attention_heads=2,
            audio_cross_attention_dim=32,
            connector_attention_head_dim=12,
            connector_num_attention_heads=2,
            connector_num_layers=1,
        ),
        ((128, 2, 4, 4), (8, 5, 16)),
        (TOKENS, 48),
        {"attention_mask": masks},
    ),
    "triposplat": Family(
        "TripoSplat",
        dict(
            image_model="triposplat",
            q_token_length=24,
            model_channels=64,
            cond_channels=24,
            num_blocks=3,
            num_refiner_blocks=1,
            num_head_channels=32,
        ),
        ((24, 16), (1, 5)),
        (TOKENS, 24),
    ),
    "hunyuan 3d 2.1": Family(
        "Hunyuan3Dv2_1",
        dict(
            image_model="hunyuan3d2_1",
            in_channels=16,
            hidden_size=64,
            context_dim=24,
            depth=4,
            num_heads=2,
            guidance_cond_proj_dim=None,
            num_moe_layers=1,
            num_experts=2,
            moe_top_k=1,
        ),
        (16, 24),
        (TOKENS, 24),
    ),
    "hunyuan 3d 2": Family(
        "Hunyuan3Dv2",
        dict(
            image_model="hunyuan3d2",
            in_channels=16,
            context_in_dim=24,
            hidden_size=64,
            mlp_ratio=2.0,
            num_heads=2,
            depth=2,
            depth_single_blocks=2,
            qkv_bias=True,
            guidance_embed=False,
        ),
        (16, 24),
        (TOKENS, 24),
    ),
}


def build(name: str, seed: int = 0):
    """A family's tiny model as ComfyUI's ModelPatcher: random float32 weights on the CPU, scaled so
    that signals neither die nor grow.
    """
    import comfy.model_patcher
    import comfy.supported_models

    family = FAMILIES[name]
    config = getattr(comfy.supported_models, family.config)(dict(family.options))
    # the configuration class sets some options itself, for the full size
    config.unet_config.update(family.options)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    fill(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights; ComfyUI's layers come without any."""
    draw = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict(keep_vars=True).items():
        if not value.is_floating_point() or "inv_freq" in name:
            continue
        random = torch.randn(value.shape, generator=draw)
        fan_in = value[0].numel() if value.ndim > 1 else 1
        if value.ndim > 1:
            random *= 0.7 / max(fan_in, 1) ** 0.5
        elif name.endswith(("bias", "beta")):
            random *= 0.02
        else:  # a norm's scale
            random = 1 + 0.1 * random
        value.data.copy_(random)


def latent(name: str, batch: int = 1, shape: tuple[int, ...] | None = None, seed: int = 1):
    """Noise of the family's latent shape; ComfyUI's NestedTensor for a model of several streams."""
    draw, shape = torch.Generator().manual_seed(seed), shape or FAMILIES[name].latent
    if isinstance(shape[0], int):
        return torch.randn(batch, *shape, generator=draw)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.randn(batch, *part, generator=draw) for part in shape])


def prompt(name: str, seed: int = 2) -> list:
    """A CONDITIONING of random tokens with whatever else the family wants."""
    family, draw = FAMILIES[name], torch.Generator().manual_seed(seed)
    extras = {
        key: value() if callable(value) else torch.randn(value, generator=draw)
        for key, value in family.extras.items()
    }
    return [[torch.randn(1, *family.context, generator=draw), extras]]


def schedule(model, steps: int) -> torch.Tensor:
    """ComfyUI's simple schedule for the model: steps + 1 noise levels."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )


def sample(
    model,
    name: str,
    steps: int = 6,
    batch: int = 1,
    cfg: float = 1.0,
    sampler: str = "euler",
    noise=None,
    sigmas: torch.Tensor | None = None,
    callback=None,
):
    """A run of ComfyUI's sampler with a prompt and, where cfg is not 1, another one against it."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt(name), prompt(name, seed=3))
    guider.set_cfg(cfg)
    sigmas = schedule(model, steps) if sigmas is None else sigmas
    noise = latent(name, batch) if noise is None else noise
    return guider.sample(
        noise,
        noise * 0,
        comfy.samplers.sampler_object(sampler),
        sigmas,
        callback=callback,
        disable_pbar=True,
        seed=1,
    )
