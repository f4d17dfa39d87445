"""TeaCache's F on tiny models of ComfyUI, against the formula of each official script, written here
anew from what the model's own modules are given.

The scripts are named in tests/accel/caching/test_coefficients.py. Mochi, whose class ComfyUI
builds at one size only, is in test_models.py.
"""

import pytest
import torch
from torch.nn.functional import layer_norm, silu

import tiny_models
from family_caching import calibrated
from nibble.accel.caching import coefficients
from nibble.accel.caching.teacache import IDENTITY, distance
from nibble.nodes.bridge.caching import wrap_blocks
from nibble.nodes.bridge.caching.apply import apply_teacache
from nibble.nodes.bridge.caching.settings import TeaCacheSettings

STEPS = 4


def normed(tokens: torch.Tensor) -> torch.Tensor:
    """LayerNorm without a scale of its own."""
    return layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def rms(tokens: torch.Tensor, eps: float) -> torch.Tensor:
    return tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + eps)


class Watch:
    """What a module was given and gave, call by call."""

    def __init__(self, module: torch.nn.Module):
        self.calls: list[tuple] = []
        before = module.register_forward_pre_hook(self._before, with_kwargs=True)
        after = module.register_forward_hook(self._after, with_kwargs=True)
        self.handles = (before, after)

    def _before(self, _module, args, kwargs):
        # blocks write into what they are given
        self.given = [_copy(value) for value in args], {k: _copy(v) for k, v in kwargs.items()}

    def _after(self, _module, _args, _kwargs, out):
        self.calls.append((*self.given, _copy(out)))

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def _copy(value):
    return value.clone() if torch.is_tensor(value) else value


def norm1_zero(block, image, temb):
    """TeaCache4FLUX, TeaCache4HunyuanVideo: transformer_blocks[0].norm1(inp, emb=temb)."""
    linear = block.img_mod.lin
    shift, scale = linear(silu(temb)).chunk(6, dim=-1)[:2]
    return normed(image) * (1 + scale[:, None]) + shift[:, None]


def flux(network, args, kwargs, out):
    return norm1_zero(network.double_blocks[0], kwargs["img"], kwargs["vec"])


def flux_2(network, args, kwargs, out):
    """TensorRT-LLM: norm1 of the first block with double_stream_modulation_img(temb)[0]."""
    modulation = kwargs["vec"][0][0]
    return normed(kwargs["img"]) * (1 + modulation.scale) + modulation.shift


def qwen(network, args, kwargs, out):
    """mlx-teacache, signal A: the modulated input of the first block's image side."""
    block = network.transformer_blocks[0]
    shift, scale = block.img_mod[1](silu(kwargs["temb"])).chunk(6, dim=-1)[:2]
    return normed(kwargs["hidden_states"]) * (1 + scale[:, None]) + shift[:, None]


def ltx(network, args, kwargs, out):
    """TeaCache4LTX-Video."""
    table = network.transformer_blocks[0].scale_shift_table
    image, temb = args[0], kwargs["timestep"]
    values = table[None, None] + temb.reshape(image.shape[0], temb.shape[1], table.shape[0], -1)
    shift, scale = values.unbind(dim=2)[:2]
    return rms(image, 1e-6) * (1 + scale) + shift


def lumina_2(network, args, kwargs, out):
    """TeaCache4Lumina2: layers[0].norm1(input_to_main_loop, temb), LuminaRMSNormZero."""
    block = network.layers[0]
    joint, temb = args[0], args[3]
    scale = block.adaLN_modulation[1](silu(temb)).chunk(4, dim=1)[0]
    return rms(joint, 1e-5) * block.attention_norm1.weight * (1 + scale[:, None])


def first_residual(network, args, kwargs, out):
    """mlx-teacache, signal B: what the first main layer adds."""
    return out - args[0]


def cosmos(network, args, kwargs, out):
    """TeaCache4Cosmos: adaln_norm_state(norm_state, inp, scale, shift), with AdaLN's LoRA."""
    part = network.blocks["block0"].blocks[0]
    lora = kwargs["adaln_lora_B_3D"]
    shift, scale, _ = (part.adaLN_modulation(args[1]) + lora).chunk(3, dim=1)
    return normed(args[0]) * (1 + scale) + shift


def returned(network, args, kwargs, out):
    return out


def flat(network, args, kwargs, out):
    """TeaCache4Wan2.1 with use_ret_steps: e0, a projection for each of the six modulations."""
    return out.unflatten(-1, (6, -1))


# family (and which of its sets) → the entry of its coefficients, the module that is watched, and
# the formula
OFFICIAL = {
    "flux": ("FLUX.1 dev", "double_blocks.0", flux),
    "flux2": ("FLUX.2 dev", "double_blocks.0", flux_2),
    "hunyuan video": ("HunyuanVideo", "double_blocks.0", flux),
    "qwen-image": ("Qwen-Image", "transformer_blocks.0", qwen),
    "ltxv": ("LTX-Video 2B", "transformer_blocks.0", ltx),
    "lumina 2": ("Lumina 2", "layers.0", lumina_2),
    "z-image": ("Z-Image", "layers.0", first_residual),
    "cosmos 1": ("Cosmos 1 7B", "blocks.block0", cosmos),
    # TeaCache4HiDream-I1: timesteps = self.t_embedder(...), before the pooled prompt is added
    "hidream i1": ("HiDream I1 Full", "t_embedder", returned),
    "wan 2.1": ("Wan 2.1 T2V 14B", "time_projection", flat),
    # without use_ret_steps: e, which the projection is made of
    "wan 2.1, plain": ("Wan 2.1 T2V 14B, plain", "time_embedding", returned),
    # TeaCache4CogVideoX1.5: emb = self.time_embedding(...)
    "cogvideox": ("CogVideoX 5B, 5B I2V", "time_embedding_linear_2", returned),
}


@pytest.mark.parametrize("family", OFFICIAL)
def test_f_is_the_official_one(family, monkeypatch):
    entry, module, official = OFFICIAL[family]
    family = family.removesuffix(", plain")
    feature = next(e.feature for e in coefficients.every() if e.model == entry)
    model = tiny_models.build(family)
    network = model.model.diffusion_model
    seen = []

    def noted(now, before):
        seen.append((now.clone(), before.clone()))
        return distance(now, before)

    monkeypatch.setattr(wrap_blocks, "distance", noted)
    watch = Watch(network.get_submodule(module))
    settings = TeaCacheSettings(0.0, rule="teacache", coefficients=IDENTITY, feature=feature)
    tiny_models.sample(apply_teacache(model, settings), family, STEPS)
    watch.stop()
    with torch.no_grad():
        wanted = [official(network, *call) for call in watch.calls]
    assert len(wanted) == STEPS
    # the last step is computed without a look
    for (now, before), last, this in zip(seen, wanted, wanted[1:], strict=False):
        torch.testing.assert_close(now, this.reshape(now.shape), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(before, last.reshape(now.shape), rtol=1e-4, atol=1e-5)
    assert len(seen) == STEPS - 2


def test_every_feature_of_an_entry_is_looked_at():
    told = {entry.feature for entry in coefficients.every()}
    looked = {entry for entry, _, _ in OFFICIAL.values()}
    assert told == {e.feature for e in coefficients.every() if e.model in looked}


def test_calibrate_cache_measures_on_the_same_f():
    """HiDream: the changes of the timestep's embedding alone, whatever the prompt."""
    family, steps = "hidream i1", 6
    model = tiny_models.build(family)
    watch = Watch(model.model.diffusion_model.t_embedder)
    found = calibrated(model, family, steps)
    watch.stop()
    embedded = [out for _, _, out in watch.calls]
    changes = [
        float(distance(now, last)) for last, now in zip(embedded, embedded[1:], strict=False)
    ]
    assert found.feature == "timestep"
    assert [x for x, _ in found.teacache["points"]] == pytest.approx(changes, abs=1e-5)
