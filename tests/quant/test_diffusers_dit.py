"""A class-conditional DiT in scripts: quantized to codewords, loaded into diffusers again, and
sampled.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

from nibble.quant.diffusers import dit_source, dit_teacher, load_quantized  # noqa: E402
from nibble.quant.files.checkpoint import open_quantized  # noqa: E402
from nibble.quant.files.errors import FileRefused  # noqa: E402
from nibble.quant.files.integrity import HEADER_SUM  # noqa: E402
from nibble.quant.job.measurement import Measurement  # noqa: E402
from nibble.quant.vq4dit.quantize import quantize_checkpoint  # noqa: E402
from nibble.quant.vq4dit.recipe import Recipe  # noqa: E402
from nibble.quant.weights.vq import VQLinear  # noqa: E402

LABELS = 10


@pytest.fixture(scope="module")
def dit():
    """A random DiT of two blocks, 128 wide, on latents of 4 x 8 x 8."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=LABELS,
    )
    # a trained model's modulation is not near zero, as a fresh one's is
    for name, parameter in model.named_parameters():
        if name.endswith("norm1.linear.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def quantized(dit, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "dit-vq3.safetensors"
    quantize_checkpoint(dit_source(dit), path, Recipe.from_preset("fast", bits=3))
    return path


def scheduler():
    return diffusers.DDIMScheduler(num_train_timesteps=1000)


@torch.no_grad()
def sample(model, steps: int = 4, guidance: float = 2.0) -> torch.Tensor:
    """A latent by DDIM with classifier-free guidance."""
    ddim = scheduler()
    ddim.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([3, LABELS])
    for t in ddim.timesteps:
        out = model(torch.cat([x, x]), timestep=t.expand(2), class_labels=labels).sample[:, :4]
        asked, free = out.chunk(2)
        x = ddim.step(free + guidance * (asked - free), t, x).prev_sample
    return x


def decibels(exact: torch.Tensor, other: torch.Tensor) -> float:
    return (10 * torch.log10(exact.square().sum() / (other - exact).square().sum())).item()


def test_a_dit_is_quantized_loaded_and_sampled(dit, quantized):
    open_quantized(quantized).verify()
    model = load_quantized(quantized, torch.float32)
    assert type(model) is type(dit)
    layers = {name for name, module in model.named_modules() if isinstance(module, VQLinear)}
    assert layers == set(open_quantized(quantized).layers)
    assert {name.partition(".")[0] for name in layers} == {"transformer_blocks"}
    exact, sampled = sample(dit), sample(model)
    assert sampled.isfinite().all()
    assert decibels(exact, sampled) > 9


def test_what_was_not_quantized_is_the_dits_own(dit, quantized):
    model, file = load_quantized(quantized, torch.float32), open_quantized(quantized)
    state = dit.state_dict()
    kept = [name for name in file.units if name not in file.layers]
    assert kept
    for name in kept:
        assert torch.equal(model.get_parameter(name), state[name]), name


def test_each_layer_is_close_to_its_matrix(dit, quantized):
    model = load_quantized(quantized, torch.float32)
    for name in open_quantized(quantized).layers:
        exact = dit.get_submodule(name).weight
        assert decibels(exact, model.get_submodule(name).quantized().dequantize()) > 12, name


def test_a_dit_is_calibrated_on_its_own_sampling(dit, tmp_path):
    """VQ4DiT's recipe, on random classes."""
    teacher = dit_teacher(dit, scheduler(), pictures=2, steps=2, batch=2)
    path = tmp_path / "calibrated.safetensors"
    recipe = Recipe.from_preset("vq4dit", bits=3, steps=2)
    quantize_checkpoint(dit_source(dit), path, recipe, Measurement(teacher=teacher))
    assert decibels(sample(dit), sample(load_quantized(path, torch.float32))) > 7


def test_its_biases_can_be_trained(quantized):
    model = load_quantized(quantized, torch.float32, train=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    out = model(x, timestep=torch.tensor([500]), class_labels=torch.tensor([1])).sample
    out.square().mean().backward()
    bias = model.transformer_blocks[0].attn1.to_q.bias
    assert bias.grad is not None
    assert bias.grad.abs().sum() > 0


def test_a_file_that_does_not_fit_its_config_is_refused(quantized, tmp_path):
    metadata = open_quantized(quantized).metadata
    del metadata[HEADER_SUM]
    config = json.loads(metadata["config"]) | {"num_layers": 1}
    path = tmp_path / "other.safetensors"
    tensors = load_file(quantized)
    save_file(tensors, path, metadata | {"config": json.dumps(config)})
    with pytest.raises(FileRefused, match="does not fit its model: transformer_blocks.1"):
        load_quantized(path)
    tensors.pop("proj_out_1.bias")
    save_file(tensors, path, metadata)
    with pytest.raises(FileRefused, match="proj_out_1.bias is missing"):
        load_quantized(path)
