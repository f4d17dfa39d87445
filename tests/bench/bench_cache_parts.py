"""SmoothCache inside a step, on FLUX: blocks, against attention and MLPs apart, at equal work.

    COMFYUI_PATH=/path/to/ComfyUI python tests/bench/bench_cache_parts.py

The demo model, prompts and noise of bench_cache.py, the line through the last results. Work: the
weights of the matrices that each token is multiplied by, in double blocks and single ones, as a
share of all; what modulates is left out, as it runs once a step. "without attention": what a
calibration from before attention could be reused gives.
"""

import argparse
import copy
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_in_process
from bench.cache import drawing, methods

ALPHAS = (0.02, 0.03, 0.04, 0.055, 0.07, 0.1, 0.15, 0.2)
RESULTS = Path(__file__).resolve().parent / "results"


def shares(network) -> dict[str, float]:
    """kind → its share of the work."""

    def size(*modules) -> int:
        return sum(
            weight.numel()
            for module in modules
            for name, weight in module.named_parameters()
            if weight.ndim == 2 and "mod" not in name
        )

    doubles, singles = network.double_blocks, network.single_blocks
    sizes = {
        "double": size(*doubles),
        "single": size(*singles),
        "double.attn": sum(size(block.img_attn, block.txt_attn) for block in doubles),
        "double.img_mlp": sum(size(block.img_mlp) for block in doubles),
        "double.txt_mlp": sum(size(block.txt_mlp) for block in doubles),
    }
    whole = sizes["double"] + sizes["single"]
    return {kind: found / whole for kind, found in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "cache-parts.json")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--calibration-prompts", type=int, default=6)
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    options = parser.parse_args()
    if not options.comfyui:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder: the bench draws with its samplers.")
    comfyui_in_process.start(options.comfyui)
    import torch

    from nibble.nodes.bridge.caching.apply import apply_smoothcache
    from nibble.nodes.bridge.caching.settings import SmoothCacheSettings

    torch.set_num_threads(1)
    measured = drawing.scenes(drawing.PROMPT_SEED, options.prompts)
    fitted = drawing.scenes(drawing.CALIBRATION_SEED, options.calibration_prompts, measured)
    bench = drawing.Bench(drawing.load("16-bit", Path()), "16-bit", measured)
    calibration = methods.calibrate(bench, fitted)
    older = copy.deepcopy(calibration)
    del older.curves["double.attn"]
    share = shares(bench.model.model.diffusion_model)

    def measure(method: str, depth: str, alpha: float, given) -> None:
        seen = []
        settings = SmoothCacheSettings(alpha, depth, order=1)
        patched = apply_smoothcache(bench.model, settings, given, watch=seen.append)

        def work() -> float:
            rows = seen[-1].rows
            return sum(share[kind] * sum(row.values()) / len(row) for kind, row in rows.items())

        bench.measure(method, alpha, patched, work=work)
        bench.rows[-1]["computed"] = {k: sum(row.values()) for k, row in seen[-1].rows.items()}

    for alpha in ALPHAS:
        measure("blocks", "block", alpha, calibration)
        measure("attention and MLPs", "sublayer", alpha, calibration)
        measure("without attention", "sublayer", alpha, older)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "steps": drawing.STEPS,
        "torch": torch.__version__,
        "shares": share,
        "prompts": measured,
        "calibration_prompts": fitted,
        "rows": bench.rows,
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
