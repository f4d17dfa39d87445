"""Models with several text encoders, one of them at 4 bits: ComfyUI's own loaders and ours give the
conditioning of the numbers in the files.
"""

import folder_paths
import pytest
import torch
from comfy_extras.nodes_hidream import QuadrupleCLIPLoader
from comfy_extras.nodes_sd3 import TripleCLIPLoader
from safetensors.torch import save_file

import nodes
import several_encoders as several
import small_encoders as small
from dequantized_files import dequantized
from nibble.nodes.bridge.quantized import encoders, layouts
from nibble.nodes.text_encoders import NibbleLoadCLIP
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe


def dual(kind: str):
    return lambda *names: nodes.DualCLIPLoader().load_clip(*names, kind)[0]


# model → its encoders' files, and ComfyUI's loader of them
MODELS = {
    "flux": (("clip_l", "wide"), dual("flux")),
    "sd3": (("clip_l", "clip_g", "wide"), lambda *names: TripleCLIPLoader.execute(*names).args[0]),
    "hidream": (
        ("clip_l", "clip_g", "deep", "llama"),
        lambda *names: QuadrupleCLIPLoader.execute(*names).args[0],
    ),
}
KEPT = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """models/text_encoders with each encoder, at 4 bits (four-NAME) and with the numbers of that
    file in float32 (whole-NAME).
    """
    encoders.register()
    home = tmp_path_factory.mktemp("text_encoders")
    for path in several.write(home, "clip_l", "clip_g", "wide", "deep", "llama"):
        if path.stem not in KEPT:
            four = path.with_name(f"four-{path.name}")
            quantize_checkpoint(path, four, Recipe.from_preset("fast"))
            save_file(dequantized(four), path.with_name(f"whole-{path.name}"))
    patch = pytest.MonkeyPatch()
    patch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(home)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    yield home
    patch.undo()


def files(model: str, prefix: str) -> list[str]:
    names, _ = MODELS[model]
    return [f"{'' if name in KEPT else prefix}{name}.safetensors" for name in names]


def opened(model: str, load, prefix: str = "four-"):
    names, _ = MODELS[model]
    with several.small("deep" if "deep" in names else "wide"):
        return load(*files(model, prefix))


def ours(*names: str):
    return encoders.load(list(names))[0]


def stock(model: str):
    return MODELS[model][1]


def encoded(clip) -> dict[str, torch.Tensor]:
    found = clip.encode_from_tokens(
        clip.tokenize(several.PROMPT), return_pooled=True, return_dict=True
    )
    return {name: part for name, part in found.items() if isinstance(part, torch.Tensor)}


def ours_of(clip) -> set[str]:
    """The encoders that have layers of ours."""
    return {
        name
        for name, encoder in clip.cond_stage_model.named_children()
        if any(layouts.is_ours(getattr(module, "weight", None)) for module in encoder.modules())
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_conditioning_is_that_of_the_numbers_in_the_files(folder, model):
    expected = encoded(opened(model, stock(model), "whole-"))
    assert {"cond", "pooled_output"} <= expected.keys()
    for load in (stock(model), ours):
        clip = opened(model, load)
        found = encoded(clip)
        assert ours_of(clip) == {"t5xxl", "llama"} & ours_of(clip) != set()
        assert found.keys() == expected.keys()
        for name, part in expected.items():
            # ComfyUI hands the words of its table over in bfloat16
            assert small.db(part, found[name]) > 45, name


def test_the_node_loads_hidreams_four(folder):
    """CLIP-L and CLIP-G as they are, T5 and Llama at 4 bits."""
    output = opened("hidream", _node)
    assert ours_of(output.args[0]) == {"t5xxl", "llama"}
    summary = output.ui["nibble_chart"][0]["summary"]
    assert ["type", "hidream"] in summary
    assert sum("4-bit weights" in words for _, words in summary) == 2


def _node(*names):
    return NibbleLoadCLIP.execute(**{f"clip_name{i}": name for i, name in enumerate(names, 1)})


def test_clip_l_beside_ours_is_as_it_is_alone(folder):
    """FLUX's pooled output is CLIP-L's alone, to the bit."""
    with several.small("wide"):
        (alone,) = nodes.CLIPLoader().load_clip("clip_l.safetensors", "stable_diffusion")
    pooled = encoded(opened("flux", ours))["pooled_output"]
    assert torch.equal(pooled, encoded(alone)["pooled_output"])


def test_sd3_joins_what_each_encoder_gives(folder):
    """Tokens of CLIP-L and CLIP-G side by side and filled with zeros, then T5's."""
    found = encoded(opened("sd3", ours))
    with several.small("wide"):
        alone = {
            name: encoded(nodes.CLIPLoader().load_clip(f"{name}.safetensors", "sd3")[0])
            for name in ("clip_l", "clip_g", "four-wide")
        }
    clip, t5 = found["cond"].split([77, found["cond"].shape[1] - 77], 1)
    assert torch.equal(t5, alone["four-wide"]["cond"])
    assert torch.equal(clip[..., :64], alone["clip_l"]["cond"][..., :64])
    assert torch.equal(clip[..., 64:128], alone["clip_g"]["cond"][..., 768 : 768 + 64])
    assert not clip[..., 128:].any()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("turned", [False, True])
def test_the_type_is_chosen_by_the_files_in_any_order(folder, model, turned):
    names = files(model, "four-")
    paths = [folder / name for name in (reversed(names) if turned else names)]
    assert encoders.type_of(paths) == model


def test_the_order_of_files_does_not_matter(folder):
    names = files("flux", "four-")
    with several.small("wide"):
        one, other = (encoded(encoders.load(order)[0]) for order in (names, names[::-1]))
    assert all(torch.equal(one[name], other[name]) for name in one)
