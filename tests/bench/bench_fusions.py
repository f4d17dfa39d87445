"""What running neighbours as one saves: FLUX.1's linear2 of a published file as one op beside a sum
of two, and its MLP with the GELU inside beside two linears. Times on this CPU or GPU; bytes by
count, each tensor that an op reads or writes once: `python -m nibble bench fusions`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import timer
from cases import Case, make_input, make_w4a4
from nibble.kernels import ops

ORDER = ("weight", "weight_scale", "smooth_factor", "proj_down", "proj_up", "bias")
HIDDEN, RANK = 3072, 32


def linear2_bytes(m: int, hidden: int) -> tuple[int, int]:
    """(one op, a sum of two) of (m, 5 hidden) bf16 activations to (m, hidden)."""
    k, n = 5 * hidden, hidden
    x, y, h = 2 * m * k, 2 * m * n, 4 * m * RANK
    codes, weight = m * k // 2 + m * k // 16, n * k // 2 + n * k // 32
    one = x + 2 * codes + 2 * h + weight + y
    # x is copied, h is made twice, and two results are stored, read and added
    return one, one + 2 * x + 2 * h + y + 3 * y


def mlp_bytes(m: int, hidden: int) -> tuple[int, int]:
    """(fused, layer by layer) of (m, hidden) through 4 hidden and back."""
    k, n = hidden, 4 * hidden
    x, middle, h = 2 * m * k, 2 * m * n, 4 * m * RANK
    codes = [m * size // 2 + m * size // 16 for size in (k, n)]
    both = x + 2 * sum(codes) + 4 * h + 2 * (n * k // 2 + n * k // 32) + x
    parts_of_h = 2 * h * -(-n // 128)  # one h of each tile of 128 columns, written and added
    return both + parts_of_h, both + 4 * middle


def linear2(m: int, hidden: int, device: str) -> dict:
    case = Case("linear2", m, 5 * hidden, hidden, R=RANK)
    x, p = make_input(case, torch.bfloat16, device=device), make_w4a4(case, device=device)
    signed, unsigned = columns(p, slice(0, hidden)), columns(p, slice(hidden, 5 * hidden))
    signed["bias"] = None

    def sum_of_two() -> torch.Tensor:
        y = ops.linear_w4a4(x[:, hidden:].contiguous(), **unsigned, act_unsigned=True)
        return y + ops.linear_w4a4(x[:, :hidden].contiguous(), **signed)

    return {
        "one op": lambda: ops.linear_w4a4(x, **p, unsigned_from=hidden),
        "a sum of two": sum_of_two,
    }


def columns(p: dict, part: slice) -> dict:
    """A layer's parameters for some of its inputs."""
    return p | {
        "weight": p["weight"][:, part.start // 2 : part.stop // 2].contiguous(),
        "weight_scale": p["weight_scale"][part.start // 64 : part.stop // 64],
        "smooth_factor": p["smooth_factor"][part],
        "proj_down": p["proj_down"][part],
    }


def mlp(m: int, hidden: int, device: str) -> dict:
    up, down = (
        Case("up", m, hidden, 4 * hidden, R=RANK),
        Case("down", m, 4 * hidden, hidden, R=RANK),
    )
    x = make_input(up, torch.bfloat16, device=device)
    first, second = (
        [p[name] for name in ORDER] for p in (make_w4a4(c, device=device) for c in (up, down))
    )

    def layer_by_layer() -> torch.Tensor:
        middle = torch.nn.functional.gelu(ops.linear_w4a4(x, *first), approximate="tanh")
        return ops.linear_w4a4(middle, *second, True)

    return {
        "one op": lambda: ops.mlp_w4a4(x, first, second, False, 0, True, 0),
        "layer by layer": layer_by_layer,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="FLUX.1's is 3072")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("fusions.json"))
    chosen = parser.parse_args(arguments)
    rows, m, hidden = [], chosen.tokens, chosen.hidden
    for name, make, count in (("linear2", linear2, linear2_bytes), ("mlp", mlp, mlp_bytes)):
        timings = timer.side_by_side(make(m, hidden, chosen.device), chosen.device, chosen.rounds)
        bytes_of = dict(zip(timings, count(m, hidden), strict=True))
        rows.append({"what": name, "M": m, "hidden": hidden, "timings": timings, "bytes": bytes_of})
        print(
            f"{name}, M={m}, hidden {hidden}: "
            + "; ".join(
                f"{way} {timings[way]['ms']:.1f} ms, {bytes_of[way] / 1e6:.0f} MB"
                for way in timings
            )
        )
    chosen.out.write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
