"""CUDA's driver, by ctypes: devices, modules, and kernels started on a stream.

The library comes with every graphics driver (`libcuda.so.1`, `nvcuda.dll`). Device memory,
streams and contexts are torch's: a module is loaded into a device's primary context, which torch
uses too.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterable

from .plans import Launch, Matrix

_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76  # CU_DEVICE_ATTRIBUTE_…
_MOST_SHARED, _CARVEOUT = 8, 9  # CU_FUNC_ATTRIBUTE_…
_LARGEST_CARVEOUT = 100
_RELAXED_CAPTURE = 2
_EARLY_START = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an identifier, and a union of 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class DriverError(RuntimeError):
    """The driver's own words, and what was asked of it."""


class Driver:
    """lib: the driver's library; another one in tests. Raises DriverError where there is none."""

    def __init__(self, lib: ctypes.CDLL | None = None):
        self.lib = _load() if lib is None else lib
        self.process = os.getpid()
        self._check(self.lib.cuInit(0), "starting CUDA")

    def attribute(self, device: int, which: int) -> int:
        handle, value = ctypes.c_int(), ctypes.c_int()
        self._check(self.lib.cuDeviceGet(ctypes.byref(handle), device), f"finding GPU {device}")
        asked = self.lib.cuDeviceGetAttribute(ctypes.byref(value), which, handle)
        self._check(asked, f"asking GPU {device}")
        return value.value

    def capability(self, device: int) -> int:
        """10 * major + minor."""
        return 10 * self.attribute(device, _MAJOR) + self.attribute(device, _MINOR)

    def multiprocessors(self, device: int) -> int:
        return self.attribute(device, _MULTIPROCESSORS)

    def version(self) -> int:
        """1000 * major + 10 * minor of the newest CUDA that the driver serves."""
        value = ctypes.c_int()
        self._check(self.lib.cuDriverGetVersion(ctypes.byref(value)), "asking the driver's version")
        return value.value

    def context(self, device: int) -> ctypes.c_void_p:
        """A device's primary context, kept as long as the process lives."""
        handle, context = ctypes.c_int(), ctypes.c_void_p()
        self._check(self.lib.cuDeviceGet(ctypes.byref(handle), device), f"finding GPU {device}")
        kept = self.lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
        self._check(kept, f"using GPU {device}")
        return context

    def function(self, context: ctypes.c_void_p, code: bytes, symbol: str) -> ctypes.c_void_p:
        """A kernel from a cubin or PTX, loaded into a context; also while a graph is captured."""
        module, found = ctypes.c_void_p(), ctypes.c_void_p()
        mode = ctypes.c_int(_RELAXED_CAPTURE)
        with _Current(self, context):
            self._check(self.lib.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "loading")
            try:
                # text has to end with a zero
                loaded = self.lib.cuModuleLoadData(ctypes.byref(module), code + b"\0")
                self._check(loaded, f"loading {symbol}")
                taken = self.lib.cuModuleGetFunction(ctypes.byref(found), module, symbol.encode())
                self._check(taken, f"finding {symbol}")
                carveout = self.lib.cuFuncSetAttribute(found, _CARVEOUT, _LARGEST_CARVEOUT)
                self._check(carveout, f"preferring shared memory for {symbol}")
            finally:
                self.lib.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        return found

    def allow_shared(self, function: ctypes.c_void_p, size: int) -> None:
        """More than 48 KB of shared memory have to be allowed, once for each kernel and context."""
        allowed = self.lib.cuFuncSetAttribute(function, _MOST_SHARED, size)
        self._check(allowed, f"allowing {size} bytes of shared memory")

    def matrix(self, matrix: Matrix) -> ctypes.Array:
        """What Hopper's copy engine is told of a matrix: 128 bytes, aligned to 64 as the driver
        wants them.
        """
        buffer = (ctypes.c_ubyte * 192)()
        offset = -ctypes.addressof(buffer) % 64
        described = (ctypes.c_ubyte * 128).from_buffer(buffer, offset)
        if not matrix.base:
            return described
        pair64, pair32 = ctypes.c_uint64 * 2, ctypes.c_uint32 * 2
        swizzle = 3 if matrix.box_bytes == 128 else 2
        status = self.lib.cuTensorMapEncodeTiled(
            described,
            0,  # bytes
            2,
            ctypes.c_void_p(matrix.base),
            pair64(matrix.row_bytes, matrix.rows),
            (ctypes.c_uint64 * 1)(matrix.row_bytes),
            pair32(matrix.box_bytes, matrix.box_rows),
            pair32(1, 1),
            0,  # not interleaved
            swizzle,
            3,  # 256 bytes into the second-level cache at once
            0,  # zeros outside
        )
        self._check(status, "describing a matrix to the copy engine")
        return described

    def ready(self, function: ctypes.c_void_p, launch: Launch) -> Ready:
        """A launch with its arguments in memory."""
        values = [
            self.matrix(value) if isinstance(value, Matrix) else value for value in launch.arguments
        ]
        return Ready(function, launch, values)

    def start(self, context: ctypes.c_void_p, launches: Iterable[Ready], stream: int) -> None:
        """Starts kernels, one after another; nothing waits."""
        with _Current(self, context):
            for launch in launches:
                if launch.config is None:
                    status = self.lib.cuLaunchKernel(
                        launch.function, *launch.shape, stream, launch.addresses, None
                    )
                else:
                    launch.config.stream = stream
                    status = self.lib.cuLaunchKernelEx(
                        ctypes.byref(launch.config), launch.function, launch.addresses, None
                    )
                if status:
                    self._check(status, f"starting {launch.name}")

    def _check(self, status: int, what: str) -> None:
        if not status:
            return
        if os.getpid() != self.process:
            raise DriverError(
                f"{what}: this process was forked from one that uses the GPU; start it with the"
                " 'spawn' method"
            )
        words = ctypes.c_char_p()
        self.lib.cuGetErrorString(status, ctypes.byref(words))
        text = words.value.decode() if words.value else f"error {status}"
        raise DriverError(f"{what}: {text}")


def _early(launch: Launch) -> _Config:
    """Of a kernel that may start while the one before it still runs; its stream is set later."""
    attribute = _Attribute(id=_EARLY_START)
    attribute.value[0] = 1
    (x, y), shared = launch.grid, launch.shared
    config = _Config((x, y, 1), (launch.threads, 1, 1), shared)
    config.attributes, config.count = ctypes.pointer(attribute), 1
    return config


class Ready:
    """A launch that can be started, and again: the driver reads its arguments when it is."""

    def __init__(self, function: ctypes.c_void_p, launch: Launch, values: list):
        (x, y), name = launch.grid, launch.kernel.name
        self.function, self.name = function, name
        self.shape = (x, y, 1, launch.threads, 1, 1, launch.shared)
        self.config = _early(launch) if launch.waits else None
        self._values = values
        self.addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))

    def replace(self, number: int, value: ctypes.Array) -> None:
        """Another value for an argument."""
        self._values[number] = value
        self.addresses[number] = ctypes.addressof(value)


class _Current:
    """Makes a context current for one block; one that is current already costs one question."""

    def __init__(self, driver: Driver, context: ctypes.c_void_p):
        self.driver, self.context = driver, context

    def __enter__(self) -> None:
        now = ctypes.c_void_p()
        self.driver.lib.cuCtxGetCurrent(ctypes.byref(now))
        self.pushed = now.value != self.context.value
        if self.pushed:
            status = self.driver.lib.cuCtxPushCurrent_v2(self.context)
            self.driver._check(status, "choosing the GPU")

    def __exit__(self, *_) -> None:
        if self.pushed:
            self.driver.lib.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def _load() -> ctypes.CDLL:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        lib = ctypes.CDLL(name)
    except OSError as error:
        raise DriverError(f"no NVIDIA driver ({name}): {error}") from error
    return typed(lib)


def typed(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told of pointers and 64-bit numbers, which ctypes would cut to an int."""
    lib.cuLaunchKernel.argtypes = [
        ctypes.c_void_p,
        *(ctypes.c_uint,) * 7,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    return lib


@functools.cache
def driver() -> Driver:
    """The process's driver. Raises DriverError."""
    return Driver()
