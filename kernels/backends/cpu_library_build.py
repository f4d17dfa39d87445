"""`python -m nibble libraries`: the package's CPU libraries.

Zig's C++ compiler (`pip install ziglang`) makes every platform's on any machine, with the C++
library inside. Without it the C++ compiler at hand makes this machine's. Flags are those of
cmake/cpu.cmake, which builds the extension.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import cpu_library
from .cpu_library import CSRC, FOLDER, KERNELS, RULES


class Platform(NamedTuple):
    """target: as Zig names it, with the oldest C library or system that the file runs on."""

    target: str
    suffix: str


PLATFORMS = {
    "linux-x86_64": Platform("x86_64-linux-gnu.2.28", "so"),
    "linux-aarch64": Platform("aarch64-linux-gnu.2.28", "so"),
    "windows-x86_64": Platform("x86_64-windows-gnu", "dll"),
    "macos-aarch64": Platform("aarch64-macos.11.0", "dylib"),
}
COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-DNDEBUG")


def zig() -> list[str]:
    """Zig's C++ compiler, or nothing where it is not installed."""
    if importlib.util.find_spec("ziglang") is None:
        return []
    return [sys.executable, "-m", "ziglang", "c++"]


def compiler_here() -> list[str]:
    """The C++ compiler at hand. Raises ValueError where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    raise ValueError("no C++ compiler was found; `pip install ziglang` brings one")


def flags_of(source: Path, x86: bool) -> list[str]:
    """A source's own flags: those of its instruction set in cmake/cpu.cmake, by its name's end."""
    sets = re.findall(r"^ +set\((\w+)_flags (-[^)]*)\)", RULES.read_text(encoding="utf-8"), re.M)
    flags = {name: given.split() for name, given in sets}
    wanted = flags["cpu"][:] if source.parent.name == "cpu" else ["-O2"]
    named = re.search(r"_([a-z0-9]+)[a-z_]*$", source.stem)
    if x86 and named and named[1] in flags:
        wanted += flags[named[1]]
    return wanted


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}\n{done.stderr.strip()[-3000:]}")
    return done.stdout


def _linking(name: str, by_zig: bool) -> list[str]:
    """What makes one library of the objects: no symbols but the exported ones."""
    if by_zig and name.startswith("macos"):  # else its name is the path that it was linked at
        return ["-s", "-Wl,-install_name,@rpath/nibble_cpu.dylib"]
    if by_zig:
        return ["-s"]
    if name.startswith("linux"):
        static = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
        return ["-s", "-pthread", *static, "-ldl"]
    return []


def compile_library(name: str, path: Path) -> str:
    """One platform's library; returns its compiler in words. Raises ValueError with the compiler's
    own words, or where nothing here can make it.
    """
    compiler = zig()
    target = ["-target", PLATFORMS[name].target, "-fno-sanitize=all"] if compiler else []
    if not compiler and name != cpu_library.here():
        raise ValueError(f"{name} is made on other machines by Zig alone: pip install ziglang")
    compiler = compiler or compiler_here()
    sources = [CSRC / "library.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]

        def build(source: Path, result: Path) -> None:
            flags = [*target, *COMMON, *flags_of(source, "x86" in name), f"-I{CSRC}"]
            _run([*compiler, *flags, "-c", str(source), "-o", str(result)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(build, sources, objects))
        linked = Path(folder) / path.name
        link = [*compiler, *target, "-shared", *_linking(name, bool(target))]
        _run([*link, *map(str, objects), "-o", str(linked)])
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(linked.read_bytes())
        os.replace(fresh, path)  # a program that has the old one loaded keeps it
    words = _run([*compiler, "--version"]).splitlines()[0]
    return f"Zig's {words}" if target else words


def version() -> str:
    """That of the compiled part."""
    text = (KERNELS / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', text, re.M)
    assert found is not None
    return found[1]


def abi() -> int:
    """The number in csrc/nibble.h."""
    text = (CSRC / "nibble.h").read_text(encoding="utf-8")
    found = re.search(r"constexpr int ABI = (\d+);", text)
    assert found is not None
    return int(found[1])


def write_package(folder: Path, platforms: Iterable[str]) -> dict:
    """Compiles and writes the folder; returns its manifest. Raises ValueError."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict = {"abi": abi(), "version": version(), "sources": cpu_library.sources_hash()}
    manifest["platforms"] = {}
    for name in platforms:
        path = folder / f"nibble_cpu-{name}.{PLATFORMS[name].suffix}"
        compiler = compile_library(name, path)
        content = path.read_bytes()
        listed = {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}
        manifest["platforms"][name] = listed | {"bytes": len(content), "compiler": compiler}
        print(f"{path.name}: {len(content):,} bytes, by {compiler}")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def main(arguments: list[str]) -> int:
    """Compiles and writes; returns the exit code. Raises ValueError."""
    parser = argparse.ArgumentParser(prog="python -m nibble libraries", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder (default: the package's own)"
    )
    parser.add_argument(
        "--platforms",
        nargs="+",
        choices=[*PLATFORMS, "all"],
        default=[cpu_library.here()],
        metavar="PLATFORM",
        help=f"any of {' '.join(PLATFORMS)}, or all (default: this machine's)",
    )
    options = parser.parse_args(arguments)
    every = "all" in options.platforms
    manifest = write_package(options.out, PLATFORMS if every else options.platforms)
    total = sum(listed["bytes"] for listed in manifest["platforms"].values())
    print(f"{options.out}: {total:,} bytes")
    return 0
