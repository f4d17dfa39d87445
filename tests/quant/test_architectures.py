"""Which family a file is of, and what becomes of each layer."""

import math

import pytest

from nibble.quant.files.architectures import missing_layer, natural, plan, recognise
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes, known_shapes
from nibble.quant.svdquant.quantize import predict
from nibble.quant.svdquant.recipe import Recipe

FAST = Recipe.from_preset("fast")
FLUX = flux1_shapes(2, 3, 256, 64, 64)


def actions(shapes, recipe=FAST):
    return {layer.name: layer for layer in plan(shapes, recognise(shapes, "m"), recipe)}


def test_flux1_dev_has_its_12_billion_weights():
    assert sum(map(math.prod, known_shapes("flux1-dev").values())) == 11_901_408_320


def test_flux_layers_become_what_they_should():
    layers = actions(FLUX)
    assert {name for name, layer in layers.items() if layer.action == "keep"} == {
        "img_in",
        "txt_in",
        "time_in.in_layer",
        "time_in.out_layer",
        "vector_in.in_layer",
        "guidance_in.in_layer",
        "final_layer.linear",
    }
    assert (
        layers["double_blocks.0.img_mod.lin"].action
        == layers["single_blocks.2.modulation.lin"].action
        == "w4a16"
    )
    assert layers["double_blocks.1.txt_mlp.2"].post_gelu
    assert not layers["double_blocks.1.txt_mlp.0"].post_gelu
    # linear2 reads attention beside GELU: both signs
    assert layers["single_blocks.0.linear2"].action == "w4a4"
    assert not layers["single_blocks.0.linear2"].post_gelu


def test_a_recipe_moves_layers_but_never_those_that_detection_reads():
    layers = actions(
        FLUX,
        Recipe.from_preset(
            "fast",
            keep=["single_blocks.0.*"],
            w4a16=["*_in*", "single_blocks.1.linear1"],
            modulation="keep",
        ),
    )
    assert layers["single_blocks.0.linear1"].action == "keep"
    assert layers["single_blocks.1.linear1"].action == "w4a16"
    assert layers["double_blocks.0.img_mod.lin"].action == "keep"
    assert (
        layers["img_in"].action
        == layers["txt_in"].action
        == layers["vector_in.in_layer"].action
        == "keep"
    )
    assert layers["time_in.in_layer"].action == "w4a16"


def test_layers_that_cannot_be_grouped_or_gain_nothing_stay():
    shapes = FLUX | {
        "double_blocks.0.img_mlp.0.weight": (1024, 100),
        "double_blocks.0.img_mlp.2.weight": (16, 1024),
    }
    layers = actions(shapes)
    assert (
        layers["double_blocks.0.img_mlp.0"].why
        == "K=100 would need too many zeros for whole groups of 64"
    )
    assert "too small" in layers["double_blocks.0.img_mlp.2"].why
    narrow = {key: (shape[0], 100) if len(shape) == 2 else shape for key, shape in FLUX.items()}
    with pytest.raises(
        FileRefused,
        match=r"m has no layer that could be quantized to 4 bits \(K=100 would need too many",
    ):
        plan(narrow, recognise(narrow, "m"), FAST, "m")


def test_unsigned_activations_need_a_bias_and_the_recipes_consent():
    shapes = {key: shape for key, shape in FLUX.items() if key != "double_blocks.0.img_mlp.2.bias"}
    assert not actions(shapes)["double_blocks.0.img_mlp.2"].post_gelu
    assert not actions(FLUX, Recipe.from_preset("fast", act_unsigned=False))[
        "double_blocks.0.img_mlp.2"
    ].post_gelu


def test_projections_of_one_input_are_grouped_and_adjacent():
    block = "transformer_blocks.{}.attn."
    shapes = {"txt_norm.weight": (64,), "img_in.weight": (256, 64)}
    for i in range(11):
        shapes |= {
            f"{block.format(i)}{m}.weight": (256, 256)
            for m in ("to_q", "to_out.0", "to_k", "add_q_proj", "add_k_proj", "to_v", "add_v_proj")
        }
    layers = plan(shapes, recognise(shapes, "m"), FAST)
    groups = {
        layer.name.removeprefix(block.format(10)): layer.group
        for layer in layers
        if layer.name.startswith(block.format(10))
    }
    assert (
        groups["to_q"]
        == groups["to_k"]
        == groups["to_v"]
        != groups["add_q_proj"]
        == groups["add_v_proj"]
    )
    assert groups["to_out.0"] is None
    order = [layer.name for layer in layers if layer.group == groups["to_q"]]
    start = [layer.name for layer in layers].index(order[0])
    assert [layer.name for layer in layers[start : start + 3]] == order
    assert [layer.name for layer in layers] == [
        layer.name for layer in plan(dict(reversed(shapes.items())), recognise(shapes, "m"), FAST)
    ]


def test_block_2_comes_before_block_10():
    assert sorted(["b.10.x", "b.2.x"], key=natural) == ["b.2.x", "b.10.x"]


REFUSED = {
    "LoRA": (
        ["double_blocks.0.img_attn.qkv.lora_A.weight", "double_blocks.0.img_attn.qkv.weight"],
        "is a LoRA",
    ),
    "kohya LoRA": (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "is a LoRA"),
    "LoKr": (["single_blocks.0.linear1.lokr_w1"], "is a LoRA"),
    "VAE": (["decoder.conv_in.weight", "encoder.conv_in.weight"], "is a VAE"),
    "Wan VAE": (["decoder.conv1.weight", "encoder.conv1.weight"], "is a VAE"),
    "TAESD": (["taesd_decoder.1.weight"], "is a VAE"),
    "Qwen": (["layers.0.self_attn.q_proj.weight", "embed_tokens.weight"], "is a text encoder"),
    "CLIP": (["text_model.encoder.layers.0.mlp.fc1.weight"], "is a CLIP text encoder"),
    "CLIP vision": (["vision_model.encoder.layers.0.mlp.fc1.weight"], "is a vision encoder"),
    "ControlNet": (
        [*flux1_shapes(1, 1, 128, 64, 64), "controlnet_blocks.0.weight"],
        "is a ControlNet",
    ),
    "SDXL": (["input_blocks.0.0.weight"], "is a U-Net"),
    "diffusers FLUX": (
        ["x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"],
        "diffusers' names",
    ),
    "diffusers SD3": (
        [
            "pos_embed.proj.weight",
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.attn.to_q.weight",
        ],
        "diffusers' names",
    ),
    "diffusers Z-Image": (
        ["noise_refiner.0.attention.norm_k.weight", "layers.0.attention.to_q.weight"],
        "diffusers' names",
    ),
    "Nunchaku": (["transformer_blocks.0.qkv_proj.wscales"], "quantized already"),
    "bitsandbytes": (
        ["double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4"],
        "quantized already",
    ),
    "unknown": (
        ["some.weight", "other.weight"],
        "holds no diffusion transformer: it has no blocks",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_models_are_refused_in_one_sentence(kind):
    keys, words = REFUSED[kind]
    with pytest.raises(FileRefused, match=words) as refusal:
        recognise({key: (64, 64) for key in keys}, "my.safetensors")
    assert str(refusal.value).startswith("my.safetensors ")
    assert str(refusal.value).count(". ") <= 2


def test_the_size_of_flux1_dev_is_predicted_to_the_byte_from_shapes():
    report = predict(known_shapes("flux1-dev"), FAST, "flux1-dev")
    w4a4 = [layer for layer in report.rows if layer.action == "w4a4"]
    assert len(w4a4) == 228
    assert (
        sum(row.bytes_after for row in report.rows)
        < report.bytes_after
        < sum(row.bytes_after for row in report.rows) + 1_000_000
    )


@pytest.mark.parametrize("layer", ["double_blocks.1.img_attn.qkv", "single_blocks.2.linear2"])
def test_a_model_that_lacks_a_layer_between_others_is_refused(layer):
    shapes = dict(flux1_shapes(3, 4, 128, 64, 64))
    plan(shapes, recognise(shapes, "m"), Recipe())
    del shapes[f"{layer}.weight"]
    with pytest.raises(FileRefused, match=rf"m lacks the layer {layer}, .* download it again"):
        plan(shapes, recognise(shapes, "m"), Recipe(), "m")


def test_a_layer_that_only_the_first_or_last_blocks_have_is_not_missed():
    shapes = dict(flux1_shapes(3, 4, 128, 64, 64))
    del shapes["single_blocks.3.linear2.weight"], shapes["double_blocks.0.txt_mlp.0.weight"]
    assert plan(shapes, recognise(shapes, "m"), Recipe(), "m")
    built = ["img_in", "double_blocks.0.img_attn.proj", "single_blocks.3.linear2"]
    refusal = missing_layer(shapes, built, "m.safetensors")
    assert "m.safetensors lacks the layer single_blocks.3.linear2" in str(refusal)
    assert missing_layer(shapes, built[:2], "m.safetensors") is None


@pytest.mark.parametrize(
    "text, patch, name",
    [(2560, 128, "Mage-Flow"), (3584, 64, "Qwen-Image"), (2560, 64, "Qwen-Image")],
)
def test_mage_flow_is_told_from_qwen_image_by_its_sizes_as_comfyui_does(text, patch, name):
    shapes = {
        "txt_norm.weight": (text,),
        "img_in.weight": (3072, patch),
        "proj_out.weight": (patch, 3072),
        "transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072),
    }
    assert recognise(shapes, "m").name == name
