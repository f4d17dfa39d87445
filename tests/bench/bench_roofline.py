"""An estimate by arithmetic, no measurement: which bound holds a 4-bit layer back on a GPU, and how
much faster than bf16 it could be at best.

    python -m nibble bench roofline [--tokens 4608] [--out FILE] [--measured gpu.json]

Rates are NVIDIA's published dense ones (whitepapers of GA102, Ada, Blackwell RTX, A100, H100; data
sheets of the cards), at boost clock. Each bound is the time that the layer would take if that alone
limited it:

    bytes    every operand read once, every result written once, over memory bandwidth;
      quantize_down's own traffic is added
    mma      2 M N K over the matrix units' rate for what the codes become: int4, or 8 bits where
      int4 is not native
    outer    on Hopper the product of both scales is a rank-one product in tf32, half as long as the
      codes' own
    rescale  2 float32 operations an output and group of 64 columns (times the weight's scale, then
      a multiply-add with the token's)
    issue    a warp instruction a clock and scheduler, as many as the machine code has
    branch   2 M R (K + N) in bf16, for the low-rank part
    l2       both operands of every tile, over the bandwidth of the second-level cache; where that
      is known

The units work side by side, so the product takes at least the largest of mma + outer + branch,
rescale, issue, l2 and bytes; quantize_down comes before it. bf16 is held to its own two bounds in
the same way, so both sides are ideal and the ratio is a ceiling, not a promise.

No GPU reaches its published rate in every unit: `reachable` is the same ratio with the best rates
that others have measured in the place of the published ones, where somebody has (`Measured`). Of
each tile it is told what it asks of the second-level cache while the matrix units run at full rate.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from math import exp, log
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401 - makes `nibble` importable
from nibble.kernels.backends.cubins import plans

SHAPES = [(3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072)]


@dataclass(frozen=True)
class Measured:
    """TOP/s of codes and TFLOP/s of bf16 that somebody measured; bf16 None: the published one."""

    codes: float
    bf16: float | None
    source: str


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
    # warp instructions for 64 x 64 outputs and a group of 64 columns, counted in the machine code
    slots: int = 363
    measured: Measured | None = None
    l2_gb_s: float | None = None

    @property
    def wgmma(self) -> bool:
        return self.unit.startswith("e4m3")

    @property
    def clocks(self) -> float:
        """Clocks a second of all multiprocessors."""
        return self.multiprocessors * self.ghz * 1e9


LEARN_CUDA = "github.com/gau-nernst/learn-cuda, 02_matmul_sm120: products of 8192, at 400 W"
MMAPEAK = "github.com/hjc4869/mmapeak, pull request 5: mma.sync alone"
NVL = "mma.sync alone on an H100 NVL, by mmapeak; bf16 of cuBLAS on an H200"
DEEP_GEMM = "fp8 of github.com/deepseek-ai/DeepGEMM on an H800; bf16 of cuBLAS on an H200"
GPUS = [
    Gpu("RTX 3060", 28, 1.777, 360, 25.5, 203.8, "int4", 128),
    Gpu("RTX 4070", 46, 2.475, 504, 58.3, 466.3, "int4", 128),
    Gpu(
        "RTX 4080", 76, 2.505, 717, 97.5, 779.8, "int4", 128,
        measured=Measured(679, None, MMAPEAK),
    ),
    Gpu("RTX 4090", 128, 2.52, 1008, 165.2, 1321.2, "int4", 128),
    Gpu(
        "RTX 5090", 170, 2.407, 1792, 209.5, 838.0, "int8", 128, 730,
        measured=Measured(485.8, 201.0, LEARN_CUDA),
    ),
    Gpu("A100", 108, 1.41, 2039, 312.0, 1248.0, "int4", 64, l2_gb_s=5120 * 1.41),
    Gpu(
        "H100", 132, 1.83, 3350, 989.4, 1978.9, "e4m3 (wgmma)", 128, 268,
        measured=Measured(1550, 790, DEEP_GEMM),
    ),
    Gpu(
        "H200", 132, 1.83, 4800, 989.4, 1978.9, "e4m3 (wgmma)", 128, 268,
        measured=Measured(1550, 790, DEEP_GEMM),
    ),
    Gpu(
        "H200, by mma.sync", 132, 1.83, 4800, 989.4, 1978.9, "int8", 128, 610,
        measured=Measured(1410, 790, NVL),
    ),
]  # fmt: skip
"""The A100's cache delivers 5120 bytes a clock (its whitepaper)."""
MMA_TILES = ((32, 128), (64, 128), (128, 128), (256, 128))
WGMMA_TILES = ((64, 128), (128, 128), (128, 256))
"""(tokens, weight rows); 256 tokens by mma.sync are among the kernels with int4 alone."""


# ---- the second-level cache ----------------------------------------------------------------------


def group_bytes(gpu: Gpu, tile: tuple[int, int]) -> int:
    """Bytes that a tile reads for a group of 64 columns: codes and scales of both sides."""
    tokens, rows = tile
    return tokens * (64 if gpu.wgmma else 32) + rows * 32 + 4 * tokens + 2 * rows


def wanted(gpu: Gpu, tile: tuple[int, int]) -> dict[str, float]:
    """What a tile asks of the second-level cache while the matrix units run at their published
    rate: bytes a clock of each multiprocessor, and GB/s of all.
    """
    tokens, rows = tile
    a_clock = gpu.codes * 1e12 / gpu.clocks
    took = 2 * tokens * rows * 64 / a_clock * (1.5 if gpu.wgmma else 1)
    asked = group_bytes(gpu, tile) / took
    return {"bytes_a_clock": asked, "gb_s": asked * gpu.clocks / 1e9}


def chosen_tile(gpu: Gpu, m: int, n: int) -> tuple[int, int]:
    """(tokens, weight rows) of the tile that a layer gets."""
    if gpu.wgmma:
        blocks, tokens = plans.hopper_tile(m, n, gpu.multiprocessors)
        return tokens, 128 * blocks
    mma = "Int4" if gpu.unit == "int4" else "Int8"
    return plans.tile_rows(m, n, gpu.multiprocessors, mma), plans.COLUMNS


def bounds(gpu: Gpu, m: int, k: int, n: int, rank: int = 32) -> dict[str, float]:
    """Milliseconds of each bound of one layer."""
    wide = 1 if gpu.wgmma else 0.5  # bytes that a code takes between the two ops
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
    issued = m * n * k / 64**3 * gpu.slots
    mma = 2e-9 * m * n * k / gpu.codes
    tokens, rows = tile = chosen_tile(gpu, m, n)
    through_l2 = m * n * k / 64 / (tokens * rows) * group_bytes(gpu, tile)
    known = {"l2": through_l2 / gpu.l2_gb_s / 1e6} if gpu.l2_gb_s else {}
    return known | {
        "quantize": quantize_bytes / gpu.gb_s / 1e6,
        "bytes": product_bytes / gpu.gb_s / 1e6,
        "mma": mma,
        "outer": mma / 2 if gpu.wgmma else 0.0,
        "branch": 2e-9 * m * rank * (k + n) / gpu.bf16,
        "rescale": rescale / (gpu.lanes * gpu.clocks) * 1e3,
        "issue": issued / (4 * gpu.clocks) * 1e3,
    }


def layer(gpu: Gpu, m: int, k: int, n: int, rank: int = 32) -> dict:
    """Bounds of one layer, the one that binds the product, and the best possible ratio to bf16."""
    times = bounds(gpu, m, k, n, rank)
    product = {
        "mma": times["mma"] + times["outer"] + times["branch"],
        **{name: times[name] for name in ("rescale", "issue", "bytes", "l2") if name in times},
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


def reachable(gpu: Gpu) -> Gpu | None:
    """The GPU with what others have measured of it; None where nobody has."""
    if gpu.measured is None:
        return None
    bf16 = gpu.measured.bf16 or gpu.bf16
    return replace(gpu, codes=gpu.measured.codes, bf16=bf16, measured=None)


def mean(rows: list[dict]) -> float:
    """The geometric mean of the layers' ratios."""
    return exp(sum(log(row["times_as_fast"]) for row in rows) / len(rows))


def table(tokens: int, cache: dict[str, float] | None = None) -> list[dict]:
    """One entry a GPU: its layers, the mean of their ratios, and its tiles. cache: GPU -> measured
    GB/s of its second-level cache.
    """
    found = []
    for gpu in GPUS:
        gpu = replace(gpu, l2_gb_s=(cache or {}).get(gpu.name, gpu.l2_gb_s))
        rows = [layer(gpu, tokens, k, n) for k, n in SHAPES]
        entry = {"gpu": gpu.name, "unit": gpu.unit, "times_as_fast_at_best": mean(rows)}
        measured = reachable(gpu)
        if measured is not None:
            entry["times_as_fast_reachable"] = mean([layer(measured, tokens, *s) for s in SHAPES])
            entry["measured"] = asdict(gpu.measured)
        tiles = WGMMA_TILES if gpu.wgmma else MMA_TILES
        entry["l2"] = {f"{tile[0]} x {tile[1]}": wanted(gpu, tile) for tile in tiles}
        found.append(entry | {"layers": rows})
    return found


def print_l2(entry: dict) -> None:
    print("  asks of the second-level cache at full rate, bytes a clock and multiprocessor (TB/s):")
    for tile, found in entry["l2"].items():
        print(f"    {tile:10}{found['bytes_a_clock']:6.1f}{found['gb_s'] / 1e3:8.1f}")


def print_entry(entry: dict, measured: dict[tuple, float]) -> None:
    print(
        f"\n{entry['gpu']} ({entry['unit']}): at best {entry['times_as_fast_at_best']:.2f} x"
        " bf16, geometric mean   [by arithmetic]"
    )
    if "measured" in entry:
        print(
            f"  {entry['times_as_fast_reachable']:.2f} x with rates that were measured:"
            f" {entry['measured']['codes']} TOP/s ({entry['measured']['source']})"
        )
    names = ("quantize", "bytes", "mma", "outer", "branch", "rescale", "issue", "l2")
    heads = "".join(f"{name:>9}" for name in names)
    print(f"  {'layer':>13}{heads}  {'binds':8}{'ms':>7}{'bf16':>8}{'ratio':>7}")
    for row in entry["layers"]:
        times = row["bounds_ms"]
        cells = "".join(f"{times[n]:9.3f}" if n in times else f"{'':9}" for n in names)
        seen = measured.get((entry["gpu"], row["M"], row["K"], row["N"]))
        shares = f"   measured {seen:.3f} ms, {100 * row['ms'] / seen:.0f} % of it" if seen else ""
        print(
            f"  {row['K']:>6}x{row['N']:<6}{cells}  {row['binds']:8}{row['ms']:7.3f}"
            f"{row['bf16_ms']:8.3f}{row['times_as_fast']:7.2f}{shares}"
        )
    print_l2(entry)


def read_measured(path: Path | None) -> tuple[dict[tuple, float], dict[str, float]]:
    """((GPU's short name, M, K, N) -> milliseconds, GPU -> GB/s of its second-level cache), from
    bench_gpu.py's file.
    """
    if path is None:
        return {}, {}
    whole = json.loads(path.read_text(encoding="utf-8"))
    full = whole["environment"].get("gpu", "")
    name = next((gpu.name for gpu in GPUS if gpu.name in full), full)
    rows = whole.get("layers", {}).get("rows", [])
    layers = {(name, row["M"], row["K"], row["N"]): row["ms"] for row in rows if "ms" in row}
    cache = whole.get("ceilings", {}).get("cache_gb_s")
    return layers, {name: cache} if cache else {}


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
    measured, cache = read_measured(options.measured)
    entries = table(options.tokens, cache)
    facts = {"estimate": True, "tokens": options.tokens, "rank": 32, "gpus": entries}
    options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for entry in entries:
        print_entry(entry, measured)


if __name__ == "__main__":
    main()
