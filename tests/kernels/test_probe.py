"""The probes of a Hopper: their expected results hold in the emulator, their kernels compile, and
on a Hopper they are run.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from emulator import build
from nibble.kernels.backends.cubins import nvrtc
from probe import on_gpu, probes

KERNELS = [
    *("products", "integers", "copy", "transpose<4>", "multiply<0, true>", "multiply<1, false>")
]
COUNTS = {"mma": 6, "transpose": 1, "copies": 5, "products": 8, "integers": 4}


@pytest.fixture(scope="module")
def emulated():
    """`start` of the probes in the emulator."""
    if reason := build.unavailable():
        pytest.skip(reason)
    entry = Path(probes.__file__).with_name("entry.cpp")
    lib = ctypes.CDLL(str(build.library(own=(build.HERE / "emulator.cpp", entry))))

    def start(name, threads, shared, *arguments):
        name, _, numbers = name.partition("<")
        values = []
        if name == "multiply":
            kind, is_unsigned = numbers.rstrip(">").split(", ")
            values = [int(kind), int(is_unsigned == "true")]
        for argument in arguments:
            if isinstance(argument, probes.Tile):
                sizes = (*argument.matrix.shape, argument.box_rows, argument.box_bytes)
                kinds = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
                values.append(ctypes.c_void_p(argument.matrix.data_ptr()))
                values += [kind(size) for kind, size in zip(kinds, sizes, strict=True)]
            elif isinstance(argument, torch.Tensor):
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append(argument)
        getattr(lib, f"probe_{name}")(*values)

    return start


@pytest.mark.parametrize("group", probes.GROUPS)
def test_the_emulator_gives_what_the_probes_expect(emulated, group):
    found = list(probes.run(group, emulated))
    assert len(found) == COUNTS[group]
    assert [result for result in found if result.wrong] == []


@pytest.mark.parametrize("group", probes.GROUPS)
def test_a_kernel_that_does_nothing_fails_every_probe(group):
    assert all(result.wrong for result in probes.run(group, lambda *arguments: None))


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_hopper(name):
    try:
        nvrtc.architectures()
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    compiled = nvrtc.compile_kernel(on_gpu.kernel(name), "90a")
    assert compiled.code.startswith(b"\x7fELF")


@pytest.mark.gpu
@pytest.mark.parametrize("group", probes.GROUPS)
def test_the_gpu_gives_what_the_probes_expect(group):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device in this machine")
    if group in probes.HOPPER_ONLY and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("these instructions are Hopper's own")
    assert [found for found in probes.run(group, on_gpu.Gpu()) if found.wrong] == []
