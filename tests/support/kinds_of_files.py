"""Files of every kind that ComfyUI loads, as the names of their tensors: from ComfyUI's own
classes, built without weights, so that the answer is known by construction.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import comfy
import comfy.ops
import torch

COMFY = Path(comfy.__path__[0])
OPERATIONS = dict(dtype=None, device="meta", operations=comfy.ops.disable_weight_init)
DIAGONAL = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
KL = dict(
    double_z=True, z_channels=4, resolution=256, in_channels=3, out_ch=3, ch=32,
    ch_mult=[1, 2, 4, 4], num_res_blocks=2, attn_resolutions=[], dropout=0.0,
)  # fmt: skip
UNET = dict(
    image_size=32, in_channels=4, model_channels=32, num_res_blocks=[2, 2], channel_mult=[1, 2],
    transformer_depth=[1, 1, 1, 1], transformer_depth_middle=1, num_head_channels=32,
    use_spatial_transformer=True, context_dim=64, legacy=False,
)  # fmt: skip


def _of(path: str, *arguments, **options) -> Callable[[], torch.nn.Module]:
    """A class of ComfyUI's by its path, called when the names are wanted."""
    module, _, name = path.rpartition(".")
    return lambda: getattr(import_module(module), name)(*arguments, **options)


def _json(name: str) -> dict:
    return json.loads((COMFY / name).read_text(encoding="utf-8"))


def _llama(name: str, module: str = "llama", **config) -> Callable[[], torch.nn.Module]:
    config = {"num_hidden_layers": 2} | config
    return _of(f"comfy.text_encoders.{module}.{name}", config, **OPERATIONS)


def _video_vae(**changes) -> dict:
    return dict(dim=32, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
                temperal_downsample=[False, True, True], dropout=0.0) | changes  # fmt: skip


BUILT = {
    "vae": {
        "sd 1.5": _of("comfy.ldm.models.autoencoder.AutoencoderKL", ddconfig=KL, embed_dim=4),
        "flux": _of(
            "comfy.ldm.models.autoencoder.AutoencodingEngine",
            regularizer_config=DIAGONAL,
            encoder_config={
                "target": "comfy.ldm.modules.diffusionmodules.model.Encoder",
                "params": KL,
            },
            decoder_config={
                "target": "comfy.ldm.modules.diffusionmodules.model.Decoder",
                "params": KL,
            },
        ),
        "wan 2.1": _of("comfy.ldm.wan.vae.WanVAE", **_video_vae()),
        "wan 2.2": _of("comfy.ldm.wan.vae2_2.WanVAE", **_video_vae()),
        "ltx": _of("comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE", version=0),
        "mochi": _of("comfy.ldm.genmo.vae.model.VideoVAE"),
        "cascade, stage a": _of("comfy.ldm.cascade.stage_a.StageA"),
        "cascade, stage c": _of("comfy.ldm.cascade.stage_c_coder.StageC_coder"),
        "cogvideo": _of("comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX", latent_channels=16),
        "seedvr 2": _of("comfy.ldm.seedvr.vae.VideoAutoencoderKLWrapper"),
        "mage": _of("comfy.ldm.mage_flow.vae.MageVAE"),
        "taesd": _of("comfy.taesd.taesd.TAESD", latent_channels=4),
        "hunyuan 3d": _of("comfy.ldm.hunyuan3d.vae.ShapeVAE"),
        "minimax h3, pictures": _of(
            "comfy.ldm.minimax.vae.MiniMaxH3VideoVAE", operations=comfy.ops.disable_weight_init
        ),
        "minimax h3, sound": _of("comfy.ldm.minimax.audio_vae.MiniMaxH3AudioVAE"),
        "minimax music": _of(
            "comfy.ldm.minimax_music.dav.MiniMaxMusic3DAV", operations=comfy.ops.disable_weight_init
        ),
        "triposplat": _of("comfy.ldm.triposplat.vae.OctreeGaussianDecoder"),
    },
    "text_encoders": {
        "clip l": _of(
            "comfy.clip_model.CLIPTextModel", _json("sd1_clip_config.json"), **OPERATIONS
        ),
        "clip g": _of(
            "comfy.clip_model.CLIPTextModel", _json("clip_config_bigg.json"), **OPERATIONS
        ),
        "t5 xxl": _of(
            "comfy.text_encoders.t5.T5", _json("text_encoders/t5_config_xxl.json"), **OPERATIONS
        ),
        "umt5 xxl": _of(
            "comfy.text_encoders.t5.T5", _json("text_encoders/umt5_config_xxl.json"), **OPERATIONS
        ),
        "t5 base": _of(
            "comfy.text_encoders.t5.T5", _json("text_encoders/t5_config_base.json"), **OPERATIONS
        ),
        **{
            name: _llama(name)
            for name in (
                "Llama2",
                "Mistral3Small24B",
                "Qwen25_3B",
                "Qwen3_06B",
                "Qwen3_4B",
                "Qwen3_8B",
                "Qwen25_7BVLI",
                "Gemma2_2B",
                "Gemma3_4B",
                "Gemma3_12B",
                "Ovis25_2B",
            )
        },
    },
    "clip_vision": {
        name: _of("comfy.clip_model.CLIPVisionModelProjection", _json(f"{name}.json"), **OPERATIONS)
        for name in (
            "clip_vision_config_vitl",
            "clip_vision_config_h",
            "clip_vision_config_g",
            "clip_vision_siglip_384",
        )
    }
    | {
        "dino 2": _of(
            "comfy.image_encoders.dino2.Dinov2Model",
            _json("image_encoders/dino2_large.json"),
            **OPERATIONS,
        )
    },
    "controlnet": {
        "sd 1.5": _of("comfy.cldm.cldm.ControlNet", hint_channels=3, **UNET),
        "flux": _of(
            "comfy.ldm.flux.controlnet.ControlNetFlux",
            image_model="flux",
            in_channels=16,
            vec_in_dim=64,
            context_in_dim=64,
            hidden_size=128,
            mlp_ratio=4.0,
            num_heads=1,
            depth=2,
            depth_single_blocks=0,
            axes_dim=[16, 56, 56],
            txt_ids_dims=[],
            theta=10000,
            qkv_bias=True,
            guidance_embed=True,
            patch_size=2,
            out_channels=16,
            **OPERATIONS,
        ),  # fmt: skip
        "t2i adapter": _of(
            "comfy.t2i_adapter.adapter.Adapter",
            cin=64,
            channels=[32, 64, 128, 128],
            nums_rb=2,
            ksize=1,
            sk=True,
            use_conv=False,
        ),  # fmt: skip
    },
    "model_patches": {
        "qwen-image": _of(
            "comfy_extras.nodes_model_patch.QwenImageBlockWiseControlNet",
            num_layers=2,
            **OPERATIONS,
        ),  # fmt: skip
        "multitalk": _of("comfy_extras.nodes_model_patch.MultiTalkModelPatch", **OPERATIONS),
    },
    "style_models": {
        "redux": _of("comfy.ldm.flux.redux.ReduxImageEncoder"),
        "t2i style": _of(
            "comfy.t2i_adapter.adapter.StyleAdapter",
            width=64,
            context_dim=64,
            num_head=8,
            n_layes=1,
            num_token=8,
        ),  # fmt: skip
    },
    "audio_encoders": {
        "wav2vec 2": _of("comfy.audio_encoders.wav2vec2.Wav2Vec2Model", num_layers=1, **OPERATIONS)
    },
    "latent_upscale_models": {
        "ltx": _of(
            "comfy.ldm.lightricks.latent_upsampler.LatentUpsampler", comfy.ops.disable_weight_init
        )
    },
    "frame_interpolation": {
        "film": _of("comfy_extras.frame_interpolation_models.film_net.FILMNet"),
        "rife": _of("comfy_extras.frame_interpolation_models.ifnet.IFNet"),
    },
    "background_removal": {
        "birefnet": _of("comfy.background_removal.birefnet.BiRefNet", **OPERATIONS)
    },
    "photomaker": {"photomaker": _of("comfy_extras.nodes_photomaker.PhotoMakerIDEncoder")},
    "upscale_models": {
        "esrgan": _of("spandrel.architectures.ESRGAN.ESRGAN", num_filters=8, num_blocks=1),
        "compact": _of("spandrel.architectures.Compact.Compact", num_feat=8, num_conv=3),
        "span": _of(
            "spandrel.architectures.SPAN.SPAN", num_in_ch=3, num_out_ch=3, feature_channels=8
        ),
        "swinir": _of(
            "spandrel.architectures.SwinIR.SwinIR", embed_dim=12, window_size=8, num_heads=[2] * 4
        ),
        "dat": _of("spandrel.architectures.DAT.DAT", embed_dim=12, depth=[1], num_heads=[2]),
        "hat": _of("spandrel.architectures.HAT.HAT", embed_dim=12, depths=(1,), num_heads=(2,)),
        "plksr": _of("spandrel.architectures.PLKSR.RealPLKSR", dim=8, n_blocks=2),
        "scunet": _of("spandrel.architectures.SCUNet.SCUNet", config=[1] * 7, dim=8),
        "omnisr": _of("spandrel.architectures.OmniSR.OmniSR", num_feat=8, res_num=1),
    },
}


def names(folder: str, label: str) -> set[str]:
    """The names of the tensors of one of `BUILT`."""
    # upscalers look at their own numbers while they are built
    with torch.device("cpu" if folder == "upscale_models" else "meta"):
        module = BUILT[folder][label]()
    return set(module.state_dict())
