"""Codewords for ComfyUI's other transformers: a tiny Wan and a tiny Z-Image, calibrated at work and
computed from what was written.
"""

import comfy.model_patcher
import comfy.supported_models
import folder_paths
import pytest
import torch

from nibble.nodes.bridge.quantize import record_inputs
from nibble.nodes.bridge.quantize import vq4dit as vq
from nibble.nodes.bridge.quantized import linear as ops
from nibble.nodes.bridge.quantized import loading
from nibble.quant.calibration import pictures
from nibble.quant.files import checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's diffusion_models folder, empty."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)


FAMILIES = {
    "wan": (
        "WAN21_T2V",
        dict(
            image_model="wan2.1",
            model_type="t2v",
            dim=128,
            out_dim=16,
            in_dim=16,
            num_heads=2,
            ffn_dim=192,
            num_layers=2,
            patch_size=(1, 2, 2),
            freq_dim=32,
            text_dim=32,
            text_len=8,
            qk_norm=True,
            cross_attn_norm=True,
            eps=1e-6,
        ),
        (16, 1, 8, 8),
    ),
    "z-image": (
        "ZImage",
        dict(
            image_model="lumina2",
            patch_size=2,
            in_channels=16,
            dim=256,
            cap_feat_dim=32,
            n_layers=2,
            n_refiner_layers=1,
            qk_norm=True,
            n_heads=8,
            n_kv_heads=8,
            axes_dims=[16, 8, 8],
            axes_lens=[64, 64, 64],
            multiple_of=32,
            ffn_dim_multiplier=1.0,
            rope_theta=10000.0,
            z_image_modulation=True,
            time_scale=1000.0,
            pad_tokens_multiple=8,
        ),
        (16, 8, 8),
    ),
}


def tiny(family: str, operations=None):
    """A tiny model of a family, by ComfyUI's own classes; with random weights where its operations
    are ComfyUI's.
    """
    kind, options, _ = FAMILIES[family]
    config = getattr(comfy.supported_models, kind)(dict(options))
    config.unet_config.update(options)
    config.custom_operations = operations
    config.set_inference_dtype(torch.float32, None)
    model, draw = config.get_model({}, ""), torch.Generator().manual_seed(0)
    for name, value in (
        model.diffusion_model.state_dict(keep_vars=True).items() if operations is None else ()
    ):
        scale = 0.7 / value[0].numel() ** 0.5 if value.ndim > 1 else 0.02
        value.data.copy_(
            torch.randn(value.shape, generator=draw) * scale
            + (1.0 if value.ndim == 1 and not name.endswith("bias") else 0.0)
        )
    return comfy.model_patcher.ModelPatcher(
        model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_another_family_is_calibrated_on_noise_and_draws_from_its_codewords(
    folder, monkeypatch, family
):
    monkeypatch.setattr(vq, "TEACHER_PROMPTS", 1)
    monkeypatch.setattr(pictures, "TOKENS", 8)
    patcher, latent = tiny(family), {"samples": torch.zeros(1, *FAMILIES[family][2])}
    with torch.inference_mode():
        name, report = vq.VQRequest(
            model_name="",
            recipe=vq.recipe_of("best", 3, steps=6, turns=1),
            filename=family,
            model=patcher,
            latent=latent,
            steps=2,
        ).run()
    assert sum("→" in row.why for row in report.rows) >= 10
    assert min(report.decibels()) > 5
    file = checkpoint.open_quantized(folder / name)
    ours = tiny(family, ops.NibbleOperations)
    state = {key: file.read(key) for key in file.header.tensors}
    ours.model.diffusion_model.load_state_dict(
        loading.packed(state, file.layers, torch.float32), strict=False
    )
    drawn = [drawing(model, latent["samples"]) for model in (patcher, ours)]
    assert (drawn[1] - drawn[0]).norm() < 0.6 * drawn[0].norm()
    assert torch.isfinite(drawn[1]).all()


def drawing(patcher, latent: torch.Tensor) -> torch.Tensor:
    """The end of two Euler steps from noise under random conditioning."""
    found = []
    pictures = record_inputs.random_pictures(
        patcher, 3, prompts=1, steps=2, latent={"samples": latent}
    )
    record_inputs.draw(
        record_inputs.Recording(patcher, pictures),
        lambda step, denoised, x, total: found.append(denoised.clone()),
    )
    return found[-1]
