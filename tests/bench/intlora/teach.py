"""Every arm trained on the concept, and scored merged, as it would be deployed."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.intlora.arms import ARMS, Bench, names_of
from nibble.demo import pictures
from nibble.quant.intlora import file as files
from nibble.quant.intlora import train
from nibble.quant.intlora.merge import merge, unmerged
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.weights import linears


def plain(flux, weights: dict) -> None:
    """Puts merged weights, (N, K) and bias by name, into a model as ordinary linears."""
    for name, (weight, bias) in weights.items():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight = torch.nn.Parameter(weight, False)
        layer.bias = torch.nn.Parameter(bias, False)
        linears.replace(flux, name, layer)


def teach_all(bench: Bench, save) -> list[dict]:
    """Every arm, trained and scored as it would be deployed."""
    flux = pictures.load_flux()
    rows = [{"arm": "16 bit, untrained"} | bench.score(flux)]
    kept = {name: flux.get_submodule(name) for name in names_of(flux)}
    plain(
        flux,
        {
            name: (
                IntBase.from_weight(
                    old.weight.detach(), bench.options.bits, bench.options.group
                ).weight(),
                old.bias.detach(),
            )
            for name, old in kept.items()
        },
    )
    rows.append({"arm": "4 bit, untrained"} | bench.score(flux))
    save(rows)
    for arm in bench.options.arms:
        layers, flux, losses = bench.teach(ARMS[arm])
        facts = {"train loss, last 25": float(np.mean(losses[-25:]))}
        if ARMS[arm] in ("mul", "shift", "shift_add"):
            rows.append({"arm": arm} | facts | integer_arm(bench, flux, layers))
        else:
            rows.append({"arm": arm} | facts | bench.score(flux))
        if ARMS[arm] == "qlora":
            save(rows)
            joined = {
                name: IntBase.from_weight(
                    layer.weight + layer.lora_up.detach() @ layer.lora_down.detach(),
                    bench.options.bits,
                    bench.options.group,
                )
                for name, layer in layers.items()
            }
            plain(
                flux, {name: (joined[name].weight(), layer.bias) for name, layer in layers.items()}
            )
            rows.append({"arm": "QLoRA + PTQ"} | bench.score(flux))
        save(rows)
    return rows


def integer_arm(bench: Bench, flux, layers: dict) -> dict:
    """Merges every layer into integers, checks that nothing changed, and scores the merged
    model.
    """
    adapter = train.adapter(layers, steps=bench.options.steps)
    widths, weights = set(), {}
    equal = True
    for name, layer in layers.items():
        merged = merge(layer.base, [(adapter.layers[name], 1.0)], bits=32)
        equal &= torch.equal(merged.base.weight(), unmerged(layer.base, adapter.layers[name]))
        widths.add(merged.base.bits)
        weights[name] = merged.base.weight(), layer.bias
    plain(flux, weights)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter.safetensors"
        files.save(adapter, target)
        size = target.stat().st_size
    floats = sum(2 * (layer.lora_up.numel() + layer.lora_down.numel()) for layer in layers.values())
    return {
        "merged equals unmerged": equal,
        "merged bits": sorted(widths),
        "file bytes": size,
        "bf16 LoRA bytes": floats,
    } | bench.score(flux)
