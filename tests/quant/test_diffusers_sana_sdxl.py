"""SANA and SDXL's U-Net under diffusers' names: quantized by a file and while they load, loaded,
saved and loaded again.
"""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

import nibble
from compare import assert_same_state
from nibble.quant.files import unet_names
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused

diffusers = pytest.importorskip("diffusers")

from nibble.quant.diffusers import by_config  # noqa: E402
from nibble.quant.weights.base import StoredLinear  # noqa: E402

OPTIONS = {"rank": 16, "solver": "svd", "seed": 3}
CLASSES = {"sana": "SanaTransformer2DModel", "sdxl": "UNet2DConditionModel"}
PLACES = {"sana": "transformer", "sdxl": "unet"}
needs_accelerate = pytest.mark.skipif(
    not importlib.util.find_spec("accelerate"),
    reason="diffusers loads quantized models with accelerate alone",
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(kind: str):
    """A tiny random one in float32."""
    torch.manual_seed(0)
    if kind == "sana":
        model = diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=32,
            num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=64,
            cross_attention_dim=128, caption_channels=64, sample_size=8,
        )  # fmt: skip
    else:
        model = diffusers.UNet2DConditionModel(
            sample_size=8, block_out_channels=(64, 128), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64,
            transformer_layers_per_block=1, attention_head_dim=(1, 2), norm_num_groups=8,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64 + 48, use_linear_projection=True,
        )  # fmt: skip
    return model.eval()


@torch.no_grad()
def called(kind: str, model) -> torch.Tensor:
    x, words, t = normal(2, 4, 8, 8), normal(2, 5, 64, seed=1), torch.tensor([500, 20])
    if kind == "sana":
        return model(x, words, t).sample
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    added = {"text_embeds": normal(2, 64, seed=2), "time_ids": sizes}
    return model(x, t, words, added_cond_kwargs=added).sample


def decibels(exact: torch.Tensor, other: torch.Tensor) -> float:
    return (10 * torch.log10(exact.square().sum() / (other - exact).square().sum())).item()


@pytest.fixture(scope="module", params=["sana", "sdxl"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    """A pipeline's folder, and the file that the command line makes of it."""
    folder = tmp_path_factory.mktemp(kind)
    built(kind).save_pretrained(folder / "16bit" / PLACES[kind])
    nibble.quantize(folder / "16bit", folder / "q.safetensors", quiet=True, **OPTIONS)
    return folder


def quantized(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, StoredLinear)}


def test_a_folder_of_diffusers_is_quantized_and_loaded(kind, folder):
    open_quantized(folder / "q.safetensors").verify()
    model = nibble.load(folder / "q.safetensors", torch.float32)
    assert type(model).__name__ == CLASSES[kind]
    assert decibels(called(kind, built(kind)), called(kind, model)) > 14


def test_the_linears_of_blocks_are_quantized_and_what_reads_few_tokens_is_not(kind, folder):
    model = built(kind)
    layers = quantized(nibble.load(folder / "q.safetensors", torch.float32))
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    }
    if kind == "sana":
        # two of three convolutions of a feed-forward are of 1 x 1
        one_by_one = {
            f"transformer_blocks.{i}.ff.conv_{name}"
            for i in range(2)
            for name in ("inverted", "point")
        }
        assert layers == linears | one_by_one
    else:
        first = {f"{name}.transformer_blocks.0.attn2.to_k" for name in _attentions(model)}
        assert layers == linears - first
        assert first <= linears


def _attentions(model) -> set[str]:
    return {
        name.partition(".transformer_blocks")[0]
        for name, _ in model.named_modules()
        if ".transformer_blocks" in name
    }


def test_what_was_not_quantized_is_the_models_own(kind, folder):
    model, exact = nibble.load(folder / "q.safetensors", torch.float32), built(kind).state_dict()
    kept = {name for name in exact if name.rpartition(".")[0] not in quantized(model)}
    state = model.state_dict()
    assert all(torch.equal(state[name], exact[name]) for name in kept)


def test_codewords_do_too(kind, folder, tmp_path):
    target = tmp_path / "vq.safetensors"
    nibble.quantize(folder / "16bit", target, method="vq", bits=3, quiet=True)
    model = nibble.load(target, torch.float32)
    assert decibels(called(kind, built(kind)), called(kind, model)) > 10


# of the file, what reads one input has one smoothing, which a loader cannot see
SHARED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "attn2.to_v")


@needs_accelerate
def test_a_model_quantized_while_it_loads_is_that_of_the_file(kind, folder):
    made = nibble.load(folder / "q.safetensors", torch.float32)
    model = getattr(diffusers, CLASSES[kind]).from_pretrained(
        folder / "16bit" / PLACES[kind],
        quantization_config=nibble.NibbleConfig(**OPTIONS),
        torch_dtype=torch.float32,
    )
    assert quantized(model) == quantized(made)

    def alone(model) -> dict:
        state = model.state_dict().items()
        return {key: t for key, t in state if not key.rpartition(".")[0].endswith(SHARED)}

    assert_same_state(alone(model), alone(made))
    assert decibels(called(kind, built(kind)), called(kind, model)) > 14


@needs_accelerate
def test_a_saved_model_is_loaded_as_it_was(kind, folder, tmp_path):
    made = nibble.load(folder / "q.safetensors", torch.float32)
    made.save_pretrained(tmp_path)
    again = getattr(diffusers, CLASSES[kind]).from_pretrained(tmp_path, torch_dtype=torch.float32)
    assert_same_state(dict(made.state_dict()), dict(again.state_dict()))
    assert torch.equal(called(kind, again), called(kind, made))
    again.dequantize()
    assert not quantized(again)
    assert decibels(called(kind, built(kind)), called(kind, again)) > 14


def test_kept_convolutions_of_1_by_1_stay_convolutions(tmp_path):
    built("sana").save_pretrained(tmp_path / "transformer")
    target = tmp_path / "q.safetensors"
    nibble.quantize(tmp_path, target, quiet=True, keep=["transformer_blocks.0.ff.*"], **OPTIONS)
    model = nibble.load(target, torch.float32)
    kept = model.transformer_blocks[0].ff.conv_inverted
    assert isinstance(kept, torch.nn.Conv2d)
    assert torch.equal(kept.weight, built("sana").transformer_blocks[0].ff.conv_inverted.weight)
    assert isinstance(model.transformer_blocks[1].ff.conv_inverted, StoredLinear)


def test_an_sdxl_file_has_comfyuis_names_and_is_that_of_the_single_file(tmp_path):
    model = built("sdxl")
    model.save_pretrained(tmp_path / "unet")
    state = model.state_dict()
    names = unet_names.to_comfyui(state)
    save_file(
        {names[name]: tensor.contiguous() for name, tensor in state.items()},
        tmp_path / "single.safetensors",
    )
    of_folder, of_file = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    nibble.quantize(tmp_path / "unet", of_folder, quiet=True, **OPTIONS)
    nibble.quantize(tmp_path / "single.safetensors", of_file, quiet=True, **OPTIONS)
    one, other = load_file(of_folder), load_file(of_file)
    assert "input_blocks.3.1.transformer_blocks.0.attn1.to_q.weight" in one
    assert_same_state(one, other)


def test_an_sdxl_of_a_single_file_is_built_as_the_published_one():
    """Shapes alone: 2.6 billion weights are not made here."""
    with torch.device("meta"):
        config = {k: v for k, v in by_config._SDXL.items() if not k.startswith("_")}
        model = diffusers.UNet2DConditionModel(**config)
    assert sum(tensor.numel() for tensor in model.parameters()) == 2_567_463_684
    state = model.state_dict()
    names = unet_names.to_comfyui(state)
    assert len(set(names.values())) == len(names)
    shapes = {ours: tuple(state[theirs].shape) for theirs, ours in names.items()}
    assert shapes["label_emb.0.0.weight"] == (1280, 2816)
    assert shapes["input_blocks.8.1.transformer_blocks.9.ff.net.2.weight"] == (1280, 5120)
    assert shapes["output_blocks.2.2.conv.weight"] == (1280, 1280, 3, 3)
    assert shapes["output_blocks.5.2.conv.weight"] == (640, 640, 3, 3)
    assert shapes["input_blocks.6.0.op.weight"] == (640, 640, 3, 3)


def test_a_u_net_that_is_no_sdxl_is_refused(tmp_path):
    small = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8)
    small |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"))
    small |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=64)
    diffusers.UNet2DConditionModel(**small).save_pretrained(tmp_path / "unet")
    with pytest.raises(FileRefused, match="SDXL's can be quantized"):
        nibble.quantize(tmp_path, tmp_path / "q.safetensors", quiet=True)


def test_calibration_outside_comfyui_is_refused_for_both_with_the_way_out(kind, folder, tmp_path):
    way = "use --preset fast$" if kind == "sana" else "or the node VQ Quantize Checkpoint"
    with pytest.raises(ValueError, match=way):
        nibble.quantize(
            folder / "16bit", tmp_path / "q.safetensors", method="vq", preset="best", quiet=True
        )
