"""Cycles of the CPU ops' inner loops on processors that are not at hand: `python -m nibble bench
cpu_loops`.

The AVX-512 sources are compiled as they are shipped; llvm-mca (LLVM's model of a processor's ports,
Debian: llvm) runs the assembly of each loop, with every operand in L1. `share` is how much of the
time goes into the 8-bit products: cycles of as many vpdpbusd alone, by the same model, over the
loop's. A model is not a measurement. LLVM's charge a vector port for a broadcast from memory, which
these processors do in a load port alone (uops.info): broadcasts are given to it as plain loads. Its
sapphirerapids has one port for products where a server has two, and its znver4 takes twice the
cycles for one; both count alike in a loop and in its limit.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from checkout import ROOT

CPUS = ("cascadelake", "icelake-server", "sapphirerapids", "znver4")
AVX512 = ("f", "bw", "vl", "dq", "vnni")
FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-DNIBBLE_X86",
    "-mavx2",
    "-mfma",
    "-mf16c",
    *(f"-mavx512{part}" for part in AVX512),
    "-w",
]
PRODUCT = "vpdpbusd"
ROUNDS = 100

PROBE = """
#include "cpu/ops_avx512.cpp"
#define BEGIN(name) asm volatile("# LLVM-MCA-BEGIN " name ::: "memory")
#define END asm volatile("# LLVM-MCA-END" ::: "memory")
namespace nibble::cpu {
__attribute__((flatten)) void probe_decode(const uint8_t* weight, int64_t stride, uint8_t* panel) {
    BEGIN("decode");
    decode_panel(weight, stride, PANEL, panel);
    END;
}
}
"""

# What a pass through each loop does, and in which unit.
LOOPS = {
    "product": (8 * 32 * 64, "multiply-adds"),
    "decode": (16 * 64, "weights"),
    "one token": (4 * 128, "weights"),
}


def assembly(sources: Path, compiler: str) -> str:
    """The probe, compiled from a tree's kernels/csrc."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text(PROBE, encoding="utf-8")
        command = [compiler, *FLAGS, f"-I{sources}", "-S", str(probe), "-o", "-"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{compiler} does not compile {sources}: {done.stderr.strip()[-500:]}")
    return done.stdout


def body(text: str, function: str) -> list[str]:
    """A function's lines, by a part of its mangled name; none if it is not there."""
    lines = text.splitlines()
    starts = re.compile(rf"_Z\w*{function}\w*:")
    begin = next((i for i, line in enumerate(lines) if starts.match(line)), None)
    if begin is None:
        return []
    size = re.compile(rf"\s*\.size\s+{re.escape(lines[begin][:-1])},")
    end = next(i for i in range(begin, len(lines)) if size.match(lines[i]))
    return lines[begin:end]


def loop(text: str, function: str, instruction: str) -> str | None:
    """The instructions from a label to the jump back to it: of a function's loops without another
    one inside, the one with the most of an instruction.
    """
    lines, places, found = body(text, function), {}, [""]
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            places[label[1]] = i
        jump = re.match(r"\s+j\w+\s+(\.L\w+)", line)
        if jump and jump[1] in places:
            inside = lines[places[jump[1]] : i + 1]
            found.append("\n".join(part for part in inside if not re.match(r"\s*\.", part)))
            places.clear()
    return max(found, key=lambda code: len(re.findall(instruction, code))) or None


def marked(text: str, name: str) -> str:
    begin, end = f"# LLVM-MCA-BEGIN {name}\n", "# LLVM-MCA-END"
    inside = text.partition(begin)[2].partition(end)[0]
    return "\n".join(line for line in inside.splitlines() if not re.match(r"\s*[.#]", line))


def cycles(code: str, cpu: str, mca: str) -> float | None:
    """Of one pass, in the long run; None where this llvm-mca has no such processor."""
    code = re.sub(r"v(pbroadcastd|broadcastss)(?=\s+-?\w*\()", "vmovups", code)
    command = [mca, f"-mcpu={cpu}", f"-iterations={ROUNDS}", "-instruction-info=0"]
    done = subprocess.run(command, input=code + "\n", capture_output=True, text=True)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(total[1]) / ROUNDS if total else None


def products_alone(count: int, cpu: str, mca: str) -> float | None:
    """Cycles of so many independent products."""
    code = "\n".join(f"\tvpdpbusd %zmm0, %zmm1, %zmm{i}" for i in range(2, 18))
    found = cycles(code, cpu, mca)
    return found and found / 16 * count


def rows_of(text: str, mca: str) -> list[dict]:
    codes = {
        "product": loop(text, "dot_tileILi8E", PRODUCT),
        "decode": marked(text, "decode"),
        "one token": loop(text, "few_tileILi1ELi4E", "vpermps"),
    }
    rows = []
    for name, code in codes.items():
        work, unit = LOOPS[name]
        products = code.count(PRODUCT) if code else 0
        for cpu in CPUS if code else ():
            found = cycles(code, cpu, mca)
            if found is None:
                continue
            limit = products_alone(products, cpu, mca) if products else None
            rows.append(
                {
                    "loop": name,
                    "cpu": cpu,
                    "instructions": len(code.strip().splitlines()),
                    "cycles": found,
                    "unit": unit,
                    "units_a_cycle": work / found,
                    "share": limit and limit / found,
                }
            )
    return rows


def tool(names: list[str]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=results / "cpu-loops.json")
    parser.add_argument("--sources", type=Path, default=ROOT / "kernels" / "csrc")
    parser.add_argument("--before", type=Path, help="kernels/csrc of another commit, beside it")
    chosen = parser.parse_args()
    compiler = tool(["g++"])
    mca = tool([f"llvm-mca-{version}" for version in range(30, 15, -1)] + ["llvm-mca"])
    if compiler is None or mca is None:
        print("skipped: needs g++ and llvm-mca (Debian: g++, llvm)")
        return
    found = {"llvm-mca": Path(mca).name, "now": rows_of(assembly(chosen.sources, compiler), mca)}
    if chosen.before:
        found["before"] = rows_of(assembly(chosen.before, compiler), mca)
    for when in ("before", "now"):
        for row in found.get(when, ()):
            share = f", {row['share']:.1%} of the products' limit" if row["share"] else ""
            print(
                f"{when:7}{row['loop']:10} {row['cpu']:15} {row['cycles']:7.1f} cycles,"
                f" {row['units_a_cycle']:6.1f} {row['unit']} a cycle{share}"
            )
    chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
