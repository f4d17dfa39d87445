"""What the compiler made of every GPU kernel: registers, shared memory, stack, spills and matrix
instructions, bounded by a file.

    python tests/kernels/check_resources.py                      compile every .cu for every
      architecture and look (needs nvcc)
    python tests/kernels/check_resources.py --arch 90a           one architecture; --only sm90 for
      files with that in their path
    python tests/kernels/check_resources.py --module FILE        look into a built module instead
      (needs cuobjdump)
    python tests/kernels/check_resources.py --log FILE           read the log of a build (nvcc's
      -Xptxas=-v)
    python tests/kernels/check_resources.py --manifest FILE      look at a package of cubins (what
      `python -m nibble cubins` writes)
    python tests/kernels/check_resources.py --write              take what was found as the new
      bounds

Bounds lie in kernels/resources.json: the most registers a kernel may use for each architecture, as
nvcc compiles it. What NVRTC makes of it differs by a few: a package has bounds of its own ("90a
nvrtc") where they were written, and may else use as many as are given out for nvcc's, which is in
eights, so that no fewer warps fit.
Spills and a stack are not allowed. A kernel without a bound is a mistake too: it has to be looked
at once. Exit code 1 and a line for each broken bound. Matrix instructions
are counted in the machine code where cuobjdump or nvdisasm is found; they tell that a kernel is on
the path that it is meant to be on.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC, BOUNDS = ROOT / "kernels" / "csrc", ROOT / "kernels" / "resources.json"
ARCHS = {
    "75": ("sm75",),
    "80": ("sm80",),
    "86": ("sm80",),
    "89": ("sm80",),
    "90a": ("sm90", "sm100"),
    "100f": ("sm100",),
    "120f": ("sm100", "sm120"),
}
"""Architecture -> the names of files or folders that are its own; files under no such name are
compiled for all.
"""
GIVEN_OUT = 8
"""Registers of a thread are given out in so many at a time."""
MATRIX = re.compile(r"\b(IMMA|HMMA|QMMA|OMMA|IGMMA|HGMMA|QGMMA|UTCIMMA|UTCHMMA|UTCQMMA)\b")


@dataclass
class Kernel:
    name: str
    arch: str
    mangled: str
    file: str = ""
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    matrix: dict[str, int] | None = field(default=None)
    compiler: str = ""  # where it is not nvcc

    @property
    def key(self) -> str:
        """Its architecture as the bounds have it."""
        return f"{self.arch} {self.compiler}".strip()


def base_name(mangled: str) -> str:
    """The function's own name and template numbers: _ZN6nibble4cuda..12gemm_kernelILi128E.. ->
    gemm_kernel<128>; others as they are.
    """
    position, name = mangled.find("_ZN") + 3, mangled
    if position < 3:
        return mangled
    while match := re.match(r"K?(\d+)", mangled[position:]):
        start = position + match.end()
        position = start + int(match.group(1))
        name = mangled[start:position]
    numbers = (
        re.findall(r"L[a-zA-Z0-9_]*?(n?\d+)E", mangled[position:])
        if mangled[position : position + 1] == "I"
        else []
    )
    return name + (f"<{','.join(numbers).replace('n', '-')}>" if numbers else "")


# ---- reading reports -----------------------------------------------------------------------------


def read_ptxas(text: str, file: str = "") -> list[Kernel]:
    """The kernels in what `-Xptxas -v` prints."""
    found: list[Kernel] = []
    properties: dict[str, tuple[int, int]] = {}
    function = ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            found.append(Kernel(base_name(match[1]), match[2], match[1], file))
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match[1]
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            properties[function] = int(match[1]), int(match[2]) + int(match[3])
        elif found and (match := re.search(r"Used (\d+) registers", line)):
            kernel = found[-1]
            kernel.registers = int(match[1])
            kernel.stack, kernel.spills = properties.get(kernel.mangled, (0, 0))
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
    return found


def read_module(text: str) -> list[Kernel]:
    """The kernels in what `cuobjdump --dump-resource-usage` prints; spills appear there as local
    memory.
    """
    found, arch = [], ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            found.append(Kernel(base_name(match[1]), arch, match[1]))
        elif found and (
            match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line)
        ):
            found[-1].registers, found[-1].stack, found[-1].shared, found[-1].spills = map(
                int, match.groups()
            )
    return found


def read_manifest(manifest: dict) -> list[Kernel]:
    """The kernels of a package of cubins; PTX has no registers yet."""
    return [
        Kernel(
            base_name(place["symbol"]),
            arch,
            place["symbol"],
            listed["file"],
            **{name: place.get(name, 0) for name in ("registers", "shared", "stack", "spills")},
            compiler="nvrtc",
        )
        for arch, listed in manifest["architectures"].items()
        for place in listed["kernels"].values()
        if "registers" in place
    ]


def count_matrix(text: str, kernels: list[Kernel]) -> None:
    """Adds counts of matrix instructions from a disassembly (cuobjdump's or nvdisasm's)."""
    by_key, current, arch = {(kernel.mangled, kernel.arch): kernel for kernel in kernels}, None, ""
    for line in text.splitlines():
        if match := re.match(r"\s*arch = sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*(?:Function : |\.text\.)(\w+)", line):
            current = by_key.get((match[1], arch)) or next(
                (kernel for kernel in kernels if not arch and kernel.mangled == match[1]), None
            )
            if current:
                current.matrix = {}
        elif current and (match := MATRIX.search(line)):
            current.matrix[match[1]] = current.matrix.get(match[1], 0) + 1


# ---- making them ---------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    nvcc = shutil.which("nvcc")
    beside = [str(Path(nvcc).resolve().parent)] if nvcc else []
    return shutil.which(name) or next(
        (found for folder in beside if (found := shutil.which(name, path=folder))), None
    )


def jobs(archs: list[str], only: str) -> list[tuple[Path, str]]:
    found = []
    for path in sorted((CSRC / "cuda").rglob("*.cu")):
        places = path.relative_to(CSRC).with_suffix("").parts
        own = next((name for name in sum(ARCHS.values(), ()) if name in places), None)
        found += [
            (path, arch)
            for arch in archs
            if (own is None or own in ARCHS[arch]) and only in str(path.relative_to(CSRC))
        ]
    return found


def compile_one(job: tuple[Path, str]) -> list[Kernel]:
    path, arch = job
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [
            "nvcc",
            "-cubin",
            "-std=c++17",
            "-O3",
            "--expt-relaxed-constexpr",
            "-Xptxas=-v,-warn-spills",
            "-DNIBBLE_CUDA",
            f"-I{CSRC}",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            str(path),
            "-o",
            str(cubin),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{path.name} for sm_{arch} does not compile:\n{result.stderr}")
        kernels = read_ptxas(result.stderr, str(path.relative_to(CSRC / "cuda")))
        for kernel in kernels:
            kernel.arch = arch
        disassembler = tool("nvdisasm")
        if disassembler and kernels:
            count_matrix(
                subprocess.run(
                    [disassembler, "-c", str(cubin)], capture_output=True, text=True
                ).stdout,
                kernels,
            )
    return kernels


def look_into(module: Path) -> list[Kernel]:
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise SystemExit("cuobjdump is not found; it comes with the CUDA toolkit")
    kernels = read_module(
        subprocess.run(
            [cuobjdump, "--dump-resource-usage", str(module)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    count_matrix(
        subprocess.run(
            [cuobjdump, "-sass", str(module)], capture_output=True, text=True, check=True
        ).stdout,
        kernels,
    )
    return kernels


# ---- judging -------------------------------------------------------------------------------------


def bound_of(kernel: Kernel, bounds: dict[str, dict[str, int]]) -> int | None:
    """The most registers that a kernel may use, None where nobody has said."""
    archs = bounds.get(kernel.name, {})
    own = archs.get(kernel.key, archs.get(kernel.arch))
    if own is None or kernel.key in archs:
        return own
    return -(-own // GIVEN_OUT) * GIVEN_OUT


def broken(kernels: list[Kernel], bounds: dict[str, dict[str, int]] | None) -> list[str]:
    """A line for each broken bound; without `bounds` only spills and stacks are looked at."""
    lines = []
    for kernel in kernels:
        where = f"{kernel.name} on sm_{kernel.arch}"
        if kernel.spills or kernel.stack:
            lines.append(
                f"{where} has {kernel.spills} bytes of spills and a stack of {kernel.stack} bytes;"
                " none are allowed"
            )
        if bounds is None:
            continue
        bound = bound_of(kernel, bounds)
        if bound is None:
            lines.append(
                f"{where} uses {kernel.registers} registers and has no bound in {BOUNDS.name}"
            )
        elif kernel.registers > bound:
            lines.append(f"{where} uses {kernel.registers} registers and may use {bound}")
    return lines


def table(kernels: list[Kernel]) -> str:
    width = max((len(kernel.name) for kernel in kernels), default=6)
    lines = [
        f"{'kernel':<{width}}  {'arch':<5}{'registers':>10}{'shared':>8}{'stack':>7}{'spills':>8} "
        " matrix instructions"
    ]
    for kernel in sorted(
        kernels, key=lambda kernel: (kernel.file, kernel.name, len(kernel.arch), kernel.arch)
    ):
        matrix = (
            "not counted"
            if kernel.matrix is None
            else ", ".join(f"{count} {name}" for name, count in kernel.matrix.items()) or "none"
        )
        lines.append(
            f"{kernel.name:<{width}} "
            f" {kernel.arch:<5}{kernel.registers:>10}{kernel.shared:>8}"
            f"{kernel.stack:>7}{kernel.spills:>8}  {matrix}"
        )
    return "\n".join(lines)


def write_bounds(kernels: list[Kernel]) -> None:
    """Keeps the bounds of kernels that were not looked at."""
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    for kernel in kernels:
        alike = [
            other.registers
            for other in kernels
            if (other.name, other.key) == (kernel.name, kernel.key)
        ]
        # instantiations for several dtypes share a name here
        bounds.setdefault(kernel.name, {})[kernel.key] = max(alike)
    ordered = {
        name: dict(sorted(bounds[name].items(), key=lambda item: int(re.sub(r"\D", "", item[0]))))
        for name in sorted(bounds)
    }
    BOUNDS.write_text(
        "{\n"
        + ",\n".join(
            f" {json.dumps(name)}: {json.dumps(of_archs)}" for name, of_archs in ordered.items()
        )
        + "\n}\n"
    )


def look(options: argparse.Namespace) -> list[Kernel]:
    """The kernels of what is asked for."""
    if options.module:
        return look_into(options.module)
    if options.log:
        return read_ptxas(options.log.read_text())
    if options.manifest:
        return read_manifest(json.loads(options.manifest.read_text(encoding="utf-8")))
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not found")
    wanted = jobs(options.arch or list(ARCHS), options.only)
    with ThreadPoolExecutor(options.jobs) as pool:
        return [kernel for found in pool.map(compile_one, wanted) for kernel in found]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", action="append", choices=ARCHS)
    parser.add_argument("--only", default="", help="files with this in their path")
    parser.add_argument("--module", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--manifest", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write what was found here too")
    parser.add_argument("--write", action="store_true")
    parser.add_argument(
        "--spills-only",
        action="store_true",
        help="registers are another compiler's than that of the bounds",
    )
    options = parser.parse_args(arguments)
    kernels = look(options)
    print(table(kernels))
    if options.json:
        options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1))
    if options.write:
        write_bounds(kernels)
    bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    wrong = broken(kernels, None if options.spills_only else bounds)
    print(
        "\n".join(wrong) if wrong else f"{len(kernels)} kernels, all within their bounds",
        file=sys.stderr if wrong else sys.stdout,
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
