"""VQ4DiT on its own kind of model: a class-conditional DiT of diffusers, trained here in minutes,
at 4, 3 and 2 bits by the paper's method, by ours, by rounding, and by SVDQuant.

    python tests/bench/bench_dit.py [--arms "vq4dit 2" "round to nearest 2" …]

The model draws 32 x 32 pixels (patches of 4, so 64 tokens) of five classes: a shape and a colour
each, anywhere. It predicts noise, as DiT-XL/2 does, and is sampled by DDIM with classifier-free
guidance. All arms change the same layers. PSNR is against the pictures of the unquantized model
from the same noise; a layer's SQNR is of what it puts out for what it reads while other pictures
are drawn, and the output's is of the noise that the whole model predicts there. "obeys": the share
of pictures whose colour is nearest to their class's. No FID: that would need ImageNet's weights and
pictures, which are not to be had here.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench.bench_vq import round_to_nearest
from nibble.quant.diffusers import dit_source, dit_teacher, load_quantized
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant.quantize import quantize_checkpoint as svdquant
from nibble.quant.svdquant.recipe import Recipe as SVDQuantRecipe
from nibble.quant.vq4dit.quantize import VQJob
from nibble.quant.vq4dit.quantize import quantize_checkpoint as vq
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe
from nibble.quant.vq4dit.trajectory import Call, record

RESULTS = Path(__file__).resolve().parent / "results"
PIXELS, CLASSES, BATCH, GUIDANCE = 32, 5, 16, 1.5
CONFIG: dict[str, Any] = dict(
    num_attention_heads=3,
    attention_head_dim=64,
    in_channels=3,
    out_channels=3,
    num_layers=4,
    sample_size=PIXELS,
    patch_size=4,
    num_embeds_ada_norm=CLASSES,
    norm_eps=1e-6,
)
KINDS = (
    "vq4dit",
    "round to nearest, a scale for each 64",
    "round to nearest, a scale a row",
    "k-means",
    "fast",
    "best",
)
ARMS = ["SVDQuant W4A4", *(f"{kind} {bits}" for bits in (2, 3, 4) for kind in KINDS)]
GROUPS = {"round to nearest, a scale for each 64": 64, "round to nearest, a scale a row": 0}
ROWS = 128  # inputs of each layer that its SQNR is of


def colours() -> Tensor:
    """One for each class, far from one another and from grey: (CLASSES, 3) in -1…1."""
    hue = torch.arange(CLASSES) / CLASSES * 2 * math.pi
    return torch.stack([(hue + 2 * math.pi * i / 3).cos() for i in range(3)], -1)


def patterns(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (batch, 3, PIXELS, PIXELS) of classes: a disc, square, diamond, ring or cross in the
    class's colour, anywhere, on a dark grey that differs.
    """
    count, line = len(labels), torch.linspace(-1, 1, PIXELS)
    middle = torch.rand(count, 2, 1, 1, generator=generator) - 0.5
    radius = 0.35 + 0.15 * torch.rand(count, 1, 1, generator=generator)
    x, y = line - middle[:, 0], line[:, None] - middle[:, 1]
    disc = (x.square() + y.square()).sqrt()
    cross = torch.minimum(x.abs(), y.abs()) * 3
    inside = torch.maximum(x.abs(), y.abs())
    distance = torch.stack(
        [disc, inside, x.abs() + y.abs(), (disc - radius * 0.7).abs() * 3, cross.maximum(inside)]
    )[labels, torch.arange(count)]
    shape = torch.sigmoid((radius - distance) * 20)[:, None]
    grey = -0.8 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    return grey + shape * (colours()[labels][:, :, None, None] - grey)


def scheduler() -> diffusers.DDIMScheduler:
    """DiT's own: 1000 steps, variances evenly spread from 1e-4 to 0.02."""
    return diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)


def trained(options: argparse.Namespace) -> tuple[nn.Module, dict]:
    """The model, the same each time (kept in `--scratch`), and how training it went."""
    path = options.scratch / f"dit-{options.training_steps}.safetensors"
    torch.manual_seed(0)
    model: Any = diffusers.DiTTransformer2DModel(**CONFIG)
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval().requires_grad_(False), {}
    for name, parameter in model.named_parameters():  # adaLN-Zero
        if ".norm1.linear." in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    began, losses = time.process_time(), []
    generator, noised = torch.Generator().manual_seed(0), scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in range(options.training_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        clean = patterns(labels, generator)
        times = torch.randint(1000, (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        given = noised.add_noise(clean, noise, times)
        found = model(given, timestep=times, class_labels=labels).sample
        loss = (found - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        for name, tensor in model.state_dict().items():
            average[name].lerp_(tensor, max(0.005, 1 / (step + 1)))
    model.load_state_dict(average)
    save_file(average, path)
    last = losses[-100:]
    told = {"steps": options.training_steps, "loss": sum(last) / len(last)}
    told["cpu_seconds"] = time.process_time() - began
    return model.eval().requires_grad_(False), told


@torch.no_grad()
def drawn(model: nn.Module, count: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """(pictures, their classes) by DDIM with classifier-free guidance."""
    generator, ddim = torch.Generator().manual_seed(seed), scheduler()
    ddim.set_timesteps(steps)
    labels = torch.arange(count) % CLASSES
    x = torch.randn(count, 3, PIXELS, PIXELS, generator=generator)
    both = torch.cat([labels, torch.full_like(labels, CLASSES)])
    for t in ddim.timesteps:
        out = model(torch.cat([x, x]), timestep=t.expand(2 * count), class_labels=both).sample
        asked, free = out.chunk(2)
        x = ddim.step(free + GUIDANCE * (asked - free), t, x).prev_sample
    return x.clamp(-1, 1), labels


def obeyed(pictures: Tensor, labels: Tensor) -> float:
    """The share whose most coloured pixels are nearest to the class's colour."""
    flat = pictures.flatten(2)
    colour = flat - flat.mean(1, keepdim=True)
    most = colour.norm(dim=1).topk(60, dim=1).indices
    mean = colour.gather(2, most[:, None].expand(-1, 3, -1)).mean(2)
    wanted = colours() - colours().mean(1, keepdim=True)
    nearest = nn.functional.normalize(mean, dim=1) @ nn.functional.normalize(wanted, dim=1).T
    return (nearest.argmax(1) == labels).float().mean().item()


def psnr(exact: Tensor, other: Tensor) -> float:
    """The mean of pictures, whose values reach from -1 to 1."""
    error = (exact - other).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error.clamp_min(1e-10))).mean().item()


def inputs_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What layers read while pictures are drawn that nothing is fitted to: (ROWS, K) of each."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0].reshape(-1, args[0].shape[-1])[::17])
        )
        for name, kept in found.items()
    ]
    drawn(model, 8, 6, seed=99)
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(0)

    def some(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:ROWS]]

    return {name: some(torch.cat(rows)) for name, rows in found.items()}


@torch.no_grad()
def layer_decibels(exact: nn.Module, other: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """SQNR of each layer's output without its bias, sorted."""
    decibels = []
    for name, rows in inputs.items():
        layer, changed = exact.get_submodule(name), other.get_submodule(name)
        wanted = layer(rows)
        error = changed(rows) - wanted
        signal = (wanted - layer.bias).square().sum()
        decibels.append((10 * torch.log10(signal / error.square().sum())).item())
    return sorted(decibels)


def calls_of(model: nn.Module) -> list[Call]:
    """The calls that draw pictures which nothing is fitted to and no other figure is of."""
    return record(model, partial(drawn, model, 10, 10, seed=8))


@torch.no_grad()
def output_decibels(exact: nn.Module, other: nn.Module, calls: list[Call]) -> float:
    """SQNR of the predicted noise along the unquantized model's own way."""
    power = error = 0.0
    for call in calls:
        wanted = exact(*call.args, **call.kwargs).sample
        power += wanted.square().sum().item()
        error += (other(*call.args, **call.kwargs).sample - wanted).square().sum().item()
    return 10 * math.log10(power / error)


def rounded(model: nn.Module, names: Iterable[str], bits: int, group: int) -> tuple[Any, float]:
    """The model with these layers rounded to nearest, and the bits of a weight, scales included."""
    copy: Any = diffusers.DiTTransformer2DModel(**CONFIG)
    copy.load_state_dict(model.state_dict())
    stored = weights = 0.0
    with torch.no_grad():
        for name in names:
            matrix = copy.get_submodule(name).weight
            matrix.copy_(round_to_nearest(matrix, bits, group))
            stored += matrix.numel() * bits + 16 * matrix.numel() / (group or matrix.shape[1])
            weights += matrix.numel()
    return copy.eval(), stored / weights


def quantized(model: Any, arm: str, options: argparse.Namespace) -> tuple[nn.Module, float]:
    """The model of a file of ours, and the bits of a weight, whatever belongs to it included."""
    kind, _, bits = arm.rpartition(" ")
    target = options.scratch / f"{arm.replace(' ', '-')}.safetensors"
    target.unlink(missing_ok=True)
    source = dit_source(model)
    if kind == "SVDQuant":
        report = svdquant(source, target, SVDQuantRecipe.from_preset("fast"))
    else:
        preset, changes = (
            ("fast", {"scaled": False, "turns": 0}) if kind == "k-means" else (kind, {})
        )
        recipe = VQRecipe.from_preset(preset, bits=int(bits), **changes)
        measurement = Measurement()
        if recipe.calibrated:
            teacher = dit_teacher(
                model, scheduler(), options.pictures, options.steps, guidance=GUIDANCE
            )
            measurement = Measurement(teacher=teacher)
        report = vq(source, target, recipe, measurement)
    rows = [row for row in report.rows if row.action != "keep"]
    weights = sum(math.prod(source.shapes[f"{row.name}.weight"]) for row in rows)
    return load_quantized(target, torch.float32), 8 * sum(row.bytes_after for row in rows) / weights


def one(arm: str, model: nn.Module, known: dict, options: argparse.Namespace) -> dict:
    """An arm's row."""
    began = time.process_time()
    kind, _, bits = arm.rpartition(" ")
    if kind in GROUPS:
        other, size = rounded(model, known["inputs"], int(bits), GROUPS[kind])
    else:
        other, size = quantized(model, arm, options)
    seconds = time.process_time() - began
    decibels = layer_decibels(model, other, known["inputs"])
    pictures, labels = drawn(other, options.count, options.steps, seed=7)
    return {
        "arm": arm,
        "bits_per_weight": size,
        "layer_db_median": decibels[len(decibels) // 2],
        "layer_db_worst": decibels[0],
        "output_db": output_decibels(model, other, known["calls"]),
        "psnr": psnr(known["pictures"], pictures),
        "obeys": obeyed(pictures, labels),
        "cpu_seconds": seconds,
    }


def run(options: argparse.Namespace) -> None:
    """Every arm's row, written down as soon as it is there."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    facts = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    model, training = trained(options)
    job = VQJob.prepare(
        dit_source(model), options.scratch / "plan.safetensors", VQRecipe.from_preset("fast")
    )
    pictures, labels = drawn(model, options.count, options.steps, seed=7)
    known = {"inputs": inputs_of(model, job.quantized_names), "pictures": pictures}
    known["calls"] = calls_of(model)
    facts |= {
        "command": "python tests/bench/bench_dit.py",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "pictures": options.count,
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "obeys_unquantized": obeyed(pictures, labels),
    }
    if training:
        facts["training"] = training
    print({key: value for key, value in facts.items() if key != "rows"}, flush=True)
    for arm in options.arms:
        row = one(arm, model, known, options)
        facts["rows"] = [kept for kept in facts["rows"] if kept["arm"] != arm] + [row]
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        print(
            {key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "dit.json")
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument("--training-steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=30, help="pictures that are compared")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM")
    parser.add_argument("--pictures", type=int, default=8, help="to calibrate on")
    parser.add_argument("--scratch", type=Path, help="keeps the trained model and the files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = options.scratch or Path(scratch)
        run(options)


if __name__ == "__main__":
    main()
