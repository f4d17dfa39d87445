"""The IntLoRA paper's table in small, at 4 and at 8 bits: everyone merged, as it would be deployed.

    float LoRA            16 bits
    QLoRA + PTQ           a 16-bit LoRA beside the low-bit base, merged and rounded again
    QA-LoRA               a LoRA on sums of groups of inputs, merged into the groups' zeros (Xu et
                          al., ICLR 2024); its base has a scale for each 32 weights, the others' one
                          for each row
    IntLoRA MUL, SHIFT    the paper's form: the base of W - R, R matched in variance with exponent
                          1.5 (`Grid.of_paper`, which is *Train IntLoRA*'s *round to nearest*)
    the same, odd         on a grid without zeros, where every weight can change; at 4 bits, where a
                          fifth of the others' integers are zero
    SHIFT-ADD             the base of W

The paper has 8-bit activations too; here they stay floats.
"""

from dataclasses import replace

import torch

from bench.intlora.arms import Bench, names_of
from bench.intlora.teach import integer_arm, plain
from nibble.demo import pictures
from nibble.quant.intlora import train
from nibble.quant.intlora.linear import Grid
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.weights import linears

BITS = (4, 8)
GROUP = 32
INTEGER_ARMS = {
    "IntLoRA MUL": ("mul", False),
    "IntLoRA SHIFT": ("shift", False),
    "IntLoRA MUL, odd": ("mul", True),
    "IntLoRA SHIFT, odd": ("shift", True),
    "SHIFT-ADD": ("shift_add", False),
}


class QALoRA(torch.nn.Module):
    """x W^T + b + (sums of groups of x down^T) up^T: a change that is the same within a group, and
    so one of the groups' zeros.
    """

    def __init__(self, base: IntBase, bias: torch.Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight(), bias
        self.out_features, self.in_features = base.shape
        groups = len(base.scale)
        drawn = torch.rand(rank, groups, generator=generator) * 2 - 1
        self.lora_down = torch.nn.Parameter(drawn / self.in_features**0.5)
        self.lora_up = torch.nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        sums = x.unflatten(-1, (-1, self.base.group)).sum(-1)
        return (
            torch.nn.functional.linear(x, self.weight, self.bias)
            + (sums @ self.lora_down.T) @ self.lora_up.T
        )

    def merged(self) -> torch.Tensor:
        """The weight of the base with its new zeros."""
        zeros = (self.lora_up @ self.lora_down).T.detach()
        return replace(self.base, zeros=zeros).weight()


def table(bench: Bench, save) -> None:
    """Every arm at both widths, one row after another."""
    rows: list[dict] = []

    def add(bits: int, arm: str, facts: dict) -> None:
        rows.append({"bits": bits, "arm": arm} | facts)
        save(rows)

    add(16, "untrained", bench.score(pictures.load_flux()))
    _, flux, _ = bench.teach(None)
    add(16, "float LoRA", bench.score(flux))
    for bits in BITS:
        bench.options.bits, bench.options.group = bits, 0
        add(bits, "untrained", bench.score(_untrained(bits)))
        layers, flux, _ = bench.teach("qlora")
        add(bits, "QLoRA, not merged", bench.score(flux))
        plain(flux, _rounded_again(layers, bits))
        add(bits, "QLoRA + PTQ", bench.score(flux))
        layers, flux = _qa_lora(bench, bits)
        plain(flux, {name: (layer.merged(), layer.bias) for name, layer in layers.items()})
        add(bits, "QA-LoRA", bench.score(flux))
        for arm, (variant, odd) in INTEGER_ARMS.items():
            if odd and bits != 4:
                continue
            flux = pictures.load_flux()
            options = train.AdapterOptions(
                variant, bench.options.rank, grid=replace(Grid.of_paper(bits), odd=odd)
            )
            layers = train.attach(flux, names_of(flux), options)
            bench.learn(flux, layers)
            add(bits, arm, integer_arm(bench, flux, layers))


def _untrained(bits: int) -> torch.nn.Module:
    flux = pictures.load_flux()
    weights = {}
    for name in names_of(flux):
        old = flux.get_submodule(name)
        weights[name] = (
            IntBase.from_weight(old.weight.detach(), bits, 0).weight(),
            old.bias.detach(),
        )
    plain(flux, weights)
    return flux


def _rounded_again(layers: dict, bits: int) -> dict:
    joined = {
        name: layer.weight + layer.lora_up.detach() @ layer.lora_down.detach()
        for name, layer in layers.items()
    }
    return {
        name: (IntBase.from_weight(weight, bits, 0).weight(), layers[name].bias)
        for name, weight in joined.items()
    }


def _qa_lora(bench: Bench, bits: int) -> tuple[dict, torch.nn.Module]:
    flux, layers = pictures.load_flux(), {}
    flux.requires_grad_(False)
    for i, name in enumerate(names_of(flux)):
        old = flux.get_submodule(name)
        base = IntBase.from_weight(old.weight.detach(), bits, GROUP)
        generator = torch.Generator().manual_seed(i)
        layers[name] = QALoRA(base, old.bias.detach(), bench.options.rank, generator)
        linears.replace(flux, name, layers[name])
    bench.learn(flux, layers)
    return layers, flux
