"""The CPU's kernels as the C library of the package: one file for each system and processor, for
every Python and every torch, loaded by ctypes.

    <package>/kernels/libraries/manifest.json   ABI, version, hash of the sources, compiler, and of
                                                each platform its file, size and hash
    <package>/kernels/libraries/nibble_cpu-linux-x86_64.so, ...

`python -m nibble libraries` makes the folder (`cpu_library_build`); a git clone has none. A library
is loaded where it is whole and was made of the very sources beside it. NIBBLE_LIBRARY=0 leaves it
out.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[1]
FOLDER = KERNELS / "libraries"
CSRC = KERNELS / "csrc"
RULES = KERNELS / "cmake" / "cpu.cmake"
"""Compiler flags of each source."""

SYSTEMS = {"Linux": "linux", "Windows": "windows", "Darwin": "macos"}
PROCESSORS = {"AMD64": "x86_64", "x86_64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
ERRORS = {"V": ValueError, "M": MemoryError}
WORDS = 1024
"""Bytes of an answer in words."""


class Unavailable(Exception):
    """Why there is no library to load, in words."""


def here() -> str:
    """This machine's platform, as the manifest names it; Windows on ARM runs x86-64's."""
    system, processor = platform.system(), platform.machine()
    name = f"{SYSTEMS.get(system, system)}-{PROCESSORS.get(processor, processor)}"
    return name if name != "windows-aarch64" else "windows-x86_64"


def sources() -> Iterator[Path]:
    """Every file that a library is made of."""
    yield RULES
    yield from sorted(CSRC.glob("*.h"))
    yield CSRC / "library.cpp"
    yield from sorted(path for path in (CSRC / "cpu").rglob("*") if path.is_file())


@functools.cache
def sources_hash() -> str:
    """sha256 of the sources; empty where they are not there."""
    if not CSRC.exists():
        return ""
    total = hashlib.sha256()
    for path in sources():
        total.update(path.relative_to(KERNELS).as_posix().encode())
        total.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return total.hexdigest()


class Library:
    """A door for `compiled.Compiled`: a loaded library. Raises OSError where it cannot be loaded.

    Ops take a call's bytes and raise ValueError for what is refused, MemoryError, or RuntimeError.
    """

    DEVICES = ("cpu",)

    def __init__(self, path: Path, version: str):
        self.__file__, self.__version__ = str(path), version
        self._loaded = ctypes.CDLL(str(path))
        self._loaded.nibble_free.argtypes = [ctypes.c_void_p]
        self._loaded.nibble_free.restype = None
        self.ABI = int(self._loaded.nibble_abi())

    def __getattr__(self, op: str) -> Callable[[bytes], None]:
        """The door of an op, made when it is first asked for."""
        try:
            function = self._typed(op, ctypes.c_char_p, ctypes.c_size_t)
        except AttributeError:
            raise AttributeError(f"{self.__file__} has no {op}") from None

        def door(call: bytes) -> None:
            said = function(call, len(call))
            if said is not None:
                self._raise(said)

        setattr(self, op, door)
        return door

    def _typed(self, name: str, *arguments: Any) -> Callable[..., int | None]:
        """A function of the library that returns null, or the address of words."""
        function = getattr(self._loaded, f"nibble_{name}")
        function.argtypes, function.restype = arguments or None, ctypes.c_void_p
        return function

    def _raise(self, said: int) -> None:
        text = ctypes.string_at(said).decode(errors="replace")
        self._loaded.nibble_free(said)
        raise ERRORS.get(text[0], RuntimeError)(text[1:])

    def _ask(self, name: str, *arguments: Any) -> None:
        said = self._typed(name)(*arguments)
        if said is not None:
            self._raise(said)

    def _number(self, name: str, *arguments: Any) -> int:
        """The answer to a question, whose arguments are an op's name, an int and sizes."""
        answer = ctypes.c_int64()
        self._ask(name, *arguments, ctypes.byref(answer))
        return answer.value

    def _text(self, name: str, *arguments: Any) -> list[str]:
        """The lines of an answer in words."""
        answer = ctypes.create_string_buffer(WORDS)
        self._ask(name, *arguments, answer, ctypes.c_size_t(WORDS))
        return answer.value.decode(errors="replace").split("\n")

    def capability(self, device: int) -> int:
        return self._number("capability", ctypes.c_int(device))

    def codes(self, capability: int) -> int:
        return self._number("codes", ctypes.c_int(capability))

    def route(self, op: str, capability: int, M: int, N: int, K: int) -> tuple[str, str]:
        path, reason = self._text("route", *_question(op, capability, M, N, K))
        return path, reason

    def workspace_bytes(
        self, op: str, capability: int, M: int, N: int, K: int, R: int, codes: int = 0
    ) -> int:
        asked = _question(op, capability, M, N, K, R)
        return self._number("workspace_bytes", *asked, ctypes.c_int(codes))

    def linear_w4a4_bytes(self, capability: int, M: int, N: int, K: int, R: int, codes: int) -> int:
        asked = _question("", capability, M, N, K, R)[1:]
        return self._number("linear_w4a4_bytes", *asked, ctypes.c_int(codes))

    def cpu_isas(self) -> tuple[str, ...]:
        return tuple(self._text("about")[1].split())

    def build_info(self) -> dict[str, str]:
        return {"compiler": self._text("about")[0], "cuda": "", "architectures": ""}


def _question(op: str, capability: int, *sizes: int) -> list[Any]:
    return [op.encode(), ctypes.c_int(capability), *map(ctypes.c_int64, sizes)]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What `python -m nibble libraries` wrote; None where there is none, or a damaged one."""
    try:
        return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def load(abi: int, folder: Path = FOLDER) -> Library:
    """The package's library for this machine. Raises Unavailable with the reason."""
    if os.environ.get("NIBBLE_LIBRARY", "1") == "0":
        raise Unavailable("NIBBLE_LIBRARY=0 leaves the package's CPU library out")
    manifest = read_manifest(folder)
    if manifest is None:
        raise Unavailable("the package carries no CPU library")
    listed = manifest["platforms"].get(here())
    if listed is None:
        raise Unavailable(f"the package carries no CPU library for {here()}")
    if sources_hash() not in ("", manifest["sources"]) or manifest["abi"] != abi:
        raise Unavailable("the package's CPU library is of other sources than those beside it")
    path = folder / listed["file"]
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != listed["sha256"]:
            raise Unavailable(f"{listed['file']} is damaged; install Nibble again")
        found = Library(path, manifest["version"])
    except OSError as error:
        raise Unavailable(f"{listed['file']} cannot be loaded: {error}") from None
    if found.ABI != abi:
        raise Unavailable(f"{listed['file']} has interface {found.ABI} and {abi} is needed")
    return found
