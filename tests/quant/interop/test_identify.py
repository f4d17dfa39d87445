"""What a file is, in one line: files that are made here, so that the answer is known."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nibble import __main__ as cli
from nibble.accel.caching import calibration_file
from nibble.accel.caf import couplings_files, heads_file
from nibble.quant.files import prompts
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.kinds import kind_of, own_kind
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.interop.identify import identify
from nibble.quant.training import state
from published_files import RandomFlux
from random_flux import flux_state, quantize

SMALL = dict(double=1, single=1, hidden=64, context=64, vector=64, channels=16)


@pytest.fixture
def made(tmp_path):
    """Writes a file of named tensors; returns its path."""

    def write(name: str, tensors, metadata=None):
        if not isinstance(tensors, dict):
            tensors = {key: torch.zeros(2, 2) for key in tensors}
        save_file(tensors, tmp_path / name, metadata)
        return tmp_path / name

    return write


def model(dtype=torch.bfloat16) -> dict:
    return {key: torch.zeros(shape, dtype=dtype) for key, shape in flux1_shapes(**SMALL).items()}


@pytest.mark.parametrize(
    ("names", "folder", "what"),
    [
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "vae", "VAE"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"], "loras", "LoRA"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "loras", "LoRA"),
        (["transformer.layers.0.to_q.lokr_w1"], "loras", "LoRA"),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], "text_encoders", "text encoder"),
        (["model.layers.0.self_attn.q_proj.weight"], "text_encoders", "text encoder"),
        (["control_model.zero_convs.0.0.weight"], "controlnet", "ControlNet"),
        (["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"], "upscale_models", "upscaler"),
        (["vision_model.encoder.layers.0.layer_norm1.weight"], "clip_vision", "vision encoder"),
        (["redux_down.weight", "redux_up.weight"], "style_models", "style model"),
        (["clip_l", "clip_g"], "embeddings", "textual inversion"),
        (["position_net.linears.0.weight"], "gligen", "GLIGEN"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "ipadapter", "IP-Adapter"),
    ],
)
def test_what_is_no_diffusion_model(made, names, folder, what):
    kind = identify(made("file.safetensors", names))
    assert (kind.folder, what in kind.what) == (folder, True)
    assert "diffusion model" not in kind.what


def test_a_16_bit_model_and_what_it_is_stored_as(made):
    assert identify(made("a.safetensors", model())).line == (
        "a diffusion model, FLUX.1, BF16: models/diffusion_models, opened by Load Diffusion Model"
    )
    scaled = model(torch.float8_e4m3fn)
    scaled |= {
        key.replace(".weight", ".weight_scale"): torch.ones(())
        for key, tensor in scaled.items()
        if tensor.dim() == 2
    }
    assert "8 bits (float8_e4m3fn)" in identify(made("b.safetensors", scaled)).what


def test_a_format_of_comfyui_s_is_named_from_its_layers_or_from_the_header(made):
    facts = {"format": "int8_tensorwise", "convrot": True}
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    tensors = model()
    matrices = [key.removesuffix(".weight") for key, tensor in tensors.items() if tensor.dim() == 2]
    quantized = dict(tensors)
    for name in matrices:
        weight = tensors[f"{name}.weight"]
        quantized[f"{name}.weight"] = weight.to(torch.int8)
        quantized[f"{name}.weight_scale"] = torch.ones(len(weight), 1)
    beside = {f"{name}.comfy_quant": text.clone() for name in matrices}
    assert "int8_convrot" in identify(made("a.safetensors", quantized | beside)).what
    layers = {name: {"format": "int8_tensorwise"} for name in matrices}
    header = {"_quantization_metadata": json.dumps({"layers": layers})}
    assert "(int8_tensorwise)" in identify(made("b.safetensors", quantized, header)).what


def test_an_all_in_one_file_is_a_checkpoint(made):
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in model().items()}
    whole["vae.decoder.conv_in.weight"] = torch.zeros(2, 2)
    kind = identify(made("all.safetensors", whole))
    assert (kind.folder, kind.opens) == ("checkpoints", "Load Checkpoint")
    assert "FLUX.1" in kind.what
    old = [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.bias",
    ]
    kind = identify(made("sd.safetensors", old))
    assert (kind.folder, "SD 1.5" in kind.what) == ("checkpoints", True)


def test_files_of_ours_and_of_other_programs_in_4_bits(tmp_path):
    save_file(flux_state(), tmp_path / "flux.safetensors")
    own = quantize(tmp_path / "flux.safetensors", "own.safetensors", rotation="off")
    assert identify(own).what == "a diffusion model, FLUX.1, Nibble's SVDQuant, 4 bits"
    three = tmp_path / "vq.safetensors"
    options = ["--method", "vq", "--preset", "fast", "--bits", "3"]
    assert cli.main(["quantize", str(tmp_path / "flux.safetensors"), str(three), *options]) == 0
    assert identify(three).what == "a diffusion model, FLUX.1, Nibble's VQ, 3 bits"
    published = tmp_path / "nunchaku"
    published.mkdir()
    blocks, others = RandomFlux(single=1).nunchaku()
    for name, tensors in (("transformer_blocks", blocks), ("unquantized_layers", others)):
        save_file(tensors, published / f"{name}.safetensors")
    assert identify(published).what == "a diffusion model, FLUX.1, Nunchaku INT4"


@pytest.mark.parametrize(
    "written_as",
    [
        "intlora",
        state.FORMAT,
        heads_file.FORMAT,
        couplings_files.FORMAT,
        prompts.FORMAT,
        f"{calibration_file.FORMAT}/{calibration_file.VERSION}",
    ],
)
def test_every_other_format_of_ours_is_known(made, written_as):
    kind = own_kind(written_as)
    assert kind is not None
    assert identify(made("own.safetensors", ["a"], {"format": written_as})) == kind


def test_what_is_no_safetensors_file_is_named_and_not_read(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04" + b"\0" * 60)
    (tmp_path / "old.pt").write_bytes(b"\x80\x02" + b"\0" * 60)
    assert "GGUF" in identify(tmp_path / "model.gguf").what
    for name in ("model.ckpt", "old.pt"):
        assert "pickle" in identify(tmp_path / name).what


def test_what_is_damaged_or_nobody_s_is_told(made, tmp_path):
    assert "not known to Nibble (1 tensors" in identify(made("x.safetensors", ["some.thing"])).what
    (tmp_path / "page.safetensors").write_bytes(b"<html>" + b" " * 100)
    with pytest.raises(FileRefused, match=r"page\.safetensors is a web page"):
        identify(tmp_path / "page.safetensors")
    with pytest.raises(FileRefused, match="is not that of one diffusion model"):
        identify(tmp_path)


def test_the_command_line_answers_for_any_file(made, capsys):
    path = made("clever-name.safetensors", ["decoder.conv_in.weight"])
    assert cli.main(["inspect", str(path)]) == 0
    assert "a VAE: models/vae, opened by Load VAE" in capsys.readouterr().out
    names = ["transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_k.weight"]
    assert cli.main(["inspect", "--json", str(made("d.safetensors", names))]) == 0
    told = json.loads(capsys.readouterr().out)
    assert "diffusers' names" in told["kind"]
    assert "diffusers' names" in told["quantizing"]


def test_quantizing_it_is_refused_in_the_same_words(made, capsys):
    path = made("up.safetensors", ["body.0.rdb1.conv1.weight", "conv_first.weight"])
    assert cli.main(["quantize", str(path), str(path.with_name("q.safetensors"))]) == 1
    said = capsys.readouterr().err
    assert "is an upscaler of pictures and not a diffusion model" in said
    assert "models/upscale_models" in said


def test_a_kind_needs_all_of_its_names_and_none_of_the_others():
    assert kind_of({"body.0.weight", "body.1.weight"}) is None
    both = {"vision_model.encoder.layers.0.layer_norm1.weight", "text_model.encoder.layers.0.x"}
    assert kind_of(both).folder == "text_encoders"
