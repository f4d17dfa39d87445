"""Families built of FLUX's blocks: how ComfyUI would configure each, in a few thousand
parameters, and what a prompt of it holds.
"""

from __future__ import annotations

import torch

from tiny_family import TOKENS, Family

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

FLUX_LIKE = {
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
}
