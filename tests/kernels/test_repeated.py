"""A layer's launches, planned once: at other addresses each is what planning anew gives."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from every_kernel import EveryKernel
from fake_driver import FakeDriver
from nibble.kernels.backends.cubins import driver, kernels
from nibble.kernels.backends.cubins.module import CubinModule
from nibble.kernels.backends.cubins.repeated import KEPT

GPUS = (75, 86, 90, 120)
PARAMETERS = itertools.count(0x7F00_0000_0000, 0x10_0000)
W4A4 = {
    "N": 256, "K": 128, "R": 32, "param_dtype": 2, "act_unsigned": False, "unsigned_from": 0,
    "rotate": False,
} | {
    name: next(PARAMETERS)
    for name in ("smooth", "proj_down", "weight", "weight_scale", "proj_up", "bias")
}  # fmt: skip
W4A16 = {"N": 256, "K": 128, "param_dtype": 2} | {
    name: next(PARAMETERS) for name in ("weight", "weight_scale", "weight_zeros", "bias")
}
W4A8 = {"N": 256, "K": 128, "R": 32, "group": 32, "param_dtype": 2, "rotate": False} | {
    name: next(PARAMETERS)
    for name in ("smooth", "proj_down", "weight", "weight_scale", "channel_scale", "table")
    + ("proj_up", "bias")
}
VQ = {
    "N": 256, "K": 128, "bits": 8, "vector": 4, "codebook_dtype": 1, "param_dtype": 2,
    "addend_dtype": 2, "out_dtype": 2,
} | {name: next(PARAMETERS) for name in ("indices", "codebook", "scale", "bias")}  # fmt: skip
OPS = {
    "linear_w4a4": W4A4,
    "linear_w4a8": W4A8,
    "gemv_w4a16": W4A16,
    "gemm_w4a16": W4A16,
    "gemm_vq": VQ,
}


class Recorded(driver.Driver):
    """`calls`: kernel, shape, stream and every byte of the arguments of what was started."""

    def __init__(self, *capabilities: int):
        super().__init__(FakeDriver(*capabilities))
        self.calls: list[tuple] = []

    def start(self, context, launches, stream):
        for launch in launches:
            values = [bytes(value) for value in launch._values]
            self.calls.append((launch.name, launch.shape, stream, values))
        super().start(context, launches, stream)


def module_of(*capabilities: int) -> CubinModule:
    return CubinModule(Recorded(*capabilities), EveryKernel())


def tokens_of(op: str, m: int, at: int, module: CubinModule, capability: int) -> dict:
    """A call's arguments but for the layer's, with what moves at different places."""
    place = {"device": 0, "stream": at, "threads": 1, "isa": 0}
    tokens = place | {"M": m, "x": 0x1000 * at, "x_dtype": 2, "out": 0x100_0000 * at}
    if op == "gemm_vq":
        return tokens | {"addend": 0x1_0000_0000 * at}
    if op not in ("linear_w4a4", "linear_w4a8"):
        return tokens
    codes = module.codes(capability)
    if op == "linear_w4a8":
        sizes = (m, *(W4A8[name] for name in "NKR"))
        size = module.workspace_bytes(op, capability, *sizes, 2)
        return tokens | {"x_stride": 128, "scratch": 0x1_0000_0000 * at, "scratch_size": size}
    size = module.linear_w4a4_bytes(capability, m, W4A4["N"], W4A4["K"], W4A4["R"], codes)
    return tokens | {"x_stride": 128, "scratch": 0x1_0000_0000 * at, "scratch_size": size}


def layer(op: str, module: CubinModule, capability: int) -> dict:
    more = {"codes": module.codes(capability)} if op == "linear_w4a4" else {}
    return OPS[op] | more


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("op", OPS)
def test_a_repeated_call_is_a_call(op, capability):
    module = module_of(capability)
    arguments = layer(op, module, capability)
    repeated = module.repeated(op, arguments)
    for m, at in ((1, 3), (1, 5), (70, 3), (1, 3), (70, 7), (1, 7)):
        tokens = tokens_of(op, m, at, module, capability)
        module.cuda.calls.clear()
        getattr(module, op)(**tokens, **arguments)
        wanted = list(module.cuda.calls)
        module.cuda.calls.clear()
        repeated(**tokens)
        assert module.cuda.calls == wanted and wanted


def test_planning_happens_once_for_a_number_of_tokens(monkeypatch):
    module = module_of(89)
    found, plan = [], module.repeated("linear_w4a4", layer("linear_w4a4", module, 89))
    inner = plan.plan
    monkeypatch.setattr(plan, "plan", lambda *args: found.append(args) or inner(*args))
    for at in (1, 2, 3):
        plan(**tokens_of("linear_w4a4", 64, at, module, 89))
    assert len(found) == 1
    plan(**tokens_of("linear_w4a4", 65, 1, module, 89))
    plan(**tokens_of("linear_w4a4", 64, 1, module, 89) | {"x_stride": 192})
    assert len(found) == 3
    for m in range(100, 101 + KEPT):
        plan(**tokens_of("linear_w4a4", m, 1, module, 89))
    assert len(plan._kept) <= KEPT


def test_no_tokens_start_nothing():
    module = module_of(90)
    repeated = module.repeated("linear_w4a4", layer("linear_w4a4", module, 90))
    repeated(**tokens_of("linear_w4a4", 0, 0, module, 90))
    assert module.cuda.calls == []


def test_an_unknown_route_is_refused_before_anything_is_kept():
    module = module_of(89)
    repeated = module.repeated("linear_w4a4", layer("linear_w4a4", module, 89))
    with pytest.raises(ValueError, match="route 3 is none of"):
        repeated(**tokens_of("linear_w4a4", 64, 1, module, 89) | {"isa": 3})
    assert repeated._kept == {}


def test_threads_never_share_a_launch():
    module = module_of(90)
    repeated = module.repeated("linear_w4a4", layer("linear_w4a4", module, 90))
    started = kernels.hopper("e4m3", "bf16", 1, 64).name

    def call(at: int) -> None:
        repeated(**tokens_of("linear_w4a4", 64, at, module, 90))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(1, 200)))
    products = {stream: values for name, _, stream, values in module.cuda.calls if name == started}
    assert len(products) == 199
    for at, (activations, _, parameters) in products.items():
        assert int.from_bytes(activations[:8], "little") == 0x1_0000_0000 * at
        assert (0x100_0000 * at).to_bytes(8, "little") in parameters
