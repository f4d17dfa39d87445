"""Probes on a GPU: their kernels compiled by NVRTC, started through CUDA's driver."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from nibble.kernels.backends.cubins import driver, kernels, nvrtc
from nibble.kernels.backends.cubins.plans import Launch, Matrix

from .probes import Tile

HEADER = str(Path(__file__).with_name("kernels.cuh"))


def kernel(name: str, header: str = HEADER, space: str = "probe") -> kernels.Kernel:
    return kernels.Kernel(header, f"{space}::{name}")


class Gpu:
    """`start` of `probes`, on a GPU. Raises DriverError, CompileError."""

    def __init__(self, index: int = 0):
        self.cuda = driver.driver()
        self.context = self.cuda.context(index)
        self.arch = kernels.architecture(self.cuda.capability(index))
        self.device = torch.device("cuda", index)
        self._functions: dict[kernels.Kernel, ctypes.c_void_p] = {}

    def launch(
        self, which: kernels.Kernel, grid: int, threads: int, shared: int, arguments: tuple
    ) -> None:
        """Starts a kernel of ours; nothing waits. arguments: ctypes values, or a Matrix."""
        function = self._functions.get(which)
        if function is None:
            compiled = nvrtc.compile_kernel(which, self.arch)
            function = self.cuda.function(self.context, compiled.code, compiled.symbol)
            self._functions[which] = function
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.cuda.start(
            self.context, function, Launch(which, (grid, 1), threads, shared, arguments), stream
        )

    def __call__(self, name: str, threads: int, shared: int, *arguments: object) -> None:
        """Runs one block and brings what it wrote back into the tensors."""
        there, values = [], []
        for argument in arguments:
            if isinstance(argument, int):
                values.append(ctypes.c_int(argument))
                continue
            tensor = argument.matrix if isinstance(argument, Tile) else argument
            copy = tensor.view(torch.uint8).to(self.device)
            there.append((tensor, copy))
            values.append(_value(argument, copy))
        torch.cuda.synchronize(self.device)
        self.launch(kernel(name), 1, threads, shared, tuple(values))
        torch.cuda.synchronize(self.device)
        for tensor, copy in there:
            tensor.view(torch.uint8).copy_(copy)


def _value(argument: object, copy: torch.Tensor) -> object:
    if not isinstance(argument, Tile):
        return ctypes.c_void_p(copy.data_ptr())
    rows, row_bytes = argument.matrix.shape
    return Matrix(copy.data_ptr(), rows, row_bytes, argument.box_rows, argument.box_bytes)
