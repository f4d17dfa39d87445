"""IntLoRA as an artist meets it, in a real ComfyUI: convert, apply, stack, merge, merge and save,
and the sentences for what cannot be.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_server import Refused
from demo_graphs import FLUX, WEIGHTS, Graph, psnr
from demo_loras import OTHER, SEED, STYLE, style


@pytest.fixture(scope="module")
def loras(server) -> dict[str, str]:
    """Two ordinary LoRAs, and the IntLoRAs made of them through the node: name → name."""
    made = {}
    for name, seed in ((STYLE, 5), (OTHER, 9)):
        save_file(style(seed), server.folder("loras") / name)
    for name in (STYLE, OTHER):
        made[name] = name.removesuffix(".safetensors") + ".intlora.safetensors"
    return made


@pytest.fixture(scope="module")
def converted(server, quantized, loras) -> dict[str, str]:
    for name in loras:
        graph = Graph()
        convert(graph, graph.load(quantized), name)
        server.run(graph.nodes)
    return loras


def convert(graph: Graph, model: str, lora: str, **changes) -> str:
    defaults = dict(lora_name=lora, target_error=0.02, filename="", overwrite=False, k=-1)
    return graph.add("NibbleConvertIntLoRA", model=[model, 0], **(defaults | changes))


def applied(graph: Graph, model: str, *uses: tuple) -> str:
    """uses: (IntLoRA, strength, mode) each."""
    for name, strength, mode in uses:
        model = graph.add(
            "NibbleApplyIntLoRA", model=[model, 0], intlora_name=name, strength=strength, mode=mode
        )
    return model


def drawn(server, graph: Graph, model: str) -> np.ndarray:
    saved = graph.save(graph.sample(model, graph.prompt(), seed=SEED))
    return server.picture(server.run(graph.nodes)[saved])


def picture(server, model: str, *uses: tuple) -> np.ndarray:
    graph = Graph()
    return drawn(server, graph, applied(graph, graph.load(model), *uses))


def with_stock(server, model: str, name: str, strength: float = 1.0) -> np.ndarray:
    graph = Graph()
    return drawn(
        server,
        graph,
        graph.add(
            "LoraLoaderModelOnly",
            model=[graph.load(model), 0],
            lora_name=name,
            strength_model=strength,
        ),
    )


@pytest.fixture(scope="module")
def base(server, quantized) -> np.ndarray:
    return picture(server, quantized)


@pytest.fixture(scope="module")
def styled(server, quantized, converted) -> np.ndarray:
    return picture(server, quantized, (converted[STYLE], 1.0, "branch"))


def test_the_converter_draws_what_each_layer_keeps_and_its_file_is_listed(
    server, quantized, loras, graph
):
    node = convert(graph, graph.load(quantized), STYLE, filename="drawn")
    chart = server.run(graph.nodes)[node]["nibble_chart"][0]
    assert chart["kind"] == "kept"
    assert len(chart["rows"]) == 5
    assert {row["action"] for row in chart["rows"]} == {"w4a4", "w4a16"}
    assert all(row["kept"] > 0.975 and 0 <= row["nearest"] < row["kept"] for row in chart["rows"])

    def options(kind, name):
        spec = server.get(f"/object_info/{kind}")[kind]["input"]["required"][name]
        return spec[1]["options"] if spec[0] == "COMBO" else spec[0]

    assert "drawn.intlora.safetensors" in options("NibbleApplyIntLoRA", "intlora_name")
    assert "drawn.intlora.safetensors" not in options("LoraLoaderModelOnly", "lora_name"), (
        "the stock loader would do nothing with it"
    )
    assert STYLE in options("LoraLoaderModelOnly", "lora_name")
    assert STYLE not in options("NibbleApplyIntLoRA", "intlora_name")


def test_an_intlora_does_what_its_lora_does(server, quantized, styled, base):
    stock = with_stock(server, quantized, STYLE)
    assert psnr(stock, base) < 26
    assert psnr(styled, stock) > psnr(stock, base) + 6


def test_converting_and_applying_in_one_graph(server, quantized, loras, graph, styled):
    model = graph.load(quantized)
    name = convert(graph, model, STYLE, filename="linked", overwrite=True)
    patched = graph.add(
        "NibbleApplyIntLoRA", model=[model, 0], intlora_name=[name, 0], strength=1.0, mode="branch"
    )
    assert np.array_equal(drawn(server, graph, patched), styled)


@pytest.mark.parametrize("mode", ["branch", "merge"])
def test_at_strength_zero_and_taken_off_the_picture_is_the_base_s_bit_for_bit(
    server, quantized, converted, base, mode
):
    assert np.array_equal(picture(server, quantized, (converted[STYLE], 0.0, mode)), base)
    assert not np.array_equal(picture(server, quantized, (converted[STYLE], 1.0, mode)), base)
    assert np.array_equal(picture(server, quantized), base)


def test_merged_it_is_close_to_the_branch_and_says_what_it_kept(
    server, quantized, converted, styled, base, graph
):
    model = applied(graph, graph.load(quantized), (converted[STYLE], 1.0, "merge"))
    # another picture, so that the node is run here
    saved = graph.save(graph.sample(model, graph.prompt(), seed=SEED + 1000))
    chart = server.run(graph.nodes)[model]["nibble_chart"][0]
    assert chart["kind"] == "kept"
    assert all(0.2 < row["kept"] <= 1 for row in chart["rows"])
    assert saved
    merged = picture(server, quantized, (converted[STYLE], 1.0, "merge"))
    assert psnr(merged, styled) > psnr(base, styled) + 4


def test_two_add_up_whatever_the_order_and_the_mode(server, quantized, converted, styled):
    one, two = (converted[STYLE], 0.6, "branch"), (converted[OTHER], 0.4, "branch")
    both = picture(server, quantized, one, two)
    assert psnr(both, picture(server, quantized, two, one)) > 40
    assert psnr(both, styled) < 35
    merged = picture(server, quantized, (*one[:2], "merge"), (*two[:2], "merge"))
    assert np.array_equal(
        merged, picture(server, quantized, (*two[:2], "merge"), (*one[:2], "merge"))
    )
    mixed = picture(server, quantized, (*one[:2], "merge"), two)
    assert min(psnr(merged, both), psnr(mixed, both)) > psnr(styled, both)


@pytest.mark.parametrize("how", ["wider", "same size"])
def test_a_saved_merge_is_loaded_and_draws_the_same_picture(
    server, quantized, converted, styled, graph, how
):
    before = (server.folder("diffusion_models") / quantized).read_bytes()
    model = applied(graph, graph.load(quantized), (converted[STYLE], 1.0, "branch"))
    name = f"merged-{how.replace(' ', '-')}"
    merge = graph.add(
        "NibbleMergeIntLoRA", model=[model, 0], filename=name, branch=how, overwrite=False
    )
    loaded = graph.add(
        "NibbleLoadSVDQuant", model_name=[merge, 0], verify=True, compute_dtype="default"
    )
    saved = graph.save(graph.sample(loaded, graph.prompt(), seed=SEED))
    outputs = server.run(graph.nodes)
    chart = outputs[merge]["nibble_chart"][0]
    assert chart["kind"] == "kept"
    assert chart["title"] == f"{name}.safetensors"
    assert psnr(server.picture(outputs[saved]), styled) > (34 if how == "wider" else 24)
    assert (server.folder("diffusion_models") / quantized).read_bytes() == before
    if how == "same size":
        in_memory = picture(server, quantized, (converted[STYLE], 1.0, "merge"))
        assert psnr(server.picture(outputs[saved]), in_memory) > 40


def test_a_stock_lora_is_merged_and_saved_too(server, quantized, loras, graph):
    model = graph.add(
        "LoraLoaderModelOnly", model=[graph.load(quantized), 0], lora_name=STYLE, strength_model=1.0
    )
    merge = graph.add(
        "NibbleMergeIntLoRA",
        model=[model, 0],
        filename="merged-stock",
        branch="wider",
        overwrite=False,
    )
    loaded = graph.add(
        "NibbleLoadSVDQuant", model_name=[merge, 0], verify=True, compute_dtype="default"
    )
    assert psnr(drawn(server, graph, loaded), with_stock(server, quantized, STYLE)) > 34


# ---- refused, over HTTP


def said(server, graph: Graph, words: str) -> None:
    with pytest.raises(Refused, match=words) as refusal:
        server.run(graph.nodes)
    assert "\n" not in str(refusal.value).strip()
    assert server.get("/system_stats")


def wrong(server, kind: str, good: str) -> str:
    """A file of the IntLoRA folder that cannot be applied."""
    folder, name = server.folder("intlora"), f"wrong-{kind}.intlora.safetensors"
    data = (folder / good).read_bytes()
    if kind == "truncated":
        (folder / name).write_bytes(data[:-100])
    elif kind == "flipped":
        (folder / name).write_bytes(data[:-9] + bytes([data[-9] ^ 0x40]) + data[-8:])
    elif kind == "ordinary":
        save_file(style(5), folder / name)
    else:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header["__metadata__"]["intlora_version"] = "9"
        text = json.dumps(header).encode()
        (folder / name).write_bytes(
            len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]
        )
    return name


@pytest.mark.parametrize("mode", ["branch", "merge"])
@pytest.mark.parametrize(
    "kind, words",
    [
        ("truncated", "cut off"),
        ("flipped", "checksum"),
        ("ordinary", "is an ordinary LoRA; use Load LoRA"),
        ("newer", "update Nibble"),
    ],
)
def test_a_wrong_adapter_is_refused_in_words(
    server, quantized, converted, graph, kind, words, mode
):
    name = wrong(server, kind, converted[STYLE])
    graph.save(
        graph.sample(applied(graph, graph.load(quantized), (name, 1.0, mode)), graph.prompt())
    )
    said(server, graph, words)


def test_another_4_bit_file_and_a_16_bit_model_are_refused(server, quantized, converted, graph):
    server.run(Graph().quantize(filename="intlora-other-file", rank=16).nodes)
    for model, words in (
        ("intlora-other-file.safetensors", "was made for another 4-bit file"),
        (FLUX, "is in 16 bits and has no integers"),
    ):
        for mode in ("branch", "merge"):
            graph = Graph()
            graph.save(
                graph.sample(
                    applied(graph, graph.load(model), (converted[STYLE], 1.0, mode)), graph.prompt()
                )
            )
            said(server, graph, words)


def lora(server, name: str, tensors: dict) -> str:
    save_file(tensors, server.folder("loras") / name)
    return name


def test_loras_that_cannot_be_converted_are_refused_in_words(server, quantized, loras):
    mlp, (n, k) = (
        "lora_unet_double_blocks_0_img_mlp_0",
        load_file(WEIGHTS / "diffusion_models" / FLUX)["double_blocks.0.img_mlp.0.weight"].shape,
    )
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    cases = {
        "sdxl": (
            {
                f"{sdxl}.lora_up.weight": torch.ones(640, 4),
                f"{sdxl}.lora_down.weight": torch.ones(4, 640),
            },
            "made for another model",
        ),
        "wide": (
            {
                f"{mlp}.lora_up.weight": torch.ones(640, 4),
                f"{mlp}.lora_down.weight": torch.ones(4, 640),
            },
            "made for another model",
        ),
        "rank0": (
            {
                f"{mlp}.lora_up.weight": torch.ones(n, 0),
                f"{mlp}.lora_down.weight": torch.ones(0, k),
            },
            "rank 0",
        ),
        "nan": (
            {
                f"{mlp}.lora_up.weight": torch.full((n, 4), torch.nan),
                f"{mlp}.lora_down.weight": torch.ones(4, k),
            },
            "not finite",
        ),
        "large": (
            {
                f"{mlp}.lora_up.weight": torch.ones(n, 4) * 1e4,
                f"{mlp}.lora_down.weight": torch.ones(4, k),
            },
            "does not fit int16",
        ),
    }
    for kind, (tensors, words) in cases.items():
        graph = Graph()
        convert(graph, graph.load(quantized), lora(server, f"{kind}.safetensors", tensors), k=8)
        said(server, graph, words)
        assert not (server.folder("intlora") / f"{kind}.intlora.safetensors").exists()
    graph = Graph()
    convert(graph, graph.load(FLUX), STYLE, filename="never")
    said(server, graph, "is in 16 bits and has no integers")


def test_what_cannot_be_saved_is_refused_in_words(server, quantized, converted):
    def merged(**changes):
        graph = Graph()
        model = applied(
            graph, graph.load(quantized), *changes.pop("uses", [(converted[STYLE], 0.5, "branch")])
        )
        graph.add(
            "NibbleMergeIntLoRA",
            model=[model, 0],
            **({"filename": "never", "branch": "wider", "overwrite": True} | changes),
        )
        return graph

    said(server, merged(uses=[]), "has no LoRA on it, so there is nothing to merge")
    said(server, merged(filename=quantized), "is the file that would be read")
    said(server, merged(filename=FLUX), "was not made by Nibble")
    said(server, merged(filename="../../escaped"), "leads out of the folder")
    assert not list(server.folder("diffusion_models").glob("never*"))
