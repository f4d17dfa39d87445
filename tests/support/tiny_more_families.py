"""Families that were added after the others: see tiny_models. WIDER: those of it whose layers no
group of 64 weights divides, wider.
"""

from __future__ import annotations

import dataclasses

import torch

import stable_audio
from tiny_family import TOKENS, Family
from tiny_flux_families import FLUX, FLUX_LIKE
from tiny_other_families import OTHERS
from tiny_picture_families import PICTURES

SDXL = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    num_res_blocks=[1, 1],
    channel_mult=[1, 2],
    num_classes="sequential",
    num_heads=-1,
    num_head_channels=32,
    use_spatial_transformer=True,
    legacy=False,
    model_channels=64,
    use_linear_in_transformer=True,
    transformer_depth=[1, 2],
    transformer_depth_output=[1, 1, 2, 2],
    transformer_depth_middle=2,
    context_dim=64,
    adm_in_channels=2816,
    use_temporal_attention=False,
)

MORE = {
    "sdxl": Family("SDXL", SDXL, (4, 16, 16), (TOKENS, 64), {"pooled_output": (1, 1280)}),
    "minimax h3": Family(
        "MiniMaxH3",
        dict(
            image_model="minimax_h3",
            hidden_size=128,
            num_layers=3,
            token_refiner_num_layers=1,
            num_attention_heads=2,
            attention_head_dim=64,
            ffn_hidden_size=128,
            latents_dim=24,
            audio_latents_dim=32,
            text_dim=64,
            timestep_input_dim=64,
            time_embed_hidden_size=64,
            time_embed_dim=64,
            rope_inv_freq_len=8,
        ),
        ((24, 2, 4, 4), (32, 2, 6)),
        (TOKENS, 64),
    ),
    "wan 2.1 i2v": Family(
        "WAN21_I2V",
        dict(
            image_model="wan2.1",
            model_type="i2v",
            dim=128,
            ffn_dim=128,
            num_heads=2,
            num_layers=3,
            in_dim=36,
            out_dim=16,
            text_dim=64,
        ),
        (16, 2, 8, 8),
        (TOKENS, 64),
    ),
    "ace-step 1": Family(
        "ACEStep",
        dict(
            audio_model="ace",
            attention_head_dim=32,
            inner_dim=64,
            mlp_ratio=2.0,
            num_attention_heads=2,
            num_layers=3,
            max_width=64,
            max_position=64,
            text_embedding_dim=64,
            speaker_embedding_dim=512,
            ssl_encoder_depths=[1, 1],
            ssl_latent_dims=[32, 32],
            lyric_encoder_vocab_size=50,
            lyric_hidden_size=1024,
        ),
        (8, 16, 8),
        (TOKENS, 64),
        {"conditioning_lyrics": lambda: torch.zeros(1, 4, dtype=torch.long)},
    ),
    "flux schnell": Family(
        "FluxSchnell",
        FLUX | dict(image_model="flux", guidance_embed=False, vec_in_dim=20),
        (16, 8, 12),
        (TOKENS, 24),
        {"pooled_output": (1, 20)},
    ),
    "flux fill": Family(
        "FluxInpaint",
        FLUX_LIKE["flux"].options | dict(in_channels=96),
        (16, 8, 12),
        (TOKENS, 24),
        {"pooled_output": (1, 20)},
    ),
    "pixart alpha": Family(
        "PixArtAlpha",
        PICTURES["pixart"].options | dict(image_model="pixart_alpha"),
        (4, 40, 40),
        (TOKENS, 24),
    ),
    "seedvr 2": Family(
        "SeedVR2",
        dict(
            image_model="seedvr2",
            vid_dim=128,
            txt_in_dim=64,
            heads=1,
            head_dim=128,
            num_layers=4,
            mm_layers=2,
            norm_eps=1e-5,
            mlp_type="swiglu",
            vid_out_norm=True,
        ),
        (16, 2, 8, 8),
        (TOKENS, 64),
        {"condition": (1, 17, 2, 8, 8)},
    ),
}

STABLE_AUDIO = dict(
    audio_model="dit1.0",
    embed_dim=128,
    num_heads=2,
    depth=3,
    input_concat_dim=0,
    project_cond_tokens=True,
)
MORE |= {
    "stable audio": Family(
        "StableAudio",
        STABLE_AUDIO | dict(global_cond_dim=1536, timestep_features_type="learned", io_channels=64),
        (64, 16),
        (TOKENS, 768),
        beside=stable_audio.tables,
    ),
    "stable audio 3": Family(
        "StableAudio3",
        STABLE_AUDIO
        | dict(
            global_cond_dim=768,
            timestep_features_type="expo",
            io_channels=256,
            num_memory_tokens=4,
            attn_kwargs={"qk_norm": "rms", "differential": False},
            norm_type="rms_norm",
            local_add_cond_dim=257,
            global_cond_shared_embed=True,
            global_cond_type="adaLN",
        ),
        (256, 16),
        (TOKENS, 768),
        beside=stable_audio.tables_3,
    ),
}


def _wider(family: Family, **options) -> Family:
    return dataclasses.replace(family, options=family.options | options)


WIDER = {
    "lumina 2": _wider(PICTURES["lumina 2"], dim=128, axes_dims=[16, 8, 8]),
    "boogu": _wider(
        PICTURES["boogu"],
        hidden_size=128,
        num_layers=3,
        num_double_stream_layers=3,
        axes_dim_rope=(16, 8, 8),
    ),
    "omnigen 2": _wider(PICTURES["omnigen 2"], hidden_size=128, axes_dim_rope=[16, 8, 8]),
    "wan 2.1": _wider(OTHERS["wan 2.1"], dim=64, ffn_dim=128),
    "wan 2.2 5b": _wider(OTHERS["wan 2.2 5b"], dim=64, ffn_dim=128),
    "wan 2.1 vace": _wider(OTHERS["wan 2.1 vace"], dim=64, ffn_dim=128),
}
