"""A toy DiT with the shapes of a real one, trained for seconds on patterns of low dimension: its
inputs are as correlated as real ones are.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from nibble.quant.calibration.teacher import Teacher
from nibble.quant.files.architectures import LayerPlan
from nibble.quant.vq4dit.calibrate import BlockCalibrator, learn
from nibble.quant.vq4dit.fit import fit
from nibble.quant.vq4dit.recipe import Recipe
from nibble.quant.vq4dit.student import HardVQLinear, SoftVQLinear
from nibble.quant.vq4dit.trajectory import record

WIDTH, TOKENS, CHANNELS, CLASSES = 64, 8, 16, 4


class Block(nn.Module):
    """Attention and MLP, modulated."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.mod = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        a, b, gate, c, d, gate2 = self.mod(nn.functional.silu(vec))[:, None].chunk(6, -1)
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in self.qkv(self.norm(x) * (1 + a) + b).chunk(3, -1)
        )
        x = x + gate * self.proj(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return x + gate2 * self.fc2(nn.functional.gelu(self.fc1(self.norm(x) * (1 + c) + d)))


class ToyDiT(nn.Module):
    """Velocity of x (batch, TOKENS, CHANNELS) at time t (batch,) for class labels (batch,)."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.x_in, self.classes, self.t_in = (
            nn.Linear(CHANNELS, WIDTH),
            nn.Embedding(CLASSES, WIDTH),
            nn.Linear(16, WIDTH),
        )
        self.positions = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.final_layer = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, *, t: Tensor, label: Tensor) -> Tensor:
        angles = t[:, None] * 2.0 ** torch.arange(8)
        vec = self.t_in(torch.cat([angles.sin(), angles.cos()], -1)) + self.classes(label)
        x = self.x_in(x) + self.positions
        for block in self.blocks:
            x = block(x, vec)
        return self.final_layer(x)


LAYERS = [f"blocks.{i}.{name}" for i in range(3) for name in ("qkv", "proj", "fc1", "fc2", "mod")]


@lru_cache(maxsize=1)
def trained() -> ToyDiT:
    """The same toy in every test: flow matching towards a few waves for each class."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ToyDiT()
        waves = torch.randn(CLASSES, 3, TOKENS, CHANNELS)
        optimizer = torch.optim.Adam(model.parameters(), 2e-3)
        for _ in range(120):
            label = torch.randint(CLASSES, (32,))
            data = (waves[label] * torch.randn(32, 3, 1, 1)).sum(1)
            t, noise = torch.rand(32), torch.randn(32, TOKENS, CHANNELS)
            x = data.lerp(noise, t[:, None, None])
            loss = (model(x, t=t, label=label) - (noise - data)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def drawing(model: nn.Module, batch: int = 24, steps: int = 6, seed: int = 0):
    """A sampler: Euler from noise, random classes, the same each time."""

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, label = (
            torch.randn(batch, TOKENS, CHANNELS, generator=generator),
            torch.randint(CLASSES, (batch,), generator=generator),
        )
        for step in range(steps):
            x = x - model(x, t=torch.full((batch,), 1 - step / steps), label=label) / steps
        return x

    return run


def teacher(**changes) -> Teacher:
    return Teacher(trained(), drawing(trained()), **changes)


@torch.inference_mode(False)
def quantized(recipe: Recipe, layers=tuple(LAYERS), watch=lambda *_: None) -> nn.Module:
    """A student whose layers were calibrated block by block; leaves inference mode for it, as the
    pipeline does.
    """
    calibrator = BlockCalibrator(teacher(), layers)
    for block, names in calibrator.blocks.items():
        inputs, stats = calibrator.inputs(block)
        targets, students = calibrator.targets(block, inputs), {}
        for name in names:
            linear = calibrator.teacher.model.get_submodule(name)
            how = recipe.layer_options(recipe.layout(tuple(linear.weight.shape)))
            fitted = fit(
                linear.weight,
                linear.bias,
                stats[name] if how.turns else None,
                how,
                torch.Generator().manual_seed(len(name)),
            )
            soft = recipe.preset == "vq4dit" and recipe.candidates > 1
            students[name] = (
                SoftVQLinear(fitted, linear.weight, recipe.candidates)
                if soft
                else HardVQLinear(fitted)
            )
            calibrator.install(name, students[name])
        if recipe.steps:
            learn(calibrator.student.get_submodule(block), students, targets, recipe, 0, watch)
    return calibrator.student


def error(student: nn.Module) -> float:
    """Noise in the velocity over its power, along another trajectory of the teacher than the
    student learned from.
    """
    model = trained()
    calls = record(model, drawing(model, batch=48, seed=1))
    with torch.no_grad():
        pairs = [
            (model(*call.args, **call.kwargs), student(*call.args, **call.kwargs)) for call in calls
        ]
    return sum((a - b).square().sum().item() for a, b in pairs) / sum(
        a.square().sum().item() for a, _ in pairs
    )


def planned(name: str, n: int, k: int) -> LayerPlan:
    return LayerPlan(name, "vq", "test", k, n, True)
