"""Published files, opened: the very tensors that Nibble's own file of the same weights holds; and
what is refused, in words.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from compare import assert_same
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop import swizzle
from nibble.quant.interop.opening import is_4bit, open_4bit
from nibble.quant.weights.base import json_tensor, tensor_json
from nibble.quant.weights.formats import FORMATS
from published_files import RandomFlux, awq, random_linear, random_w4a16, svdquant


def assert_same_model(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("comfy_quant"):
            assert tensor_json(tensors[name]) == tensor_json(tensor), name
        elif name.endswith(("mod.lin.bias", "modulation.lin.bias")):
            # b + 1 as stored, minus 1, may need more bits than b had
            assert_same(tensors[name], tensor.float())
        else:
            assert_same(tensors[name], tensor)


@pytest.mark.parametrize("form", ["folder", "first", "modern"])
def test_every_form_gives_nibble_s_own_tensors(files, flux, form):
    file = open_4bit(files[form])
    assert file.family == "FLUX.1"
    assert file.layers == open_quantized(files["nibble"]).layers
    assert_same_model(dict(file.tensors()), flux.nibble())


@pytest.mark.parametrize("form", ["folder", "first", "modern"])
def test_specs_tell_beforehand_what_will_be_read(files, form):
    file = open_4bit(files[form])
    for name in file.units:
        assert {(s.name, s.dtype, s.shape) for s in file.specs(name)} == {
            (k, t.dtype, tuple(t.shape)) for k, t in file.unit(name).items()
        }


def test_a_folder_is_opened_by_either_of_its_files(files):
    blocks, others = (
        files["folder"] / f"{name}.safetensors"
        for name in ("transformer_blocks", "unquantized_layers")
    )
    assert is_4bit(blocks)
    assert not is_4bit(others)
    assert not is_4bit(files["folder"] / "config.json")
    assert open_4bit(blocks).layers == open_4bit(others).layers == open_4bit(files["folder"]).layers
    assert open_4bit(blocks).metadata["config"] == '{"num_layers": 1}'
    assert open_4bit(blocks).size == sum(path.stat().st_size for path in (blocks, others))


def test_q_k_and_v_that_are_separate_in_comfyui_are_cut_apart(tmp_path):
    h = 128
    qkv, out, fc2, mod = (
        random_linear(3 * h, h, 1),
        random_linear(h, h, 2),
        random_linear(h, 4 * h, 3),
        random_w4a16(6 * h, h, 4),
    )
    tensors = svdquant("transformer_blocks.0.attn.to_qkv", qkv, True) | svdquant(
        "transformer_blocks.0.attn.to_out.0", out, True
    )
    tensors |= svdquant("transformer_blocks.0.img_mlp.net.2", fc2, True) | awq(
        "transformer_blocks.0.img_mod.1", mod, 6
    )
    save_file(tensors | {"txt_norm.weight": torch.ones(8)}, tmp_path / "qwen.safetensors")
    file = open_4bit(tmp_path / "qwen.safetensors")
    assert file.family == "Qwen-Image"
    assert file.layers["transformer_blocks.0.img_mlp.net.2"]["act_unsigned"]
    whole = torch.cat(
        [
            file.layer(f"transformer_blocks.0.attn.to_{c}")[
                f"transformer_blocks.0.attn.to_{c}.weight"
            ]
            for c in "qkv"
        ]
    )
    assert_same(whole, qkv["weight"])
    k = file.layer("transformer_blocks.0.attn.to_k")
    assert_same(k["transformer_blocks.0.attn.to_k.weight_proj_down"], qkv["weight_proj_down"])
    assert_same(k["transformer_blocks.0.attn.to_k.bias"], qkv["bias"][h : 2 * h])
    assert_same(
        file.layer("transformer_blocks.0.img_mod.1")["transformer_blocks.0.img_mod.1.weight"],
        mod["weight"],
    )
    assert_same(dict(file.tensors())["txt_norm.weight"], torch.ones(8))


def test_a_modulation_kept_as_svdquant_is_read_as_such(tmp_path):
    """As some third-party files have it: presence of zero points decides, not the name."""
    tensors = svdquant("transformer_blocks.0.img_mod.1", random_linear(768, 128, 1), True)
    save_file(tensors, tmp_path / "m.safetensors")
    assert open_4bit(tmp_path / "m.safetensors").layers["transformer_blocks.0.img_mod.1"] == {
        "format": "svdquant_w4a4",
        "rank": 16,
    }


@pytest.mark.parametrize("quantized", [True, False])
def test_z_image_s_gated_mlp_and_its_unquantized_refiners(tmp_path, quantized):
    h = 128
    tensors = {
        "noise_refiner.0.attention_norm1.weight": torch.ones(h),
        "x_pad_token": torch.ones(1, h),
        "all_x_embedder.2-1.weight": torch.ones(h, 64),
    }
    gate, qkv = random_linear(2 * h, h, 1), random_linear(3 * h, h, 2)
    if quantized:
        tensors |= svdquant("layers.0.feed_forward.net.0.proj", gate, True) | svdquant(
            "layers.0.attention.to_qkv", qkv, True
        )
    else:
        tensors |= svdquant("layers.1.attention.to_qkv", qkv, True)
        tensors |= {
            f"layers.0.attention.to_{c}.weight": qkv["weight_proj_down"] * i
            for i, c in enumerate("qkv")
        }
        tensors |= {"layers.0.feed_forward.net.0.proj.weight": gate["weight_proj_up"]}
    save_file(tensors, tmp_path / "z.safetensors")
    file = open_4bit(tmp_path / "z.safetensors")
    state = dict(file.tensors())
    assert file.family == "Z-Image"
    assert {
        "x_embedder.weight",
        "x_pad_token",
        "noise_refiner.0.attention_norm1.weight",
    } <= state.keys()
    rows = gate["weight"] if quantized else gate["weight_proj_up"]
    assert_same(state["layers.0.feed_forward.w3.weight"], rows[:h])
    assert_same(state["layers.0.feed_forward.w1.weight"], rows[h:])
    expected = (
        qkv["weight"] if quantized else torch.cat([qkv["weight_proj_down"] * i for i in range(3)])
    )
    assert_same(state["layers.0.attention.qkv.weight"], expected)


def test_linears_of_unlike_ranks_stand_block_by_block(tmp_path):
    tensors = {}
    for i, c in enumerate("qkv"):
        part = random_linear(128, 128, 5, rank=16 * (i + 1))
        tensors |= svdquant(
            f"layers.0.attention.to_{c}",
            part | {"weight_smooth_factor": torch.ones(128).bfloat16()},
            True,
        )
    save_file(
        tensors | {"noise_refiner.0.attention_norm1.weight": torch.ones(4)},
        tmp_path / "z.safetensors",
    )
    file = open_4bit(tmp_path / "z.safetensors")
    assert file.layers["layers.0.attention.qkv"]["rank"] == 96
    weight = FORMATS["svdquant_w4a4"].from_tensors(
        file.layer("layers.0.attention.qkv"), "layers.0.attention.qkv"
    )
    assert weight.shape == (384, 128)
    assert not weight.proj_up[:128, 16:].any()


# ---- comfy-kitchen's names


def kitchen_file(tensors, path, short=False, tiled=False, extra=()):
    """Nibble's tensors of a model under the other spellings of comfy-kitchen's names."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("comfy_quant"):
            facts = tensor_json(tensor) | dict(extra)
            facts |= (
                {"layout": swizzle.KITCHEN_LAYOUT}
                if tiled and facts["format"] == "svdquant_w4a4"
                else {}
            )
            facts.pop("rank", None)
            tensor = json_tensor(facts | {"group_size": 64})
        out[name] = tensor
    for name in [key for key in out if key.endswith("weight_proj_down")]:
        layer = name.removesuffix(".weight_proj_down")
        if tiled:
            out[f"{layer}.weight"] = swizzle.weight_to_kitchen(out[f"{layer}.weight"])
            out[f"{layer}.weight_scale"] = swizzle.scale_to_kitchen(out[f"{layer}.weight_scale"])
            out[f"{layer}.weight_proj_up"] = swizzle.scale_to_kitchen(
                out[f"{layer}.weight_proj_up"].t().contiguous()
            )
        for suffix in ("proj_down", "proj_up", "smooth_factor") if short else ():
            out[f"{layer}.{suffix}"] = out.pop(f"{layer}.weight_{suffix}")
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, path)
    return path


@pytest.mark.parametrize(
    "spelling", [{}, {"short": True}, {"tiled": True}, {"short": True, "tiled": True}], ids=str
)
def test_kitchen_s_spellings_give_the_same_tensors(files, tmp_path, spelling):
    own = load_file(files["nibble"])
    path = kitchen_file(own, tmp_path / "kitchen.safetensors", **spelling)
    file = open_4bit(path)
    assert is_4bit(path)
    assert file.family == "FLUX.1"
    assert file.layers == open_quantized(files["nibble"]).layers
    state = dict(file.tensors())
    for name, tensor in own.items():
        assert (
            tensor_json(state[name]) == tensor_json(tensor)
            if name.endswith("comfy_quant")
            else torch.equal(state[name], tensor)
        ), name
    assert {(s.name, s.dtype, s.shape) for n in file.units for s in file.specs(n)} == {
        (k, t.dtype, tuple(t.shape)) for k, t in state.items()
    }


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lowrank_branch_input_basis": "smoothed"}, "only 'raw'"),
        ({"group_size": 32}, "group_size"),
        ({"layout": "mine"}, "unknown layout"),
        ({"pruning": 3}, "pruning"),
        ({"rank": 7}, "rank"),
        ({"format": "float8_e4m3fn"}, "beside SVDQuant layers"),
    ],
)
def test_kitchen_files_that_cannot_be_read_say_so(files, tmp_path, change, words):
    own = load_file(files["nibble"])
    layer = "double_blocks.0.img_mlp.0.comfy_quant"
    save_file(
        own | {layer: json_tensor(tensor_json(own[layer]) | change)}, tmp_path / "k.safetensors"
    )
    refused(tmp_path / "k.safetensors", words)


# ---- refusals: one sentence with the file's name and what to do


def refused(path, words):
    with pytest.raises(FileRefused, match=words) as refusal:
        dict(open_4bit(path).tensors())
    text = str(refusal.value)
    assert text.endswith(".")
    assert ". " not in text.replace(path.name, "")
    assert path.name in text or path.parent.name in text


@pytest.fixture
def first(files):
    return load_file(files["first"])


QKV, PROJ, MOD = (
    "transformer_blocks.0.qkv_proj",
    "single_transformer_blocks.0.out_proj",
    "transformer_blocks.0.norm1.linear",
)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


CASES = {
    "wscales has the shape": lambda t: (
        t | {f"{QKV}.wscales": torch.ones(8, 384).to(torch.float8_e4m3fn)}
    ),
    r"wscales .* needs \(8, 128\)": lambda t: t | {f"{QKV}.wcscales": torch.ones(384)},
    "rank 0": lambda t: without(t, f"{QKV}.lora_down", f"{QKV}.lora_up"),
    "unknown shape": (
        lambda t: (
            t | {f"{QKV}.lora_down": torch.zeros(128, 0), f"{QKV}.lora_up": torch.zeros(384, 0)}
        )
    ),
    "lacks transformer_blocks.0.attn.to_qkv.smooth_factor": lambda t: without(t, f"{QKV}.smooth"),
    "lacks transformer_blocks.0.norm1.linear.wscales": lambda t: without(t, f"{MOD}.wscales"),
    "stores transformer_blocks.0.attn.to_qkv.proj_down in a way": (
        lambda t: t | {f"{QKV}.lora_down": t[f"{QKV}.lora_down"].to(torch.int8)}
    ),
    "half in 4 and half in 16 bits": (
        lambda t: (
            without(t, *(k for k in t if k.startswith(PROJ)))
            | {f"{PROJ}.weight": torch.zeros(128, 128)}
        )
    ),
    "do not fit together": (
        lambda t: t | svdquant("single_transformer_blocks.0.mlp_fc1", random_linear(512, 256, 1))
    ),
    "no part of FLUX.1": lambda t: t | {"caption_projection.weight": torch.zeros(4, 4)},
    "twice, under old and new names": (
        lambda t: t | {"transformer_blocks.0.attn.to_qkv.qweight": t[f"{QKV}.qweight"].clone()}
    ),
    "is a FLUX.2 model": (
        lambda t: t | {"double_stream_modulation_img.linear.weight": torch.zeros(4, 4)}
    ),
    "is a text encoder": lambda t: {
        "encoder.block.0.layer.0.SelfAttention.q.qweight": torch.zeros(4, 4)
    },
    "a model that Nibble cannot read": lambda t: {"blocks.0.attn1.to_q.qweight": torch.zeros(4, 4)},
}


@pytest.mark.parametrize("words", CASES)
def test_files_that_cannot_be_read_say_so(first, tmp_path, words):
    path = tmp_path / "bad.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in CASES[words](first).items()}, path)
    refused(path, words)


def test_half_a_folder_and_a_truncated_file_are_refused(files, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    blocks = (files["folder"] / "transformer_blocks.safetensors").read_bytes()
    (folder / "transformer_blocks.safetensors").write_bytes(blocks)
    with pytest.raises(FileRefused, match="folder half lacks unquantized_layers.safetensors"):
        open_4bit(folder / "transformer_blocks.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(blocks[: len(blocks) // 2])
    refused(tmp_path / "cut.safetensors", "cut off")
    save_file({"img_in.weight": torch.zeros(4, 4)}, tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "was not made by Nibble")


def test_a_model_without_guidance_is_read_too(tmp_path):
    blocks, others = RandomFlux(double=0, single=1, guidance=False).nunchaku()
    save_file(blocks | others, tmp_path / "schnell.safetensors")
    assert "guidance_in.in_layer.weight" not in dict(
        open_4bit(tmp_path / "schnell.safetensors").tensors()
    )


def test_json_is_read_once_and_facts_of_others_are_none(files):
    file = open_4bit(files["first"])
    assert file.fact("report") == {}
    assert file.verify() is None
    assert json.loads(file.metadata["quantization_config"])["rank"] == 16
