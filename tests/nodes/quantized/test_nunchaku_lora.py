"""LoRAs in Nunchaku's own form: converted, they are the ordinary LoRA that they were made of."""

import comfy.lora
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_tensors import sampled
from flux_runs import decibels
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.convert import convert
from nunchaku_packers import pack_down, pack_up
from published_files import METADATA, RandomFlux

H = 128
# Nunchaku's module, diffusers' linears of which it is put together
DOUBLE = {
    "qkv_proj": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "qkv_proj_context": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "out_proj": ["attn.to_out.0"],
    "out_proj_context": ["attn.to_add_out"],
    "mlp_fc1": ["ff.net.0.proj"],
    "mlp_fc2": ["ff.net.2"],
    "mlp_context_fc1": ["ff_context.net.0.proj"],
    "mlp_context_fc2": ["ff_context.net.2"],
}
SINGLE = {"qkv_proj": ["attn.to_q", "attn.to_k", "attn.to_v"], "mlp_fc1": ["proj_mlp"]}
MODULATION = {
    "transformer_blocks.0.norm1.linear": 6,
    "transformer_blocks.0.norm1_context.linear": 6,
    "single_transformer_blocks.0.norm.linear": 3,
}


def pair(n, k, seed, rank=8):
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, k, generator=draw) / k**0.5
    return (torch.randn(n, rank, generator=draw) * 0.2).bfloat16(), down.bfloat16()


def diffusers_lora():
    """(up, down) by diffusers' module; q and v of the single block alone, k unchanged."""
    shapes = {}
    for names in DOUBLE.values():
        for name in names:
            wide = "net.0" in name
            shapes[f"transformer_blocks.0.{name}"] = (
                4 * H if wide else H,
                4 * H if name.endswith("net.2") else H,
            )
    shapes |= {
        "single_transformer_blocks.0.attn.to_q": (H, H),
        "single_transformer_blocks.0.attn.to_v": (H, H),
        "single_transformer_blocks.0.proj_mlp": (4 * H, H),
        "single_transformer_blocks.0.proj_out": (H, 5 * H),
        "single_transformer_blocks.1.proj_mlp": (4 * H, H),
    } | {name: (splits * H, H) for name, splits in MODULATION.items()}
    shapes["context_embedder"] = (H, 64)
    return {name: pair(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def padded(tensor, dim):
    pad = -tensor.shape[dim] % 16
    return torch.nn.functional.pad(tensor, (0, pad) if dim else (0, 0, 0, pad))


def packed(module, up, down):
    return {
        f"{module}.lora_down": pack_down(padded(down, 0).t().contiguous()),
        f"{module}.lora_up": pack_up(padded(up, 1).contiguous()),
    }


def composed(lora):
    """As Nunchaku's to_nunchaku composes it."""
    out = {}
    for block, modules in (
        ("transformer_blocks.0", DOUBLE),
        ("single_transformer_blocks.0", SINGLE),
        ("single_transformer_blocks.1", SINGLE),
    ):
        for module, names in modules.items():
            found = [lora.get(f"{block}.{name}") for name in names]
            first = next((part for part in found if part is not None), None)
            if first is None:
                continue
            # what is missing gets the first one's down and an up of zeros
            parts = [(torch.zeros_like(first[0]), first[1]) if p is None else p for p in found]
            up = torch.block_diag(*(up for up, _ in parts))
            out |= packed(f"{block}.{module}", up, torch.cat([down for _, down in parts]))
    up, down = lora["single_transformer_blocks.0.proj_out"]
    out |= packed("single_transformer_blocks.0.out_proj", up, down[:, :H])
    out |= packed("single_transformer_blocks.0.mlp_fc2", up, down[:, H:])
    for name, splits in MODULATION.items():
        up, down = lora[name]
        rows = up.view(splits, H, -1).transpose(0, 1).reshape(splits * H, -1)
        out |= {f"{name}.lora_down": padded(down, 0), f"{name}.lora_up": padded(rows, 1)}
    up, down = lora["context_embedder"]
    return out | {"context_embedder.lora_A.weight": down, "context_embedder.lora_B.weight": up}


def vectors():
    """Differences of biases, as diffusers has them and as they lie in Nunchaku's file."""
    draw = torch.Generator().manual_seed(99)
    sizes = {
        "transformer_blocks.0.norm1.linear": 6 * H,
        "single_transformer_blocks.0.proj_mlp": 4 * H,
    }
    return {name: torch.randn(size, generator=draw) * 0.1 for name, size in sizes.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, lora = tmp_path_factory.mktemp("loras"), diffusers_lora()
    theirs = composed(lora) | {f"{name}.bias": bias for name, bias in vectors().items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in theirs.items()},
        folder / "theirs.safetensors",
    )
    save_file(RandomFlux().nibble(), folder / "model.safetensors", METADATA)
    ordinary = {}
    for name, (up, down) in lora.items():
        ordinary[f"transformer.{name}.lora_B.weight"] = up
        ordinary[f"transformer.{name}.lora_A.weight"] = down
    biases = vectors()
    ordinary["diffusion_model.double_blocks.0.img_mod.lin.diff_b"] = biases[
        "transformer_blocks.0.norm1.linear"
    ]
    ordinary["diffusion_model.single_blocks.0.linear1.diff_b"] = torch.cat(
        [torch.zeros(3 * H), biases["single_transformer_blocks.0.proj_mlp"]]
    )
    summary = convert(folder / "theirs.safetensors", folder / "converted.safetensors", "nibble")
    assert ("model", "FLUX.1") in summary
    return folder, ordinary


def with_lora(model, tensors):
    return comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0]


def changes(model):
    """Layer → the change of its weight or bias, by ComfyUI's own arithmetic."""
    found = {}
    for key, entries in model.patches.items():
        tensor = model.model.state_dict()[key] if key.endswith(".bias") else None
        module = model.model.get_submodule(key.rpartition(".")[0])
        shape = module.weight.shape if tensor is None else tensor.shape
        found[key] = comfy.lora.calculate_weight(entries, torch.zeros(shape), key)
    return found


def test_every_layer_is_changed_as_by_the_ordinary_lora(files, caplog):
    folder, ordinary = files
    model = loading.load(folder / "model.safetensors", verify=False)
    expected = changes(with_lora(model, ordinary))
    found = changes(with_lora(model, load_file(folder / "converted.safetensors")))
    assert "not loaded" not in caplog.text.lower()
    assert found.keys() == expected.keys()
    for key, change in expected.items():
        assert (found[key] - change).norm() <= 1e-6 * change.norm(), key


def test_the_picture_is_the_ordinary_lora_s(files):
    folder, ordinary = files
    model = loading.load(folder / "model.safetensors", verify=False)
    expected, plain = sampled(with_lora(model, ordinary)), sampled(model)
    found = sampled(with_lora(model, load_file(folder / "converted.safetensors")))
    assert decibels(expected, plain) < 30
    assert decibels(expected, found) > 60


def without_up(tensors):
    del tensors["transformer_blocks.0.qkv_proj.lora_up"]


def of_another_layer(tensors):
    for part in ("lora_down", "lora_up"):
        first = tensors[f"transformer_blocks.0.mlp_fc1.{part}"]
        tensors[f"transformer_blocks.0.mlp_fc9.{part}"] = first.clone()


def of_another_rank(tensors):
    tensors["transformer_blocks.0.qkv_proj.lora_up"] = torch.zeros(384, 8)


def with_more(tensors):
    tensors["something"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (without_up, "lacks"),
        (of_another_layer, "does not have"),
        (of_another_rank, "do not fit"),
        (with_more, "no part of a LoRA"),
    ],
)
def test_a_damaged_file_is_refused_and_nothing_is_written(files, tmp_path, damage, reason):
    tensors = load_file(files[0] / "theirs.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(FileRefused, match=rf"damaged.safetensors .*{reason}"):
        convert(tmp_path / "damaged.safetensors", tmp_path / "out.safetensors", "nibble")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.safetensors"]
