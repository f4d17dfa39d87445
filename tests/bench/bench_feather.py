"""FEATHER beside FastV, uniform pruning and none: does the encoder still find what it is asked for,
and what does it cost.

    COMFYUI_PATH=… python tests/bench/bench_feather.py                 both parts, about two minutes
      of one core
    COMFYUI_PATH=… python tests/bench/bench_feather.py --parts find --pictures 10

find   A model with weights set by hand (`seeker.py`) is asked where the red square of 3 x 3 patches
  is, in pictures of 27 x 27 patches (the paper's 729)
       with the square at every height from top to bottom. FEATHER prunes first; every other arm
       keeps exactly as many tokens at both stages.
cost   Time and memory of a language model of ComfyUI's Qwen2.5-VL class with random weights and
  reduced width, for 196, 1369 and 4096 visual
       tokens, by the share that the first stage keeps. Time is the processor's own (one thread), so
       that a busy machine does not change it.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401

RESULTS = Path(__file__).resolve().parent / "results"
KEEPS = (0.5, 0.3, 0.15, 0.08)
SIDES = (14, 37, 64)
SHAPE = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def start() -> None:
    """ComfyUI's library and this checkout, in this process."""
    if not os.environ.get("COMFYUI_PATH"):
        raise SystemExit(
            "set COMFYUI_PATH to a ComfyUI folder: this bench measures on its encoders"
        )
    import comfyui_in_process

    comfyui_in_process.start()


def find(pictures: int, side: int) -> dict:
    """Accuracy of each arm by the share kept, over pictures whose square is ever lower; and where
    the kept patches are.
    """
    from bench import seeker

    clip, rows = seeker.build(), []
    for number in range(pictures):
        height = number / max(1, pictures - 1)
        pixels, corners = seeker.picture(side, side, number, height)
        rows.append(
            _look(clip, None, pixels, corners[0], side)
            | {"arm": "none", "keep": 1.0, "height": height}
        )
        for keep in KEEPS:
            counts = None
            for arm in ("feather", "feather without grid", "fastv", "uniform"):
                found = _look(
                    clip, _settings(arm, keep, counts, side * side), pixels, corners[0], side
                )
                counts = counts or found["kept"]
                rows.append(found | {"arm": arm, "keep": keep, "height": height})
    return {
        "side": side,
        "pictures": pictures,
        "rows": [
            _summary(arm, keep, rows)
            for arm, keep in dict.fromkeys((r["arm"], r["keep"]) for r in rows)
        ],
    }


def _settings(arm: str, keep: float, counts: list[int] | None, whole: int):
    """FEATHER's own stages, or an arm that keeps as many."""
    from bench import seeker
    from nibble.accel.feather import Stage
    from nibble.nodes.bridge.feather.prune import PruneSettings

    first, second = seeker.STAGES
    if counts is None:
        return PruneSettings((Stage(first, keep, 3), Stage(second, keep * keep)))
    return PruneSettings(
        (Stage(first, counts[0] / whole), Stage(second, counts[1] / counts[0])), arm.split()[0]
    )


def _look(clip, settings, pixels, corner, side: int) -> dict:
    from bench import seeker
    from nibble.accel import feather as accel
    from nibble.nodes.bridge.feather import prune as feather

    clip = clip if settings is None else feather.prune(clip, settings)
    found = clip.encode_from_tokens(seeker.prompt(pixels), return_dict=True)
    right = seeker.right(seeker.answer(found["cond"], side, side), corner)
    if settings is None:
        return {"right": right, "kept": [side * side] * 2, "left": 9, "mean_height": 0.5}
    masks = found[feather.KEY]["pictures"][0]["masks"]
    last = masks[-1].reshape(side, side)
    return {
        "right": right,
        "kept": [int(mask.sum()) for mask in masks],
        "left": int(last[corner[0] : corner[0] + 3, corner[1] : corner[1] + 3].sum()),
        "mean_height": accel.mean_row(masks[-1], side, side),
    }


def _summary(arm: str, keep: float, rows: list[dict]) -> dict:
    mine = [row for row in rows if (row["arm"], row["keep"]) == (arm, keep)]
    share = lambda part: round(statistics.mean(row["right"] for row in part), 3)  # noqa: E731
    return {
        "arm": arm,
        "keep": keep,
        "tokens": [round(statistics.mean(row["kept"][i] for row in mine)) for i in (0, 1)],
        "accuracy": share(mine),
        "accuracy_top": share([row for row in mine if row["height"] < 0.5]),
        "accuracy_bottom": share([row for row in mine if row["height"] >= 0.5]),
        "mean_height": round(statistics.mean(row["mean_height"] for row in mine), 2),
    }


def cost(sides: tuple[int, ...]) -> dict:
    """Seconds of the processor and peak memory of one prompt, by visual tokens and share kept."""
    import torch

    torch.set_num_threads(1)
    clip, rows = _language_model(), []
    for side in sides:
        base = None
        for keep in (1.0, 0.5, 0.3, 0.1):
            row = _measure(clip, side, keep, rounds=3 if side < 60 else 1)
            base = base or row
            rows.append(
                row
                | {
                    "times_faster": round(base["seconds"] / row["seconds"], 2),
                    "flops_share": round(row["flops"] / base["flops"], 3),
                }
            )
            print(
                f"{row['visual_tokens']:5} visual tokens, keep {keep}: {row['seconds']:.3f} s,"
                f" {rows[-1]['times_faster']:.2f} times as fast, {rows[-1]['flops_share']:.0%} of"
                f" the operations, peak {row['peak_mb']:.0f} MB, {row['tokens_per_layer'][-1]}"
                " tokens in the last layer",
                flush=True,
            )
    return {"shape": SHAPE, "text_tokens": 32, "rows": rows}


def _language_model():
    """Random weights behind a vision tower that costs nothing."""
    from unittest import mock

    import comfy.sd
    import comfy.text_encoders.qwen_vl
    import torch

    from bench import seeker

    class Tower(torch.nn.Module):
        def __init__(self, **_):
            super().__init__()

        def forward(self, patches, grid):
            return torch.randn(
                len(patches) // 4, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0)
            )

    with mock.patch.object(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", Tower):
        clip = comfy.sd.CLIP(
            seeker.Target,
            model_options={
                "qwen25_7b_model_config": SHAPE | {"vocab_size": 16},
                "dtype": torch.float32,
            },
        )
    generator = torch.Generator().manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        scale = weight.shape[-1] ** -0.5 if weight.ndim else 1
        weight.data.copy_(
            torch.ones(weight.shape)
            if "norm" in name
            else torch.randn(weight.shape, generator=generator) * scale
        )
    return clip


def _measure(clip, side: int, keep: float, rounds: int) -> dict:
    import torch

    from nibble.accel import feather as accel
    from nibble.nodes.bridge.feather import prune as feather
    from nibble.nodes.bridge.feather import record

    layers, text = SHAPE["num_hidden_layers"], 32
    pruned = feather.prune(clip, feather.PruneSettings(accel.stages(layers, keep), mode="drop"))
    prompt = {
        "qwen25_7b": [
            [
                ({"type": "image", "data": torch.zeros(1, side * 28, side * 28, 3)}, 1.0),
                *[(1, 1.0)] * text,
            ]
        ]
    }
    peak = _peak(lambda: pruned.encode_from_tokens(prompt))
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        found = pruned.encode_from_tokens(prompt, return_dict=True)
        seconds.append(time.process_time() - began)
    told = found.get(feather.KEY)
    tokens = (
        record.Prompt(
            **{**told, "pictures": [record.Picture(**p) for p in told["pictures"]]}
        ).tokens()
        if told
        else [side * side + text] * layers
    )
    return {
        "visual_tokens": side * side,
        "keep": keep,
        "seconds": statistics.median(seconds),
        "peak_mb": round(peak / 1e6, 1),
        "tokens_per_layer": tokens,
        "flops": accel.flops(tokens, SHAPE["hidden_size"], SHAPE["intermediate_size"]),
    }


def _peak(run) -> int:
    """Bytes that a call holds at most beyond what was there; the allocator gives back what is free
    at once meanwhile, so that old blocks hide nothing.
    """
    libc, threshold = ctypes.CDLL(None), -3  # M_MMAP_THRESHOLD
    libc.mallopt(threshold, 1 << 16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    run()
    peak = _memory("VmHWM") - before
    libc.mallopt(threshold, 1 << 25)
    return peak


def _memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=("find", "cost"), default=("find", "cost"))
    parser.add_argument("--pictures", type=int, default=21)
    parser.add_argument(
        "--side", type=int, default=27, help="patches in a row of the pictures of `find`"
    )
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=SIDES,
        help="patches in a row of the pictures of `cost`",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "feather.json")
    options = parser.parse_args()
    start()
    result = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    if "find" in options.parts:
        result["find"] = find(options.pictures, options.side)
        for row in result["find"]["rows"]:
            print(
                f"{row['arm']:21} keep {row['keep']:<4} tokens {row['tokens'][0]:3},"
                f" {row['tokens'][1]:3}: finds {row['accuracy']:.0%} (top half"
                f" {row['accuracy_top']:.0%}, bottom half {row['accuracy_bottom']:.0%}), mean"
                f" height {row['mean_height']}",
                flush=True,
            )
        _write(result, options.out)
    if "cost" in options.parts:
        result["cost"] = cost(tuple(options.sides))
        _write(result, options.out)


def _write(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
