"""The same pictures on other machines: which stay equal bit for bit, and how far the others are.

    python tests/bench/bench_machines.py
    python tests/bench/bench_machines.py --avx512 FOLDER

A machine is a process of its own that draws the same prompts and seeds from the same files of the
demo model: with other kernels of ours, other instruction sets in torch and its libraries, another
number of threads. The first, this machine as it is, is what the others are compared with. torch,
MKL and oneDNN are held to older instructions by their own switches (ATEN_CPU_CAPABILITY, MKL_CBWR,
ONEDNN_MAX_CPU_ISA). FOLDER has a `nibble_kernels` whose AVX-512 runs in software, built as
tests/kernels/sanitize/test_avx512_by_simde.py builds it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import machine
from bench.bench_w4a8 import with_activations
from nibble.demo import pictures, prompts, run
from nibble.kernels.backends import native
from nibble.quant import diffusers as models
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe
from plain import plain_torch

OUT = Path(__file__).with_name("results") / "machines.json"
FILES = {  # file → its recipe; None: the 16-bit model
    "16-bit": None,
    "4-bit": Recipe.from_preset("fast"),
    "w4a8": Recipe.from_preset("fast", format="svdquant_w4a8"),
    "3-bit": VQRecipe.from_preset("fast", bits=3),
}
MODELS = {  # what is drawn with → (file, bits of its activations where it lets one choose)
    "16 bit": ("16-bit", None),
    "4 bit": ("4-bit", 4),
    "4 bit, 8-bit activations": ("4-bit", 8),
    "svdquant_w4a8": ("w4a8", None),
    "3 bit": ("3-bit", None),
}
OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
HERE = "this machine"
MACHINES: dict[str, dict] = {
    HERE: {},
    "the same again": {},
    "two threads": {"threads": 2},
    "our kernels without AVX2 (portable C++)": {"isa": "portable"},
    "plain torch in their place": {"plain": True},
    "torch without AVX2, our kernels as here": {"env": {"ATEN_CPU_CAPABILITY": "default"}},
    "MKL and oneDNN without AVX2, our kernels as here": {
        "env": {key: OLD[key] for key in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA")}
    },
    "nothing with AVX2 (torch, its libraries, our kernels)": {"env": OLD, "isa": "portable"},
    "nothing with AVX2, plain torch": {"env": OLD, "plain": True},
}
BY_AVX512 = "our kernels with AVX-512 VNNI (in software)"


# ---- one machine, in a process of its own --------------------------------------------------------


def draw(folder: Path, how: dict, count: int, seeds: int) -> tuple[dict[str, torch.Tensor], dict]:
    """(model → pictures, float32 (count * seeds, 64, 64, 3), each drawn alone as a worker does;
    what drew them).
    """
    torch.set_num_threads(how.get("threads", 1))
    vae, drawn = pictures.load_vae(), {}
    asked = [(prompt, seed) for prompt in prompts.SCORED[:count] for seed in range(seeds)]
    with contextlib.ExitStack() as stack:
        if how.get("plain"):
            stack.enter_context(plain_torch())
        elif native.module()[0] is None:
            raise SystemExit("no compiled kernels here: pip install ./kernels")
        elif "isa" in how:
            stack.enter_context(held_to(how["isa"]))
        for name, (file, bits) in MODELS.items():
            model = opened(folder, file, bits)
            latents = [pictures.sample(model, [prompt], [seed]) for prompt, seed in asked]
            drawn[name] = torch.cat([pictures.decode(vae, one) for one in latents])
        return drawn, facts()


def held_to(isa: str) -> contextlib.AbstractContextManager:
    """Our kernels with one instruction set. Raises ValueError for one that they do not have."""
    placed, number = native.place, native.ISAS[isa]
    return mock.patch.object(
        native, "place", lambda device, isa=0: placed(device, isa) | {"isa": isa or number}
    )


def opened(folder: Path, file: str, bits: int | None) -> torch.nn.Module:
    if FILES[file] is None:
        return pictures.load_flux()
    model = models.load_quantized(folder / f"{file}.safetensors", torch.float32)
    return model if bits is None else with_activations(model, bits)


def facts() -> dict:
    """What this process computes with."""
    module, why = native.module()
    return {
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "kernels": list(module.cpu_isas()) if module else why,
    }


# ---- all of them ---------------------------------------------------------------------------------


def on(name: str, how: dict, folder: Path, options: argparse.Namespace) -> tuple[dict, dict]:
    """(the machine's pictures, its facts)."""
    out = folder / "drawn.pt"
    command = [sys.executable, __file__, "--draw", str(out), "--folder", str(folder)]
    command += ["--how", json.dumps(how)]
    command += ["--prompts", str(options.prompts), "--seeds", str(options.seeds)]
    paths = [str(path) for path in (how.get("site"), os.environ.get("PYTHONPATH")) if path]
    env = os.environ | how.get("env", {}) | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{name}: {result.stderr[-2000:]}")
    return torch.load(out), json.loads(result.stdout.splitlines()[-1])


def compared(drawn: torch.Tensor, with_: torch.Tensor) -> dict:
    """How many are equal bit for bit: as computed, and as saved in 8 bits a channel; and the PSNR
    in dB of those that are not, None where there is none.
    """
    levels = [(each * 255).round().byte() for each in (drawn, with_)]
    found = {
        "pictures": len(drawn),
        "equal": sum(map(torch.equal, drawn, with_)),
        "equal as saved": sum(map(torch.equal, *levels)),
        "largest difference of levels": int((levels[0].int() - levels[1].int()).abs().max()),
    }
    errors = (drawn.double() - with_.double()).square().mean((1, 2, 3))
    each = -10 * errors[errors > 0].log10()
    return found | {
        "psnr": each.mean().item() if len(each) else None,
        "worst psnr": each.min().item() if len(each) else None,
    }


def show(name: str, row: dict) -> None:
    print(name)
    for model, found in row["models"].items():
        line = f"{found['equal']} of {found['pictures']} equal, {found['equal as saved']} as saved"
        if found["psnr"] is not None:
            line += f"; the others {found['psnr']:.1f} dB, worst {found['worst psnr']:.1f}"
        print(f"    {model:26s} {line}", flush=True)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Writes the results anew after each machine."""
    for name, recipe in FILES.items():
        if recipe is not None:
            run.quantize(folder / f"{name}.safetensors", recipe)
    machines = dict(MACHINES)
    if options.avx512:
        machines[BY_AVX512] = {"site": str(options.avx512.resolve()), "isa": "avx512_vnni"}
    reference, of_here = on(HERE, machines.pop(HERE), folder, options)
    wide = compared(reference["4 bit, 8-bit activations"], reference["4 bit"])
    results = {
        "environment": machine.describe_cpu(),
        "prompts": options.prompts,
        "seeds": options.seeds,
        HERE: of_here,
        "8-bit activations against 4-bit ones, both here": wide,
        "rows": [],
    }
    for name, how in machines.items():
        drawn, found = on(name, how, folder, options)
        models_ = {model: compared(drawn[model], reference[model]) for model in MODELS}
        how = {key: value for key, value in how.items() if key != "site"}
        row = {"machine": name, "how": how, "facts": found, "models": models_}
        results["rows"].append(row)
        show(name, row)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--prompts", type=int, default=len(prompts.SCORED))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--avx512", type=Path, help="a folder with nibble_kernels made by SIMDe")
    for name in ("--draw", "--folder", "--how"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.draw:
        how = json.loads(options.how)
        drawn, found = draw(Path(options.folder), how, options.prompts, options.seeds)
        torch.save(drawn, options.draw)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


if __name__ == "__main__":
    main()
