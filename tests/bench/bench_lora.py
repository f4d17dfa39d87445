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
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_in_process
from bench import machine, timer
from nibble.kernels import ops, which
from random_flux import flux_shapes

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ["rank", "switch", "picture"]
SHAPES = {
    "qkv": (9216, 3072),
    "proj": (3072, 3072),
    "mlp.0": (12288, 3072),
    "mlp.2": (3072, 12288),
    "linear1": (21504, 3072),
    "linear2": (3072, 15360),
}
BLOCKS = {"double": 19, "single": 38}
ADDED = (0, 16, 32, 64, 128)
LAYOUTS = {
    "fp8 (e4m3)": "TensorCoreFP8E4M3Layout",
    "int8": "TensorWiseINT8Layout",
    "convrot w4a4": "TensorCoreConvRotW4A4Layout",
}


# ---- rank


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
                laps[name] += [time.process_time() - began] if turn else []
    best = {name: 1e3 * min(found) for name, found in laps.items()}
    return best, {name: found / best["+0"] for name, found in best.items()}


def ranks(options) -> dict:
    rows = [rank_row(name, options.tokens, options) for name in options.shapes]
    calls = rows[0]["ratio"]
    print(
        summary := {
            call: round(timer.geometric_mean([row["ratio"][call] for row in rows]), 4)
            for call in calls
        }
    )
    backend, reason = which("linear_w4a4", torch.device("cpu"))
    return {"computed_by": f"{backend} ({reason})", "rows": rows, "mean_ratio": summary}


# ---- ComfyUI in this process


def has_comfyui() -> bool:
    """Starts ComfyUI's library, on the CPU; says aloud where there is none."""
    if not comfyui_in_process.COMFYUI:
        print("COMFYUI_PATH is not set: the parts that need ComfyUI did NOT run")
        return False
    comfyui_in_process.start()
    return True


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def big_model(hidden: int):
    """One double and one single block of FLUX's shapes with random 4-bit weights, as Load SVDQuant
    Model makes a model.
    """
    import comfy.sd

    from nibble.nodes.bridge.quantized import loading
    from nibble.nodes.bridge.quantized.linear import NibbleOperations

    generator, state, layers = torch.Generator().manual_seed(0), {}, {}
    for name, shape in flux_shapes(hidden=hidden, double=1, single=1).items():
        stem = name.removesuffix(".weight")
        if (
            name.endswith(".weight")
            and "blocks" in name
            and "_mod" not in name
            and ".modulation" not in name
        ):
            parts = draw(*shape, 32, generator)
            for part, tensor in parts.items():
                if part == "weight":
                    state[f"{stem}.weight"] = tensor
                elif part != "bias":
                    state[f"{stem}.weight_{part.removeprefix('weight_')}"] = tensor
            layers[stem] = {"format": "svdquant_w4a4", "rank": 32}
        else:
            state[name] = (
                torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else (torch.randn(shape, generator=generator) * 0.01).bfloat16()
            )
    packed = loading.packed(state, layers, torch.bfloat16)
    return comfy.sd.load_diffusion_model_state_dict(
        packed, model_options={"custom_operations": NibbleOperations}
    ), list(layers)


def switch(options) -> dict:
    """Seconds of putting on, changing and taking off; with what ComfyUI itself needs to compute the
    patched weights.
    """
    import comfy.lora
    import comfy.model_management
    import comfy.sd

    from nibble.nodes.bridge.quantized import layouts, lora

    model, names = big_model(options.hidden)
    linears = {name: model.model.diffusion_model.get_submodule(name) for name in names}
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, linear in linears.items():
        (n, k), stem = linear.weight.shape, "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": torch.randn(n, 16, generator=generator).bfloat16() * 0.02,
            f"{stem}.lora_down.weight": torch.randn(16, k, generator=generator).bfloat16() * 0.02,
        }

    def load(patcher):
        lora.plan_patches(lambda chosen: comfy.model_management.load_models_gpu([chosen]), patcher)

    def with_lora(strength):
        return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]

    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    found = {
        "base": seconds(lambda: load(model)),
        "put on": seconds(lambda: load(with_lora(1.0))),
        "strength changed": statistics.median(
            seconds(lambda s=s: load(with_lora(s))) for s in (0.5, 0.8, -1.0)
        ),
        "bytes made": sum(
            tensor.nbytes
            for linear in linears.values()
            for tensor in (linear.weight.params.proj_down, linear.weight.params.proj_up)
        ),
        "bytes of the 4-bit weights": sum(
            linear.weight._qdata.nbytes for linear in linears.values()
        ),
        "taken off": seconds(lambda: load(model)),
    }
    after = model.model.state_dict()
    found["base back bit for bit"] = all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    name, linear = max(linears.items(), key=lambda item: item[1].weight.numel())
    patches, key = with_lora(1.0).patches[f"diffusion_model.{name}.weight"], name

    def difference():
        dense = layouts.effective_weight(linear.weight)
        return comfy.lora.calculate_weight(patches, dense, key)

    patched = difference()
    found["largest layer alone"] = {
        "shape": list(linear.weight.shape),
        "ComfyUI's new weight, dequantized": seconds(difference),
        "its factors out of the difference": seconds(
            lambda: lora.absorb_dense(linear.weight, patched)
        ),
    }
    slow = seconds(lambda: comfy.model_management.load_models_gpu([with_lora(1.0)]))
    found["put on from the difference of weights"] = slow
    weights = sum(linear.weight.numel() for linear in linears.values())
    found["of FLUX.1 dev"] = options.hidden == 3072 and flux_share(linears, weights)
    for step in (
        "put on",
        "strength changed",
        "taken off",
        "put on from the difference of weights",
    ):
        found[f"{step}, all of FLUX.1 dev (extrapolated)"] = (
            found[step] / found["of FLUX.1 dev"] if found["of FLUX.1 dev"] else None
        )
    print(json.dumps(found, indent=1), flush=True)
    return found


def flux_share(linears: dict, weights: int) -> float:
    """These linears' share of the weights of all blocks' linears in FLUX.1 dev."""

    def of(kind):
        return sum(
            linear.weight.numel() for name, linear in linears.items() if name.startswith(kind)
        )

    return weights / (BLOCKS["double"] * of("double") + BLOCKS["single"] * of("single"))


# ---- picture


def trained(options) -> tuple[dict[str, torch.Tensor], list]:
    """A float LoRA of the demo model's block linears under Black Forest Labs' names, and prompts
    for what it was taught.
    """
    import bench_intlora

    from bench import concept

    chosen = argparse.Namespace(rank=8, batch=8, steps=options.steps, lr=2e-3, batches=1, prompts=8)
    bench = bench_intlora.Bench(chosen)
    flux = bench_intlora.pictures.load_flux()
    layers = bench.attach(flux, None)
    optimizer = torch.optim.AdamW(
        [p for layer in layers.values() for p in (layer.lora_up, layer.lora_down)],
        lr=chosen.lr,
        weight_decay=0,
    )
    value = bench.loss(flux, 0.75, chosen.batch)
    for step in range(chosen.steps):
        value(torch.Generator().manual_seed(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {}
    for name, layer in layers.items():
        stem = f"transformer.{name}"
        tensors |= {
            f"{stem}.lora_B.weight": layer.lora_up.detach().bfloat16(),
            f"{stem}.lora_A.weight": layer.lora_down.detach().bfloat16(),
        }
    return (
        tensors,
        [str(scene) for scene in concept.scenes()[:: 36 // options.prompts]][: options.prompts],
    )


def drawn(patcher, texts: list[str]) -> torch.Tensor:
    """Latents of one picture a prompt by ComfyUI's sampler, 8 steps."""
    import comfy.sample
    import comfy.samplers

    from nibble.demo import prompts

    out = []
    for seed, text in enumerate(texts):
        tokens, pooled = prompts.embed(prompts.word_indices([text]))
        cond = [[tokens, {"pooled_output": pooled, "guidance": 3.5}]]
        latent, noise = (
            torch.zeros(1, 16, 8, 8),
            torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed)),
        )
        out.append(
            comfy.sample.sample(
                patcher,
                noise,
                8,
                1.0,
                "euler",
                "simple",
                cond,
                cond,
                latent,
                disable_pbar=True,
                seed=seed,
            )
        )
    return torch.cat(out)


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


def requantized(dense, layout: str, patches: dict, share: float = 1.0):
    """A copy of the 16-bit model whose block linears hold a quantized weight with the patches, as
    ComfyUI's `set_weight` rounds it; and the change kept.
    """
    import comfy.lora
    import comfy.utils
    from comfy.quant_ops import QuantizedTensor

    errors, kept = [], []
    for key, entries in patches.items():
        linear = comfy.utils.get_attr(dense.model, key.removesuffix(".weight"))
        weight = linear.weight.detach().float()
        base = (
            QuantizedTensor.from_float(weight.bfloat16(), layout, scale="recalculate")
            if "W4A4" not in layout
            else QuantizedTensor.from_float(weight.bfloat16(), layout)
        )
        plain = base.dequantize().float()
        changed = (
            comfy.lora.calculate_weight(entries, plain.clone(), key) if share else plain.clone()
        )
        if share:
            scale = {} if "W4A4" in layout else {"scale": "recalculate"}
            after = (
                base.requantize_from_float(
                    changed, stochastic_rounding=comfy.utils.string_to_seed(key), **scale
                )
                .dequantize()
                .float()
            )
            delta = changed - plain
            errors.append(decibels(delta, after - plain - delta))
            kept.append(float(((after - plain) * delta).sum() / delta.square().sum()))
        else:
            after = plain
        linear.weight = torch.nn.Parameter(after.to(linear.weight.dtype), requires_grad=False)
    return errors, kept


def in_the_branch(path: Path, texts: list[str], with_lora) -> tuple:
    """Latents with and without the LoRA of the demo model at 4 bits, and how each weight changed
    beside what ComfyUI computes for it.
    """
    import comfy.lora
    import comfy.utils

    from nibble.demo import pictures
    from nibble.nodes.bridge.quantized import layouts, loading
    from nibble.quant.svdquant.quantize import quantize_checkpoint
    from nibble.quant.svdquant.recipe import Recipe

    if not path.exists():
        quantize_checkpoint(pictures.FLUX_FILE, path, Recipe.from_preset("fast"))
    ours = loading.load(path, dtype="fp32")

    def effective(key):
        weight = comfy.utils.get_attr(ours.model, key)
        return layouts.effective_weight(weight)

    patched = with_lora(ours)
    keys = [
        key for key in patched.patches if layouts.is_ours(comfy.utils.get_attr(ours.model, key))
    ]
    without, plain = drawn(ours, texts), {key: effective(key) for key in keys}
    latents, errors, kept = drawn(patched, texts), [], []
    for key, before in plain.items():
        delta = comfy.lora.calculate_weight(patched.patches[key], before.clone(), key) - before
        change = effective(key) - before
        errors.append(decibels(delta, change - delta))
        kept.append(float((change * delta).sum() / delta.square().sum()))
    return latents, without, errors, kept


def picture(options) -> dict:
    import comfy.sd

    from nibble.demo import pictures

    tensors, texts = trained(options)

    def dense():
        return comfy.sd.load_diffusion_model(
            str(pictures.FLUX_FILE), model_options={"dtype": torch.float32}
        )

    def with_lora(patcher, strength=1.0):
        return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]

    exact = dense()
    base, target = drawn(exact, texts), drawn(with_lora(exact), texts)
    patches = with_lora(exact).patches
    rows = [{"route": "16 bit, LoRA left off", "db": decibels(target, base - target)}]

    def note(route, latents, without, errors=(), kept=()):
        rows.append(
            {
                "route": route,
                "db": decibels(target, latents - target),
                "db without the LoRA": decibels(base, without - base),
                "effect": float(
                    ((latents - without) * (target - base)).sum() / (target - base).square().sum()
                ),
                "effect db": decibels(target - base, (latents - without) - (target - base)),
                "change": statistics.median(errors) if errors else None,
                "worst change": min(errors) if errors else None,
                "share": statistics.mean(kept) if kept else None,
            }
        )
        print(
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in rows[-1].items()
            },
            flush=True,
        )

    note(
        "ours, fast: in the branch",
        *in_the_branch(options.folder / "demo-fast.safetensors", texts, with_lora),
    )
    for name, layout in LAYOUTS.items():
        try:
            plain = dense()
            requantized(plain, layout, patches, share=0.0)
            without = drawn(plain, texts)
            changed = dense()
            errors, kept = requantized(changed, layout, patches)
            note(f"{name}, requantized", drawn(changed, texts), without, errors, kept)
        except (NotImplementedError, RuntimeError, TypeError, KeyError, ValueError) as error:
            rows.append(
                {"route": name, "absent": f"{type(error).__name__}: {error}".splitlines()[0]}
            )
            print(rows[-1], flush=True)
    return {"rows": rows, "prompts": texts, "steps": options.steps, "nunchaku, on paper": NUNCHAKU}


NUNCHAKU = (
    "Its own loader concatenates the factors into the branch, as here, so a LoRA is as exact; a"
    " strength is one number per 16 ranks in the kernel, so changing it moves nothing. Stock Load"
    " LoRA is not taken, LoKr, LoHa and DoRA are not known, and conversion to its packing is done"
    " when a LoRA is loaded."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "lora.json")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
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
            found = ranks(options)
        elif with_comfyui:
            found = {"switch": switch, "picture": picture}[part](options)
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
