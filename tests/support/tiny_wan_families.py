"""Wan's offspring, which add to the stream between the blocks or keep something from step to step:
tiny models that only the walk through every class needs, see tiny_models.
"""

from __future__ import annotations

import torch

from tiny_family import TOKENS, Family
from tiny_other_families import WAN

MODEL = "comfy.ldm.wan.model"
SMALL = WAN | dict(dim=64, ffn_dim=128)
VIDEO = (16, 2, 8, 8)
TEXT = (TOKENS, 24)


class Faces(torch.nn.Module):
    """Stands for Wan Animate's encoder of faces, which has 22 million weights: a face's brightness
    in 32 places.
    """

    def get_motion(self, faces: torch.Tensor) -> torch.Tensor:
        """(frames, 3, height, width) → (frames, 32)."""
        return torch.nn.functional.adaptive_avg_pool2d(faces.mean(1), (4, 8)).flatten(1)


WAN_KIN = {
    "wan causal": Family("WAN21_CausalAR_T2V", SMALL, VIDEO, TEXT),
    # sound is injected behind blocks 0, 4, 8, …, 39, of which the last is the last of the model
    "wan 2.2 s2v": Family(
        "WAN22_S2V",
        SMALL | dict(model_type="s2v", num_layers=5, audio_dim=32),
        VIDEO,
        TEXT,
        {"audio_embed": (1, 25, 32, 8)},
    ),
    "wandancer": Family(
        "WAN22_WanDancer",
        SMALL
        | dict(model_type="wandancer", in_dim=36, num_layers=5, music_dim=64, music_latent_dim=64),
        VIDEO,
        TEXT,
        {"audio_embed": (1, 8, 35)},
    ),
    "wan animate 2": Family(
        "WAN_Animate2",
        SMALL | dict(model_type="animate2", in_dim=36),
        (16, 3, 8, 8),
        TEXT,
        {"pose_video_latent": (1, 16, 2, 8, 8)},
    ),
    "wan 2.1 camera": Family(
        "WAN21_Camera", SMALL | dict(model_type="camera", in_dim=32), VIDEO, TEXT
    ),
    "wan 2.2 camera": Family(
        "WAN22_Camera", SMALL | dict(model_type="camera_2.2", in_dim=36), VIDEO, TEXT
    ),
    "scail": Family(
        "WAN21_SCAIL",
        SMALL | dict(model_type="scail", in_dim=20),
        VIDEO,
        TEXT,
        {"pose_video_latent": (1, 16, 2, 4, 4)},
    ),
    "scail 2": Family("WAN21_SCAIL2", SMALL | dict(model_type="scail2", in_dim=20), VIDEO, TEXT),
    "humo": Family(
        "WAN21_HuMo",
        SMALL | dict(model_type="humo", in_dim=36),
        VIDEO,
        TEXT,
        {"audio_embed": (1, 2, 8, 5, 32)},
        smaller=((MODEL, "AudioProjModel", dict(channels=32, intermediate_dim=32)),),
    ),
    # an adapter of faces behind blocks 0, 5, …
    "wan 2.2 animate": Family(
        "WAN22_Animate",
        SMALL | dict(model_type="animate", in_dim=36, num_layers=5, motion_encoder_dim=32),
        VIDEO,
        TEXT,
        {"pose_video_latent": (1, 16, 1, 8, 8), "face_video_pixels": (1, 3, 4, 16, 16)},
        smaller=((f"{MODEL}_animate", "Generator", Faces),),
    ),
}


def prompt_ids() -> torch.Tensor:
    """Tokens of a prompt as HiDream-O1 gives them to its model: the last one marks the time."""
    return torch.tensor([[151644, 872, 198, 11, 12, 13, 151645, 151673]])


BESIDE = {
    "hidream o1": Family(
        "HiDreamO1",
        dict(
            image_model="hidream_o1",
            text_config_overrides=dict(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=32,
                rope_dims=[6, 5, 5],
            ),
            vision_config_overrides=dict(
                hidden_size=64,
                num_heads=2,
                intermediate_size=64,
                depth=1,
                deepstack_visual_indexes=(),
            ),
        ),
        (3, 64, 96),
        (TOKENS, 64),
        {"text_input_ids": prompt_ids},
    ),
    "hunyuan video 1.5": Family(
        "HunyuanVideo15",
        dict(
            image_model="hunyuan_video",
            in_channels=65,
            out_channels=32,
            patch_size=[1, 1, 1],
            vec_in_dim=None,
            axes_dim=[8, 12, 12],
            context_in_dim=24,
            hidden_size=64,
            mlp_ratio=2.0,
            num_heads=2,
            depth=3,
            depth_single_blocks=0,
            theta=256,
            qkv_bias=True,
            guidance_embed=False,
            byt5=False,
            meanflow=False,
            use_cond_type_embedding=True,
            vision_in_dim=32,
            meanflow_sum=False,
        ),
        (32, 2, 4, 4),
        (TOKENS, 24),
        {"pooled_output": (1, 20)},
    ),
}
