"""Processor time of 4-bit linears of FLUX.1's shapes whose branch grows by a LoRA's rank."""

import time

import torch

from bench import timer
from nibble.kernels import ops, which

SHAPES = {
    "qkv": (9216, 3072),
    "proj": (3072, 3072),
    "mlp.0": (12288, 3072),
    "mlp.2": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
}
ADDED = (0, 16, 32, 64, 128)


def draw(
    n: int, k: int, rank: int, generator: torch.Generator, dtype=torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Random operands of a 4-bit linear."""

    def normal(*shape, size=1.0):
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    return {
        "weight": torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, generator=generator),
        "weight_scale": (torch.rand(k // 64, n, generator=generator) * 0.01 + 0.005).to(dtype),
        "smooth_factor": torch.ones(k, dtype=dtype),
        "proj_down": normal(k, rank, size=k**-0.5),
        "proj_up": normal(n, rank, size=0.1),
        "bias": normal(n, size=0.1),
    }


def rank_row(name: str, tokens: int, options) -> dict:
    """One shape: every added rank, and the same in two products beside the layer."""
    n, k = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    x, base = torch.randn(tokens, k, generator=generator).bfloat16(), draw(n, k, 32, generator)
    calls = {}
    for added in ADDED:
        down, up = (
            torch.randn(size, added, generator=generator).bfloat16() * 0.02 for size in (k, n)
        )
        longer = base | {
            "proj_down": torch.cat([base["proj_down"], down], 1),
            "proj_up": torch.cat([base["proj_up"], up], 1),
        }
        calls[f"+{added}"] = lambda p=longer: ops.linear_w4a4(x, **p)
        if added:
            calls[f"beside {added}"] = lambda d=down, u=up: (
                ops.linear_w4a4(x, **base) + (x @ d) @ u.T
            )
    ms, ratio = processor_time(calls, options.rounds)
    row = {
        "shape": name,
        "N": n,
        "K": k,
        "tokens": tokens,
        "ratio": ratio,
        "ms": ms,
        "operations": {added: round(added * (n + k) / (n * k), 5) for added in ADDED},
        "bytes": {added: 2 * added * (n + k) for added in ADDED},
    }
    print(
        f"{name} {tokens} tokens:",
        {call: round(ratio, 3) for call, ratio in row["ratio"].items()},
        flush=True,
    )
    return row


def processor_time(calls: dict, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """(milliseconds of processor time, ratio to the first) of calls that take turns: the least of
    the rounds, which other programs disturb least.
    """
    laps = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(rounds + 1):  # the first one warms up
            for name, run in calls.items():
                began = time.process_time()
                run()
                elapsed = time.process_time() - began
                if turn:
                    laps[name].append(elapsed)
    best = {name: 1e3 * min(found) for name, found in laps.items()}
    return best, {name: found / best["+0"] for name, found in best.items()}


def ranks(options) -> dict:
    rows = [rank_row(name, options.tokens, options) for name in options.shapes]
    calls = rows[0]["ratio"]
    summary = {
        call: round(timer.geometric_mean([row["ratio"][call] for row in rows]), 4) for call in calls
    }
    print(summary)
    backend, reason = which("linear_w4a4", torch.device("cpu"))
    return {"computed_by": f"{backend} ({reason})", "rows": rows, "mean_ratio": summary}
