"""`python -m nibble inspect` and `quantize` take a model in every form, and say which it is."""

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.files.known_shapes import flux1_shapes

cli = importlib.import_module("nibble.__main__")
SHAPES = flux1_shapes(1, 1, 128, 64, 64)


@pytest.fixture
def forms(tmp_path):
    """The same FLUX.1 in each form, by the form's name."""
    tensors = {name: (torch.randn(shape) * 0.05).bfloat16() for name, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(
        {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
        | {"vae.decoder.conv_in.weight": torch.zeros(4, 4)},
        tmp_path / "all in one.safetensors",
    )
    fp8 = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }
    save_file(fp8, tmp_path / "fp8.safetensors")
    folder, places = tmp_path / "parts", {}
    folder.mkdir()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        places |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return {
        "plain": tmp_path / "plain.safetensors",
        "all in one": tmp_path / "all in one.safetensors",
        "fp8": tmp_path / "fp8.safetensors",
        "index": folder / "model.safetensors.index.json",
        "shard": folder / "model-00002-of-00002.safetensors",
        "folder": folder,
    }


def inspected(capsys, path, *options):
    assert cli.main(["inspect", str(path), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_form_is_named(forms, capsys):
    for form, path in forms.items():
        facts = inspected(capsys, path)
        assert (facts["architecture"], facts["quantized"]) == ("FLUX.1", False)
        assert facts["files"] == (2 if form in ("index", "shard", "folder") else 1), form
        few = "8 bits (float8_e4m3fn)"
        assert facts["weights"] == (few if form == "fp8" else "BF16")
        left_out = "1 other tensors (VAE, text encoders)" if form == "all in one" else None
        assert facts.get("left out") == left_out
    assert inspected(capsys, forms["folder"])["file"] == "model.safetensors"


def test_a_plan_says_what_the_source_is(forms, capsys):
    notes = inspected(capsys, forms["fp8"], "--plan")["report"]["notes"]
    assert notes == [
        "started from weights of 8 bits (float8_e4m3fn), and what they lost stays lost"
    ]


def test_any_form_is_quantized_to_the_same_file(forms, tmp_path):
    made = {}
    for form in ("plain", "all in one", "index", "folder"):
        target = tmp_path / f"q {form}.safetensors"
        command = ["quantize", str(forms[form]), str(target), "--rank", "16", "--memory-cap", "0"]
        assert cli.main(command) == 0
        made[form] = load_file(target)
    for tensors in made.values():
        assert tensors.keys() == made["plain"].keys()
        assert all(torch.equal(tensors[name], made["plain"][name]) for name in tensors)


def test_a_gguf_file_is_named_with_its_bits(tmp_path, capsys):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    for name, shape in SHAPES.items():
        few = len(shape) == 2
        kind = getattr(gguf.GGMLQuantizationType, "Q8_0" if few else "F32")
        data = gguf.quants.quantize(torch.randn(shape).numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = inspected(capsys, tmp_path / "m.gguf")
    assert (facts["file"], facts["weights"]) == ("m.gguf", "8.5 bits (Q8_0)")
    assert facts["architecture"] == "FLUX.1"
