"""The GPU kernels without a compiled extension: cubins as data, started through CUDA's driver.

A cubin depends on no Python, no torch and no operating system. Those that the package carries are
used; what is missing (a newer GPU, a changed source, a git clone) is compiled by NVRTC, which
torch's CUDA wheels bring, once, into a cache on disk.

module     the interface of `nibble_kernels`, for GPUs
plans      an op's struct -> the kernels to start: which instance, grid, threads, shared memory
plans_w16  the same for activations of 16 bits
plans_w4a8  the same for weights that are read as int8
plans_nvfp4  the same for 4-bit floats
routes     the paths of the W4A4 product by number, each with its tiles
repeated   a layer's launches, planned once and started at other addresses
structs    the structs of csrc/nibble.h
kernels    every instance, and for which architectures it is built
wanted     those that a model can ask for
library    where a cubin comes from: the package, the cache, NVRTC; with the reason in words
nvrtc      CUDA C++ -> cubin, by NVRTC
driver     libcuda: devices, modules, launches
build      `python -m nibble cubins`: the package's own
"""

from .driver import DriverError
from .module import CubinModule, Unavailable, module
from .nvrtc import CompileError

ERRORS = (Unavailable, DriverError, CompileError, OSError, ValueError)
"""Why kernels cannot be had this way."""
__all__ = ["ERRORS", "CompileError", "CubinModule", "DriverError", "Unavailable", "module"]
