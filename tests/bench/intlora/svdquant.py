"""SHIFT-ADD on SVDQuant's W4A4 weights, folded into their 16-bit branch."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.intlora.arms import Bench, names_of, show_progress
from nibble.demo import run
from nibble.quant import diffusers as models
from nibble.quant.intlora import train
from nibble.quant.intlora.merge import branch
from nibble.quant.merge.refit import fold_into_branch
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights import linears
from nibble.quant.weights.modules import as_module


def on_svdquant(bench: Bench, save) -> None:
    """SHIFT-ADD trained beside the kernel of the demo FLUX at W4A4 (preset fast), then folded into
    the 16-bit branch: joined, and at the old rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        run.quantize(Path(folder) / "demo.safetensors", Recipe.from_preset("fast"))
        flux = models.load_quantized(Path(folder) / "demo.safetensors", torch.float32)
    rows = [{"arm": "SVDQuant W4A4, untrained"} | bench.score(flux)]
    save(rows)
    names = [
        name for name in names_of(flux) if hasattr(flux.get_submodule(name), "weight_proj_down")
    ]
    layers = train.attach(flux, names, train.AdapterOptions("shift_add", bench.options.rank))
    train.train(
        layers,
        bench.loss(flux, 0.75, bench.options.batch),
        train.Options(steps=bench.options.steps, lr=bench.options.lr),
        progress=show_progress,
    )
    rows.append({"arm": "SHIFT-ADD beside W4A4"} | bench.score(flux))
    save(rows)
    adapter = train.adapter(layers)
    for label, rank in (("joined, rank 32 + 16", None), ("cut back to rank 32", 32)):
        shares = []
        for name, layer in layers.items():
            weight = layer.inner.quantized()
            folded, share = fold_into_branch(
                weight, branch(layer.base, [(adapter.layers[name], 1.0)]), rank
            )
            linears.replace(flux, name, as_module(folded))
            shares.append(share)
        rows.append(
            {"arm": f"folded into the branch, {label}", "change kept": float(np.mean(shares))}
            | bench.score(flux)
        )
        save(rows)
