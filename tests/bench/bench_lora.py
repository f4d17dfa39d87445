"""What a LoRA on a 4-bit model costs and keeps: per added rank, when it is put on, and in the
picture, beside routes that quantize again.

    python tests/bench/bench_lora.py                          all of it, about 6 minutes on one
      core; needs ComfyUI at COMFYUI_PATH
    python tests/bench/bench_lora.py --parts rank             the kernels alone, without ComfyUI

rank      4-bit linears of FLUX.1's shapes, rank 32, with 16 to 128 more columns in their branch,
  beside two thin products of torch after the layer.
          Processor time of calls that take turns, the least of the rounds.
switch    two blocks of FLUX.1 in its own shapes with random 4-bit weights inside ComfyUI: putting a
  LoRA of rank 16 on every linear, changing its
          strength, taking it off; from its own factors (as a sampler loads it) and from the
          difference of whole weights (as anything else does). Seconds for all of FLUX.1 dev are
          extrapolated by the number of blocks.
picture   a LoRA trained here on the demo model, in 16 bit, to draw a shape and a colour that it
  never saw (`concept.py`). Pictures against the
          16-bit model with it merged; `change`: signal to noise of what the LoRA does to each
          weight, where a route rounds it; `share`: how much of the change is kept; `effect`: how
          much of what the LoRA does to the 16-bit picture it does to the route's own picture
          without it, and `effect db`: how closely, so that no route is charged with its base's own
          errors. The requantizing routes are ComfyUI's own: dequantize, add,
          `requantize_from_float(scale="recalculate", stochastic_rounding)`, with comfy-kitchen's
          layouts; their activations stay in 16 bit here, which favours them.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_in_process
from bench import machine
from bench.lora import picture, rank, switch

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ["rank", "switch", "picture"]
COMFYUI_PARTS = {"switch": switch.switch, "picture": picture.picture}


def has_comfyui() -> bool:
    """Starts ComfyUI's library, on the CPU; says aloud where there is none."""
    if not comfyui_in_process.COMFYUI:
        print("COMFYUI_PATH is not set: the parts that need ComfyUI did NOT run")
        return False
    comfyui_in_process.start()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "lora.json")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", nargs="+", default=list(rank.SHAPES), choices=list(rank.SHAPES))
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="where the demo model is quantized to, once"
    )
    for name, default in {
        "tokens": 256,
        "rounds": 7,
        "hidden": 3072,
        "steps": 150,
        "prompts": 9,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    with_comfyui = bool(set(options.parts) - {"rank"}) and has_comfyui()
    for part in options.parts:
        if part == "rank":
            found = rank.ranks(options)
        elif with_comfyui:
            found = COMFYUI_PARTS[part](options)
        else:
            continue
        facts[part] = {"environment": machine.describe_cpu()} | found
        options.out.write_text(
            json.dumps(
                facts, indent=1, default=lambda value: None if math.isnan(value) else str(value)
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
