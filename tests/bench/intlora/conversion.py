"""An ordinary LoRA converted to IntLoRA: how much of its change is kept."""

import numpy as np

from bench.intlora.arms import Bench
from nibble.quant.intlora.convert import ModuleChange, Options, convert
from nibble.quant.merge.integer_grid import IntBase


def conversion(bench: Bench, rows: list) -> dict:
    """An ordinary LoRA, trained on the 16-bit model, converted: share of its change kept against k,
    at several strengths.
    """
    layers, _, _ = bench.teach(None)
    bases = {name: IntBase.from_weight(layer.weight, 4, 64) for name, layer in layers.items()}
    changes = [
        ModuleChange.of_lora(name, layer.lora_up.detach(), layer.lora_down.detach())
        for name, layer in layers.items()
    ]
    found = []
    for strength in (0.1, 0.3, 1.0):
        result = convert(
            changes,
            bases,
            "the bench's LoRA",
            Options(strength=strength, ks=tuple(range(0, 13, 2))),
        )
        found.append(
            {
                "strength": strength,
                "mean |D|/|W|": float(np.mean([r.size for r in result.rows])),
                "kept": result.retention,
                "kept, worst layer": min(r.retention for r in result.rows),
                "nearest rounding keeps": float(np.mean([r.nearest for r in result.rows])),
                "k chosen": sorted({r.k for r in result.rows}),
                "merged bits": sorted({r.bits for r in result.rows}),
                "kept by k": {
                    k: float(np.mean([r.by_k[k] for r in result.rows])) for k in range(0, 13, 2)
                },
                "adapter bytes": result.adapter.nbytes,
                "bf16 LoRA bytes": sum(2 * (c.up.numel() + c.down.numel()) for c in changes),
            }
        )
        print({key: value for key, value in found[-1].items()}, flush=True)
    rows.extend(found)
