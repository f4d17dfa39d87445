"""What diffusers calls a model's tensors comes back under ComfyUI's names, by the conversions of
ComfyUI and of diffusers itself.
"""

import dataclasses
import re

import comfy.model_detection
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

import full_size_models
import tiny_models
from nibble.quant.files.diffusers_names import in_comfyui_names
from nibble.quant.files.source import Source
from nibble.quant.files.stored_tensors import StoredTensor, StoredTensors
from tiny_more_families import MORE, WIDER


@pytest.fixture(autouse=True)
def more_families(monkeypatch):
    for name, family in (MORE | WIDER).items():
        monkeypatch.setitem(tiny_models.FAMILIES, name, family)
    # ComfyUI's conversion knows no other
    flux = tiny_models.FAMILIES["flux"]
    options = flux.options | {"mlp_ratio": 4.0}
    monkeypatch.setitem(tiny_models.FAMILIES, "flux", dataclasses.replace(flux, options=options))


def native(name):
    """A tiny model's tensors, each with numbers of its own."""
    state = tiny_models.build(name).model.diffusion_model.state_dict()
    return {key: torch.randn_like(value.float()) for key, value in state.items()}


def assert_comes_back(tmp_path, theirs, wanted):
    assert theirs.keys() != wanted.keys()
    tensors = {key: value.contiguous().clone() for key, value in theirs.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    source = Source(tmp_path / "m.safetensors")
    assert source.shapes == {key: tuple(value.shape) for key, value in wanted.items()}
    for key, value in wanted.items():
        assert torch.equal(source.read(key), value), key


# ---- by ComfyUI's own conversion, which its loader uses

COMFYUI = {
    "flux": lambda s: comfy.utils.flux_to_diffusers(
        {"depth": _blocks(s, "double_blocks"), "depth_single_blocks": _blocks(s, "single_blocks")}
        | {"hidden_size": s["img_in.bias"].shape[0]}
    ),
    "sd3": lambda s: comfy.utils.mmdit_to_diffusers(
        {"depth": s["x_embedder.proj.weight"].shape[0] // 64}
        | {"num_blocks": _blocks(s, "joint_blocks")}
    ),
    "auraflow": lambda s: comfy.utils.auraflow_to_diffusers(
        {"n_double_layers": _blocks(s, "double_layers")}
        | {"n_layers": _blocks(s, "double_layers") + _blocks(s, "single_layers")}
    ),
    "pixart": lambda s: comfy.utils.pixart_to_diffusers(
        {"depth": _blocks(s, "blocks"), "hidden_size": s["t_embedder.mlp.2.bias"].shape[0]}
    ),
    "z-image": lambda s: comfy.utils.z_image_to_diffusers(
        {"n_layers": _blocks(s, "layers"), "dim": s["x_embedder.bias"].shape[0]}
    ),
    "sdxl": lambda s: comfy.utils.unet_to_diffusers(tiny_models.FAMILIES["sdxl"].options),
}
# other names of the same tensors, for LoRAs
ALIASES = ("ff.linear_", "ff_context.linear_", "attn.to_qkv_mlp", "attn.to_out.weight")
OF_OTHERS = ("class_embedding.",)  # the same of other U-Nets


def _blocks(state, name):
    return comfy.model_detection.count_blocks(list(state), name + ".{}.")


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyuis_conversion_is_undone(tmp_path, name):
    ours, theirs, found = native(name), {}, set()
    if name == "sd3":  # the depth is a part of the name of the last block's modulation
        ours = {key: value for key, value in ours.items() if "attn2" not in key}
    for key, place in COMFYUI[name](ours).items():
        target, rows, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if target not in ours or any(alias in key for alias in ALIASES + OF_OTHERS):
            continue
        value = ours[target] if rows is None else ours[target].narrow(*rows)
        theirs[key] = value if change is None else change(value)
        found.add(target)
    wanted = {key: value for key, value in ours.items() if key in found}
    assert len(wanted) > 0.75 * len(ours)
    assert_comes_back(tmp_path, theirs, wanted)


# ---- by diffusers' own conversion of single files

DIFFUSERS = {
    "flux2": "convert_flux2_transformer_checkpoint_to_diffusers",
    "auraflow": "convert_auraflow_transformer_checkpoint_to_diffusers",
    "z-image": "convert_z_image_transformer_checkpoint_to_diffusers",
    "wan 2.1": "convert_wan_transformer_to_diffusers",
    "wan 2.1 i2v": "convert_wan_transformer_to_diffusers",
    "wan 2.1 vace": "convert_wan_transformer_to_diffusers",
    "ltxv": "convert_ltx_transformer_checkpoint_to_diffusers",
    "minimax h3": "convert_minimax_h3_transformer_checkpoint_to_diffusers",
    "krea 2": "convert_krea2_transformer_checkpoint_to_diffusers",
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_conversion_is_undone(tmp_path, name):
    module = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="diffusers is not installed"
    )
    convert = getattr(module, DIFFUSERS[name], None)
    if convert is None:
        pytest.skip("this diffusers does not know the model")
    ours = native(name)
    for unused in ("norm_final.weight", "rope.inv_freq"):  # what diffusers leaves out
        ours.pop(unused, None)
    arguments = {"config": None} if name == "minimax h3" else {}
    theirs = convert(dict(ours), **arguments)
    assert_comes_back(tmp_path, theirs, ours)


# ---- of models whose conversion holds in the published size alone: names and shapes


class OfShapes(StoredTensors):
    """Tensors without storage."""

    path = None
    name = "m"
    metadata: dict = {}

    def __init__(self, state):
        self.tensors = {
            key: StoredTensor(value.dtype, tuple(value.shape), value.nbytes)
            for key, value in state.items()
        }

    def read(self, name):
        raise AssertionError(f"names and shapes are enough; {name} was read")

    def sample(self, name, start, count):
        raise AssertionError(f"names and shapes are enough; {name} was read")


def as_published(shapes):
    """HunyuanVideo as its authors name it, which ComfyUI renames when it loads one."""
    renamed = {}
    for key, shape in shapes.items():
        for ours, theirs in HUNYUAN.items():
            key = re.sub(ours, theirs, key)
        renamed[key] = shape
    return renamed


HUNYUAN = {
    r"(img|txt)_attn\.qkv\.": r"\1_attn_qkv.",
    r"(img|txt)_attn\.proj\.": r"\1_attn_proj.",
    r"(img|txt)_attn\.norm\.query_norm\.": r"\1_attn_q_norm.",
    r"(img|txt)_attn\.norm\.key_norm\.": r"\1_attn_k_norm.",
    r"(single_blocks\.\d+)\.norm\.query_norm\.": r"\1.q_norm.",
    r"(single_blocks\.\d+)\.norm\.key_norm\.": r"\1.k_norm.",
    r"mlp\.0\.": "mlp.fc1.",
    r"mlp\.2\.": "mlp.fc2.",
    r"mod\.lin\.": "mod.linear.",
    r"modulation\.lin\.": "modulation.linear.",
    r"self_attn\.qkv\.": "self_attn_qkv.",
    r"self_attn\.proj\.": "self_attn_proj.",
    r"^(time_in|guidance_in|txt_in\.t_embedder)\.in_layer\.": r"\1.mlp.0.",
    r"^(time_in|guidance_in|txt_in\.t_embedder)\.out_layer\.": r"\1.mlp.2.",
    r"c_embedder\.in_layer\.": "c_embedder.linear_1.",
    r"c_embedder\.out_layer\.": "c_embedder.linear_2.",
}
PUBLISHED = {
    "Lumina2": ("convert_lumina2_to_diffusers", dict),
    "Chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", dict),
    "Flux": ("convert_flux_transformer_checkpoint_to_diffusers", dict),
    "HunyuanVideo": ("convert_hunyuan_video_transformer_to_diffusers", as_published),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_sizes_come_back(name):
    module = pytest.importorskip(
        "diffusers.loaders.single_file_utils", reason="diffusers is not installed"
    )
    convert, renamed = PUBLISHED[name]
    shapes, _ = full_size_models.build(name)
    shapes = {key: shape for key, shape in shapes.items() if key != "norm_final.weight"}
    # the converters want the authors' own names of norms
    given = {
        re.sub(
            r"(query|key)_norm\.weight|(distilled_guidance_layer\.norms\.\d+)\.weight", _scale, k
        )
        if name in ("Chroma", "Flux")
        else k: torch.empty(shape, device="meta")
        for k, shape in renamed(shapes).items()
    }
    theirs = getattr(module, convert)(given)
    found = in_comfyui_names(OfShapes(theirs)).tensors
    wanted = {re.sub(r"(norms\.\d+)\.weight", r"\1.scale", key): s for key, s in shapes.items()}
    assert {key: info.shape for key, info in found.items()} == wanted


def _scale(match):
    return match[0].removesuffix("weight") + "scale"
