"""CUDA C++ into cubins by NVRTC, NVIDIA's compiler as a library, which torch's CUDA wheels bring.

The kernels' headers compile as they are; the two headers of the standard library that they name
are given here, a line each.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

from .kernels import Kernel

CSRC = Path(__file__).resolve().parents[2] / "csrc"
_HEADERS = {
    "cstddef": "#pragma once\nusing size_t = decltype(sizeof(0));\n",
    "cstdint": "#pragma once\n"
    + "".join(
        f"using {sign}int{bits}_t = {words};\n"
        for bits, kind in ((8, "char"), (16, "short"), (32, "int"), (64, "long long"))
        for sign, words in (("", f"signed {kind}"), ("u", f"unsigned {kind}"))
    )
    + "using uintptr_t = unsigned long long;\n",
}
_OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")
OPTIONS = " ".join((*_OPTIONS, *_HEADERS.values()))
"""All that a result depends on besides the sources, the architecture and the compiler."""


class Compiled(NamedTuple):
    """code: a cubin, or PTX as text; symbol: the kernel's name in it; log: ptxas' report."""

    code: bytes
    symbol: str
    log: str


class CompileError(RuntimeError):
    """NVRTC's own words on why a kernel does not compile, or why there is no NVRTC."""


@functools.cache
def library() -> ctypes.CDLL:
    """NVRTC. Raises CompileError where none is found."""
    tried: list[str] = []
    for path in _candidates():
        for builtins in _builtins(path):  # NVRTC looks for it by name alone
            _load(builtins, tried)
        found = _load(path, tried)
        if found is not None:
            return found
    raise CompileError(
        "no NVRTC was found; torch's CUDA wheels bring it, as does `pip install nvidia-cuda-nvrtc`"
        + (f" ({tried[0]})" if tried else "")
    )


def _load(path: str, tried: list[str]) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        tried.append(str(error))
        return None


def _candidates() -> list[str]:
    """Paths of NVRTC: of torch's own wheels first, then the toolkit's, the newest of each."""
    pattern = "nvrtc64_*_0.dll" if sys.platform == "win32" else "libnvrtc.so.*"
    homes = []
    for package, below in (("nvidia", ("*/lib", "*/bin", "*/bin/x86_64")), ("torch", ("lib",))):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            homes += [os.path.join(place, folder) for folder in below]
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if variable in os.environ:
            homes += [os.path.join(os.environ[variable], folder) for folder in ("lib64", "bin")]
    found = [path for home in homes for path in sorted(glob.glob(f"{home}/{pattern}"))[::-1]]
    return [path for path in found if "alt" not in os.path.basename(path)]


def _builtins(path: str) -> list[str]:
    pattern = "nvrtc-builtins*.dll" if sys.platform == "win32" else "libnvrtc-builtins.so.*"
    return glob.glob(os.path.join(os.path.dirname(path), pattern))


def version() -> tuple[int, int]:
    """(major, minor) of NVRTC. Raises CompileError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
    return major.value, minor.value


def architectures() -> tuple[int, ...]:
    """The numbers of the architectures that this NVRTC compiles for, such as 89."""
    count = ctypes.c_int()
    _check(library().nvrtcGetNumSupportedArchs(ctypes.byref(count)), "architectures")
    numbers = (ctypes.c_int * count.value)()
    _check(library().nvrtcGetSupportedArchs(numbers), "architectures")
    return tuple(numbers)


def compile_kernel(kernel: Kernel, arch: str) -> Compiled:
    """One kernel for sm_<arch> ("89", "90a", "120f"), or as PTX ("ptx80"). Needs no GPU and may be
    called from several threads. Raises CompileError.
    """
    lib, program = library(), ctypes.c_void_p()
    source = f'#include "{kernel.header}"\nusing namespace nibble;\nusing namespace nibble::cuda;\n'
    texts = _strings(_HEADERS.values())
    names = _strings(_HEADERS)
    _check(
        lib.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"nibble.cu", len(_HEADERS), texts, names
        ),
        "program",
    )
    try:
        expression = kernel.name.encode()
        _check(lib.nvrtcAddNameExpression(program, expression), kernel.name)
        target = f"compute_{arch[3:]}" if arch.startswith("ptx") else f"sm_{arch}"
        options = _strings((*_OPTIONS, f"--gpu-architecture={target}", f"-I{CSRC}"))
        failed = lib.nvrtcCompileProgram(program, len(options), options)
        log = _output(lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog, program)
        text = log.rstrip(b"\0").decode(errors="replace")
        if failed:
            raise CompileError(f"{kernel.name} does not compile for {target}: {text.strip()[:400]}")
        symbol = ctypes.c_char_p()
        lowered = lib.nvrtcGetLoweredName(program, expression, ctypes.byref(symbol))
        _check(lowered, kernel.name)
        assert symbol.value is not None
        kind = "PTX" if arch.startswith("ptx") else "CUBIN"
        sizes, contents = (getattr(lib, f"nvrtcGet{kind}{end}") for end in ("Size", ""))
        return Compiled(_output(sizes, contents, program), symbol.value.decode(), text)
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _output(size_of, content_of, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)), "size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(content_of(program, buffer), "output")
    return buffer.raw


def _strings(texts) -> ctypes.Array:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _check(status: int, what: str) -> None:
    if status:
        words = library().nvrtcGetErrorString
        words.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {words(status).decode()} ({what})")
