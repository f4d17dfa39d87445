"""An estimate on paper, no measurement: which bound holds a 4-bit layer back on a GPU, and how much
faster than bf16 it could be at best.

    python -m nibble bench roofline [--tokens 4608] [--out FILE] [--measured gpu.json]

Rates are NVIDIA's published dense ones (whitepapers of GA102, Ada, Blackwell RTX, A100, H100; data
sheets of the cards), at boost clock. Each bound is the time that the layer would take if that alone
limited it:

    bytes    every operand read once, every result written once, over memory bandwidth;
      quantize_down's own traffic is added
    mma      2 M N K over the matrix units' rate for what the codes become: int4, or 8 bits where
      int4 is not native
    rescale  2 float32 operations an output and group of 64 columns (times the weight's scale, then
      a multiply-add with the token's)
    issue    a warp instruction a clock and scheduler: the mma, the rescale, and the loads of
      fragments and scales
    branch   2 M R (K + N) in bf16, for the low-rank part

The units work side by side, so the product takes at least the largest of mma + branch, rescale,
issue and bytes; quantize_down comes before it. bf16 is held to its own two bounds in the same way,
so both sides are ideal and the ratio is a ceiling, not a promise.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

SHAPES = [(3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072)]


@dataclass(frozen=True)
class Gpu:
    """Published figures. TFLOP/s and TOP/s are dense; bf16 adds in float32. `unit`: what the codes
    are multiplied as.
    """

    name: str
    multiprocessors: int
    ghz: float
    gb_s: float
    bf16: float
    codes: float
    unit: str
    lanes: int  # float32 multiply-adds a clock and multiprocessor
    # columns of one warp-wide m16n8 instruction; wgmma is counted in the same pieces
    mma_k: int = 64

    @property
    def clocks(self) -> float:
        """Clocks a second of all multiprocessors."""
        return self.multiprocessors * self.ghz * 1e9


GPUS = [
    Gpu("RTX 3060", 28, 1.777, 360, 25.5, 203.8, "int4", 128),
    Gpu("RTX 4070", 46, 2.475, 504, 58.3, 466.3, "int4", 128),
    Gpu("RTX 4090", 128, 2.52, 1008, 165.2, 1321.2, "int4", 128),
    Gpu("RTX 5090", 170, 2.407, 1792, 209.5, 838.0, "int8", 128, mma_k=32),
    Gpu("A100", 108, 1.41, 2039, 312.0, 1248.0, "int4", 64),
    Gpu("H100", 132, 1.83, 3350, 989.4, 1978.9, "e4m3 (wgmma)", 128, mma_k=0),
]


def bounds(gpu: Gpu, m: int, k: int, n: int, rank: int = 32) -> dict[str, float]:
    """Milliseconds of each bound of one layer."""
    wide = 1 if gpu.unit.startswith("e4m3") else 0.5  # bytes that a code takes between the two ops
    product_bytes = (
        wide * m * k
        + 4 * m * k / 64
        + n * k / 2
        + 2 * n * k / 64
        + 2 * m * n
        + 4 * m * rank
        + 2 * n * rank
    )
    quantize_bytes = 2 * m * k + wide * m * k + 4 * m * k / 64 + 4 * m * rank + 2 * k * rank
    rescale = 2 * m * n * k / 64
    # wgmma is issued once for a warp group: its slots are next to nothing
    pieces = m * n / (16 * 8) * (k / gpu.mma_k if gpu.mma_k else 0)
    # A warp's tile of 64 x 64: 8 loads of fragments and as many of scales for its 32 instructions
    # over 64 columns.
    issued = pieces * (1 + 0.5 * 32 / 64) + rescale / 32
    return {
        "quantize": quantize_bytes / gpu.gb_s / 1e6,
        "bytes": product_bytes / gpu.gb_s / 1e6,
        "mma": 2e-9 * m * n * k / gpu.codes,
        "branch": 2e-9 * m * rank * (k + n) / gpu.bf16,
        "rescale": rescale / (gpu.lanes * gpu.clocks) * 1e3,
        "issue": issued / (4 * gpu.clocks) * 1e3,
    }


def layer(gpu: Gpu, m: int, k: int, n: int, rank: int = 32) -> dict:
    """Bounds of one layer, the one that binds the product, and the best possible ratio to bf16."""
    times = bounds(gpu, m, k, n, rank)
    product = {
        "mma": times["mma"] + times["branch"],
        **{name: times[name] for name in ("rescale", "issue", "bytes")},
    }
    binding = max(product, key=product.get)
    ours = product[binding] + times["quantize"]
    dense = max(2e-9 * m * n * k / gpu.bf16, 2 * (m * k + n * k + m * n) / gpu.gb_s / 1e6)
    return {
        "K": k,
        "N": n,
        "M": m,
        "bounds_ms": times,
        "binds": binding,
        "ms": ours,
        "bf16_ms": dense,
        "times_as_fast": dense / ours,
    }


def table(tokens: int) -> list[dict]:
    """One entry a GPU: its layers, and the geometric mean of their ratios."""
    found = []
    for gpu in GPUS:
        rows = [layer(gpu, tokens, k, n) for k, n in SHAPES]
        mean = exp(sum(log(row["times_as_fast"]) for row in rows) / len(rows))
        found.append(
            {"gpu": gpu.name, "unit": gpu.unit, "times_as_fast_at_best": mean, "layers": rows}
        )
    return found


def print_table(entries: list[dict], measured: dict[tuple, float]) -> None:
    for entry in entries:
        print(
            f"\n{entry['gpu']} ({entry['unit']}): at best {entry['times_as_fast_at_best']:.2f} x"
            " bf16, geometric mean   [estimate]"
        )
        print(
            f"  {'layer':>13}{'quantize':>10}{'bytes':>8}{'mma':>8}{'branch':>8}{'rescale':>9}"
            f"{'issue':>8}  {'binds':8}{'ms':>7}{'bf16':>8}{'ratio':>7}"
        )
        for row in entry["layers"]:
            t = row["bounds_ms"]
            seen = measured.get((entry["gpu"], row["M"], row["K"], row["N"]))
            print(
                f"  {row['K']:>6}x{row['N']:<6}{t['quantize']:10.3f}{t['bytes']:8.3f}"
                f"{t['mma']:8.3f}{t['branch']:8.3f}{t['rescale']:9.3f}{t['issue']:8.3f} "
                f" {row['binds']:8}{row['ms']:7.3f}{row['bf16_ms']:8.3f}{row['times_as_fast']:7.2f}"
                + (
                    f"   measured {seen:.3f} ms, {100 * row['ms'] / seen:.0f} % of the bound"
                    if seen
                    else ""
                )
            )


def read_measured(path: Path | None) -> dict[tuple, float]:
    """(GPU's short name, M, K, N) -> milliseconds, from bench_gpu.py's file."""
    if path is None:
        return {}
    whole = json.loads(path.read_text(encoding="utf-8"))
    full = whole["environment"].get("gpu", "")
    name = next((gpu.name for gpu in GPUS if gpu.name in full), full)
    return {
        (name, row["M"], row["K"], row["N"]): row["ms"]
        for row in whole.get("layers", {}).get("rows", [])
        if "ms" in row
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "results" / "roofline.json"
    )
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument(
        "--measured", type=Path, help="a file of bench_gpu.py, to set beside the estimate"
    )
    options = parser.parse_args()
    entries = table(options.tokens)
    options.out.write_text(
        json.dumps(
            {"estimate": True, "tokens": options.tokens, "rank": 32, "gpus": entries}, indent=1
        )
        + "\n",
        encoding="utf-8",
    )
    print_table(entries, read_measured(options.measured))


if __name__ == "__main__":
    main()
