"""Heads beside a model: nothing before training, exact branches after it, no trace when taken off,
and the same again from disk.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nibble.accel.caf import adapter, heads_file
from nibble.quant.files.errors import FileRefused


class Net(nn.Module):
    """Patches of 2 x 2 of a (batch, 3, 4, 4) latent, a linear or a convolution on them, and two
    linears.
    """

    def __init__(self, convolution: bool):
        super().__init__()
        self.convolution = convolution
        if convolution:
            self.patch_embedding = nn.Conv2d(3, 8, 2, stride=2)
        else:
            self.img_in = nn.Linear(12, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6)])
        self.reached = 0

    def patches(self, x):
        return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 4, 12)

    def forward(self, x):
        x = (
            self.patch_embedding(x).flatten(2).transpose(1, 2)
            if self.convolution
            else self.img_in(self.patches(x))
        )
        self.reached += 1
        return self.blocks[1](torch.tanh(self.blocks[0](x)))


@pytest.fixture(params=[False, True], ids=["linear", "convolution"])
def net(request):
    torch.manual_seed(0)
    return Net(request.param)


NAMES = ["blocks.0", "blocks.1"]


def filled(net, rank=2):
    """An adapter that changes everything."""
    made = adapter.CAFAdapter.create(net, NAMES, rank, 1.5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


@pytest.mark.parametrize("rank", [0, 2])
def test_untrained_heads_change_no_bit(net, rank):
    x, made = torch.randn(2, 3, 4, 4), adapter.CAFAdapter.create(net, NAMES, rank, 1.5)
    plain = net(x)
    shown = adapter.presented_by(net, made.input_layer, lambda: net(torch.ones_like(x)))
    for head in (made.velocity, made.acceleration):
        with adapter.attached(net, head, made.input_layer, shown):
            assert torch.equal(net(x), plain)


@pytest.mark.parametrize("rank", [0, 2])
def test_branches_are_what_merging_them_would_be(net, rank):
    x, made = torch.randn(2, 3, 4, 4), filled(net, rank)
    with adapter.attached(net, made.velocity, made.input_layer):
        beside = net(x)
    plain = net(x)
    with torch.no_grad():
        for name, tensors in made.velocity.branches().items():
            net.get_submodule(name).weight += (
                tensors["difference"] if rank == 0 else tensors["up"] @ tensors["down"]
            )
    torch.testing.assert_close(beside, net(x))
    assert not torch.allclose(beside, plain)


def test_heads_act_at_both_ends_and_fade_between_them(net):
    """Each sample by its own noise level, whether a layer sees batch and tokens apart or as one."""
    x, made = torch.randn(4, 3, 4, 4), filled(net)
    shown = adapter.presented_by(net, made.input_layer, lambda: net(x))
    sigma = torch.tensor([1.0, 0.5, 0.25, 0.0])
    torch.testing.assert_close(adapter.share(sigma, 0.2), torch.tensor([1.0, 0.2, 0.4, 1.0]))
    with adapter.attached(net, made.acceleration, made.input_layer, shown, made.strength(sigma)):
        faded = net(x)
        flat = net.blocks[0](torch.ones(8, 8))
    with adapter.attached(net, made.acceleration, made.input_layer, shown):
        whole = net(x)
        most = net.blocks[0](torch.ones(8, 8))
    torch.testing.assert_close(faded[[0, 3]], whole[[0, 3]])
    assert torch.equal(faded[1], net(x)[1])
    assert not torch.allclose(faded[2], whole[2])
    torch.testing.assert_close(flat[[0, 1, 6, 7]], most[[0, 1, 6, 7]])
    torch.testing.assert_close(flat[2], net.blocks[0](torch.ones(8)))


def test_the_initial_velocity_is_as_more_channels_of_the_input_layer(net):
    """A layer on concatenated channels, as the paper has it, gives the same."""
    x, start, made = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), filled(net)
    shown = adapter.presented_by(net, made.input_layer, lambda: net(start))
    assert net.reached == 0, "the model is stopped at its input layer"
    seen = []
    layer = net.get_submodule(made.input_layer)
    with adapter.attached(net, made.acceleration, made.input_layer, shown):
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        net(x)
        handle.remove()
    with torch.no_grad():
        if net.convolution:
            wide = nn.functional.conv2d(
                torch.cat([x, start], 1),
                torch.cat([layer.weight, made.acceleration.extra], 1),
                layer.bias,
                stride=2,
            )
        else:
            wide = nn.functional.linear(
                torch.cat([net.patches(x), net.patches(start)], 2),
                torch.cat([layer.weight, made.acceleration.extra], 1),
                layer.bias,
            )
    torch.testing.assert_close(seen[0], wide)


def test_nothing_is_left_on_the_model_however_it_ends(net):
    x, made = torch.randn(2, 3, 4, 4), filled(net)
    before = net(x)
    with (
        pytest.raises(RuntimeError),
        adapter.attached(net, made.acceleration, made.input_layer, torch.zeros(1)),
    ):
        raise RuntimeError
    with pytest.raises(ValueError, match="without its layer"):
        adapter.presented_by(net, made.input_layer, lambda: None)
    assert torch.equal(net(x), before)
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in net.modules()
    )


def test_gradients_reach_a_head_and_not_the_model(net):
    made = filled(net)
    net.requires_grad_(False)
    shown = adapter.presented_by(net, made.input_layer, lambda: net(torch.ones(2, 3, 4, 4)))
    with adapter.attached(net, made.acceleration, made.input_layer, shown):
        net(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in made.acceleration.parameters())
    assert all(parameter.grad is None for parameter in made.velocity.parameters())


@pytest.mark.parametrize("rank", [0, 2])
def test_a_file_gives_the_same_adapter(net, tmp_path, rank):
    made = filled(net, rank)
    made.facts["steps"], made.middle = 7, 0.25
    heads_file.save_file(made, tmp_path / "a.caf.safetensors")
    read = heads_file.read_file(tmp_path / "a.caf.safetensors")
    assert (read.h, read.rank, read.input_layer, read.middle, read.facts) == (
        1.5,
        rank,
        made.input_layer,
        0.25,
        {"steps": 7},
    )
    for kind in ("velocity", "acceleration"):
        found = read.head(kind).tensors()
        assert found.keys() == made.head(kind).tensors().keys()
        assert all(
            torch.equal(found[name], tensor) for name, tensor in made.head(kind).tensors().items()
        )
    adapter.check(read, net, "a.caf.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.caf.safetensors"]


def test_a_file_that_does_not_fit_is_refused_by_name(net):
    made, other = filled(net), Net(net.convolution)
    other.blocks[1] = nn.Linear(8, 5)
    with pytest.raises(
        FileRefused,
        match=r"my\.caf changes blocks\.1 \(6 x 8\), and the connected model has 5 x 8 there",
    ):
        adapter.check(made, other, "my.caf")
    del other.blocks[1]
    with pytest.raises(FileRefused, match="no such layer"):
        adapter.check(made, other, "my.caf")
    with pytest.raises(FileRefused, match="feeds the initial velocity"):
        adapter.check(made, Net(not net.convolution), "my.caf")


def test_files_that_are_none_are_refused(net, tmp_path):
    path = tmp_path / "a.caf.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(FileRefused, match="no CAF file"):
        heads_file.read_file(path)
    heads_file.save_file(filled(net), path)
    tensors = load_file(path)
    about = {"h": 1.5, "rank": 2, "input_layer": "img_in", "middle": 0.0, "facts": {}}
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != "velocity.blocks.0.up"},
        path,
        {"format": heads_file.FORMAT, "caf": json.dumps(about)},
    )
    with pytest.raises(
        FileRefused,
        match=r"is damaged: blocks\.0 has down \(2, \d+\) at rank 2; download or train it again",
    ):
        heads_file.read_file(path)
    save_file(tensors, path, {"format": heads_file.FORMAT, "caf": "{}"})
    with pytest.raises(FileRefused, match="damaged"):
        heads_file.read_file(path)


def test_what_cannot_have_an_adapter_is_refused(net):
    with pytest.raises(ValueError, match="rank 7 is not between 0 and 6"):
        adapter.CAFAdapter.create(net, ["blocks.1"], 7, 1.5)
    with pytest.raises(ValueError, match="takes its latent in by none of"):
        adapter.input_layer(nn.Sequential(nn.Linear(2, 2)))
