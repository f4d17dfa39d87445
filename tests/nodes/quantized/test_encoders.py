"""Quantized text encoders in ComfyUI: its own classes and loaders open them, and what stock nodes
and FEATHER do with a CLIP they do with these.
"""

import shutil

import comfy.ops
import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.sa_t5
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

import encoder_shapes
import nodes
import small_encoders as small
import tiny_encoders
from dequantized_files import dequantized
from nibble.accel.feather import Stage
from nibble.demo import pictures
from nibble.nodes.bridge.feather import prune as feather
from nibble.nodes.bridge.quantized import encoders, layouts, loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.vq4dit.quantize import quantize_checkpoint as quantize_to_codewords
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe
from pruned_encoders import tokens

RECIPES = {
    "w4a16": Recipe.from_preset("fast"),
    "w4a8": Recipe.from_preset("fast", format="svdquant_w4a8", rank=0),
}
QUERY = "encoder.block.1.layer.0.SelfAttention.q"


@pytest.fixture(scope="module", autouse=True)
def registered():
    encoders.register()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return small.t5_file(tmp_path_factory.mktemp("encoders") / "t5.safetensors")


@pytest.fixture(scope="module", params=RECIPES)
def path(request, plain):
    target = plain.with_name(f"t5-{request.param}.safetensors")
    quantize_checkpoint(plain, target, RECIPES[request.param])
    return target


@pytest.fixture(scope="module")
def w4a16(plain):
    target = plain.with_name("t5-alone.safetensors")
    quantize_checkpoint(plain, target, RECIPES["w4a16"])
    return target


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/text_encoders."""
    home = tmp_path / "text_encoders"
    home.mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(home)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    return home


def transformer(clip):
    return clip.cond_stage_model.t5xxl.transformer


def test_the_layers_are_ours_and_the_table_is_comfyuis(path):
    model = transformer(small.opened(path))
    assert layouts.is_ours(model.get_submodule(QUERY).weight)
    assert not layouts.is_ours(model.shared.weight)
    assert model.shared.weight.dequantize().shape == (32128, 128)


def test_the_conditioning_is_that_of_the_numbers_in_the_file(w4a16):
    """4-bit weights and 16-bit inputs are exact products of what the file says."""
    expected = small.conditioning(small.t5(dequantized(w4a16)))
    assert small.db(expected, small.conditioning(small.opened(w4a16))) > 60


def test_inputs_of_8_bits_cost_little(path):
    expected = small.conditioning(small.t5(dequantized(path)))
    assert small.db(expected, small.conditioning(small.opened(path))) > 25


def test_it_is_close_to_16_bit(plain, path):
    expected = small.conditioning(small.opened(plain))
    assert small.db(expected, small.conditioning(small.opened(path))) > 10


def test_it_takes_a_quarter_of_the_memory(plain, path):
    whole, four = (small.opened(file).patcher.model_size() for file in (plain, path))
    blocks = 3 * (4 * 128 * 128 + 3 * 128 * 256)
    assert four == pytest.approx(blocks * 4.25 / 8 + 32128 * 132, rel=0.05)
    assert four < 0.6 * whole


def lora(rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    name = "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.o"
    return {
        f"{name}.lora_up.weight": torch.randn(128, rank, generator=generator) * 0.1,
        f"{name}.lora_down.weight": torch.randn(rank, 128, generator=generator) * 0.1,
    }


def test_a_lora_does_what_it_does_to_the_same_weights_in_16_bit(w4a16):
    changed = []
    for clip in (small.t5(dequantized(w4a16)), small.opened(w4a16)):
        _, patched = comfy.sd.load_lora_for_models(None, clip, lora(), 0, 1.0)
        changed += [small.conditioning(patched), small.conditioning(clip)]
    with_lora, without, ours, ours_without = changed
    assert small.db(without, with_lora) < 30  # it does something
    assert small.db(with_lora, ours) > 40
    assert small.db(without, ours_without) > 60  # and comes off again


def test_clip_save_gives_the_file_back(w4a16):
    state = small.opened(w4a16).cond_stage_model.t5xxl.transformer.state_dict()
    stored = load_file(w4a16)
    for key in (f"{QUERY}.weight", f"{QUERY}.weight_scale", "shared.weight"):
        assert torch.equal(torch.as_tensor(state[key]), stored[key]), key


@pytest.mark.parametrize("name", [f"{QUERY}.weight_scale", f"{QUERY}.weight"])
def test_a_damaged_layer_is_refused(w4a16, name):
    state = load_file(w4a16)
    state[name] = state[name][:1]
    with pytest.raises(FileRefused, match=QUERY):
        small.t5(state)


def test_a_scale_that_is_not_finite_is_refused(w4a16):
    state = load_file(w4a16)
    state[f"{QUERY}.weight_scale"][0, 0] = float("nan")
    with pytest.raises(FileRefused, match="NaN or infinity"):
        small.t5(state)


# ---- loaders


def test_stock_clip_loader_opens_it(folder, path):
    shutil.copy(path, folder / "four.safetensors")
    with small.small_xxl():
        (clip,) = nodes.CLIPLoader().load_clip("four.safetensors", "sd3")
    assert layouts.is_ours(transformer(clip).get_submodule(QUERY).weight)
    assert small.db(small.conditioning(small.opened(path)), small.conditioning(clip)) > 30


def test_ours_opens_it_as_the_stock_loader_does(folder, path):
    shutil.copy(path, folder / "four.safetensors")
    with small.small_xxl():
        (stock,) = nodes.CLIPLoader().load_clip("four.safetensors", "sd3")
        clip, kind = encoders.load(["four.safetensors"], "sd3")
    assert kind == "sd3"
    assert torch.equal(small.conditioning(stock), small.conditioning(clip))
    chart = encoders.chart(["four.safetensors"], kind, clip)
    assert ["type", "sd3"] in chart["summary"]
    assert any(
        "21 layers of 4-bit weights, 1 of 8-bit rows" in text for _, text in chart["summary"]
    )


def test_ours_looks_at_the_checksums(folder, w4a16):
    data = bytearray(w4a16.read_bytes())
    data[-1000] ^= 1
    (folder / "bad.safetensors").write_bytes(data)
    with pytest.raises(FileRefused, match="checksum"), small.small_xxl():
        encoders.load(["bad.safetensors"], "sd3")


@pytest.mark.parametrize(
    ("file", "what"),
    [
        (pictures.FLUX_FILE, "a diffusion model, FLUX.1, BF16 and no text encoder: it belongs in"),
        (pictures.VAE_FILE, "a VAE and no text encoder: it belongs in models/vae"),
    ],
)
def test_ours_refuses_what_comfyui_would_build_of_random_weights(folder, file, what):
    shutil.copy(file, folder / "other.safetensors")
    with pytest.raises(FileRefused) as refused:
        encoders.load(["other.safetensors"])
    assert str(refused.value).startswith(f"other.safetensors is {what}")


def test_its_files_are_listed(folder, w4a16, plain):
    shutil.copy(w4a16, folder / "four.safetensors")
    shutil.copy(plain, folder / "sixteen.safetensors")
    assert encoders.quantized_files() == ["four.safetensors"]


def test_an_encoder_that_comfyui_builds_without_formats_gets_the_table_in_16_bit(w4a16):
    """It looks for quantized layers in T5-XXL, and not in Stable Audio's T5."""
    target = tiny_encoders.Target(
        comfy.text_encoders.sa_t5.SAT5Model, comfy.text_encoders.sa_t5.SAT5Tokenizer
    )
    gated = {"is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"}
    options = {"t5base_model_config": small.T5 | gated}
    clip = comfy.sd.CLIP(
        target, model_options=options | {"dtype": torch.float32}, state_dict=[load_file(w4a16)]
    )
    model = clip.cond_stage_model.t5base.transformer
    assert layouts.is_ours(model.get_submodule(QUERY).weight)
    table = dequantized(w4a16)["shared.weight"]
    assert torch.equal(model.shared.weight.float(), table.bfloat16().float())
    assert small.conditioning(clip).isfinite().all()


def test_the_loader_of_models_says_where_it_belongs(w4a16):
    with pytest.raises(FileRefused, match=r"is a text encoder \(T5\): put it into models/text_enc"):
        loading.load(w4a16)


def test_codewords_of_3_bits_open_too(plain):
    target = plain.with_name("t5-vq3.safetensors")
    quantize_to_codewords(plain, target, VQRecipe.from_preset("fast", bits=3))
    clip = small.opened(target)
    assert layouts.format_of(transformer(clip).get_submodule(QUERY).weight) == "vq"
    found = small.conditioning(clip)
    assert small.db(small.conditioning(small.t5(dequantized(target))), found) > 40
    assert small.db(small.conditioning(small.opened(plain)), found) > 5


def test_a_report_speaks_of_prompts():
    lines = [
        ["error", "median 20 dB; measured on pictures that were held out"],
        ["pictures", "fair"],
    ]
    assert encoders.of_prompts(lines) == [
        ["error", "median 20 dB; measured on prompts that were held out"]
    ]


# ---- which type


def header_only(path, keys: dict[str, tuple[int, ...]]):
    save_file({name: torch.zeros(shape) for name, shape in keys.items()}, path)
    return path


LAYER = "model.layers.0."
ENCODERS = {
    "clip_l": {"text_model.encoder.layers.0.mlp.fc1.weight": (1,)},
    "clip_g": {"text_model.encoder.layers.30.mlp.fc1.weight": (1,)},
    "t5xxl": {
        "encoder.block.0.layer.0.SelfAttention.q.weight": (1,),
        "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": (1,),
        "encoder.final_layer_norm.weight": (4096,),
    },
    "qwen3_4b": {
        f"{LAYER}post_attention_layernorm.weight": (2560,),
        f"{LAYER}self_attn.q_norm.weight": (128,),
    },
    "mistral": {f"{LAYER}post_attention_layernorm.weight": (5120,)},
}
TYPES = {
    ("clip_l",): "stable_diffusion",
    ("clip_l", "t5xxl"): "flux",
    ("t5xxl", "clip_l"): "flux",
    ("clip_l", "clip_g"): "sdxl",
    ("clip_l", "clip_g", "t5xxl"): "sd3",
    ("t5xxl",): "sd3",
    ("qwen3_4b",): "lumina2",
    ("mistral",): "flux2",
}


@pytest.mark.parametrize("names", TYPES)
def test_the_type_is_what_they_are_used_with_most(tmp_path, names):
    paths = [header_only(tmp_path / f"{name}.safetensors", ENCODERS[name]) for name in names]
    assert encoders.type_of(paths) == TYPES[names]


def test_a_pair_of_many_uses_is_asked_about(tmp_path):
    paths = [header_only(tmp_path / f"{n}.safetensors", ENCODERS[n]) for n in ("mistral", "clip_l")]
    with pytest.raises(FileRefused, match="choose the type"):
        encoders.type_of(paths)


# ---- pictures


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen-Image-Edit's encoder in 16 and 4 bits."""
    whole = tiny_encoders.qwen_image()
    model = whole.cond_stage_model.qwen25_7b.transformer
    home = tmp_path_factory.mktemp("qwen")
    save_file(
        {k: v.clone().contiguous() for k, v in model.state_dict().items()}, home / "q.safetensors"
    )
    quantize_checkpoint(home / "q.safetensors", home / "q4.safetensors", RECIPES["w4a16"])
    return whole, tiny_encoders.qwen_image(load_file(home / "q4.safetensors"))


def test_an_edit_encoder_reads_pictures(qwen):
    whole, four = qwen
    model = four.cond_stage_model.qwen25_7b.transformer
    assert layouts.is_ours(model.get_submodule("model.layers.0.self_attn.q_proj").weight)
    plain = whole.encode_from_tokens(tokens(whole))
    assert small.db(plain, four.encode_from_tokens(tokens(four))) > 5


def test_feather_prunes_it(qwen):
    """With every token kept, bit for bit the encoder; with half of them, another conditioning."""
    _, four = qwen
    plain = four.encode_from_tokens(tokens(four))
    for keep, same in ((1.0, True), (0.5, False)):
        pruned = feather.prune(four, feather.PruneSettings((Stage(3, keep),)))
        found = pruned.encode_from_tokens(tokens(pruned))
        assert torch.equal(found, plain) is same
        assert found.isfinite().all()


# ---- the real ones, without their weights

CLASSES = {
    "Gemma 2 2B": "Gemma2_2B",
    "Gemma 3 4B": "Gemma3_4B",
    "Qwen2.5-VL 3B": "Qwen25_3B",
    "Qwen2.5-VL 7B": "Qwen25_7BVLI",
    "Qwen3 0.6B": "Qwen3_06B",
    "Qwen3 4B": "Qwen3_4B",
    "Qwen3 8B": "Qwen3_8B",
    "Llama 3.1 8B": "Llama2",
    "Mistral Small 24B": "Mistral3Small24B",
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_documents_sizes_are_of_comfyuis_layers(name):
    """Every linear and table of ComfyUI's class is in tests/support/encoder_shapes.py, as large."""
    build = getattr(comfy.text_encoders.llama, CLASSES[name])
    model = build({}, torch.float16, "meta", comfy.ops.disable_weight_init)
    built = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    ours = encoder_shapes.REAL[name]
    for key, shape in ours.items():
        if len(shape) == 2:
            assert built[key] == shape, key
    missing = {key for key, shape in built.items() if len(shape) == 2} - ours.keys()
    assert missing <= {"model.lm_head.weight"}
