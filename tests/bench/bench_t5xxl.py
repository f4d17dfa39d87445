"""A text encoder of the published size, end to end: T5-XXL with random weights (4.7 B) in fp8,
quantized, opened by ComfyUI, and a prompt encoded.

    COMFYUI_PATH=… python tests/bench/bench_t5xxl.py --folder DIR [--blocks 24] [--out FILE.json]

Names, shapes and dtypes are those of t5xxl_fp8_e4m3fn_scaled.safetensors: linears in fp8, each with
a float32 `scale_weight`; the table and norms in float32. Every stage is a process of its own, and
its memory that process's peak (VmHWM), everything counted, pages of the mapped file too:

    quantize   python -m nibble quantize, preset fast
    16 bit     CLIPLoader on the fp8 file: what the others are compared with
    stock      CLIPLoader on the 4-bit file
    ours       Load Quantized CLIP on it, checksums too where all blocks were quantized

--blocks: so many of the 24 are made and quantized, and stand for the others too; `whole_seconds`
and `whole_cpu_seconds` are then the measured ones times how many more weights the whole has.

Random weights say what the sizes cost and that the whole way works, not what 4 bits do to trained
weights. Needs 9 GB of disk.
"""

import argparse
import json
import math
import os
import re
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
PLAIN, SMALL = "t5xxl_fp8", "t5xxl-4bit"
BLOCKS = 24
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


def repeat(path: Path, whole: Path, blocks: int) -> None:
    """The file of a T5 of `blocks` blocks as one of 24: those blocks again and again, without
    metadata, whose checksums would be of the few.
    """
    if blocks == BLOCKS:
        path.rename(whole)
        return
    header, start = _header(path)
    table, pieces, end = {}, [], 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, stop = entry["data_offsets"]
        for copy in _copies(name, blocks):
            table[copy] = entry | {"data_offsets": [end, end + stop - begin]}
            pieces.append((start + begin, stop - begin))
            end += stop - begin
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "rb") as source, open(whole, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin, length in pieces:
            source.seek(begin)
            file.write(source.read(length))


def _header(path: Path) -> tuple[dict, int]:
    """(a safetensors file's JSON, where its tensors begin)."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _copies(name: str, blocks: int) -> list[str]:
    """Under which names a tensor of few blocks stands in the whole; the table of positions is the
    first block's alone.
    """
    found = re.fullmatch(r"encoder\.block\.(\d+)\.(.*)", name)
    if found is None or "relative_attention_bias" in name:
        return [name]
    numbers = range(int(found[1]), BLOCKS, blocks)
    return [f"encoder.block.{number}.{found[2]}" for number in numbers]


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


def quantize(source: Path, target: Path) -> dict:
    """`python -m nibble quantize` in a process of its own."""
    command = [sys.executable, "-m", "nibble", "quantize", "--preset", "fast"]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        # the checkout under the name `nibble`, whatever its folder is called
        Path(home, "nibble").symlink_to(checkout.ROOT)
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        subprocess.run([*command, str(source), str(target)], check=True, env=environment)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join(["python", *command[1:]]),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": used.ru_maxrss * 1024,
        "bytes_before": source.stat().st_size,
        "bytes_after": target.stat().st_size,
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


def measured(folder: Path, blocks: int) -> dict:
    """All stages; the files are gone afterwards. Two large files are never there at once where few
    blocks stand for all.
    """
    parts = {name: folder / f"{name}-part.safetensors" for name in (PLAIN, SMALL)}
    whole = {name: folder / f"{name}.safetensors" for name in (PLAIN, SMALL)}
    shapes = encoder_shapes.REAL["T5-XXL"]
    few = {name: shape for name, shape in shapes.items() if name in _of_blocks(shapes, blocks)}
    try:
        write(parts[PLAIN], few)
        load = os.getloadavg()[0]
        rows = {"quantize": quantize(parts[PLAIN], parts[SMALL])}
        repeat(parts[PLAIN], whole[PLAIN], blocks)
        rows["16 bit"], plain = encoded_apart(folder, whole[PLAIN].name, "stock")
        whole[PLAIN].unlink()
        repeat(parts[SMALL], whole[SMALL], blocks)
        for loader in ("stock", "ours"):
            row, found = encoded_apart(folder, whole[SMALL].name, loader)
            rows[loader] = row | closeness(plain, found)
    finally:
        for path in (*parts.values(), *whole.values()):
            path.unlink(missing_ok=True)
    times = sum(map(math.prod, shapes.values())) / sum(map(math.prod, few.values()))
    for name in ("seconds", "cpu_seconds"):
        rows["quantize"][f"whole_{name}"] = round(rows["quantize"][name] * times)
    return {"blocks": blocks, "rows": rows, "load_average": load}


def _of_blocks(shapes: encoder_shapes.Shapes, blocks: int) -> set[str]:
    """Names of the tensors of the first blocks, and of what belongs to none."""
    firsts = tuple(f"encoder.block.{number}." for number in range(blocks))
    return {name for name in shapes if ".block." not in name or name.startswith(firsts)}


def main() -> None:
    """Writes, quantizes, encodes, compares; prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="for 9 GB of files")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--encode", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.encode:
        name, loader, out = options.encode
        print(json.dumps(encode(options.folder, name, loader, Path(out))))
        return
    result = measured(options.folder, options.blocks) | {
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
