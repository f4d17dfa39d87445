"""The interface of `nibble_kernels` for GPUs, without anything compiled for this Python.

Ops take the same arguments by name. `isa` is the number of a route on a GPU: 0 the one that is
chosen, and the others as `routes` numbers them, so that every path can be tried on one GPU.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from . import (
    driver,
    kernels,
    library,
    nvrtc,
    plans,
    plans_nvfp4,
    plans_w4a8,
    plans_w16,
    routes,
    structs,
)
from .kernels import Kernel
from .plans import Gpu, Launch
from .repeated import Plan, RepeatedCall
from .structs import E4M3, INT8, PACKED

OLDEST = 75


class Unavailable(RuntimeError):
    """Why a GPU cannot run the kernels this way, in words."""


class Device:
    """One GPU: what it is, and its kernels, loaded when they are first asked for.

    Which kernels can be had is found out once, by loading one: those of the package, else those
    that NVRTC makes here, else the package's PTX, which the driver compiles. Raises Unavailable
    with the reasons where none of them loads.
    """

    def __init__(self, index: int, package: library.Package, cuda: driver.Driver):
        self.cuda, self.package = cuda, package
        self.gpu = Gpu(cuda.capability(index), cuda.multiprocessors(index))
        if self.gpu.capability < OLDEST:
            raise Unavailable(
                f"the kernels need compute capability {OLDEST / 10}, and cuda:{index} has"
                f" {self.gpu.capability / 10}"
            )
        self.context = cuda.context(index)
        self._functions: dict[Kernel, tuple[ctypes.c_void_p, int]] = {}
        self._lock = threading.Lock()
        self.passed_over: list[str] = []
        self.arch, self.packaged = self._chosen()

    def _chosen(self) -> tuple[str, bool]:
        """(architecture, whether its cubins are the package's); why not a way before that one is
        in `passed_over`.
        """
        wanted = kernels.architecture(self.gpu.capability)
        own = str(self.gpu.capability) if wanted == kernels.PTX else wanted
        reasons = self.passed_over
        for arch, packaged in ((wanted, True), (own, False), (kernels.PTX, True)):
            if packaged and not self.package.has(arch):
                why = self.package.absent or f"the package has no cubins for {arch}"
            elif not packaged and library.why_not_compile(arch):
                why = library.why_not_compile(arch)
            else:
                self.arch, self.packaged = arch, packaged
                try:
                    self.function(kernels.add_tiles(self.gpu.mma), 0)
                    return arch, packaged
                except (driver.DriverError, nvrtc.CompileError, ValueError, OSError) as error:
                    why = str(error)
            if why not in reasons:
                reasons.append(why)
        raise Unavailable("; ".join(reasons))

    @property
    def origin(self) -> str:
        """Where its kernels come from, in words."""
        if self.packaged:
            return f"{self.arch} of the package ({self.package.manifest['compiler']})"
        major, minor = nvrtc.version()
        return f"{self.arch}, compiled here by NVRTC {major}.{minor}"

    @property
    def knows_waiting(self) -> bool:
        """Whether its kernels of a product wait themselves for the one before them; those of the
        PTX, which is for 8.0 and later, do not.
        """
        return self.gpu.capability >= 90 and self.arch != kernels.PTX

    @property
    def way(self) -> str:
        """`origin`, and why not a way before it."""
        return "; ".join([self.origin, *self.passed_over])

    def cubin(self, kernel: Kernel) -> library.Cubin:
        """A kernel's code; what the package has not (another GPU's path) is compiled. Raises
        CompileError, or ValueError for a damaged package.
        """
        found = self.package.find(kernel, self.arch) if self.packaged else None
        return library.cached(kernel, self.arch) if found is None else found

    def function(self, kernel: Kernel, shared: int) -> ctypes.c_void_p:
        """A kernel that may use so many bytes of shared memory."""
        found, allowed = self._functions.get(kernel, (None, 0))
        if found is not None and shared <= allowed:
            return found
        with self._lock:
            found, allowed = self._functions.get(kernel, (None, 0))
            if found is None:
                found = self.cuda.function(self.context, *self.cubin(kernel))
                allowed = 48 * 1024
            if shared > allowed:
                self.cuda.allow_shared(found, shared)
                allowed = shared
            self._functions[kernel] = found, allowed
        return found

    def ready(self, launches: Iterable[Launch]) -> list[driver.Ready]:
        return [
            self.cuda.ready(self.function(launch.kernel, launch.shared), launch)
            for launch in launches
        ]

    def start(self, launches: Iterable[Launch], stream: int) -> None:
        self.cuda.start(self.context, self.ready(launches), stream)

    def prepare(
        self,
        wanted: Iterable[Kernel],
        said: Callable[[int, int, str], None] | None = None,
        at_once: int = 4,
    ) -> int:
        """Has kernels compiled side by side before they are needed; returns how many that were.
        `said`: done, all, name. What it raises ends the work, after the kernels under way.
        """
        missing = self.missing(wanted)
        with ThreadPoolExecutor(at_once) as pool:
            tasks = {pool.submit(self.cubin, kernel): kernel for kernel in missing}
            try:
                if said and missing:
                    said(0, len(missing), missing[0].name)
                for done, task in enumerate(as_completed(tasks), 1):
                    task.result()
                    if said:
                        said(done, len(missing), tasks[task].name)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return len(missing)

    def missing(self, wanted: Iterable[Kernel]) -> list[Kernel]:
        """Those that would have to be compiled; none where nothing can be."""
        if library.why_not_compile(self.arch):
            return []
        return [kernel for kernel in wanted if not self._is_at_hand(kernel)]

    def _is_at_hand(self, kernel: Kernel) -> bool:
        packaged = self.packaged and self.package.lists(kernel, self.arch)
        return packaged or kernel in self._functions or library.is_cached(kernel, self.arch)


class CubinModule:
    """See the module's docstring. cuda, package: others in tests.

    default_route: what a call without a route gets. 0 leaves it to the GPU; another one is for
    GPUs on which a path is found to be wrong, and is set before the first call.
    """

    DEVICES = ("cuda",)

    def __init__(
        self, cuda: driver.Driver | None = None, package: library.Package | None = None
    ) -> None:
        self.cuda = driver.driver() if cuda is None else cuda
        self.package = library.Package() if package is None else package
        self.default_route = 0
        self._devices: dict[int, Device] = {}
        self._lock = threading.Lock()

    def on(self, device: int) -> Device:
        """A GPU by its index. Raises Unavailable, DriverError."""
        found = self._devices.get(device)
        if found is None:
            with self._lock:
                found = self._devices.get(device) or Device(device, self.package, self.cuda)
                self._devices[device] = found
        return found

    # ---- questions ---------------------------------------------------------------------------

    def capability(self, device: int) -> int:
        return self.on(device).gpu.capability

    def codes(self, capability: int, route: int = 0) -> int:
        """The form of 4-bit codes that a GPU's product, or a route of it, reads fastest."""
        return routes.codes_of(route or self.default_route, capability)

    @staticmethod
    def routes(op: str, capability: int) -> dict[int, str]:
        """The routes of an op on a GPU, by number."""
        return routes.of(op, capability)

    def route(self, op: str, capability: int, m: int, n: int, k: int) -> tuple[str, str]:
        """(path, reason) in words."""
        chosen = routes.path_of(self.default_route)
        if op.startswith("gemm_w4a4_up") and chosen:
            return f"{routes.PATHS[chosen]}, asked for", f"route {self.default_route}"
        if op == "gemm_w4a4_up" and capability // 10 == 9:
            path = "sm90: wgmma on 8-bit floats (integers for activations of 8 bits)"
            return path, f"compute capability {capability / 10}"
        words = {75: "sm75: int4 m8n8k32", 80: "sm80: int4 m16n8k64"}
        if op.startswith("gemm_w4a4_up"):
            floor = 75 if capability < 80 else 80 if capability < 90 else 100
            path = words.get(floor, "sm100: int8 m16n8k32 on widened codes")
            return path, f"compute capability {capability / 10}"
        if op == "gemm_nvfp4_up":
            return "sm120: e2m1 m16n8k64 with block scales", f"compute capability {capability / 10}"
        if op == "linear_w4a8":
            path = "int8 m8n8k16" if capability < 80 else "int8 m16n8k32"
            return f"cuda: {path} on weights that are read as int8", "not yet measured"
        return f"cuda: {op}", "one kernel for every GPU from 7.5 on"

    @staticmethod
    def workspace_bytes(
        op: str, capability: int, M: int, N: int, K: int, R: int, codes: int
    ) -> int:
        """Bytes of scratch that an op wants; R: the rank of the h that it writes, if it does."""
        if op == "gemm_w4a4_up" and capability // 10 == 9 and codes != INT8:
            return plans.hopper_workspace(codes, M, K)
        if op == "gemm_w4a4_up_gelu_quantize_down" and codes != E4M3:
            return plans.gelu_workspace(M, N, R)
        return plans_w4a8.scratch_bytes(M, K, R) if op == "linear_w4a8" else 0

    def linear_w4a4_bytes(self, capability: int, M: int, N: int, K: int, R: int, codes: int) -> int:
        """Bytes of scratch of a whole linear."""
        work = self.workspace_bytes("gemm_w4a4_up", capability, M, N, K, R, codes)
        return _linear_places(M, K, R, codes)[2] + _aligned(work)

    # ---- ops ---------------------------------------------------------------------------------

    def quantize_down(self, device: int, stream: int, threads: int, isa: int, **fields) -> None:
        there = self.on(device)
        there.start(plans.quantize_down(structs.QuantizeDown(**fields), there.gpu), stream)

    def gemm_w4a4_up(
        self, device: int, stream: int, threads: int, isa: int, workspace_size: int, **fields
    ) -> None:
        there, op = self.on(device), structs.GemmW4A4Up(**fields)
        there.start(routes.product(op, there.gpu, isa or self.default_route), stream)

    def gemm_w4a4_up_gelu_quantize_down(
        self,
        device: int,
        stream: int,
        threads: int,
        isa: int,
        mid_dtype: int,
        workspace_size: int,
        **fields,
    ) -> None:
        there = self.on(device)
        second = {name: fields.pop(name) for name in list(fields) if name in _OF_SECOND}
        first = structs.GemmW4A4Up(out_dtype=mid_dtype, **fields)
        op = structs.GemmW4A4UpGeluQuantizeDown(first=first, **second)
        route = isa or self._path_of_fused()
        there.start(routes.fused(op, there.gpu, route), stream)

    def _path_of_fused(self) -> int:
        """The fused op has paths and no tiles of its own, and none of Hopper's."""
        path = routes.path_of(self.default_route)
        return path if path in routes.MMAS else 0

    def linear_w4a4(
        self,
        device: int,
        stream: int,
        threads: int,
        isa: int,
        scratch: int,
        scratch_size: int,
        **fields,
    ) -> None:
        """quantize_down and gemm_w4a4_up, with what goes between them in scratch memory."""
        there, whole = self.on(device), fields | {"scratch": scratch}
        there.start(_linear(there, isa or self.default_route, whole), stream)

    def linear_w4a8(
        self, device: int, stream: int, threads: int, isa: int, scratch_size: int, **fields
    ) -> None:
        """isa: tokens of a tile, 0 for those that the GPU would choose."""
        there = self.on(device)
        there.start(_linear_w4a8(there, isa, fields), stream)

    def gemv_w4a16(self, device: int, stream: int, threads: int, isa: int, **fields) -> None:
        there = self.on(device)
        there.start(_w4a16(there, isa, fields), stream)

    gemm_w4a16 = gemv_w4a16

    def gemm_vq(self, device: int, stream: int, threads: int, isa: int, **fields) -> None:
        there = self.on(device)
        there.start(_vq(there, isa, fields), stream)

    def quantize_nvfp4_down(
        self, device: int, stream: int, threads: int, isa: int, **fields
    ) -> None:
        there, op = self.on(device), structs.QuantizeNvfp4Down(**fields)
        there.start(plans_nvfp4.quantize_nvfp4_down(op, there.gpu), stream)

    def gemm_nvfp4_up(self, device: int, stream: int, threads: int, isa: int, **fields) -> None:
        """isa: tokens of a tile, 0 for those that the GPU would choose."""
        there, op = self.on(device), structs.GemmNvfp4Up(**fields)
        planned = plans_nvfp4.gemm_nvfp4_up(op, there.gpu)
        there.start(plans_nvfp4.product(op, isa) if isa else planned, stream)

    def repeated(self, op: str, arguments: dict[str, Any]) -> RepeatedCall:
        """An op of a layer, whose arguments but for the tokens' these are: called as the op is
        with the others, it keeps what it planned.
        """
        return RepeatedCall(self, _PLANS[op], arguments)


# ---- a layer's arguments -> its launches ---------------------------------------------------------


def _linear(there: Device, route: int, fields: dict[str, Any]) -> list[Launch]:
    get, scratch = fields.get, fields.get("scratch", 0)
    m, k, rank, codes = fields["M"], fields["K"], fields["R"], fields["codes"]
    ascales, h, workspace = (scratch + place for place in _linear_places(m, k, rank, codes))
    if not CubinModule.workspace_bytes("gemm_w4a4_up", there.gpu.capability, m, 0, k, rank, codes):
        workspace = 0  # the end of the scratch memory, where something else may begin
    shared = {name: get(name) for name in ("M", "K", "R", "param_dtype", "codes")}
    shared |= {name: get(name) for name in ("act_unsigned", "unsigned_from")}
    shared |= {"q": scratch, "ascales": ascales, "h": h}
    quantizer = {name: get(name) for name in ("x", "x_stride", "x_dtype", "smooth")}
    quantizer |= {name: get(name) for name in ("proj_down", "rotate")}
    product = {name: get(name) for name in ("N", "weight", "weight_scale", "proj_up", "bias")}
    product |= {"out": get("out"), "out_dtype": get("x_dtype"), "h_stride": rank}
    first = structs.QuantizeDown(**shared, **quantizer)
    second = structs.GemmW4A4Up(**shared, **product, workspace=workspace)
    following = routes.product(second, there.gpu, route)
    waiting = [launch._replace(waits=there.knows_waiting) for launch in following]
    return plans.quantize_down(first, there.gpu) + waiting


def _linear_w4a8(there: Device, route: int, fields: dict[str, Any]) -> list[Launch]:
    op = structs.LinearW4A8(**{name: fields[name] for name in fields if name != "scratch_size"})
    launches = plans_w4a8.linear_w4a8(op, there.gpu, routes.w4a8_rows(route))
    product = [launch._replace(waits=there.knows_waiting) for launch in launches[-1:]]
    return launches[:-1] + product


def _w4a16(there: Device, route: int, fields: dict[str, Any]) -> list[Launch]:
    return plans_w16.w4a16(structs.W4A16(**fields), there.gpu)


def _vq(there: Device, route: int, fields: dict[str, Any]) -> list[Launch]:
    return plans_w16.gemm_vq(structs.GemmVQ(**fields), there.gpu)


_PLANS: dict[str, Plan] = {
    "linear_w4a4": _linear,
    "linear_w4a8": _linear_w4a8,
    "gemv_w4a16": _w4a16,
    "gemm_w4a16": _w4a16,
    "gemm_vq": _vq,
}


_OF_SECOND = {field[0] for field in structs.GemmW4A4UpGeluQuantizeDown._fields_} - {"first"}


def _aligned(size: int) -> int:
    return (size + 255) & ~255


def _linear_places(m: int, k: int, rank: int, codes: int) -> tuple[int, int, int]:
    """Where ascales, h and the workspace begin behind the codes, in a whole linear's scratch."""
    ascales = _aligned(m * k // (2 if codes == PACKED else 1))
    h = ascales + _aligned(m * k // structs.GROUP * 4)
    return ascales, h, h + _aligned(m * rank * 4)


@functools.cache
def module() -> CubinModule:
    """The process's own. Raises DriverError where there is no driver."""
    return CubinModule()
