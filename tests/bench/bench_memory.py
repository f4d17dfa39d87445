"""The memory plan beside measured peaks, on a CPU: COMFYUI_PATH=~/ComfyUI python -m nibble bench
memory --model flux1-dev-svdq.safetensors.

Each stage runs in a process of its own, in ComfyUI's own classes and at full width, with random
weights; the peak is the resident memory (VmHWM of /proc, reset before the work), so Linux only.

    program  Python, torch, ComfyUI and Nibble, imported
    count    a step of a 16-bit FLUX.1 dev of four blocks, and decoding, on tensors without memory:
      the most that is alive at once, as torch's flash attention leaves it, in bfloat16 and float32
    encode   T5-XXL of a few blocks reads 512 tokens: what a block takes does not depend on how many
      there are
    sample   one step with --model at each of --sizes
    decode   FLUX.1's VAE, --size pixels
    picture  all of it at once, as a workflow holds it: T5-XXL in 4 bits and CLIP-L read 512 tokens,
      --model takes one step at --size, the VAE decodes tiles, and with --whole the picture at once

`held` is what the stage holds before the work, `work` how much more at its peak; `plan` has the
same of quant/files/memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_in_process
from bench import machine

STAGES = ("program", "count", "encode", "sample", "decode", "picture")
BLOCKS = 2  # of T5


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """From now on VmHWM is of what comes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measured(work) -> dict:
    """What was held before `work()`, and how much more during it."""
    held = resident("VmRSS")
    forget_peak()
    began = time.monotonic()
    with torch.inference_mode():  # as ComfyUI runs its nodes
        work()
    peak = resident("VmHWM")
    return {
        "held": held,
        "work": peak - held,
        "peak": peak,
        "seconds": round(time.monotonic() - began, 1),
    }


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are alive; `peak`: the most at once."""

    def __init__(self):
        super().__init__()
        self.peak = self.bytes = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.bytes += size

        def gone() -> None:
            self.known.discard(place)
            self.bytes -= size

        weakref.finalize(storage, gone)


# ---- the stages, each in its process


def encode(_options) -> dict:
    import comfy
    from comfy.text_encoders import t5

    from nibble.quant.files.memory import weights

    place = Path(comfy.sd.__file__).parent / "text_encoders" / "t5_config_xxl.json"
    config = json.loads(place.read_text("utf-8")) | {"num_layers": BLOCKS}
    model = t5.T5(config, torch.float16, "cpu", comfy.ops.manual_cast)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    tokens = torch.randint(0, 1000, (1, weights.TOKENS))
    with torch.inference_mode():
        mask = torch.ones(1, weights.TOKENS)
        found = measured(lambda: model(tokens, mask, dtype=torch.float32))
    return found | {"plan": {"work": weights.published_encoder("t5-xxl").work}}


def count(options) -> dict:
    from torch._subclasses.fake_tensor import FakeTensorMode

    import full_size_models
    from nibble.quant.files.memory import comfyui, published

    blocks = {"depth": 2, "depth_single_blocks": 2}
    factor = published.models()["flux1-dev"]["factor"]
    side = options.size // 8
    rows = {}
    for dtype in (torch.bfloat16, torch.float32):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = full_size_models.model_of("Flux", dtype, **blocks)
            sizes = {"x": (1, 16, side, side), "timestep": (1,), "context": (1, 512, 4096)}
            sizes |= {"y": (1, 768), "guidance": (1,)}
            inputs = {name: torch.empty(size, dtype=dtype) for name, size in sizes.items()}
            alive = Alive()
            with torch.inference_mode(), alive:
                model(**inputs)
        plan = {"work": comfyui.sampling(factor, side * side, dtype.itemsize)}
        rows[str(dtype)] = {"work": alive.peak, "plan": plan}
        rows[f"decode, {dtype}"] = _count_decoding(options.size, dtype)
    return rows


def _count_decoding(size: int, dtype: torch.dtype) -> dict:
    import published_sizes
    from nibble.quant.files.memory.weights import published_vae

    model = published_sizes.vae("flux").first_stage_model.to(dtype)
    latent = torch.empty(1, 16, size // 8, size // 8, dtype=dtype, device="meta")
    alive = Alive()
    with torch.inference_mode(), alive:
        model.decode(latent)
    plan = published_vae("flux").decoder.bytes(1, (size, size), dtype.itemsize)
    return {"work": alive.peak, "plan": {"work": plan}}


def sample(options) -> dict:
    from nibble.nodes.bridge.quantized import loading
    from nibble.quant.cli.plan import model
    from nibble.quant.files.memory.stages import Loadout, Work, stages

    loadout = Loadout(model(str(options.model)))
    rows = {}
    for size in options.sizes:
        patcher = loading.load(options.model)
        text = torch.randn(1, 512, 4096) * 0.25
        facts = {"pooled_output": torch.randn(1, 768), "guidance": 3.5}
        found = measured(one_step(patcher, [[text, facts]], size))
        (stage,) = stages(loadout, Work(size=(size, size), card=None, ram=10**12))
        work = sum(part.bytes for part in stage.ram if part.kind == "work")
        plan = {"work": work, "held": stage.ram_peak - work, "peak": stage.ram_peak}
        rows[str(size)] = found | {"plan": plan}
        del patcher
    return rows


def one_step(patcher, conditioning: list, size: int) -> Callable[[], object]:
    """A step of FLUX.1 at so many pixels, to be run."""
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds({"positive": conditioning})
    noise = torch.randn(1, 16, size // 8, size // 8)
    euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0])
    return lambda: guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True)


def flux_vae():
    """FLUX.1's VAE with random weights, in ComfyUI."""
    import comfy.sd

    import published_sizes

    shapes = published_sizes.VAES["flux"]
    logging.disable(logging.WARNING)  # it names every weight that is not there
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    vae = comfy.sd.VAE(sd=tensors, dtype=torch.float32)
    for parameter in vae.first_stage_model.parameters():
        torch.nn.init.normal_(parameter, std=0.01)
    return vae


def decoding(vae, size: int, tiled: bool) -> Callable[[], object]:
    """A picture to be decoded."""
    latent = torch.randn(1, 16, size // 8, size // 8)
    return (lambda: vae.decode_tiled(latent, 64, 64, 8)) if tiled else lambda: vae.decode(latent)


def decode(options) -> dict:
    from nibble.quant.files.memory.stages import DECODE

    found = measured(decoding(flux_vae(), options.size, options.tiled))
    return found | {"plan": planned("flux1-dev", options.size, options.tiled)[DECODE]}


def planned(model: str, size: int, tiled: bool, encoders: list[str] = ()) -> dict[str, dict]:
    """The plan of each stage on a CPU: what it takes, and what it holds at most."""
    from nibble.quant.cli import plan
    from nibble.quant.files.memory.stages import Loadout, Work, stages

    vae, read = plan.vae_weights("flux"), tuple(map(plan.encoder, encoders))
    loadout = Loadout(plan.model(model), read, vae, tiled=tiled)
    rows = {}
    for stage in stages(loadout, Work(size=(size, size), card=None, ram=10**12)):
        work = sum(part.bytes for part in stage.ram if part.kind == "work")
        rows[stage.name] = {"work": work, "held": stage.ram_peak - work, "peak": stage.ram_peak}
    return rows


def picture(options) -> dict:
    import folder_paths

    import flux_encoders
    from nibble.nodes.bridge.quantized import encoders, loading
    from nibble.quant.files.memory.stages import DECODE, ENCODE, SAMPLE

    files = flux_encoders.files(options.encoders)
    folder_paths.add_model_folder_path("text_encoders", str(options.encoders))
    encoders.register()
    clip, _ = encoders.load([path.name for path in files], verify=False)
    patcher, vae = loading.load(options.model), flux_vae()
    conditioning: list = []

    def read() -> None:
        tokens = clip.tokenize("cat " * 511)
        conditioning.extend(clip.encode_from_tokens_scheduled(tokens))
        conditioning[0][1]["guidance"] = 3.5

    step = options.step_size or options.size
    tiles, whole, stepped = (
        planned(str(options.model), size, tiled, list(map(str, files)))
        for size, tiled in ((options.size, True), (options.size, False), (step, True))
    )
    work = {
        ENCODE: (read, tiles[ENCODE]),
        SAMPLE: (lambda: one_step(patcher, conditioning, step)(), stepped[SAMPLE]),
        f"{DECODE} in tiles": (decoding(vae, options.size, True), tiles[DECODE]),
    }
    if options.whole:
        work[DECODE] = (decoding(vae, options.size, False), whole[DECODE])
    rows = {"size": options.size, "step": step}
    for name, (run, plan) in work.items():
        rows[name] = measured(run) | {"plan": plan}
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    return rows | {"tokens": conditioning[0][0].shape[1]}


def program(_options) -> dict:
    import nibble.nodes.bridge.quantized.loading  # noqa: F401
    from nibble.quant.files.memory.stages import PROGRAM

    return measured(lambda: None) | {"plan": {"held": PROGRAM}}


# ---- all of them


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "results" / "memory.json"
    )
    parser.add_argument("--model", type=Path, help="a 4-bit FLUX.1 file: `sample`, `picture`")
    parser.add_argument(
        "--encoders", type=Path, help="folder of the encoders of `picture`, made there (2.8 GB)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[256], help="pixels, for `sample`")
    parser.add_argument("--size", type=int, default=1024, help="pixels: `decode`, `picture`")
    parser.add_argument(
        "--step-size",
        type=int,
        help="pixels of the step of `picture` (--size): a small one reads all weights, too",
    )
    parser.add_argument("--tiled", action="store_true", help="`decode` in tiles")
    parser.add_argument("--whole", action="store_true", help="`picture`: decode it whole, too")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--name", help="of the rows in --out (default: the stage's)")
    parser.add_argument("--alone", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        _start(options.alone == "count")
        print(json.dumps(globals()[options.alone](options)))
        return
    out = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    out["environment"] = machine.describe_cpu()
    for stage in options.stages:
        needs = {"sample": (options.model,), "picture": (options.model, options.encoders)}
        if None in needs.get(stage, ()):
            continue
        row = _in_a_process(stage)
        out[options.name or stage] = row
        print(options.name or stage, json.dumps(row, indent=1), flush=True)
        options.out.write_text(json.dumps(out, indent=1, default=str) + "\n", encoding="utf-8")


def _start(torchs_attention: bool) -> None:
    """ComfyUI as it is on a CPU, or with torch's own attention, as on a GPU."""
    if torchs_attention:
        sys.path.insert(0, comfyui_in_process.COMFYUI)
        import comfy.cli_args

        comfy.cli_args.args.use_pytorch_cross_attention = True
        sys.path.pop(0)  # by which `start` knows that it was called
    comfyui_in_process.start()


def _in_a_process(stage: str) -> dict:
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", stage]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
