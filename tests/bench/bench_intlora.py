"""IntLoRA beside float LoRA and QLoRA: a new concept taught to the demo model at 4-bit weights;
conversion of an ordinary LoRA; sizes; cost.

    python tests/bench/bench_intlora.py            all of it, about 20 minutes on one core
    python tests/bench/bench_intlora.py --parts convert cost
    python tests/bench/bench_intlora.py --parts teach --group 64 --out
    tests/bench/results/intlora-group64.json

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
import ctypes
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import concept
from nibble.demo import pictures, prompts, run, scorer
from nibble.demo.train import PatchEncoder
from nibble.quant import diffusers as models
from nibble.quant.calibration import recorder
from nibble.quant.intlora import file as files
from nibble.quant.intlora import train
from nibble.quant.intlora.convert import ModuleChange, Options, convert  # noqa: E402
from nibble.quant.intlora.linear import Grid  # noqa: E402
from nibble.quant.intlora.merge import branch, merge, unmerged
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.merge.refit import fold_into_branch
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights import linears
from nibble.quant.weights.modules import as_module

RESULTS = Path(__file__).resolve().parent / "results"
PARTS = ["teach", "svdquant", "convert", "cost"]
ARMS = {
    "float LoRA": None,
    "QLoRA": "qlora",
    "IntLoRA MUL": "mul",
    "IntLoRA SHIFT": "shift",
    "SHIFT-ADD": "shift_add",
}


class FloatLoRA(torch.nn.Module):
    """x W^T + b + (x down^T) up^T."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, rank: int, generator: torch.Generator
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.lora_down = torch.nn.Parameter(
            (torch.rand(rank, weight.shape[1], generator=generator) * 2 - 1)
            / weight.shape[1] ** 0.5
        )
        self.lora_up = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, x):
        return (
            torch.nn.functional.linear(x, self.weight, self.bias)
            + (x @ self.lora_down.T) @ self.lora_up.T
        )


def names_of(flux) -> list[str]:
    """The linears that are adapted: attention and feed-forward of every block."""
    return [name for name in recorder.find_linears(flux) if "blocks" in name and "norm" not in name]


class Bench:
    """Model, data and options shared by all arms."""

    def __init__(self, options):
        self.options = options
        # before the world grows: its components are fitted to the world
        self.encoder = PatchEncoder(np.random.default_rng(0))
        concept.extend_world()

    def loss(self, flux, share: float, batch: int):
        """generator → flow-matching loss of a batch; share: of concept pictures in it."""

        def value(generator: torch.Generator) -> torch.Tensor:
            rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
            scenes, images = concept.batch(batch, rng, share)
            latents = self.encoder.latents(images)
            noise, draws = (
                torch.randn(latents.shape, generator=generator),
                torch.randn(batch, generator=generator),
            )
            t, guidance = (
                torch.sigmoid(0.4 + 1.2 * draws),
                1 + 4 * torch.rand(batch, generator=generator),
            )
            words = prompts.embed(prompts.word_indices([str(scene) for scene in scenes]))
            velocity = models.velocity(
                flux, torch.lerp(latents, noise, t[:, None, None, None]), t, *words, guidance
            )
            return torch.nn.functional.mse_loss(velocity, noise - latents)

        return value

    @torch.no_grad()
    def score(self, flux) -> dict:
        """Losses and accuracies of a model."""
        row = {}
        for name, share, seed in (("loss", 1.0, 10**9), ("prior loss", 0.0, 2 * 10**9)):
            draw = self.loss(flux, share, 32)
            row[name] = float(
                np.mean(
                    [
                        draw(torch.Generator().manual_seed(seed + i)).item()
                        for i in range(self.options.batches)
                    ]
                )
            )
        asked = concept.scenes()[:: 36 // self.options.prompts]
        row |= self.accuracy(flux, asked, "concept")
        return row

    def accuracy(self, flux, scenes, kind: str) -> dict:
        latents = pictures.sample(
            flux, [str(scene) for scene in scenes], [7000 + i for i in range(len(scenes))]
        )
        found = scorer.score(self.read(latents), scenes)
        return {f"{kind} {fact}": found[fact] for fact in ("all", "colour", "shape", "place")}

    def read(self, latents: torch.Tensor) -> np.ndarray:
        """Latents (batch, 16, 8, 8) → pictures (batch, 64, 64, 3): the inverse of the encoder on
        its 16 components.
        """
        e = self.encoder
        values = (
            latents.permute(0, 2, 3, 1).reshape(-1, 16) / e.scale @ e.components.reshape(16, 192)
            + e.mean.flatten()
        )
        patches = values.reshape(-1, 8, 8, 3).permute(0, 3, 1, 2).reshape(len(latents), 64, 192).mT
        return (
            torch.nn.functional.fold(patches, (64, 64), 8, stride=8)
            .clamp(0, 1)
            .permute(0, 2, 3, 1)
            .numpy()
        )

    def readable(self) -> dict:
        """The scorer on rendered pictures that went through the encoder and its inverse: the
        ceiling.
        """
        rng = np.random.default_rng(1)
        return {
            kind: scorer.score(self.read(self.encoder.latents(images)), scenes)["all"]
            for kind, (scenes, images) in (
                ("concept", concept.batch(72, rng, 1.0)),
                ("prior", concept.batch(72, rng, 0.0)),
            )
        }

    def attach(self, flux, arm: str | None) -> dict:
        o = self.options
        if arm in ("mul", "shift", "shift_add"):
            return train.attach(
                flux,
                names_of(flux),
                train.AdapterOptions(
                    arm, o.rank, grid=Grid(bits=o.bits, group=o.group, lora_bits=o.lora_bits)
                ),
            )
        layers = {}
        flux.requires_grad_(False)
        for i, name in enumerate(names_of(flux)):
            old = flux.get_submodule(name)
            weight = (
                old.weight.detach()
                if arm is None
                else IntBase.from_weight(old.weight.detach(), o.bits, o.group).weight()
            )
            layers[name] = FloatLoRA(
                weight, old.bias.detach(), o.rank, torch.Generator().manual_seed(i)
            )
            linears.replace(flux, name, layers[name])
        return layers

    def teach(self, arm: str | None) -> tuple[dict, torch.nn.Module, list[float]]:
        """Trains an arm: layers, model, losses."""
        flux = pictures.load_flux()
        layers = self.attach(flux, arm)
        losses = train.train(
            layers,
            self.loss(flux, 0.75, self.options.batch),
            train.Options(steps=self.options.steps, lr=self.options.lr),
            progress=lambda step, steps, loss: (
                step % 25 or print(f"  {step}/{steps} {loss:.4f}", flush=True)
            ),
        )
        return layers, flux, losses


def plain(flux, weights: dict) -> None:
    """Puts merged weights, (N, K) and bias by name, into a model as ordinary linears."""
    for name, (weight, bias) in weights.items():
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight, layer.bias = (
            torch.nn.Parameter(weight, False),
            torch.nn.Parameter(bias, False),
        )
        linears.replace(flux, name, layer)


def teach_all(bench: Bench, save) -> list[dict]:
    """Every arm, trained and scored as it would be deployed."""
    flux = pictures.load_flux()
    rows = [{"arm": "16 bit, untrained"} | bench.score(flux)]
    kept = {name: flux.get_submodule(name) for name in names_of(flux)}
    plain(
        flux,
        {
            name: (
                IntBase.from_weight(
                    old.weight.detach(), bench.options.bits, bench.options.group
                ).weight(),
                old.bias.detach(),
            )
            for name, old in kept.items()
        },
    )
    rows.append({"arm": "4 bit, untrained"} | bench.score(flux))
    save(rows)
    for arm in bench.options.arms:
        layers, flux, losses = bench.teach(ARMS[arm])
        facts = {"train loss, last 25": float(np.mean(losses[-25:]))}
        if ARMS[arm] in ("mul", "shift", "shift_add"):
            rows.append({"arm": arm} | facts | integer_arm(bench, flux, layers))
        else:
            rows.append({"arm": arm} | facts | bench.score(flux))
        if ARMS[arm] == "qlora":
            save(rows)
            joined = {
                name: IntBase.from_weight(
                    layer.weight + layer.lora_up.detach() @ layer.lora_down.detach(),
                    bench.options.bits,
                    bench.options.group,
                )
                for name, layer in layers.items()
            }
            plain(
                flux, {name: (joined[name].weight(), layer.bias) for name, layer in layers.items()}
            )
            rows.append({"arm": "QLoRA + PTQ"} | bench.score(flux))
        save(rows)
    return rows


def integer_arm(bench: Bench, flux, layers: dict) -> dict:
    """Merges every layer into integers, checks that nothing changed, and scores the merged
    model.
    """
    adapter, widths, weights, equal = (
        train.adapter(layers, steps=bench.options.steps),
        set(),
        {},
        True,
    )
    for name, layer in layers.items():
        merged = merge(layer.base, [(adapter.layers[name], 1.0)])
        equal &= torch.equal(merged.base.weight(), unmerged(layer.base, adapter.layers[name]))
        widths.add(merged.base.bits)
        weights[name] = merged.base.weight(), layer.bias
    plain(flux, weights)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "adapter.safetensors"
        files.save(adapter, target)
        size = target.stat().st_size
    floats = sum(2 * (layer.lora_up.numel() + layer.lora_down.numel()) for layer in layers.values())
    return {
        "merged equals unmerged": equal,
        "merged bits": sorted(widths),
        "file bytes": size,
        "bf16 LoRA bytes": floats,
    } | bench.score(flux)


def on_svdquant(bench: Bench, save) -> None:
    """SHIFT-ADD trained beside the kernel of the demo FLUX at W4A4 (preset fast), then folded into
    the 16-bit branch: joined, and at the old rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        run.quantize(Path(folder) / "demo.safetensors", Recipe.from_preset("fast"))
        flux = models.load_quantized(Path(folder) / "demo.safetensors", torch.float32)
    rows = [{"arm": "SVDQuant W4A4, untrained"} | bench.score(flux)]
    save(rows)
    names = [
        name for name in names_of(flux) if hasattr(flux.get_submodule(name), "weight_proj_down")
    ]
    layers = train.attach(flux, names, train.AdapterOptions("shift_add", bench.options.rank))
    train.train(
        layers,
        bench.loss(flux, 0.75, bench.options.batch),
        train.Options(steps=bench.options.steps, lr=bench.options.lr),
        progress=lambda step, steps, loss: (
            step % 25 or print(f"  {step}/{steps} {loss:.4f}", flush=True)
        ),
    )
    rows.append({"arm": "SHIFT-ADD beside W4A4"} | bench.score(flux))
    save(rows)
    adapter = train.adapter(layers)
    for label, rank in (("joined, rank 32 + 16", None), ("cut back to rank 32", 32)):
        shares = []
        for name, layer in layers.items():
            weight = layer.inner.quantized()
            folded, share = fold_into_branch(
                weight, branch(layer.base, [(adapter.layers[name], 1.0)]), rank
            )
            linears.replace(flux, name, as_module(folded))
            shares.append(share)
        rows.append(
            {"arm": f"folded into the branch, {label}", "change kept": float(np.mean(shares))}
            | bench.score(flux)
        )
        save(rows)


def conversion(bench: Bench, rows: list) -> dict:
    """An ordinary LoRA, trained on the 16-bit model, converted: share of its change kept against k,
    at several strengths.
    """
    layers, _, _ = bench.teach(None)
    bases = {name: IntBase.from_weight(layer.weight, 4, 64) for name, layer in layers.items()}
    changes = [
        ModuleChange.of_lora(name, layer.lora_up.detach(), layer.lora_down.detach())
        for name, layer in layers.items()
    ]
    found = []
    for strength in (0.1, 0.3, 1.0):
        result = convert(
            changes,
            bases,
            "the bench's LoRA",
            Options(strength=strength, ks=tuple(range(0, 13, 2))),
        )
        found.append(
            {
                "strength": strength,
                "mean |D|/|W|": float(np.mean([r.size for r in result.rows])),
                "kept": result.retention,
                "kept, worst layer": min(r.retention for r in result.rows),
                "nearest rounding keeps": float(np.mean([r.nearest for r in result.rows])),
                "k chosen": sorted({r.k for r in result.rows}),
                "merged bits": sorted({r.bits for r in result.rows}),
                "kept by k": {
                    k: float(np.mean([r.by_k[k] for r in result.rows])) for k in range(0, 13, 2)
                },
                "adapter bytes": result.adapter.nbytes,
                "bf16 LoRA bytes": sum(2 * (c.up.numel() + c.down.numel()) for c in changes),
            }
        )
        print({key: value for key, value in found[-1].items()}, flush=True)
    rows.extend(found)


def memory(kind: str) -> float:
    """VmRSS (now) or VmHWM (the peak since it was reset), MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def kept_for_backward(value) -> float:
    """MB of tensors that one loss keeps for its backward pass, the model's own weights aside."""
    seen: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value(torch.Generator().manual_seed(1)).backward()
    return sum(seen.values()) / 2**20


def measure(bench: Bench, arm: str, checkpointing: bool, send) -> None:
    """Sends an arm's memory and time; run in a process of its own."""
    flux = pictures.load_flux()
    layers = bench.attach(flux, ARMS[arm])
    value = bench.loss(flux, 0.75, bench.options.batch)
    kept = kept_for_backward(value)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, seconds, last = memory("VmRSS"), [], time.process_time()
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks] if checkpointing else []
    for _ in train.steps(layers, value, train.Options(steps=6), checkpointed=blocks):
        seconds.append(time.process_time() - last)
        last = time.process_time()
    row = {
        "arm": arm,
        "checkpointing": checkpointing,
        "peak MB over the attached model": memory("VmHWM") - before,
        "CPU seconds a step": float(np.median(seconds[1:])),
    }
    send(row if checkpointing else row | {"MB kept for backward": kept})


def cost(bench: Bench, save) -> None:
    """Each arm's cost, each in a fork of its own: seconds are of one core's work, whatever else the
    machine does.
    """
    rows, context = [], multiprocessing.get_context("fork")
    for arm in bench.options.arms:
        for checkpointing in (False, True):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(bench, arm, checkpointing, sender.send))
            process.start()
            sender.close()
            rows.append(receiver.recv())
            process.join()
            print(rows[-1], flush=True)
            save(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "intlora.json")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
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
    bench = Bench(options)
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
        if part in ("teach", "svdquant"):
            print(
                {
                    key: round(value, 4) if isinstance(value, float) else value
                    for key, value in rows[-1].items()
                },
                flush=True,
            )

    facts["readable"] = bench.readable()
    if "teach" in options.parts:
        teach_all(bench, lambda rows: save("teach", rows))
    if "svdquant" in options.parts:
        on_svdquant(bench, lambda rows: save("svdquant", rows))
    if "convert" in options.parts:
        rows: list = []
        conversion(bench, rows)
        save("convert", rows)
    if "cost" in options.parts:
        cost(bench, lambda rows: save("cost", rows))


if __name__ == "__main__":
    main()
