"""IntLoRA beside float LoRA and QLoRA: a new concept taught to the demo model at 4-bit weights;
conversion of an ordinary LoRA; sizes; cost.

    python tests/bench/bench_intlora.py       all of it; without `paper` about 20 minutes on a core
    python tests/bench/bench_intlora.py --parts convert cost
    python tests/bench/bench_intlora.py --parts teach --group 64 --out
    tests/bench/results/intlora-group64.json
    python tests/bench/bench_intlora.py --parts paper --steps 120
                                                   the paper's table at 4 and 8 bits, 47 minutes
                                                   on a core shared with other work

The concept (`concept.py`) is a shape and a colour that the model never saw. Every arm trains the
same linears at the same rank on the same pictures, noise and times, and is scored merged, as it
would be deployed:

    float LoRA          16-bit base, float merge
    QLoRA               4-bit base, float LoRA beside it (not merged: needs the 16-bit branch)
    QLoRA + PTQ         the same, merged and rounded to 4 bits again, as after QLoRA
    IntLoRA MUL, SHIFT  4-bit base of W - R, merged as integers (the paper's form)
    SHIFT-ADD           4-bit base of W, merged as integers

`loss` is the flow-matching loss on concept pictures, noise and times that no arm trained on; `prior
loss` the same on the world as it was. Accuracy: share of drawn pictures that show colour, shape and
place that were asked for. The demo's picture decoder never learned the new colour, so latents are
read through the linear inverse of its (closed-form, linear) encoder instead; rendered pictures of
concept and world, encoded and read so, score 1.0 (`readable`).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench.intlora import arms, conversion, cost, paper, svdquant, teach

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ["teach", "svdquant", "convert", "cost", "paper"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "intlora.json")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--arms", nargs="+", default=list(arms.ARMS), choices=list(arms.ARMS))
    for name, default in {
        "steps": 150,
        "batch": 8,
        "rank": 8,
        "bits": 4,
        "lora-bits": 8,
        "group": 0,
        "batches": 3,
        "prompts": 18,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = arms.Bench(options)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {}
    shared = {
        "torch": torch.__version__,
        **{
            k: v
            for k, v in vars(options).items()
            if k
            in ("steps", "batch", "rank", "bits", "lora_bits", "group", "lr", "batches", "prompts")
        },
    }

    def save(part: str, rows) -> None:
        facts[part] = {"options": shared, "rows": list(rows)}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        if part in ("teach", "svdquant", "paper"):
            print(
                {
                    key: round(value, 4) if isinstance(value, float) else value
                    for key, value in rows[-1].items()
                },
                flush=True,
            )

    facts["readable"] = bench.readable()
    if "teach" in options.parts:
        teach.teach_all(bench, lambda rows: save("teach", rows))
    if "svdquant" in options.parts:
        svdquant.on_svdquant(bench, lambda rows: save("svdquant", rows))
    if "convert" in options.parts:
        rows: list = []
        conversion.conversion(bench, rows)
        save("convert", rows)
    if "cost" in options.parts:
        cost.cost(bench, lambda rows: save("cost", rows))
    if "paper" in options.parts:
        paper.table(bench, lambda rows: save("paper", rows))


if __name__ == "__main__":
    main()
