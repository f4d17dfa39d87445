"""What diffusers calls a model's tensors comes back under ComfyUI's names, by the conversions of
ComfyUI and of diffusers itself.
"""

import dataclasses

import comfy.model_detection
import comfy.utils
import pytest
import torch
from safetensors.torch import save_file

import tiny_models
from nibble.quant.files.source import Source
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
}
# other names of the same tensors, for LoRAs
ALIASES = ("ff.linear_", "ff_context.linear_", "attn.to_qkv_mlp", "attn.to_out.weight")


def _blocks(state, name):
    return comfy.model_detection.count_blocks(list(state), name + ".{}.")


@pytest.mark.parametrize("name", COMFYUI)
def test_comfyuis_conversion_is_undone(tmp_path, name):
    ours, theirs, found = native(name), {}, set()
    if name == "sd3":  # the depth is a part of the name of the last block's modulation
        ours = {key: value for key, value in ours.items() if "attn2" not in key}
    for key, place in COMFYUI[name](ours).items():
        target, rows, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        if target not in ours or any(alias in key for alias in ALIASES):
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
