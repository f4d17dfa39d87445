"""Where a kernel's cubin comes from: the package, the cache on disk, or NVRTC.

    <package>/kernels/cubins/manifest.json      sources, compiler, and of each architecture its
                                                file, the file's hash, and each kernel's place,
                                                symbol and registers
    <package>/kernels/cubins/sm_89.xz           an architecture's cubins, one behind the other
    <cache>/<hash>.cubin                        what NVRTC made here, with its symbol and hash

What lies in the package is used where it was made of the very sources beside it. The cache's
folder is ~/.cache/nibble (XDG_CACHE_HOME), on Windows %LOCALAPPDATA%\\nibble; NIBBLE_COMPILE=0
turns compiling off.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import lzma
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from . import kernels, nvrtc
from .kernels import Kernel

PACKAGE = Path(__file__).resolve().parents[2] / "cubins"
log = logging.getLogger("nibble")


class Cubin(NamedTuple):
    """code: a cubin or PTX; symbol: the kernel's name in it."""

    code: bytes
    symbol: str


@functools.cache
def sources_hash() -> str:
    """sha256 of every header that kernels are compiled from, and of the options; empty where the
    sources are not there.
    """
    headers = [nvrtc.CSRC / "nibble.h", *sorted((nvrtc.CSRC / "cuda").rglob("*.cuh"))]
    if not headers[0].exists():
        return ""
    total = hashlib.sha256(nvrtc.OPTIONS.encode())
    for header in headers:
        total.update(header.relative_to(nvrtc.CSRC).as_posix().encode())
        total.update(header.read_bytes().replace(b"\r\n", b"\n"))
    return total.hexdigest()


# ---- the package's ------------------------------------------------------------------------------


class Package:
    """The cubins that the package carries; none in a git clone."""

    def __init__(self, folder: Path = PACKAGE):
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            self.absent = ""
        except (OSError, ValueError):
            self.manifest = {"architectures": {}}
            self.absent = "the package carries no cubins"
        if not self.absent and sources_hash() not in ("", self.manifest.get("sources")):
            self.manifest = {"architectures": {}}
            self.absent = "the package's cubins are of other sources than those beside them"
        self._contents: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def has(self, arch: str) -> bool:
        return arch in self.manifest["architectures"]

    def lists(self, kernel: Kernel, arch: str) -> bool:
        """Whether a kernel is among them."""
        return kernel.name in self.manifest["architectures"].get(arch, {"kernels": {}})["kernels"]

    def find(self, kernel: Kernel, arch: str) -> Cubin | None:
        """None where it is not among them. Raises OSError, ValueError for a damaged package."""
        listed = self.manifest["architectures"].get(arch, {"kernels": {}})
        place = listed["kernels"].get(kernel.name)
        if place is None:
            return None
        start, size = place["at"]
        return Cubin(self._content(arch)[start : start + size], place["symbol"])

    def _content(self, arch: str) -> bytes:
        with self._lock:
            if arch not in self._contents:
                listed = self.manifest["architectures"][arch]
                packed = (self.folder / listed["file"]).read_bytes()
                if hashlib.sha256(packed).hexdigest() != listed["sha256"]:
                    raise ValueError(f"{listed['file']} is damaged; install Nibble again")
                self._contents[arch] = lzma.decompress(packed)
            return self._contents[arch]


def write_package(
    folder: Path, archs: Iterable[str], said: Callable[[str], None] = lambda words: None
) -> dict:
    """Compiles every kernel for the architectures by NVRTC and writes a package; returns its
    manifest. Raises CompileError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    major, minor = nvrtc.version()
    manifest: dict = {
        "sources": sources_hash(),
        "compiler": f"NVRTC {major}.{minor}",
        "architectures": {},
    }
    for arch in archs:
        wanted = list(kernels.of(arch))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(lambda kernel, arch=arch: compile_kernel(kernel, arch), wanted))
        places: dict[str, dict] = {}
        end = 0
        for kernel, compiled in zip(wanted, made, strict=True):
            size = len(compiled.code)
            places[kernel.name] = {"at": [end, size], "symbol": compiled.symbol}
            places[kernel.name] |= resources(compiled.log)
            end += size
        content = b"".join(compiled.code for compiled in made)
        packed = lzma.compress(content, preset=9)
        name = f"{arch if arch.startswith('ptx') else f'sm_{arch}'}.xz"
        (folder / name).write_bytes(packed)
        sha256 = hashlib.sha256(packed).hexdigest()
        manifest["architectures"][arch] = {"file": name, "sha256": sha256, "kernels": places}
        said(f"{name}: {len(places)} kernels, {len(content):,} bytes, {len(packed):,} packed")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def resources(report: str) -> dict[str, int]:
    """Registers, stack, spilled bytes and static shared memory, from ptxas' report; {} for PTX."""
    registers = re.search(r"Used (\d+) registers", report)
    if registers is None:
        return {}
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    stack = re.search(r"(\d+) bytes stack frame", report)
    shared = re.search(r"(\d+) bytes smem", report)
    return {
        "registers": int(registers[1]),
        "stack": int(stack[1]) if stack else 0,
        "spills": int(spills[1]) + int(spills[2]) if spills else 0,
        "shared": int(shared[1]) if shared else 0,
    }


# ---- compiled here ------------------------------------------------------------------------------


def compile_kernel(kernel: Kernel, arch: str) -> nvrtc.Compiled:
    """By NVRTC; a family (120f) that an older NVRTC does not know becomes the chip itself (120a).
    Raises CompileError.
    """
    if arch.endswith("f") and nvrtc.version() < (12, 9):
        arch = arch[:-1] + "a"
    return nvrtc.compile_kernel(kernel, arch)


def why_not_compile(arch: str) -> str:
    """Why NVRTC cannot make kernels for an architecture here; empty where it can."""
    if os.environ.get("NIBBLE_COMPILE", "1") == "0":
        return "NIBBLE_COMPILE=0 forbids compiling"
    if not sources_hash():
        return "the kernels' sources are not there"
    try:
        known = nvrtc.architectures()
    except nvrtc.CompileError as error:
        return str(error)
    number = int(re.sub(r"\D", "", arch))
    if number in known:
        return ""
    return f"NVRTC {nvrtc.version()[0]} compiles for {known[0]} to {known[-1]}, not for {arch}"


def cache_folder() -> Path:
    """Where NVRTC's results are kept."""
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~")
    else:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "nibble" / "kernels"


def _place(kernel: Kernel, arch: str) -> Path:
    """A kernel's file in the cache. Raises CompileError where there is no NVRTC."""
    key = f"{sources_hash()} {nvrtc.version()} {arch} {kernel.name}"
    return cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def is_cached(kernel: Kernel, arch: str) -> bool:
    """Whether `cached` will find it. Raises CompileError."""
    return _place(kernel, arch).exists()


def cached(kernel: Kernel, arch: str) -> Cubin:
    """From the cache, or compiled and put there. Raises CompileError."""
    path = _place(kernel, arch)
    try:
        first, _, code = path.read_bytes().partition(b"\n")
        symbol, _, sha256 = first.decode().partition(" ")
        if hashlib.sha256(code).hexdigest() == sha256:
            return Cubin(code, symbol)
    except (OSError, UnicodeDecodeError):
        pass  # not there, or damaged: made anew
    compiled = compile_kernel(kernel, arch)
    sha256 = hashlib.sha256(compiled.code).hexdigest()
    _keep(path, f"{compiled.symbol} {sha256}\n".encode() + compiled.code)
    return Cubin(compiled.code, compiled.symbol)


def _keep(path: Path, content: bytes) -> None:
    """Whole or not at all; a folder that cannot be written to costs compiling again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError as error:
        log.info("%s cannot be written (%s): kernels are compiled again next time", path, error)
