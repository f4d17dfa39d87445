"""Which models the quantize nodes list, and what becomes of those that are not one plain file."""

import json
import shutil

import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.nodes import svdquant as nodes
from nibble.nodes.bridge.quantize import record_inputs, sources
from nibble.nodes.bridge.quantize.svdquant import SVDQuantRequest
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import Source
from nibble.quant.svdquant.recipe import Recipe

FAST = Recipe.from_preset("fast", rank=16, solver="svd", rotation="off")
KINDS = (loading.FOLDER, "checkpoints", "diffusers")


@pytest.fixture
def models(tmp_path, monkeypatch, flux_file):
    """ComfyUI's folders of models: the FLUX whole, in shards, all-in-one, and as a pipeline."""
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        endings = {".safetensors"} if kind != "diffusers" else ["folder"]
        place = ([str(tmp_path / kind)], endings)
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, place)
        folder_paths.filename_list_cache.pop(kind, None)
    tensors = load_file(flux_file)
    shutil.copy(flux_file, tmp_path / loading.FOLDER / "flux.safetensors")
    shards(tmp_path / loading.FOLDER, "parts", tensors)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    whole |= {"vae.decoder.conv_in.weight": torch.zeros(4, 4), "text_encoders.a": torch.zeros(4)}
    save_file(whole, tmp_path / "checkpoints" / "all in one.safetensors")
    pipeline = tmp_path / "diffusers" / "FLUX.1-tiny"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "model_index.json").write_text("{}")
    shards(pipeline / "transformer", "diffusion_pytorch_model", tensors)
    (tmp_path / loading.FOLDER / "m.gguf").write_bytes(b"GGUF")
    yield tmp_path
    for kind in KINDS:
        folder_paths.filename_list_cache.pop(kind, None)


def shards(folder, stem, tensors):
    names, places = sorted(tensors), {}
    for number in range(2):
        file = f"{stem}-{number + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, folder / file)
        places |= dict.fromkeys(names[number::2], file)
    text = json.dumps({"weight_map": places})
    (folder / f"{stem}.safetensors.index.json").write_text(text)


LISTED = [
    "flux.safetensors",
    "parts-00001-of-00002.safetensors",
    "m.gguf",
    "checkpoints/all in one.safetensors",
    "diffusers/FLUX.1-tiny",
]


def test_each_model_is_listed_once(models):
    assert sources.listed() == LISTED
    (models / loading.FOLDER / "sub").mkdir()
    (models / loading.FOLDER / "sub" / "n.gguf").write_bytes(b"GGUF")
    assert "sub/n.gguf" in [name.replace("\\", "/") for name in sources.listed()]


def test_names_lead_to_paths_and_others_are_refused(models):
    assert sources.path_of(LISTED[3]) == models / "checkpoints" / "all in one.safetensors"
    assert sources.path_of(LISTED[4]) == models / "diffusers" / "FLUX.1-tiny"
    for name in ("checkpoints/no.safetensors", "diffusers/../checkpoints", "diffusers/no", "no"):
        with pytest.raises(FileRefused, match="press R to refresh"):
            sources.path_of(name)
        assert sources.stamp(name) == "missing"
    assert nodes.NibbleQuantizeSVDQuant.validate_inputs(LISTED[3]) is True
    assert "press R" in nodes.NibbleQuantizeSVDQuant.validate_inputs("diffusers/no")


@pytest.mark.parametrize(
    "name, origin",
    [
        (LISTED[0], "flux.safetensors"),
        (LISTED[1], "parts"),
        (LISTED[2], "m"),
        (LISTED[3], "all in one.safetensors"),
        (LISTED[4], "FLUX.1-tiny"),
        ("a/FLUX/transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "a/FLUX"),
    ],
)
def test_new_files_are_named_after_the_model(models, name, origin):
    assert sources.origin(name) == origin


@pytest.mark.parametrize("number", [1, 3, 4], ids=["shards", "all in one", "diffusers"])
def test_whatever_files_a_model_is_in_the_result_is_the_same(models, number):
    name, report = SVDQuantRequest(model_name=LISTED[number], recipe=FAST).run()
    plain, _ = SVDQuantRequest(model_name=LISTED[0], recipe=FAST).run()
    found, wanted = (load_file(models / loading.FOLDER / file) for file in (name, plain))
    assert (
        name
        == {
            1: "parts-svdq-int4-r16.safetensors",
            3: "all in one-svdq-int4-r16.safetensors",
            4: "FLUX.1-tiny-svdq-int4-r16.safetensors",
        }[number]
    )
    for key, tensor in wanted.items():
        other = key if key in found else key.replace("norm.scale", "norm.weight")
        assert torch.equal(found[other].view(torch.uint8), tensor.view(torch.uint8)), key
    assert len(found) == len(wanted)
    left_out = [note for note in report.notes if "2 other tensors (VAE, text encoders)" in note]
    assert len(left_out) == (number == 3)
    assert loading.load(models / loading.FOLDER / name)


@pytest.mark.parametrize("number", [1, 4], ids=["shards", "diffusers"])
def test_a_model_in_several_files_is_measured_as_a_whole_one(models, number):
    source = Source(sources.path_of(LISTED[number]))
    loaded = sources.load(source).model.diffusion_model.state_dict()
    plain = comfy.sd.load_diffusion_model(str(models / loading.FOLDER / "flux.safetensors"))
    wanted = plain.model.diffusion_model.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    assert source.loaded_bytes == Source(sources.path_of(LISTED[0])).loaded_bytes


def test_a_gguf_file_is_measured_with_its_decoded_weights(models, flux_file):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(models / loading.FOLDER / "m.gguf", "flux")
    for name, tensor in load_file(flux_file).items():
        whole = tensor.dim() == 2 and tensor.shape[1] % 32 == 0
        kind = getattr(gguf.GGMLQuantizationType, "Q8_0" if whole else "F32")
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Source(sources.path_of("m.gguf"))
    loaded = sources.load(source).model.diffusion_model
    linear = loaded.double_blocks[0].img_mlp[0].weight
    assert torch.equal(linear.float(), source.read("double_blocks.0.img_mlp.0.weight").float())
    assert source.loaded_bytes > 1.5 * source.bytes
    name, report = SVDQuantRequest(model_name="m.gguf", recipe=FAST).run()
    assert name == "m-svdq-int4-r16.safetensors"
    assert any(note.startswith("started from weights of 8.5 bits") for note in report.notes)
