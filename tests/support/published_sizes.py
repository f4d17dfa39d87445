"""The numbers of quant/files/memory/published.json, from ComfyUI's own classes: its tests compare
them. The file is written anew by

    COMFYUI_PATH=~/ComfyUI python tests/support/published_sizes.py
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

import checkout  # noqa: F401  (loads this checkout as `nibble`)
import full_size_models
from nibble.quant.files.memory import published, weights
from nibble.quant.files.memory.decoders import decoder_of
from nibble.quant.svdquant.quantize import predict
from nibble.quant.svdquant.recipe import Recipe

PAGE = Path(published.__file__).with_suffix(".json")
FAST = Recipe.from_preset("fast")
META = torch.device("meta")


def config_of(name: str):
    """A class of comfy.supported_models in its published size."""
    import comfy.supported_models

    options = dict(full_size_models.SIZES[name])
    config = getattr(comfy.supported_models, name)(options)
    config.unet_config.update(options)
    config.set_inference_dtype(torch.bfloat16, None)
    return config


def facts(name: str) -> dict:
    """How ComfyUI's class samples."""
    latent = config_of(name).latent_format
    ratios = [latent.spacial_downscale_ratio, latent.temporal_downscale_ratio]
    return {"factor": config_of(name).memory_usage_factor, "ratios": ratios}


def sizes(name: str) -> dict:
    """What a published model takes."""
    shapes, _ = full_size_models.build(name)
    report = predict(shapes, FAST, name)
    found = weights.of_source(name, shapes, report.bytes_before, report)
    assert found.four_bit is not None
    return {
        "bytes_16": found.bytes,
        "bytes_4": found.four_bit.bytes,
        "modulation": found.four_bit.modulation,
        "widest": found.four_bit.widest,
        "weights": found.to_quantize,
    }


def encoders() -> dict[str, dict]:
    """Text encoders, built by ComfyUI without memory."""
    import comfy
    from comfy.text_encoders import llama, qwen3vl, t5

    folder = Path(comfy.sd.__file__).parent
    made = {
        "t5-xxl": (t5.T5, "text_encoders/t5_config_xxl.json"),
        "umt5-xxl": (t5.T5, "text_encoders/umt5_config_xxl.json"),
        "clip-l": (comfy.clip_model.CLIPTextModel, "sd1_clip_config.json"),
        "clip-g": (comfy.clip_model.CLIPTextModel, "clip_config_bigg.json"),
        "qwen2.5-vl-3b": (llama.Qwen25_3B, None),
        "qwen2.5-vl-7b": (llama.Qwen25_7BVLI, None),
        "qwen3-4b": (llama.Qwen3_4B, None),
        "qwen3-vl-4b": (qwen3vl._make_qwen3vl_model("qwen3vl_4b"), None),
        "qwen3-vl-8b": (qwen3vl._make_qwen3vl_model("qwen3vl_8b"), None),
    }
    rows = {}
    for name, (cls, place) in made.items():
        config = {} if place is None else json.loads((folder / place).read_text("utf-8"))
        model = cls(config, torch.bfloat16, META, comfy.ops.manual_cast)
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        found = weights.encoder(name, shapes, None)
        rows[name] = {
            "bytes_16": found.bytes,
            "bytes_4": found.bytes_4,
            "hidden": found.hidden,
            "widest": found.widest,
            "largest": found.largest,
        }
    return rows


# tensors by which ComfyUI tells a VAE, and their shapes
VAES: dict[str, dict[str, tuple[int, ...]]] = {
    "flux": {
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    },
    "sdxl": {
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "post_quant_conv.weight": (4, 4, 1, 1),
    },
    "flux2": {
        "decoder.conv_in.weight": (512, 32, 3, 3),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "post_quant_conv.weight": (32, 32, 1, 1),
        "bn.running_mean": (128,),
    },
    "wan2.1": {
        "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1),
        "decoder.head.0.gamma": (96, 1, 1, 1),
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "decoder.head.2.weight": (3, 96, 3, 3, 3),
    },
    "wan2.2": {
        "decoder.middle.0.residual.0.gamma": (1024, 1, 1, 1),
        "decoder.upsamples.0.upsamples.0.residual.2.weight": (1024, 1024, 3, 3, 3),
    },
    "hunyuanvideo": {
        "decoder.conv_in.conv.weight": (512, 16, 3, 3, 3),
        "post_quant_conv.weight": (16, 16, 1, 1, 1),
    },
    "hunyuanvideo-1.5": {"decoder.conv_in.conv.weight": (1024, 32, 3, 3, 3)},
    "hunyuanimage": {"decoder.conv_in.weight": (1024, 64, 3, 3)},
    "mage-flow": {"student.dconv_encoder.proj_out.weight": (256, 384, 1, 1)},
    "ltx": {"decoder.up_blocks.0.res_blocks.0.conv1.conv.weight": (1024, 1024, 3, 3, 3)},
}


def vae(name: str):
    """ComfyUI's VAE of a kind, without memory."""
    import comfy.sd

    tensors = {key: torch.empty(shape, device=META) for key, shape in VAES[name].items()}
    with META:
        return comfy.sd.VAE(sd=tensors, device=torch.device("cpu"), dtype=torch.bfloat16)


def vaes() -> dict[str, dict]:
    """VAEs: their weights, and how a picture lies in the latent."""
    rows = {}
    for name, shapes in VAES.items():
        state = vae(name).first_stage_model.state_dict()
        assert decoder_of(shapes) is not None
        rows[name] = {"numbers": sum(tensor.numel() for tensor in state.values())}
    return rows


def rows() -> dict:
    """published.json as it should be."""
    page = json.loads(PAGE.read_text(encoding="utf-8"))
    for row in page["models"]:
        if "id" in row:
            row |= sizes(row["class"])
            if isinstance(row["factor"], dict):
                row["told"] = list(full_size_models.build(row["class"])[0][row["factor"]["of"]])
    return page | {"encoders": encoders(), "vaes": vaes()}


def text(page: dict) -> str:
    """The file: a line for each row."""

    def one(value) -> str:
        return json.dumps(value, ensure_ascii=False)

    parts = [f'"about": {one(page["about"])}']
    lines = ",\n".join(f"  {one(row)}" for row in page["models"])
    parts.append(f'"models": [\n{lines}\n ]')
    for key in ("encoders", "vaes"):
        lines = ",\n".join(f"  {one(name)}: {one(row)}" for name, row in page[key].items())
        parts.append(f'"{key}": {{\n{lines}\n }}')
    return "{\n " + ",\n ".join(parts) + "\n}\n"


if __name__ == "__main__":
    import comfyui_in_process

    comfyui_in_process.start()
    PAGE.write_text(text(rows()), encoding="utf-8")
