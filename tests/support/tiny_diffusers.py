"""Tiny transformers of diffusers with random weights, a scheduler as their pipelines have it, and a
loop in their place: the pipelines themselves want text encoders and VAEs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Loop:
    """Stands for a pipeline. call: (transformer, x, time (batch,), scale of the prompt) → what the
    scheduler is given.
    """

    transformer: torch.nn.Module
    scheduler: Any
    shape: tuple[int, ...]
    call: Callable
    guided: bool = False
    contexts: bool = True
    calls: int = field(default=0, init=False)

    @torch.no_grad()
    def __call__(self, steps: int = 8, seed: int = 0, guidance_scale: float = 2.0):
        self.scheduler.set_timesteps(steps)
        x = normal(*self.shape, seed=seed) * float(getattr(self.scheduler, "init_noise_sigma", 1))
        for time in self.scheduler.timesteps:
            given = x
            if hasattr(self.scheduler, "scale_model_input"):
                given = self.scheduler.scale_model_input(x, time)
            found = self._asked("cond", given, time, 1.0)
            if self.guided:
                other = self._asked("uncond", given, time, 0.0)
                found = other + guidance_scale * (found - other)
            x = self.scheduler.step(found, time, x, return_dict=False)[0]
        return x

    def _asked(self, name: str, x: torch.Tensor, time: torch.Tensor, prompt: float):
        self.calls += 1
        context = nullcontext()
        if self.contexts and hasattr(self.transformer, "cache_context"):
            context = self.transformer.cache_context(name)
        with context:
            return self.call(self.transformer, x, time.expand(len(x)), prompt)


def _flow(**options: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def flux() -> Loop:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip

    def call(model, x, time, prompt):
        return model(
            hidden_states=x, timestep=time / 1000, pooled_projections=normal(len(x), 8) * prompt,
            encoder_hidden_states=normal(len(x), 3, 16) * prompt, txt_ids=torch.zeros(3, 3),
            img_ids=normal(16, 3).round(), return_dict=False,
        )[0]  # fmt: skip

    return Loop(model, _flow(shift=2.0), (1, 16, 4), call)


def sd3() -> Loop:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip

    def call(model, x, time, prompt):
        return model(x, normal(len(x), 3, 16) * prompt, normal(len(x), 8), time).sample

    return Loop(model, _flow(shift=3.0), (1, 4, 8, 8), call, guided=True)


def qwen() -> Loop:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip

    def call(model, x, time, prompt):
        words = normal(len(x), 3, 16) * prompt
        return model(
            x, words, torch.ones(len(x), 3, dtype=torch.bool), time / 1000, [[(1, 4, 4)]] * len(x)
        ).sample

    return Loop(model, _flow(), (1, 16, 16), call, guided=True)


def z_image() -> Loop:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 12, 12], axes_lens=[64, 64, 64],
    )  # fmt: skip

    def call(model, x, time, prompt):
        words = [normal(3, 16) * prompt for _ in x]
        found = model(list(x[:, :, None]), (1000 - time) / 1000, words).sample
        return -torch.stack(list(found))[:, :, 0]

    return Loop(model, _flow(), (1, 4, 8, 8), call)


def wan() -> Loop:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip

    def call(model, x, time, prompt):
        return model(x, time, normal(len(x), 3, 16) * prompt, return_dict=False)[0]

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return Loop(model, scheduler, (1, 4, 2, 8, 8), call, guided=True)


def ltx() -> Loop:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        cross_attention_dim=32, caption_channels=16,
    )  # fmt: skip

    def call(model, x, time, prompt):
        words = normal(len(x), 3, 16) * prompt
        return model(x, words, time, torch.ones(len(x), 3), 1, 4, 4, return_dict=False)[0]

    return Loop(model, _flow(), (1, 16, 4), call, guided=True)


def hunyuan_video() -> Loop:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip

    def call(model, x, time, prompt):
        words, known = normal(len(x), 3, 16) * prompt, torch.ones(len(x), 3)
        return model(x, time, words, known, normal(len(x), 8), return_dict=False)[0]

    return Loop(model, _flow(shift=7.0), (1, 4, 1, 8, 8), call)


def cogvideox() -> Loop:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=3,
    )  # fmt: skip

    def call(model, x, time, prompt):
        return model(x, normal(len(x), 3, 16) * prompt, time, return_dict=False)[0]

    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return Loop(model, scheduler, (1, 2, 4, 8, 8), call, guided=True)


def dit() -> Loop:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=1000, norm_num_groups=4,
    )  # fmt: skip

    def call(model, x, time, prompt):
        classes = torch.full((len(x),), int(7 * prompt))
        return model(x, time, classes).sample[:, :4]

    return Loop(model, diffusers.DDIMScheduler(), (2, 4, 8, 8), call)


def latte() -> Loop:
    """Blocks over space and over time by turns, as in Open-Sora, which diffusers has not."""
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, cross_attention_dim=32, caption_channels=16, video_length=2,
        attention_bias=True, norm_type="ada_norm_single", num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
    )  # fmt: skip

    def call(model, x, time, prompt):
        return model(x, time, normal(len(x), 3, 16) * prompt, return_dict=False)[0]

    return Loop(model, diffusers.DDIMScheduler(), (1, 4, 2, 8, 8), call, guided=True)


def stable_audio() -> Loop:
    model = diffusers.StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16, time_proj_dim=16,
        global_states_input_dim=16, cross_attention_input_dim=16,
    )  # fmt: skip
    turn = get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False)

    def call(model, x, time, prompt):
        words, known = normal(len(x), 3, 16) * prompt, normal(len(x), 1, 16)
        return model(x, time, words, known, turn, return_dict=False)[0]

    # as its pipeline's, which needs torchsde
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, prediction_type="v_prediction"
    )
    return Loop(model, scheduler, (1, 4, 16), call)


FAMILIES = {
    make.__name__: make
    for make in (
        flux, sd3, qwen, z_image, wan, ltx, hunyuan_video, cogvideox, dit, latte, stable_audio,
    )
}  # fmt: skip


def build(name: str) -> Loop:
    torch.manual_seed(0)
    loop = FAMILIES[name]()
    loop.transformer.eval()
    with torch.no_grad():
        for parameter in loop.transformer.parameters():
            if not parameter.any():  # layers that training starts at zero
                parameter.normal_(std=0.02)
    return loop
