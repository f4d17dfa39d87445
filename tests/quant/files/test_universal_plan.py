"""A transformer of no known family is planned by the names and shapes of its weights."""

import pytest
import torch

from nibble.quant.files import universal_plan
from nibble.quant.files.architectures import GUESSED, family_name, plan, recognise
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import StateDictSource
from nibble.quant.svdquant.quantize import SVDQuantJob, predict
from nibble.quant.svdquant.recipe import Recipe

FAST = Recipe.from_preset("fast")
WIDE, DEEP = 1024, 10


def linear(name: str, n: int, k: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}


def unknown(blocks: int = DEEP) -> dict[str, tuple[int, ...]]:
    """A model of names that nobody uses."""
    shapes = linear("patch_in", WIDE, 64) | linear("time_in.0", WIDE, 256)
    shapes |= linear("shared_modulation.1", 6 * WIDE, WIDE) | linear("final.linear", 64, WIDE)
    for i in range(blocks):
        block = f"stages.{i}"
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{block}.mix.{part}", WIDE, WIDE)
        shapes |= linear(f"{block}.ff.up", 4 * WIDE, WIDE) | linear(f"{block}.ff.down", WIDE, 4096)
        shapes |= linear(f"{block}.ada.1", 6 * WIDE, WIDE) | linear(f"{block}.gate", 8, WIDE)
    for i in range(3):
        shapes |= linear(f"text_refiner.{i}.up", 4 * WIDE, WIDE)
        shapes |= linear(f"text_refiner.{i}.down", WIDE, 4 * WIDE)
    return shapes


def actions(shapes, recipe=FAST) -> dict[str, str]:
    return {layer.name: layer.action for layer in plan(shapes, recognise(shapes, "m"), recipe)}


def test_each_rule_decides_its_layers():
    found = actions(unknown())
    assert {found[f"stages.{i}.mix.to_q"] for i in range(DEEP)} == {"w4a4"}
    assert {found[f"stages.{i}.ff.down"] for i in range(1, DEEP - 1)} == {"w4a4"}
    assert found["stages.0.ff.down"] == found[f"stages.{DEEP - 1}.ff.down"] == "w4a16"
    assert found["stages.4.ada.1"] == found["shared_modulation.1"] == "w4a16"
    kept = ["patch_in", "time_in.0", "final.linear", "stages.3.gate", "text_refiner.1.up"]
    assert {found[name] for name in kept} == {"keep"}


def test_a_shallow_model_has_no_ends_to_protect():
    assert actions(unknown(4))["stages.0.ff.down"] == "w4a4"


def test_keys_and_values_share_their_input():
    shapes = unknown()
    groups = {layer.name: layer.group for layer in plan(shapes, recognise(shapes, "m"), FAST)}
    assert groups["stages.2.mix.to_k"] == groups["stages.2.mix.to_v"] is not None
    assert groups["stages.2.mix.to_q"] is None


def test_the_report_says_that_the_plan_was_guessed_and_the_user_can_change_it():
    report = predict(unknown(), FAST, "odd.safetensors")
    assert report.architecture == universal_plan.NAME
    assert report.notes == [GUESSED]
    kept = Recipe.from_preset("fast", keep=["stages.0.*"])
    assert actions(unknown(), kept)["stages.0.mix.to_q"] == "keep"


def test_a_quantized_file_of_such_a_model_has_a_name():
    assert family_name(dict.fromkeys(unknown(), (0, 0)), "m") == universal_plan.NAME


@pytest.mark.parametrize("what", ["no time", "no blocks"])
def test_what_is_no_diffusion_transformer_is_refused(what):
    shapes = unknown()
    if what == "no time":
        words = ("time", "ada", "modulation")
        shapes = {key: size for key, size in shapes.items() if not any(w in key for w in words)}
    else:
        shapes = {key: size for key, size in shapes.items() if not key.startswith(("st", "text"))}
    with pytest.raises(FileRefused, match=r"^odd holds no diffusion transformer"):
        recognise(shapes, "odd")


def test_small_layers_are_no_reason_to_quantize():
    shapes = {key: tuple(min(size, 256) for size in shape) for key, shape in unknown().items()}
    with pytest.raises(FileRefused, match=r"fewer than 1,000,000 weights"):
        plan(shapes, recognise(shapes, "m"), FAST, "m")


QWEN21 = {
    "txt_in.text_norm.weight": (3584,),
    **linear("img_in", 4096, 64),
    "modulation.1.weight": (16384, 4096),
    **{
        f"transformer_blocks.{i}.{part}.weight": shape
        for i in range(32)
        for part, shape in {
            "attn.to_q": (4096, 4096),
            "attn.to_k": (4096, 4096),
            "attn.to_v": (4096, 4096),
            "attn.to_out.0": (4096, 4096),
            "img_mlp.gate_up": (24576, 4096),
            "img_mlp.out": (4096, 12288),
        }.items()
    },
}


def test_qwen_image_2_1_is_not_taken_for_a_file_of_diffusers():
    assert recognise(QWEN21, "m").name == "Qwen-Image 2.1"
    found = actions(QWEN21)
    assert found["modulation.1"] == "w4a16"
    assert [found[f"transformer_blocks.9.{part}"] for part in ("attn.to_q", "img_mlp.out")] == [
        "w4a4",
        "w4a4",
    ]


def test_a_live_model_is_not_told_to_connect_itself(tmp_path):
    shapes = {"transformer_blocks.0.attn.to_q.weight": (2048, 1024), "time_embed.weight": (64,)}
    for i in range(3):
        shapes |= {
            f"transformer_blocks.{i}.attn.to_q.weight": (1024, 1024),
            f"transformer_blocks.{i}.attn.to_k.weight": (1024, 1024),
        }
    with pytest.raises(FileRefused, match="diffusers' names"):
        recognise(shapes, "m.safetensors")
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    source = StateDictSource(tensors)
    job = SVDQuantJob.prepare(source, tmp_path / "q.safetensors", FAST)
    assert job.architecture == universal_plan.NAME
    SVDQuantJob.prepare(source, tmp_path / "q.safetensors", FAST)
    assert source.notes.count(GUESSED) == 1
