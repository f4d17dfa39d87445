"""Training: gradients, the same integers as when merged, resuming, interrupting, checkpointing, and
every kind of base.
"""

import pytest
import torch
from torch import nn

from intlora_bases import K, N, bases, factors, normal, svdquant, w4a16
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora import train
from nibble.quant.intlora.linear import Grid, IntLoRALinear, rule_for, separated
from nibble.quant.intlora.merge import change, merge
from nibble.quant.intlora.train import AdapterOptions
from nibble.quant.intlora.variants import multiplier
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.weights.modules import as_module

every_variant = pytest.mark.parametrize("variant", ["shift_add", "mul", "shift"])


class Net(nn.Module):
    """Two blocks of linears with a residual, enough to train."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


NAMES = ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]


def problem(net):
    """generator → loss: the net is to learn a rotated output."""
    target = Net().eval()
    with torch.no_grad():
        for p in target.parameters():
            p.add_(normal(*p.shape, seed=p.numel(), size=0.05))

    def loss(generator):
        x = torch.randn(16, 64, generator=generator)
        return nn.functional.mse_loss(net(x), target(x).detach())

    return loss


def filled(layer: IntLoRALinear, size: float = 0.003) -> IntLoRALinear:
    down, up = factors(*layer.base.shape, rank=layer.lora_down.shape[0], size=size).floats()
    with torch.no_grad():
        layer.lora_down.copy_(down.T)
        layer.lora_up.copy_(up)
    return layer


@pytest.mark.parametrize("kind", list(bases()))
@every_variant
def test_the_forward_pass_is_the_merged_layer(kind, variant):
    base = bases()[kind]
    layer, x = filled(IntLoRALinear(base, rule_for(base, variant, 6), 4)), normal(5, K, size=1.0)
    merged = merge(base, [(layer.adapter(), 1.0)]).base
    wanted = base.inputs(x) @ merged.weight().T
    # float32 against float64 may turn a rounding over, here and there
    assert (layer(x) - wanted).norm() / wanted.norm() < 2e-3


@every_variant
def test_with_an_auxiliary_matrix_too(variant):
    base, rule = separated(normal(N, K, size=0.03), variant, 3, "a")
    layer, x = filled(IntLoRALinear(base, rule, 4, bias=normal(N))), normal(5, K, size=1.0)
    wanted = x @ merge(base, [(layer.adapter(), 1.0)]).base.weight().T + layer.bias
    assert (layer(x) - wanted).norm() / wanted.norm() < 2e-3


@every_variant
def test_the_base_of_an_adapter_is_made_again_from_the_weight(variant):
    weight = normal(N, K, size=0.03)
    base, rule = separated(weight, variant, 3, "a", Grid(bits=4, group=32))
    use = IntLoRALinear(base, rule, 4).adapter()
    again, _ = separated(weight, variant, 3, "a", Grid(bits=4, group=32))
    other, _ = separated(weight + 0.01, variant, 3, "a", Grid(bits=4, group=32))
    assert again.digest() == use.base
    assert other.digest() != use.base


@pytest.mark.parametrize(
    "make",
    [svdquant, lambda: svdquant(rotation=64), lambda: svdquant(act_unsigned=True), w4a16],
    ids=["svdquant", "rotated", "unsigned", "w4a16"],
)
@every_variant
def test_beside_a_quantized_layer(make, variant):
    inner = as_module(make())
    base = IntBase.of(make())
    layer, x = (
        IntLoRALinear(base, rule_for(base, variant, 6), 4, inner=inner),
        normal(5, K, size=1.0),
    )
    assert torch.equal(layer(x), inner(x))  # before training: nothing is added, not even rounding
    wanted = inner(x) + x @ change(base, [(filled(layer).adapter(), 1.0)]).T
    torch.testing.assert_close(layer(x), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", list(bases()))
def test_gradients_of_shift_add_are_those_of_an_ordinary_lora(kind):
    base = bases()[kind]
    layer = filled(IntLoRALinear(base, rule_for(base, "shift_add", 8), 4))
    x, grad = normal(5, K, size=1.0).requires_grad_(), normal(5, N, seed=4)
    layer(x).backward(grad)
    down, up = layer.adapter().factors.floats()
    up, down, raw = up.requires_grad_(), down.requires_grad_(), x.detach().clone().requires_grad_()
    weight = base.out_of(base.weight())
    (raw @ weight.T + (raw @ down) @ up.T).backward(grad)
    torch.testing.assert_close(layer.lora_up.grad, up.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(layer.lora_down.grad.T, down.grad, rtol=1e-3, atol=1e-5)
    assert (x.grad - raw.grad).norm() / raw.grad.norm() < 0.01


@pytest.mark.parametrize("kind", ["int4", "rotated", "odd"])
@pytest.mark.parametrize("variant", ["mul", "shift"])
def test_gradients_stop_where_the_integer_is_zero(kind, variant):
    """Against autograd of an additive form masked by Z != 0 (and, for SHIFT, scaled by 2^e
    / |u|).
    """
    base = bases()[kind]
    layer = filled(IntLoRALinear(base, rule_for(base, variant), 4), size=1e-5)
    x, grad = normal(5, K, size=1.0), normal(5, N, seed=4)
    layer(x).backward(grad)
    down, up = layer.adapter().factors.floats()
    up, down = up.requires_grad_(), down.requires_grad_()
    delta, z = base.into(up @ down.T), base.integers()
    slope = (z != 0).float()
    if variant == "shift":
        u = multiplier(base, delta.detach(), z).abs()
        slope *= 2 ** u.log2().round() / u
    (base.inputs(x) @ (base.weight() + delta * slope).T).backward(grad)
    torch.testing.assert_close(layer.lora_up.grad, up.grad, rtol=1e-3, atol=1e-4)


@every_variant
def test_gradients_start_as_lora_s(variant):
    layer = IntLoRALinear(bases()["int4"], rule_for(bases()["int4"], variant), 4)
    layer(normal(5, K)).sum().backward()
    assert layer.lora_down.grad.abs().max() == 0
    assert layer.lora_up.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pass_through(dtype):
    base = bases()["rotated"]
    layer, x = (
        filled(IntLoRALinear(base, rule_for(base, "shift_add"), 4)),
        normal(2, 3, K).to(dtype).requires_grad_(),
    )
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert y.shape == (2, 3, N)
    assert layer.lora_up.grad.dtype == torch.float32


@every_variant
def test_training_learns_and_the_merged_model_is_as_good(variant):
    net = Net()
    loss = problem(net)
    before = loss(torch.Generator().manual_seed(1)).item()
    layers = train.attach(net, NAMES, AdapterOptions(variant, rank=8))
    losses = train.train(layers, loss, train.Options(steps=30, lr=1e-2))
    trained = loss(torch.Generator().manual_seed(1)).item()
    assert len(losses) == 30
    assert trained < 0.75 * before
    found = train.adapter(layers, steps=30)
    train.detach(net, layers)
    for name, layer in layers.items():
        with torch.no_grad():
            net.get_submodule(name).weight.copy_(
                merge(layer.base, [(found.layers[name], 1.0)]).base.weight()
            )
    assert abs(loss(torch.Generator().manual_seed(1)).item() / trained - 1) < 0.02
    assert found.facts == {"steps": 30}


def test_attach_and_detach_leave_the_model_as_it_was():
    net, x = Net(), normal(3, 64)
    before = net(x)
    layers = train.attach(net, NAMES[:1], AdapterOptions("mul", rank=2))
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "blocks.0.0.lora_down",
        "blocks.0.0.lora_up",
    ]
    train.detach(net, layers)
    assert torch.equal(net(x), before)


def test_quantized_models_are_trained_beside_their_kernels():
    net = nn.Sequential(
        as_module(svdquant(64, 128, rotation=64)), nn.GELU(), as_module(w4a16(32, 64))
    )
    x, y = normal(16, 128, size=1.0), normal(16, 32, seed=1)
    before = nn.functional.mse_loss(net(x), y).item()
    layers = train.attach(net, ["0", "2"], AdapterOptions("shift_add", rank=4))
    assert layers["0"].inner is not None
    losses = train.train(
        layers,
        lambda generator: nn.functional.mse_loss(net(x), y),
        train.Options(steps=25, lr=1e-2),
    )
    assert losses[0] == pytest.approx(before)
    assert losses[-1] < 0.8 * before


def run(folder=None, steps=12, stop=None, checkpointed=False, **options):
    net = Net()
    layers = train.attach(net, NAMES, AdapterOptions("shift_add", rank=4))

    def progress(step, total, value):
        if step == stop:
            raise InterruptedError

    blocks = net.blocks if checkpointed else ()
    state = None if folder is None else folder / "state.safetensors"
    try:
        losses = train.train(
            layers,
            problem(net),
            train.Options(steps=steps, save_every=5, **options),
            state,
            blocks,
            progress,
        )
    except InterruptedError:
        losses = None
    return losses, [layer.lora_up.detach() for layer in layers.values()]


def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path):
    whole, wanted = run()
    assert run(tmp_path, stop=4)[0] is None
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    assert run(tmp_path, stop=9)[0] is None
    losses, found = run(tmp_path)
    assert losses == whole
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    longer, _ = run(tmp_path, steps=14)
    assert longer[:12] == whole
    assert len(longer) == 14


def test_checkpointing_changes_nothing_but_memory():
    assert run(checkpointed=True)[0] == run()[0]
    net = Net()
    layers = train.attach(net, NAMES, AdapterOptions(rank=2))
    train.train(layers, problem(net), train.Options(steps=1), checkpointed=net.blocks)
    assert not any("forward" in vars(block) for block in net.blocks)


def test_states_of_other_runs_are_refused(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(
        FileRefused, match="state.safetensors belongs to a training run with other options"
    ):
        run(tmp_path, seed=8)
    (tmp_path / "state.safetensors").write_bytes(
        (tmp_path / "state.safetensors").read_bytes()[:-10]
    )
    with pytest.raises(FileRefused, match="cut off"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run():
    layers = train.attach(Net(), NAMES, AdapterOptions(rank=2))
    with pytest.raises(ValueError, match="lower the learning rate"):
        train.train(
            layers,
            lambda generator: layers[NAMES[0]].lora_up.sum() * float("nan"),
            train.Options(steps=1),
        )


def test_wrong_options_are_refused():
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            train.Options(**wrong)
    with pytest.raises(ValueError, match="rank=65 is not between 1 and 64"):
        train.attach(Net(), NAMES, AdapterOptions(rank=65))
    with pytest.raises(ValueError, match="variant='x'"):
        train.attach(Net(), NAMES, AdapterOptions("x"))


def test_layers_follow_the_model_to_its_device(device):
    base, rule = separated(normal(N, K, size=0.03), "mul", 3, "a")
    layer = IntLoRALinear(base, rule, 4).to(device)
    assert layer.base.codes.device.type == layer.rule.u_scale.device.type == device
    layer(normal(2, K).to(device)).sum().backward()
    assert layer.lora_up.grad.isfinite().all()
