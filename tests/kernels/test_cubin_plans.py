"""Cubins are started as the compiled extension starts its kernels: both launchers get the same
structs, and every launch is compared (instance, grid, threads, shared memory, each argument).
"""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest

from emulator import build, emulated
from nibble.kernels.backends.cubins import kernels, plans, plans_w16, structs
from nibble.kernels.backends.cubins.plans import Gpu, Matrix

if unavailable := build.unavailable():
    pytest.skip(unavailable, allow_module_level=True)

GPUS = [
    Gpu(capability, multiprocessors)
    for capability in (75, 80, 86, 89, 90, 100, 103, 120)
    for multiprocessors in (4, 82)
]
SHAPES = [
    (m, n, k)
    for m in (0, 1, 2, 3, 17, 33, 65, 300, 4608)
    for n, k in ((64, 128), (3072, 3072), (1000, 192))
]
_ADDRESSES = itertools.count(0x10000, 0x1000)


class MatrixStruct(ctypes.Structure):
    """TensorMap of the emulator."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("rows", ctypes.c_uint64),
        ("row_bytes", ctypes.c_uint64),
        ("box_rows", ctypes.c_uint32),
        ("box_bytes", ctypes.c_uint32),
    ]


def fill(op: ctypes.Structure, **values) -> ctypes.Structure:
    """The struct with every pointer set that is not given."""
    for name, kind in op._fields_:
        if kind is ctypes.c_void_p:
            setattr(op, name, next(_ADDRESSES))
    for name, value in values.items():
        setattr(op, name, value)
    return op


def launches_of_extension(op: str, struct: ctypes.Structure, gpu: Gpu) -> list[tuple]:
    """(kernel, grid, threads, shared, arguments' bytes) of each launch, from the C++ launcher; or
    the one refusal.
    """
    lib = emulated.library()
    lib.emulated_notes.restype = ctypes.c_char_p
    lib.emulated_note(gpu.multiprocessors)
    try:
        emulated._call(op, struct, gpu.capability)
        lines = lib.emulated_notes().decode().splitlines()
    except emulated.Failed as error:
        return [("refused", str(error))]
    finally:
        lib.emulated_note(0)
    noted = []
    for line in lines:
        name, x, y, threads, shared, *arguments = line.split("\t")
        values = [bytes.fromhex(argument) for argument in arguments]
        noted.append((plain(name), (int(x), int(y)), int(threads), int(shared), values))
    return noted


def plain(name: str) -> str:
    """A C++ compiler's name of an instance as `kernels` writes it."""
    name = re.sub(r"^void |nibble::cuda::|nibble::", "", name.replace("> >", ">>"))
    name = re.sub(r"\((Form|Codes)\)(\d)", r"\1:\2", name)
    return re.sub(r"\(.*$", "", name)


def as_compiled(kernel: kernels.Kernel) -> str:
    """A name of `kernels` as `plain` gives it: enumerators by number, tilings by their sizes."""
    name = kernel.name
    for number, form in enumerate(kernels.FORMS):
        name = name.replace(form, f"Form:{number}")
    name = name.replace("Codes::packed", "Codes:0").replace("Codes::e4m3", "Codes:1")
    return name.replace("Codes::int8", "Codes:2")


def same_arguments(mine: tuple, noted: list[bytes]) -> None:
    assert len(mine) == len(noted)
    for value, content in zip(mine, noted, strict=True):
        if isinstance(value, Matrix):
            described = MatrixStruct.from_buffer_copy(content)
            fields = (getattr(described, name) or 0 for name in Matrix._fields)
            assert tuple(fields) == tuple(value)
        elif isinstance(value, ctypes.Structure):
            assert ctypes.sizeof(value) == len(content)
            other = type(value).from_buffer_copy(content)
            assert fields_of(value) == fields_of(other)
        elif not isinstance(value, ctypes.Array):  # an empty struct has a byte of no meaning
            assert type(value).from_buffer_copy(content).value == value.value


def fields_of(struct: ctypes.Structure) -> dict:
    values = {name: getattr(struct, name) for name, _ in struct._fields_}
    return {
        name: fields_of(value) if isinstance(value, ctypes.Structure) else value
        for name, value in values.items()
    }


TILINGS = {
    name: ", ".join(map(str, tiling))
    for name, tiling in {**plans_w16._W4A16, **plans_w16._VQ}.items()
}


def expand(name: str) -> str:
    """A tiling's alias as the type that it stands for, without what C++ adds behind the sizes."""
    for alias in kernels.W4A16_TILINGS:
        name = re.sub(rf"\b{alias}\b", f"Tiling<{TILINGS[alias]}>", name)
    for alias in kernels.VQ_TILINGS:
        name = re.sub(rf"{alias}<(Layout<\d, \d>)>", rf"VqTiling<\1, {TILINGS[alias]}>", name)
    return name


def shorten(name: str) -> str:
    """A tiling's blocks on a multiprocessor, its last number, are the kernel's own affair."""
    return re.sub(r"(VqTiling<Layout<\d, \d>(?:, \d){5}), \d>", r"\1>", name)


def compare(op: str, plan, struct: ctypes.Structure, gpu: Gpu) -> None:
    noted = launches_of_extension(op, struct, gpu)
    try:
        mine = plan(struct, gpu)
    except ValueError as error:
        assert noted == [("refused", str(error))]
        return
    names = [expand(as_compiled(launch.kernel)) for launch in mine]
    assert names == [shorten(name) for name, *_ in noted]
    for launch, (_, grid, threads, shared, arguments) in zip(mine, noted, strict=True):
        assert (launch.grid, launch.threads, launch.shared) == (grid, threads, shared)
        same_arguments(launch.arguments, arguments)


def known(gpu: Gpu, plan, struct: ctypes.Structure) -> None:
    """What is started is among what is built for the architecture."""
    listed = set(kernels.of(kernels.architecture(gpu.capability)))
    assert {launch.kernel for launch in plan(struct, gpu)} <= listed


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_product(gpu):
    codes = plans_codes(gpu)
    for (m, n, k), rank, dtype, sign in itertools.product(SHAPES, (0, 32, 33), (1, 2), (0, 1)):
        for form in codes:
            op = fill(structs.GemmW4A4Up(), M=m, N=n, K=k, R=rank, codes=form, act_unsigned=sign)
            op.unsigned_from = 64 * sign * (rank == 33)
            op.h_stride, op.param_dtype, op.out_dtype = rank, dtype, 2
            compare("gemm_w4a4_up", plans.gemm_w4a4_up, op, gpu)
            known(gpu, plans.gemm_w4a4_up, op)


def plans_codes(gpu: Gpu) -> tuple[int, ...]:
    both = structs.PACKED, structs.INT8
    return (*both, structs.E4M3) if gpu.hopper else both


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_fused_mlp(gpu):
    grid = itertools.product(SHAPES, (0, 40), (1, 2), (0, 1), (structs.PACKED, structs.INT8))
    for (m, n, k), rank, dtype, sign, codes in grid:
        first = fill(structs.GemmW4A4Up(), M=m, N=n // 64 * 64, K=k, R=16, act_unsigned=sign)
        first.param_dtype, first.out_dtype, first.codes = dtype, 2, codes
        op = fill(structs.GemmW4A4UpGeluQuantizeDown(), first=first, R2=rank, act_unsigned2=1)
        plan = plans.gemm_w4a4_up_gelu_quantize_down
        compare("gemm_w4a4_up_gelu_quantize_down", plan, op, gpu)
        known(gpu, plan, op)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_quantizer(gpu):
    for (m, _, k), rank in itertools.product(SHAPES, (0, 32, 33, 160)):
        for x, param, form in itertools.product((0, 1, 2), (1, 2), (0, 1, 2)):
            for codes in plans_codes(gpu):
                op = fill(structs.QuantizeDown(), M=m, K=k, R=rank, x_dtype=x, param_dtype=param)
                op.act_unsigned, op.rotate, op.codes = form == 1, form == 2, codes
                op.x_stride, op.unsigned_from = k + 8, 64 * (form == 1 and rank == 33)
                compare("quantize_down", plans.quantize_down, op, gpu)
                assert op.R == rank
                known(gpu, plans.quantize_down, op)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_w4a16(gpu):
    for (m, n, k), x, param in itertools.product(SHAPES, (0, 1, 2), (1, 2)):
        op = fill(structs.W4A16(), M=m, N=n, K=k, x_dtype=x, param_dtype=param)
        compare("gemm_w4a16", plans_w16.w4a16, op, gpu)
        known(gpu, plans_w16.w4a16, op)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_codebooks(gpu):
    layouts = (*kernels.VQ_LAYOUTS, (5, 2))
    for (m, n, k), x, (bits, vector) in itertools.product(SHAPES, (0, 1, 2), layouts):
        op = fill(structs.GemmVQ(), M=m, N=n, K=k, bits=bits, vector=vector, x_dtype=x, out_dtype=x)
        op.codebook_dtype, op.addend_dtype, op.param_dtype = 1, x, 2
        compare("gemm_vq", plans_w16.gemm_vq, op, gpu)
        if (bits, vector) in kernels.VQ_LAYOUTS:
            known(gpu, plans_w16.gemm_vq, op)


def test_refusals_are_the_same():
    gpu = Gpu(89, 82)
    op = fill(structs.GemmW4A4Up(), M=4, N=128, K=64, R=0, param_dtype=0)
    compare("gemm_w4a4_up", plans.gemm_w4a4_up, op, gpu)
    op = fill(structs.GemmW4A4Up(), M=4, N=128, K=64, R=0, param_dtype=1, codes=structs.E4M3)
    compare("gemm_w4a4_up", plans.gemm_w4a4_up, op, gpu)
    op = fill(structs.QuantizeDown(), M=4, K=64, R=0, param_dtype=1, codes=structs.E4M3)
    compare("quantize_down", plans.quantize_down, op, gpu)
    op = fill(structs.W4A16(), M=4, N=128, K=64, param_dtype=0)
    compare("gemm_w4a16", plans_w16.w4a16, op, gpu)
    op = fill(structs.GemmVQ(), M=4, N=128, K=64, bits=8, vector=4, codebook_dtype=2)
    compare("gemm_vq", plans_w16.gemm_vq, op, gpu)
