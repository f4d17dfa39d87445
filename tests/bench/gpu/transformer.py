"""The whole FLUX.1-dev transformer with random weights at 4096 + 512 tokens: time of a step,
memory, and where the time goes.
"""

from __future__ import annotations

import functools
import os
import statistics

import torch
from torch import Tensor, nn

from bench import flux, peers
from bench.gpu import start
from bench.gpu.isolate import Job, Remote
from bench.gpu.layer import PARAMETERS, random_parameters
from bench.gpu.timing import Timed
from cases import Case
from nibble.kernels import ops

# for a dry run
SMALL = flux.Config(double=1, single=1, hidden=128, heads=1, channels=16, context=32, vector=16)


def is_modulation(name: str) -> bool:
    return name.endswith("mod.lin") or name.endswith("modulation.lin")


class Held(nn.Module):
    """Parameters of one layer as buffers. What a layer computes stays finite through 57 blocks:
    scales are made small.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        super().__init__()
        self.unsigned = case.act_unsigned
        for name, tensor in random_parameters(case, dtype, device).items():
            scale = {"weight_scale": 0.1, "proj_up": 0.1, "bias": 0.01}.get(name, 1.0)
            self.register_buffer(name, tensor if name == "weight" else tensor * scale)

    def in_order(self) -> list[Tensor]:
        return [getattr(self, name) for name in PARAMETERS]


class Nibble(Held):
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_w4a4(x, *self.in_order(), act_unsigned=self.unsigned)


class NibbleMlp(nn.Module):
    """Both layers of an MLP in one op: what lies between them is never stored."""

    def __init__(self, first: Held, second: Held):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return ops.mlp_w4a4(
            x, self.first.in_order(), self.second.in_order(), act_unsigned2=self.second.unsigned
        )


class KitchenSvdquant(Held):
    def forward(self, x: Tensor) -> Tensor:
        rows, p = x.reshape(-1, x.shape[-1]), dict(zip(PARAMETERS, self.in_order(), strict=True))
        return peers.kitchen_svdquant_call(peers.need("comfy_kitchen"), rows, p, self.unsigned)[
            : len(rows)
        ].reshape(*x.shape[:-1], -1)


class KitchenConvrot(nn.Module):
    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        super().__init__()
        self.module = peers.need("comfy_kitchen")
        weight = torch.randn(case.N, case.K, dtype=dtype, device=device) * 0.02
        codes, scale = self.module.quantize_convrot_w4a4_weight(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.module.convrot_w4a4_linear(x, self.codes, self.scale, linear_dtype="int8")


class Modulation(nn.Module):
    """4-bit weights with zero points, 16-bit inputs."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str):
        super().__init__()
        parameters = random_parameters(case, dtype, device)
        self.register_buffer("weight", parameters["weight"])
        for name in ("weight_scale", "bias"):
            self.register_buffer(name, parameters[name] * 0.1)
        self.register_buffer("weight_zeros", self.weight_scale * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_w4a16(x, self.weight, self.weight_scale, self.weight_zeros, self.bias)


def maker(kind: type | None, dtype: torch.dtype, device: str) -> flux.MakeLinear:
    """Linears of one kind, 4-bit modulation beside 4-bit kinds of ours; None is torch's own."""
    ours = kind is not None and issubclass(kind, Nibble)

    def linear(name: str, inputs: int, outputs: int) -> nn.Module:
        case = Case(
            name, 1, inputs, outputs, R=min(32, inputs), act_unsigned=name.endswith("mlp.2")
        )
        if ours and is_modulation(name):
            return Modulation(case, dtype, device)
        if kind is None or is_modulation(name):
            return nn.Linear(inputs, outputs, dtype=dtype, device=device)
        return kind(case, dtype, device)

    return linear


def build(name: str, config: flux.Config, dtype: torch.dtype, device: str) -> flux.Flux:
    """A FLUX of random weights on the device, its linears as `name` says."""
    kind = {
        "bfloat16": None,
        "nibble": Nibble,
        "nibble, fused MLP": Nibble,
        "comfy_kitchen svdquant": KitchenSvdquant,
        "comfy_kitchen convrot_w4a4 int8": KitchenConvrot,
    }[name]
    linear = maker(kind, dtype, device)
    mlp = None
    if name == "nibble, fused MLP":

        def mlp(name: str, hidden: int, inner: int) -> nn.Module:
            return NibbleMlp(linear(f"{name}.0", hidden, inner), linear(f"{name}.2", inner, hidden))

    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return flux.Flux(config, linear, mlp).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def measure(name: str, config: flux.Config, picture: int, words: int, device: str) -> dict:
    """Time of a step (as a CUDA graph, and as Python launches it) and bytes."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated() if cuda else 0
    model, arguments = (
        build(name, config, torch.bfloat16, device),
        flux.inputs(config, picture, words, device, torch.bfloat16),
    )
    facts = {
        "model": name,
        "tokens": picture * picture + words,
        "double": config.double,
        "single": config.single,
    }
    with torch.inference_mode():
        if cuda:
            facts["weight_gb"] = (torch.cuda.memory_allocated() - start) / 1e9
        out = model(*arguments)
        facts["finite"] = bool(out.isfinite().all())
        facts["twice_the_same"] = bool(torch.equal(out, model(*arguments)))
        if cuda:
            facts["peak_gb"] = (torch.cuda.max_memory_allocated() - start) / 1e9
        first = _once(model, arguments, device)
        # emulated instructions take seconds a step; one is enough to see it
        laps = 5 if first < 1000 else 1
        facts["launched_ms"] = statistics.median(
            [first] + [_once(model, arguments, device) for _ in range(laps - 1)]
        )
        timed = Timed([lambda: model(*arguments)], device, target_ms=0)
        facts |= {"ms": statistics.median(timed.measure() for _ in range(laps)), "mode": timed.mode}
        facts["kernels"] = kernels(model, arguments) if cuda else {}
    return facts


def _once(model: nn.Module, arguments: tuple, device: str) -> float:
    if device == "cpu":
        return Timed([lambda: model(*arguments)], device).measure()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    model(*arguments)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def kernels(model: nn.Module, arguments: tuple) -> dict[str, float]:
    """Milliseconds of the kernels that take longest in one step, by name; empty where the profiler
    does not work.
    """
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            model(*arguments)
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[
            :14
        ]
        return {event.key[:100]: event.self_device_time_total / 1e3 for event in events}
    except Exception as error:
        return {f"the profiler failed: {error}".splitlines()[0]: 0.0}


def one(remote: Remote, name: str, label: str, device: str, dry: bool) -> None:
    config, picture, words = (SMALL, 4, 3) if dry else (flux.Config(), 64, 512)
    try:
        remote.add(measure(name, config, picture, words, device) | {"model": label})
    except Exception as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        remote.add({"model": label, "error_message": message})


def by_route(remote: Remote, route: int, **rest: object) -> None:
    """With another default route, in the process that is forked for it."""
    os.environ[start.ROUTE] = str(route)
    start.ready(str(rest["device"]), bool(rest["dry"]))
    one(remote, **rest)


def jobs(device: str, dry: bool, alive: list[int], seconds: float) -> list[Job]:
    """A process a model, so that one that fails, or another default route, harms no other. Where
    wgmma is at hand, the fused MLP and its linears by mma.sync are measured beside it.
    """
    place = {"device": device, "dry": dry}
    labels = {"bfloat16": "bfloat16", "nibble": "nibble"}
    if not {3, 4} <= set(alive):
        labels["nibble, fused MLP"] = "nibble, fused MLP"
    found = [
        Job(label, functools.partial(one, name=name, label=label, **place), seconds / 2)
        for name, label in labels.items()
    ]
    if {3, 4} <= set(alive):
        for name in ("nibble, fused MLP", "nibble"):
            label = f"{name}, by mma.sync s8"
            work = functools.partial(by_route, route=4, name=name, label=label, **place)
            found.append(Job(label, work, seconds / 2))
    return found
