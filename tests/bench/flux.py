"""FLUX.1's transformer for timing, its linears made by whoever measures: one module a layer under
Black Forest Labs' names and shapes.

Needs torch alone, and nothing has to be downloaded: weights are random. test_flux.py compares it
with diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention, silu

MakeLinear = Callable[[str, int, int], nn.Module]
"""(name, inputs, outputs) -> a module (..., inputs) -> (..., outputs)."""
MakeMlp = Callable[[str, int, int], nn.Module]
"""(name, hidden, inner) -> linear, GELU (tanh), linear; for those who fuse them."""


@dataclass(frozen=True)
class Config:
    """FLUX.1 dev."""

    double: int = 19
    single: int = 38
    hidden: int = 3072
    heads: int = 24
    channels: int = 64
    context: int = 4096
    vector: int = 768
    axes: tuple[int, int, int] = (16, 56, 56)


def rope_table(ids: Tensor, axes: tuple[int, ...], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head/2) of positions (tokens, 3)."""
    angles = [
        ids[:, i, None].double()
        * theta ** (-torch.arange(0, dim, 2, device=ids.device).double() / dim)
        for i, dim in enumerate(axes)
    ]
    table = torch.cat(angles, -1)
    return table.cos().float(), table.sin().float()


def turn(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates neighbouring pairs of (..., tokens, head) by their angles."""
    cos, sin = table
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def waves(t: Tensor, size: int = 256) -> Tensor:
    """Sinusoidal embedding of 1000 t: (batch,) -> (batch, size)."""
    angles = (
        1000
        * t.float()[:, None]
        * 10000.0 ** (-torch.arange(size // 2, device=t.device) / (size // 2))
    )
    return torch.cat([angles.cos(), angles.sin()], -1)


class Scale(nn.Module):
    """RMS norm with a learned scale."""

    def __init__(self, size: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.scale, eps=1e-6)


class Norms(nn.Module):
    """RMS norms of queries and keys."""

    def __init__(self, size: int):
        super().__init__()
        self.query_norm, self.key_norm = Scale(size), Scale(size)

    def forward(self, qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, tokens, 3 * hidden) -> normed q, normed k, v, each (batch, heads, tokens,
        head).
        """
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, layer_norm(x, (x.shape[-1],), eps=1e-6), 1 + scale)


def attend(q: Tensor, k: Tensor, v: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    return (
        scaled_dot_product_attention(turn(q, table), turn(k, table), v).transpose(1, 2).flatten(2)
    )


class Stream(nn.Module):
    """One half of a double block: the picture's or the text's own weights."""

    def __init__(self, name: str, c: Config, linear: MakeLinear, mlp: MakeMlp):
        super().__init__()
        self.mod = nn.ModuleDict({"lin": linear(f"{name}_mod.lin", c.hidden, 6 * c.hidden)})
        self.attn = nn.ModuleDict(
            {
                "qkv": linear(f"{name}_attn.qkv", c.hidden, 3 * c.hidden),
                "norm": Norms(c.hidden // c.heads),
                "proj": linear(f"{name}_attn.proj", c.hidden, c.hidden),
            }
        )
        self.mlp = mlp(f"{name}_mlp", c.hidden, 4 * c.hidden)

    def before(self, x: Tensor, vector: Tensor, heads: int) -> tuple:
        """(q, k, v) and the rest of the modulation."""
        shift, scale, *rest = self.mod["lin"](vector)[:, None].chunk(6, -1)
        return self.attn["norm"](self.attn["qkv"](modulated(x, shift, scale)), heads), rest

    def after(self, x: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        gate, shift, scale, gate2 = rest
        x = torch.addcmul(x, gate, self.attn["proj"](attended))
        return torch.addcmul(x, gate2, self.mlp(modulated(x, shift, scale)))


class Double(nn.Module):
    def __init__(self, name: str, c: Config, linear: MakeLinear, mlp: MakeMlp):
        super().__init__()
        self.img, self.txt, self.heads = (
            Stream(f"{name}.img", c, linear, mlp),
            Stream(f"{name}.txt", c, linear, mlp),
            c.heads,
        )

    def forward(self, img: Tensor, txt: Tensor, vector: Tensor, table) -> tuple[Tensor, Tensor]:
        ours, rest = self.img.before(img, vector, self.heads)
        theirs, rest_of_text = self.txt.before(txt, vector, self.heads)
        words = txt.shape[1]
        attended = attend(*(torch.cat([a, b], 2) for a, b in zip(theirs, ours, strict=True)), table)
        return self.img.after(img, attended[:, words:], rest), self.txt.after(
            txt, attended[:, :words], rest_of_text
        )


class Single(nn.Module):
    def __init__(self, name: str, c: Config, linear: MakeLinear):
        super().__init__()
        self.modulation = nn.ModuleDict(
            {"lin": linear(f"{name}.modulation.lin", c.hidden, 3 * c.hidden)}
        )
        self.linear1 = linear(f"{name}.linear1", c.hidden, 7 * c.hidden)
        self.linear2 = linear(f"{name}.linear2", 5 * c.hidden, c.hidden)
        self.norm, self.heads, self.hidden = Norms(c.hidden // c.heads), c.heads, c.hidden

    def forward(self, x: Tensor, vector: Tensor, table) -> Tensor:
        shift, scale, gate = self.modulation["lin"](vector)[:, None].chunk(3, -1)
        qkv, inner = self.linear1(modulated(x, shift, scale)).split(
            [3 * self.hidden, 4 * self.hidden], -1
        )
        attended = attend(*self.norm(qkv, self.heads), table)
        inner = torch.nn.functional.gelu(inner, approximate="tanh")
        return torch.addcmul(x, gate, self.linear2(torch.cat([attended, inner], -1)))


class Embedder(nn.Module):
    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(silu(self.in_layer(x)))


def plain_linear(name: str, inputs: int, outputs: int) -> nn.Module:
    return nn.Linear(inputs, outputs)


def chained_mlp(linear: MakeLinear) -> MakeMlp:
    """Two linears with a GELU between."""
    return lambda name, hidden, inner: nn.Sequential(
        linear(f"{name}.0", hidden, inner), nn.GELU("tanh"), linear(f"{name}.2", inner, hidden)
    )


class Flux(nn.Module):
    """forward(img (B, P, channels), txt (B, T, context), t (B,), vector (B, vector), guidance (B,),
    positions (T + P, 3)) -> (B, P, channels).
    """

    def __init__(
        self,
        config: Config = Config(),
        linear: MakeLinear = plain_linear,
        mlp: MakeMlp | None = None,
    ):
        super().__init__()
        c, mlp = config, mlp or chained_mlp(linear)
        self.img_in, self.txt_in = nn.Linear(c.channels, c.hidden), nn.Linear(c.context, c.hidden)
        self.time_in, self.guidance_in = Embedder(256, c.hidden), Embedder(256, c.hidden)
        self.vector_in = Embedder(c.vector, c.hidden)
        self.double_blocks = nn.ModuleList(
            Double(f"double_blocks.{i}", c, linear, mlp) for i in range(c.double)
        )
        self.single_blocks = nn.ModuleList(
            Single(f"single_blocks.{i}", c, linear) for i in range(c.single)
        )
        self.final_layer = nn.ModuleDict(
            {
                "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(c.hidden, 2 * c.hidden)),
                "linear": nn.Linear(c.hidden, c.channels),
            }
        )
        self.config = c

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        t: Tensor,
        vector: Tensor,
        guidance: Tensor,
        positions: Tensor,
    ) -> Tensor:
        dtype, words = img.dtype, txt.shape[1]
        vector = (
            self.time_in(waves(t).to(dtype))
            + self.guidance_in(waves(guidance).to(dtype))
            + self.vector_in(vector)
        )
        img, txt, table, excited = (
            self.img_in(img),
            self.txt_in(txt),
            rope_table(positions, self.config.axes),
            silu(vector),
        )
        for block in self.double_blocks:
            img, txt = block(img, txt, excited, table)
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = block(x, excited, table)
        shift, scale = self.final_layer["adaLN_modulation"](vector)[:, None].chunk(2, -1)
        return self.final_layer["linear"](modulated(x[:, words:], shift, scale))

    def flux_state(self) -> dict[str, Tensor]:
        """The state dict under Black Forest Labs' names: a double block's streams are joined by an
        underscore there.
        """
        return {
            name.replace(".img.", ".img_").replace(".txt.", ".txt_"): tensor
            for name, tensor in self.state_dict().items()
        }


def inputs(
    config: Config, picture: int, words: int, device: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    """Arguments of `Flux.forward` for a square picture of picture x picture tokens."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    grid = torch.cartesian_prod(
        torch.zeros(1), torch.arange(picture).float(), torch.arange(picture).float()
    )
    positions = torch.cat([torch.zeros(words, 3), grid]).to(device)
    return (
        normal(1, picture * picture, config.channels),
        normal(1, words, config.context),
        torch.full((1,), 0.7, device=device),
        normal(1, config.vector),
        torch.full((1,), 3.5, device=device),
        positions,
    )
