"""The libraries of other platforms, on this machine: ARM's in QEMU, Windows' in Wine, held against
this one's on the same numbers (every_op.cpp); and what each file needs of its system.

Built by Zig (`pip install ziglang`). Skips with its reason where Zig, the emulator or, for ARM, a
C library (Debian: qemu-user, libc6-arm64-cross, wine64) is missing.
"""

import os
import platform
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from nibble.kernels.backends import cpu_library, cpu_library_build
from nibble.kernels.backends.cpu_library_build import PLATFORMS

HERE = Path(__file__).resolve().parent
ARM_ROOT = Path("/usr/aarch64-linux-gnu")
X86_LINUX = (platform.system(), platform.machine()) == ("Linux", "x86_64")
DEBIANS_WINE = "/usr/lib/wine/wine64"  # its package puts none on PATH
EMULATORS = {
    "linux-x86_64": [],
    "linux-aarch64": ["qemu-aarch64", "-L", str(ARM_ROOT)],
    "windows-x86_64": [shutil.which("wine64") or shutil.which("wine") or DEBIANS_WINE],
}
DOORS = {f"nibble_{name}" for name in ("abi", "free", "about", "gemm_vq", "linear_w4a4", "route")}
NEEDED = {
    "linux-x86_64": {"libc.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-x86-64.so.2"},
    "linux-aarch64": {"libc.so.6", "libpthread.so.0", "libdl.so.2", "ld-linux-aarch64.so.1"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not X86_LINUX, reason="the emulators are set up for x86-64 Linux"),
    pytest.mark.skipif(not cpu_library_build.zig(), reason="no Zig: pip install ziglang"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """A platform's library: the package's where it is of these sources, else built here."""
    folder = tmp_path_factory.mktemp("libraries")

    def find(name: str) -> Path:
        manifest = cpu_library.read_manifest(cpu_library.FOLDER)
        if manifest and manifest["sources"] == cpu_library.sources_hash():
            listed = manifest["platforms"].get(name)
            if listed is not None:
                return cpu_library.FOLDER / listed["file"]
        path = folder / f"{name}.{PLATFORMS[name].suffix}"
        if not path.exists():
            cpu_library_build.compile_library(name, path)
        return path

    return find


def results(name: str, library: Path, isa: int, folder: Path) -> dict[str, list[str]]:
    """What every_op prints on a platform, by line."""
    program = folder / f"every_op-{name}.exe"
    if not program.exists():
        compiler, target = cpu_library_build.zig(), ["-target", PLATFORMS[name].target]
        part = program.with_suffix(".o")
        compiling = [*compiler, *target, "-std=c++17", f"-I{cpu_library.CSRC}", "-c"]
        linking = [*compiler[:-1], "cc", *target, str(part), "-o", str(program)]  # no C++ library
        for command in ([*compiling, str(HERE / "every_op.cpp"), "-o", str(part)], linking):
            subprocess.run(command, check=True, capture_output=True)
    command = [*EMULATORS[name], str(program), str(library), str(isa)]
    wine = {"WINEPREFIX": str(folder / "wine"), "WINEDEBUG": "-all"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | wine
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[0]: words[1:] for words in lines}


@pytest.mark.parametrize("name", ["linux-aarch64", "windows-x86_64"])
def test_another_platform_computes_what_this_one_does(name, library, tmp_path):
    if not shutil.which(EMULATORS[name][0]):
        pytest.skip(f"{EMULATORS[name][0]} is not installed")
    if name == "linux-aarch64" and not (ARM_ROOT / "lib").exists():
        pytest.skip("no C library for ARM: libc6-arm64-cross")
    ours = results("linux-x86_64", library("linux-x86_64"), 1, tmp_path)
    theirs = results(name, library(name), 1, tmp_path)
    assert set(ours) == set(theirs) and len(ours) == 11
    assert " ".join(ours["refused"]).startswith("Vquantize_down: K=65 is not a multiple")
    for line, values in ours.items():
        if line in ("codes", "codes2", "refused"):
            assert values == theirs[line], line
        else:
            pairs = zip(map(float, values), map(float, theirs[line]), strict=True)
            assert all(abs(a - b) <= 1e-5 * max(1, abs(a)) for a, b in pairs), line


@pytest.mark.parametrize("name", ["linux-x86_64", "linux-aarch64"])
def test_a_linux_library_needs_the_c_library_alone(name, library):
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    path = library(name)
    said = subprocess.run(
        ["readelf", "-W", "-d", "--dyn-syms", "-V", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert set(re.findall(r"NEEDED.*\[(.+)\]", said)) <= NEEDED[name]
    versions = re.findall(r"GLIBC_(\d+)\.(\d+)", said)
    assert max((int(a), int(b)) for a, b in versions) <= (2, 28)
    assert all(door in said for door in DOORS)


def test_a_windows_library_needs_the_system_alone(library):
    """By the names of libraries in the file: the C runtime and threads are Windows' own."""
    path = library("windows-x86_64")
    content = path.read_bytes()
    named = set(re.findall(rb"[\w.+-]+\.dll\0", content, re.I)) - {path.name.encode() + b"\0"}
    system = re.compile(rb"(kernel32|ntdll|ucrtbase|api-ms-win-crt-[\w-]+)\.dll\0", re.I)
    assert named and not [name for name in named if not system.fullmatch(name)]
    assert all(door.encode() in content for door in DOORS)


def test_a_macos_library_needs_the_system_alone(library):
    """By its load commands (mach-o/loader.h). ARM's macOS loads only what is signed."""
    content = library("macos-aarch64").read_bytes()
    (count,), place, needed, signed, oldest = (
        struct.unpack_from("<I", content, 16),
        32,
        [],
        False,
        0,
    )
    for _ in range(count):
        command, size = struct.unpack_from("<II", content, place)
        words = content[place + 24 : place + size].split(b"\0")[0].decode(errors="replace")
        if command == 0x32:  # LC_BUILD_VERSION
            oldest = struct.unpack_from("<I", content, place + 12)[0] >> 16
        elif command == 0x0D:  # LC_ID_DYLIB
            assert words == "@rpath/nibble_cpu.dylib"
        elif command & 0x7FFFFFFF in (0x0C, 0x18, 0x1F):  # LC_LOAD_, LC_LOAD_WEAK_, LC_REEXPORT_
            needed.append(words)
        signed = signed or command == 0x1D  # LC_CODE_SIGNATURE
        place += size
    assert needed == ["/usr/lib/libSystem.B.dylib"] and signed and oldest == 11
    assert all(f"_{door}".encode() in content for door in DOORS)
