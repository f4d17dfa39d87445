"""CUDA's driver for tests: GPUs that are not there, whose launches are noted.

A status other than 0 for a function is given by name; modules that a GPU cannot load by their
first bytes.
"""

from __future__ import annotations

import ctypes
import threading
from typing import NamedTuple

NO_BINARY, INVALID_IMAGE, NOT_INITIALIZED = 209, 200, 3
_WORDS = {NO_BINARY: b"no kernel image is available for execution on the device"}


class Started(NamedTuple):
    context: int
    symbol: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    stream: int
    early: bool = False
    """Whether it may be started while the kernel before it runs."""


class FakeDriver:
    """capabilities: of each GPU. `started`: what was launched; `loads`: (context, code)."""

    def __init__(self, *capabilities: int, refuses: tuple[bytes, ...] = ()):
        self.capabilities, self.refuses = capabilities, refuses
        self.status: dict[str, int] = {}
        self.started: list[Started] = []
        self.loads: list[tuple[int, bytes]] = []
        self._stacks = threading.local()
        self.modes: list[int] = []
        self.mode = 0
        self.symbols: dict[int, str] = {}
        self.attributes: list[tuple[str, int, int]] = []

    @property
    def stack(self) -> list[int]:
        """Contexts that are current for this thread."""
        if not hasattr(self._stacks, "contexts"):
            self._stacks.contexts = []
        return self._stacks.contexts

    def __getattr__(self, name: str):
        if not name.startswith("cu"):
            raise AttributeError(name)
        work = getattr(type(self), f"_{name.removesuffix('_v2')}")
        return lambda *values: self.status.get(name) or work(self, *values) or 0

    def _cuInit(self, flags):
        pass

    def _cuDriverGetVersion(self, version):
        version._obj.value = 13000

    def _cuDeviceGet(self, handle, index):
        if index >= len(self.capabilities):
            return 101
        handle._obj.value = index
        return 0

    def _cuDeviceGetAttribute(self, value, which, handle):
        capability = self.capabilities[handle.value]
        value._obj.value = {16: 82, 75: capability // 10, 76: capability % 10}[which]

    def _cuDevicePrimaryCtxRetain(self, context, handle):
        context._obj.value = 1000 + handle.value

    def _cuCtxGetCurrent(self, context):
        context._obj.value = self.stack[-1] if self.stack else None

    def _cuCtxPushCurrent(self, context):
        self.stack.append(context.value)

    def _cuCtxPopCurrent(self, context):
        context._obj.value = self.stack.pop()

    def _cuThreadExchangeStreamCaptureMode(self, mode):
        self.mode, mode._obj.value = mode._obj.value, self.mode
        self.modes.append(self.mode)

    def _cuModuleLoadData(self, module, code):
        if any(code.startswith(start) for start in self.refuses):
            return NO_BINARY
        self.loads.append((self.stack[-1], code))
        module._obj.value = len(self.loads)
        return 0

    def _cuModuleGetFunction(self, function, module, symbol):
        function._obj.value = 5000 + len(self.symbols)
        self.symbols[function._obj.value] = symbol.decode()

    def _cuFuncSetAttribute(self, function, which, value):
        self.attributes.append((self.symbols[function.value], which, value))

    def _cuTensorMapEncodeTiled(self, described, kind, rank, base, *rest):
        """What is described begins with the matrix's address."""
        described[:8] = base.value.to_bytes(8, "little")
        return 0 if ctypes.addressof(described) % 64 == 0 else 1

    def _cuLaunchKernel(self, function, x, y, z, threads, ty, tz, shared, stream, values, extra):
        self.started.append(
            Started(
                self.stack[-1], self.symbols[function.value], (x, y, z), threads, shared, stream
            )
        )

    def _cuLaunchKernelEx(self, config, function, values, extra):
        given = config._obj
        attribute = given.attributes[0]
        early = (given.count, attribute.id, attribute.value[0]) == (1, 6, 1)
        place = self.stack[-1], self.symbols[function.value], tuple(given.grid)
        self.started.append(Started(*place, given.block[0], given.shared, given.stream, early))

    def _cuGetErrorString(self, status, words):
        words._obj.value = _WORDS.get(status, b"an error of the driver")
