"""What Triton makes of the W4A4, W4A8 and NVFP4 kernels for GPUs that are not here: matrix
instructions, registers, spills.

    python tests/kernels/check_triton.py                 every architecture; needs Triton, no GPU
    python tests/kernels/check_triton.py --arch 89 --arch gfx1100
    python tests/kernels/check_triton.py --all           every tile, signed and unsigned codes

Exit code 1, and a line for each, where a kernel spills or has no matrix instruction. AMD's kernels
go as far as assembly: the last step is their linker's.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: E402, F401

ARCHS = ("80", "86", "89", "90", "100", "103", "120", "gfx1100", "gfx1201", "gfx90a", "gfx942")
MATRIX = re.compile(r"^(?:(?:I|H|Q|O|IG|HG|QG|UTCI|UTCH|UTCQ|UTCO)MMA|v_wmma|v_mfma|v_dot)")
SPILLS = ("STL", "LDL", "scratch_store", "scratch_load", "buffer_store", "buffer_load")
POINTERS = {"q": "i8", "weight": "i8", "ascales": "fp32", "h": "fp32"}
INTEGERS = ("M", "N", "groups", "words", "turn", "R", "stride")
SIGNS = {"signed": (True, False), "unsigned": (False, True), "both signs": (True, True)}


@dataclass
class Compiled:
    name: str
    arch: str
    registers: int = 0
    shared: int = 0
    spills: int = 0
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def matrix(self) -> dict[str, int]:
        return {name: n for name, n in self.instructions.items() if MATRIX.match(name)}


# ---- what is compiled ----------------------------------------------------------------------------


def gpu_of(arch: str):
    from nibble.kernels.backends.triton import Gpu

    return Gpu("hip" if arch.startswith("gfx") else "cuda", arch, 1)


def product(
    arch: str, tile: Any, signs: str, rank: int = 32, wide: bool = False
) -> tuple[Any, dict, dict]:
    """(kernel, its constants, its options). wide: activations of 8 bits."""
    from nibble.kernels.backends import triton_kernels, triton_w4a4

    way = triton_w4a4.way(gpu_of(arch))
    constants = dict(zip(("SIGNED", "UNSIGNED"), SIGNS[signs], strict=True))
    constants |= {"BIAS": True, "RANK": rank, "FLOATS": way.floats}
    constants |= {"PTX": way.ptx, "MAGIC": way.magic, "ROWS": tile.rows}
    constants |= {"COLUMNS": tile.columns, "STRIPE": triton_w4a4.STRIPE, "WIDE": wide}
    return triton_kernels.gemm_up, constants, {"num_warps": tile.warps, "num_stages": tile.stages}


def quantizer(
    arch: str, signs: str, rotate: bool, rank: int, wide: bool = False
) -> tuple[Any, dict, dict]:
    import triton.language as tl

    from nibble.kernels.backends import triton_kernels, triton_w4a4

    tile = triton_w4a4.quantizer_tile(rank, rotate, gpu_of(arch))
    constants = dict(zip(("SIGNED", "UNSIGNED"), SIGNS[signs], strict=True))
    constants |= {"ROTATE": rotate, "FLOATS": tl.bfloat16, "PARTS": 0}
    constants |= {"RANK": tile.columns, "ROWS": tile.rows, "WIDE": wide}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton_kernels.quantize_down, constants, options


def nvfp4_jobs(arch: str, everything: bool) -> list[tuple[str, tuple]]:
    """Those of 4-bit floats; none for what does not multiply them."""
    import triton.language as tl

    from nibble.kernels.backends import triton_nvfp4, triton_nvfp4_kernels, triton_w4a4

    if arch.startswith("gfx") or int(arch) < 100:
        return []
    tiles, found = triton_nvfp4.tiles(int(arch)), []
    for tile in tiles if everything else tiles[:1]:
        constants = {"BIAS": True, "RANK": 16, "SCALED": True, "ROWS": tile.rows}
        constants |= {"COLUMNS": tile.columns, "DEPTH": triton_nvfp4.DEPTH}
        constants |= {"STRIPE": triton_w4a4.STRIPE}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        job = (triton_nvfp4_kernels.gemm_nvfp4, constants, options)
        found.append((f"{tile.rows} x {tile.columns}, floats", job))
    tile = triton_w4a4.quantizer_tile(32, False, gpu_of(arch))
    constants = {"ROUNDED": True, "FLOATS": tl.bfloat16, "PARTS": 0}
    constants |= {"RANK": tile.columns, "ROWS": tile.rows}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    job = (triton_nvfp4_kernels.quantize_nvfp4, constants, options)
    return [*found, ("rank 32, floats", job)]


def w4a8_jobs(arch: str, everything: bool) -> list[tuple[str, tuple]]:
    """Those of weights that are read as int8."""
    import triton.language as tl

    from nibble.kernels.backends import triton_w4a4, triton_w4a8, triton_w4a8_kernels

    way, tiles, found = triton_w4a4.way(gpu_of(arch)), triton_w4a8.tiles(gpu_of(arch)), []
    for tile in tiles if everything else tiles[:1]:
        for group in (16, 32, 64) if everything else (32,):
            constants = {"PER": 64 // group, "BIAS": True, "RANK": 16, "FLOATS": way.floats}
            constants |= {"PTX": way.ptx, "ROWS": tile.rows, "COLUMNS": tile.columns}
            constants |= {"STRIPE": triton_w4a4.STRIPE}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            job = (triton_w4a8_kernels.gemm_w4a8, constants, options)
            found.append((f"{tile.rows} x {tile.columns}, groups of {group}", job))
    for rotate in (False, True):
        tile = triton_w4a4.quantizer_tile(32, rotate, gpu_of(arch))
        constants = {"ROTATE": rotate, "FLOATS": tl.bfloat16, "PARTS": 0}
        constants |= {"RANK": tile.columns, "ROWS": tile.rows}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        job = (triton_w4a8_kernels.quantize_tokens, constants, options)
        found.append(("rank 32" + ", rotated" * rotate, job))
    return found


def vq_jobs(arch: str, everything: bool) -> list[tuple[str, tuple]]:
    """Those of codebooks."""
    import triton.language as tl

    from nibble.kernels.backends import native_vq, triton_vq, triton_vq_kernels, triton_w4a4

    way, found = triton_vq.way(gpu_of(arch)), []
    for tile in (*way.tiles, way.few) if everything else way.tiles[:1]:
        for bits, vector in native_vq.GPU_LAYOUTS if everything else ((6, 4),):
            constants = {"BITS": bits, "D": vector, "WHOLE": True, "KIND": tl.bfloat16}
            constants |= {"SCALE": True, "BIAS": True, "ADDEND": True, "STEP": way.step}
            constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns}
            constants |= {"STRIPE": triton_w4a4.STRIPE}
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            job = (triton_vq_kernels.gemm_vq, constants, options)
            found.append((f"{tile.rows} x {tile.columns}, {bits} bits, {vector} columns", job))
    return found


def source_of(kernel: Any, constants: dict) -> Any:
    from triton.compiler import ASTSource

    pointers = POINTERS | ({"x": "fp32"} if constants.get("PARTS") else {})
    if "nvfp4" in kernel.__name__:
        pointers |= dict.fromkeys(("q", "weight", "ascales", "weight_scale"), "u8")
        pointers["weight_scale_2"] = "fp32"
    if "w4a8" in kernel.__name__:
        pointers |= {"weight_scale": "i8", "table": "i8", "channel_scale": "fp32"}
    if "vq" in kernel.__name__:
        words = {2: "i32", 4: "i64"}[constants["D"]]
        pointers |= {"x": words, "codebook": words, "indices": "u8"}
    names = list(kernel.arg_names)
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS:
            signature[name] = "i32"
        else:
            signature[name] = "*" + pointers.get(name, "bf16")
    aligned = [n for n in names if signature[n][0] == "*" or n in ("N", "R", "stride")]
    return ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


# ---- compiling and reading -----------------------------------------------------------------------


def nvidia(source: Any, arch: str, options: dict) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    made = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        text = subprocess.run(
            [tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True
        ).stdout
    found = collections.Counter(
        re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text)
    )
    registers = re.search(r"REG:(\d+)", usage)
    return Compiled(
        made.name, arch, int(registers[1]) if registers else 0, made.metadata.shared,
        sum(found[name] for name in SPILLS), dict(found),
    )  # fmt: skip


def amd(source: Any, arch: str, options: dict) -> Compiled:
    """As far as assembly."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    back_end = make_backend(target)
    parsed = back_end.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    back_end.load_dialects(context)
    stages: dict[str, Any] = {}
    back_end.add_stages(stages, parsed, source.language)
    code = source.make_ir(
        target, parsed, back_end.get_codegen_implementation(parsed), back_end.get_module_map(),
        context,
    )  # fmt: skip
    metadata = {"hash": "", "target": target, **vars(parsed)}
    for name, stage in stages.items():
        if name == "hsaco":
            break
        code = stage(code, metadata)
    found = collections.Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", code, re.M))
    registers = re.search(r"\.vgpr_count:\s+(\d+)", code)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", code)
    return Compiled(
        source.fn.__name__, arch, int(registers[1]), metadata.get("shared", 0), int(spills[1]),
        dict(found),
    )  # fmt: skip


def compiled(arch: str, kernel: Any, constants: dict, options: dict) -> Compiled:
    make = amd if arch.startswith("gfx") else nvidia
    return make(source_of(kernel, constants), arch, options)


def jobs(arch: str, everything: bool) -> list[tuple[str, tuple]]:
    """(words, what `compiled` takes after the architecture)."""
    from nibble.kernels.backends import triton_w4a4

    tiles = triton_w4a4.way(gpu_of(arch)).tiles
    found = []
    for tile in tiles if everything else tiles[:1]:
        for signs in SIGNS if everything else ("signed",):
            words = f"{tile.rows} x {tile.columns}, {signs}"
            found.append((words, product(arch, tile, signs)))
        found.append(
            (f"{tile.rows} x {tile.columns}, 8 bits", product(arch, tile, "signed", 32, True))
        )
    found.append(("rank 32, 8 bits", quantizer(arch, "signed", False, 32, True)))
    for rank in (32, 128, 256) if everything else (32,):
        for rotate in (False, True):
            words = f"rank {rank}" + ", rotated" * rotate
            found.append((words, quantizer(arch, "signed", rotate, rank)))
    if everything:
        found.append(("rank 32, both signs", quantizer(arch, "both signs", False, 32)))
    found += vq_jobs(arch, everything)
    return found + w4a8_jobs(arch, everything) + nvfp4_jobs(arch, everything)


SHOWN = (
    *("I2F", "I2FP", "FADD", "FMUL", "FFMA", "LOP3", "PRMT", "SHF", "MOV", "LDGSTS", "LDSM", "STS"),
    *("v_perm_b32", "v_and_b32_e32", "v_bfe_i32", "v_cvt_f32_i32_e32"),
)


def line(words: str, found: Compiled) -> str:
    names = [*found.matrix, *(name for name in SHOWN if name in found.instructions)]
    counts = ", ".join(f"{found.instructions[name]} {name}" for name in names)
    return (
        f"{found.arch:<8} {found.name:<14} {words:<24} {found.registers:>4} {found.shared:>7}"
        f" {found.spills:>6}  {counts}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    print("arch     kernel         form                   regs  shared spills  instructions")
    wrong = []
    for arch in options.arch or ARCHS:
        for words, job in jobs(arch, options.all):
            found = compiled(arch, *job)
            print(line(words, found), flush=True)
            if found.spills or not found.matrix:
                wrong.append(f"{found.name} ({words}) on {arch}: {found.spills} spills,"
                             f" matrix instructions {found.matrix}")  # fmt: skip
    print("\n".join(wrong) or "no spills, and matrix instructions everywhere")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
