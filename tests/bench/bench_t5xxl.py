"""A text encoder of the published size, end to end: T5-XXL with random weights (4.7 B) in fp8,
quantized, opened by ComfyUI, and a prompt encoded.

    COMFYUI_PATH=… python tests/bench/bench_t5xxl.py --folder DIR [--out FILE.json]

Names, shapes and dtypes are those of t5xxl_fp8_e4m3fn_scaled.safetensors: linears in fp8, each with
a float32 `scale_weight`; the table and norms in float32. Every stage is a process of its own, and
its memory that process's peak (VmHWM), everything counted, pages of the mapped file too:

    quantize   python -m nibble quantize, preset fast
    16 bit     CLIPLoader on the fp8 file: what the others are compared with
    stock      CLIPLoader on the 4-bit file
    ours       Load Quantized CLIP on it, checksums too

Random weights say what the sizes cost and that the whole way works, not what 4 bits do to trained
weights. Needs 8 GB of disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout
import encoder_shapes
from bench import machine
from bench.bench_cost import memory

PROMPT = "a red fox asleep in fresh snow, seen from above, soft morning light"
SOURCE, SMALL = "t5xxl_fp8.safetensors", "t5xxl-4bit.safetensors"
_LARGEST = 448.0  # of float8_e4m3fn
_CODES = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def layout(shapes: encoder_shapes.Shapes) -> Layout:
    """Tensors of the published file: (shape, dtype) of each."""
    found: Layout = {"scaled_fp8": ((0,), torch.float8_e4m3fn)}
    for name, shape in shapes.items():
        linear = len(shape) == 2 and name != "shared.weight" and "bias" not in name
        found[name] = (shape, torch.float8_e4m3fn if linear else torch.float32)
        if linear:
            found[f"{name.removesuffix('.weight')}.scale_weight"] = ((), torch.float32)
    return found


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """float32 weights with which activations neither die nor grow; queries are small, as T5 does
    not scale its scores.
    """
    if "norm" in name:
        return torch.ones(shape)
    scale = 1.0 if name == "shared.weight" else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator).mul_(
        scale / (8 if "Attention.q." in name else 1)
    )


def write(path: Path, shapes: encoder_shapes.Shapes) -> None:
    """The file, tensor by tensor."""
    table, end, whole = {}, 0, layout(shapes)
    for name, (shape, dtype) in whole.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        offsets = [end, end + size]
        table[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        end += size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    generator = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, (shape, dtype) in whole.items():
            if name.endswith("scale_weight") or name == "scaled_fp8":
                continue  # written with its weight; empty
            tensor = values(name, shape, generator)
            scale = tensor.abs().max() / _LARGEST if dtype != torch.float32 else None
            stored = tensor if scale is None else (tensor / scale).to(dtype)
            file.write(memoryview(stored.flatten().view(torch.uint8).numpy()))
            if scale is not None:
                file.write(memoryview(scale.reshape(1).view(torch.uint8).numpy()))


def encode(folder: Path, name: str, loader: str, out: Path) -> dict:
    """In the fresh process: loads a file and encodes the prompt, which goes into `out`."""
    import comfyui_in_process

    comfyui_in_process.start(os.environ["COMFYUI_PATH"])
    import folder_paths

    import nodes
    from nibble.nodes.bridge.quantized import encoders

    encoders.register()
    folder_paths.folder_names_and_paths["text_encoders"] = ([str(folder)], {".safetensors"})
    baseline, began = memory("VmRSS"), time.perf_counter()
    if loader == "ours":
        clip, _ = encoders.load([name], "sd3")
    else:
        (clip,) = nodes.CLIPLoader().load_clip(name, "sd3")
    loaded = time.perf_counter()
    with torch.inference_mode():
        found = clip.encode_from_tokens(clip.tokenize(PROMPT)).float()
    torch.save(found, out)
    return {
        "load_seconds": round(loaded - began, 1),
        "encode_seconds": round(time.perf_counter() - loaded, 1),
        "baseline_bytes": baseline,
        "peak_bytes": memory("VmHWM"),
        "weights_bytes": clip.patcher.model_size(),
        "tokens": found.shape[1],
        "finite": bool(found.isfinite().all()),
    }


def quantize(folder: Path) -> dict:
    """`python -m nibble quantize` in a process of its own."""
    command = [sys.executable, "-m", "nibble", "quantize", "--preset", "fast"]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        # the checkout under the name `nibble`, whatever its folder is called
        Path(home, "nibble").symlink_to(checkout.ROOT)
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        files = [str(folder / SOURCE), str(folder / SMALL)]
        subprocess.run([*command, *files], check=True, env={**os.environ, "PYTHONPATH": path})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join(["python", *command[1:]]),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": used.ru_maxrss * 1024,
        "source_bytes": (folder / SOURCE).stat().st_size,
        "bytes": (folder / SMALL).stat().st_size,
    }


def encoded_apart(folder: Path, name: str, loader: str) -> tuple[dict, torch.Tensor]:
    """`encode` in a fresh process."""
    out = folder / f"{loader}-{name}.pt"
    arguments = ["--folder", str(folder), "--encode", name, loader, str(out)]
    printed = subprocess.run(
        [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    found = torch.load(out)
    out.unlink()
    return json.loads(printed.stdout.splitlines()[-1]), found


def closeness(plain: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """cosine: mean over tokens; db: signal to noise."""
    cosine = torch.nn.functional.cosine_similarity(plain, other, dim=-1).mean()
    ratio = plain.square().sum() / (other - plain).square().sum()
    return {"cosine": round(cosine.item(), 5), "db": round(10 * ratio.log10().item(), 2)}


def measured(folder: Path) -> dict:
    """All stages; the files are gone afterwards."""
    source, small = folder / SOURCE, folder / SMALL
    try:
        write(source, encoder_shapes.REAL["T5-XXL"])
        load = os.getloadavg()[0]
        rows = {"quantize": quantize(folder)}
        rows["16 bit"], plain = encoded_apart(folder, SOURCE, "stock")
        for loader in ("stock", "ours"):
            row, found = encoded_apart(folder, SMALL, loader)
            rows[loader] = row | closeness(plain, found)
    finally:
        source.unlink(missing_ok=True)
        small.unlink(missing_ok=True)
    return {"rows": rows, "load_average": load}


def main() -> None:
    """Writes, quantizes, encodes, compares; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for 8 GB of files")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--encode", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.encode:
        name, loader, out = options.encode
        print(json.dumps(encode(options.folder, name, loader, Path(out))))
        return
    result = measured(options.folder) | {
        "torch": torch.__version__,
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
    }
    for stage, row in result["rows"].items():
        print(stage, json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
