from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant import diffusers as models
from nibble.quant.calibration.recorder import find_linears
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.formats import FORMATS
from published_files import METADATA, RandomFlux
from published_others import LiteFlux
from random_flux import IN_DIFFUSERS


def tiny_flux(seed: int = 0):
    torch.manual_seed(seed)
    return models.flux_transformer(**IN_DIFFUSERS).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("flux")
    source, target = folder / "tiny.safetensors", folder / "tiny-4bit.safetensors"
    save_file(
        {
            name: tensor.bfloat16().contiguous()
            for name, tensor in models.to_flux_names(tiny_flux().state_dict()).items()
        },
        source,
    )
    quantize_checkpoint(source, target, Recipe.from_preset("fast", rank=16))
    return source, target


def inputs(batch: int = 1) -> tuple:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(batch, 16, 8, 8, generator=g),
        torch.full((batch,), 0.5),
        torch.randn(batch, 4, 64, generator=g),
        torch.randn(batch, 64, generator=g),
        torch.full((batch,), 3.5),
    )


def test_flux_names_and_back_change_nothing():
    flux = tiny_flux()
    again = models.flux_transformer(models.to_flux_names(flux.state_dict()))
    assert all(
        torch.equal(a, b)
        for a, b in zip(flux.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_names_of_another_model_are_refused():
    with pytest.raises(ValueError, match="no part of a FLUX transformer"):
        models.to_flux_names({"blocks.0.attn.weight": torch.zeros(1)})


def test_a_quantized_file_draws_like_the_dense_matrices_that_it_stands_for(files):
    """Same network with each 4-bit layer's dequantized matrix: only the activations' rounding
    differs.
    """
    file = open_quantized(files[1])
    state = {name: tensor.float() for name, tensor in load_file(files[0]).items()}
    for name, facts in file.layers.items():
        weight = FORMATS[facts["format"]].from_tensors(file.layer(name), name)
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            weight.dequantize(),
            weight.effective_bias(),
        )
    with torch.no_grad():
        dense = models.velocity(models.flux_transformer(state).eval(), *inputs())
        four = models.velocity(models.load_quantized(files[1], torch.float32), *inputs())
    assert 10 * torch.log10(dense.square().sum() / (four - dense).square().sum()) > 14


def test_every_part_of_a_quantized_file_lands_in_its_place(files):
    """Each diffusers linear against the 16-bit one of that name: rows split, halves of the last
    modulation swapped.
    """
    state = {name: tensor.float() for name, tensor in load_file(files[0]).items()}
    dense, four = (
        find_linears(models.flux_transformer(state)),
        dict(models.load_quantized(files[1]).named_modules()),
    )
    for name, module in dense.items():
        found = (
            four[name].quantized().dequantize()
            if hasattr(four[name], "quantized")
            else four[name].weight.float()
        )
        assert (
            10 * torch.log10(module.weight.square().sum() / (found - module.weight).square().sum())
            > 17
        ), name


def test_saving_a_loaded_file_gives_its_tensors_back_bit_for_bit(files, tmp_path):
    target = tmp_path / "again.safetensors"
    models.save_quantized(models.load_quantized(files[1]), target, origin=files[1])
    before, after = load_file(files[1]), load_file(target)
    assert before.keys() == after.keys()
    differing = [
        name
        for name in before
        if not name.endswith("comfy_quant") and not torch.equal(before[name], after[name])
    ]
    assert not differing
    open_quantized(target).verify()
    assert open_quantized(target).layers == open_quantized(files[1]).layers


def test_a_trained_branch_is_saved(files, tmp_path):
    model = models.load_quantized(files[1], torch.float32, train=True)
    velocity = models.velocity(model, *inputs())
    velocity.square().mean().backward()
    trained = [p for p in model.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) > 8
    name = "transformer_blocks.0.ff.net.0.proj"
    with torch.no_grad():
        dict(model.named_modules())[name].get_parameter("weight_proj_up").add_(1)
    models.save_quantized(model, tmp_path / "trained.safetensors", origin=files[1])
    up = "double_blocks.0.img_mlp.0.weight_proj_up"
    difference = (
        load_file(tmp_path / "trained.safetensors")[up].float() - load_file(files[1])[up].float()
    )
    torch.testing.assert_close(difference, torch.ones_like(difference), atol=0.01, rtol=0)


def test_another_models_file_is_refused_with_where_to_load_it(files, tmp_path):
    tensors = {
        name: tensor
        for name, tensor in load_file(files[1]).items()
        if not name.startswith("vector_in")
    }
    from safetensors import safe_open

    with safe_open(files[1], "pt") as file:
        metadata = {key: text for key, text in file.metadata().items() if key != "header_checksum"}
        save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(
        FileRefused, match="none of the models that load into diffusers.*load it in ComfyUI"
    ):
        models.load_quantized(tmp_path / "other.safetensors")


def test_recorded_inputs_are_those_of_the_layers_named(files):
    state = {name: tensor.float() for name, tensor in load_file(files[0]).items()}
    names = [
        "double_blocks.0.img_attn.qkv",
        "single_blocks.0.linear2",
        "double_blocks.0.img_mod.lin",
    ]
    drawing = models.Drawing.without_data(state, 1, size=(4, 4), steps=2)
    stats = models.record_inputs(state, names, drawing)
    assert {name: s.k for name, s in stats.items()} == {names[0]: 128, names[1]: 640, names[2]: 128}
    tokens = 2 * 4  # steps x image tokens of 4 x 4 latents
    assert stats[names[0]].count == tokens
    assert stats[names[2]].count == 2


def test_every_linear_of_the_quantized_blocks_is_4_bit(files):
    model = models.load_quantized(files[1])
    left = {
        name for name, module in find_linears(model).items() if isinstance(module, torch.nn.Linear)
    }
    assert not [name for name in left if "blocks." in name]


@pytest.mark.parametrize(
    "kind", ["Nunchaku, unsigned behind GELUs", "diffusers' dialect, a smoothing each"]
)
def test_published_files_load_draw_like_our_own_and_are_saved_again(tmp_path, kind):
    lite = kind.startswith("diffusers")
    flux = LiteFlux() if lite else RandomFlux()
    published = (
        flux.lite()
        if lite
        else {name: tensor for part in flux.nunchaku() for name, tensor in part.items()}
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in published.items()},
        tmp_path / "published.safetensors",
    )
    save_file(flux.nibble(), tmp_path / "own.safetensors", METADATA)
    theirs, ours = (
        models.load_quantized(tmp_path / f"{name}.safetensors", torch.float32)
        for name in ("published", "own")
    )
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for shape in ((1, 16, 8, 8), (1, 6, 64), (1, 64))
    ]
    with torch.no_grad():
        x, tokens, pooled = inputs
        one, other = (
            models.velocity(model, x, torch.tensor([0.5]), tokens, pooled, torch.tensor([3.5]))
            for model in (theirs, ours)
        )
    assert one.isfinite().all()
    assert one.std() > 1e-3
    assert torch.equal(one, other)
    out = theirs.single_transformer_blocks[0].proj_out
    assert out.facts.get("unsigned_from", 0) == (0 if lite else 128)
    models.save_quantized(ours, tmp_path / "again.safetensors", tmp_path / "own.safetensors")
    before, after = (
        load_file(tmp_path / "own.safetensors"),
        load_file(tmp_path / "again.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], tensor)
        for name, tensor in before.items()
        if not name.endswith("comfy_quant")
    )


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_fsdp_divides_the_16_bit_layers_and_leaves_the_others_whole(files):
    """Quantized layers own buffers, which FSDP does not take; a group of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    flux = models.load_quantized(files[1], torch.float32)
    with torch.no_grad():
        alone = models.velocity(flux, *inputs())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(flux, mesh=init_device_mesh("cpu", (1,)))
        assert isinstance(flux.x_embedder.weight, DTensor)
        assert not isinstance(flux.transformer_blocks[0].attn.to_q.weight, DTensor)
        with torch.no_grad():
            divided = models.velocity(flux, *inputs())
    finally:
        dist.destroy_process_group()
    assert torch.equal(divided, alone)
