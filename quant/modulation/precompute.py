"""The results of modulation layers that stay in RAM, computed ahead of the step that asks for them.

All modulation layers of a transformer read one vector, a function of (timestep, guidance, pooled
text). So, for every step of a run:

1. `ModulationCache.around` wraps the network (as ComfyUI's DIFFUSION_MODEL wrapper does). From the
  network's small inputs (their bytes are the key) it knows the vector; for a new key it lets the
  network's own code run up to its first modulation layer, which gives the vector to the bit. At the
  first step it does so for every timestep of the run.
2. The products of all layers with all new vectors are made on the CPU, each weight being read once
  for all of them: first this step's, then, in a thread, those of the steps to come.
3. One transfer brings a step's results to the device, side by side; during the step every layer
  takes its part, and nothing waits for the GPU.
4. Each layer compares its input with the vector predicted, on the device; the answer is read after
  the step. Had any differed (a patch of another node that changes the vector), the step is done
  again with every layer looking at its own input, and so are all steps after it.

Which layers read the one vector is learned in the first step, in which every layer looks at its own
input.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import torch

_CACHE_BYTES = 256 << 20  # of results: a hundred steps of FLUX
# bytes; a network's inputs up to this size tell its modulation: timestep, guidance, pooled text
_SMALL = 64 << 10


class ModulationInput(NamedTuple):
    """What the layers read: rows (M, K) on the CPU, and the shape and device of the layer's input
    that they are.
    """

    rows: torch.Tensor
    shape: torch.Size
    device: torch.device

    @classmethod
    def of(cls, input: torch.Tensor) -> ModulationInput:
        # a copy: it is kept, and whoever gave the input may write into it
        rows = input.detach().reshape(-1, input.shape[-1]).to("cpu", copy=True)
        return cls(rows, input.shape, input.device)

    @property
    def fast(self) -> bool:
        """Whether the product need not be that of the CPU's own layers, bit for bit."""
        return self.device.type != "cpu"


class LayerState(NamedTuple):
    """What a layer's output depends on beside its input, as it was when the output was asked for.

    key     hashable: equal for equal outputs
    bias    (N,) | None: a copy, since ComfyUI's hooks write into the layer's own
    change  what a hook adds to the weight, in the layer's own terms; None: nothing
    """

    key: tuple
    bias: torch.Tensor | None = None
    change: object = None


class _Product(NamedTuple):
    """A layer's output for one row, made or in the making."""

    key: tuple
    made: torch.Tensor | Future

    def result(self) -> torch.Tensor:
        """(N,); waits for it."""
        return self.made.result()[self.key] if isinstance(self.made, Future) else self.made


class _StopAtModulation(Exception):
    """Ends a run of the network at its first modulation layer."""

    def __init__(self, vector: ModulationInput):
        super().__init__()
        self.vector = vector


class _Step:
    """One step's results on the device, and whether what the layers read was what had been
    predicted.
    """

    def __init__(
        self, layers: Sequence, vector: ModulationInput, results: torch.Tensor, buffers: dict
    ):
        self._rows = _sent(vector.rows, vector.device, "vector", buffers)
        parts = _sent(results, vector.device, "results", buffers).split(
            [layer.out_features for layer in layers], -1
        )
        self._parts = {id(layer): part for layer, part in zip(layers, parts, strict=True)}
        self._wrong = torch.zeros((), dtype=torch.bool, device=vector.device)

    def take(self, layer, input: torch.Tensor) -> torch.Tensor | None:
        """The layer's output; None where it has none or the input is of another kind."""
        part, rows = self._parts.get(id(layer)), input.reshape(-1, input.shape[-1])
        if part is None or (rows.shape, rows.dtype, rows.device) != (
            self._rows.shape,
            self._rows.dtype,
            self._rows.device,
        ):
            return None
        self._wrong |= (rows != self._rows).any()
        return part.reshape(*input.shape[:-1], -1)

    def was_right(self) -> bool:
        """Waits for the device."""
        return not bool(self._wrong)


def _sent(tensor: torch.Tensor, device: torch.device, use: str, buffers: dict) -> torch.Tensor:
    """A copy on the device, at the same place in its memory every time, so that a recorded graph
    finds it there.
    """
    key = (use, tuple(tensor.shape), tensor.dtype, device)
    if key not in buffers:
        if len(buffers) > 8:
            buffers.clear()
        buffers[key] = torch.empty_like(tensor, device=device)
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return buffers[key].copy_(source, non_blocking=True)


class ModulationCache:
    """Results of one model's layers. A layer has name, in_features, out_features, state(), its
    LayerState now, and compute(rows, fast, state).
    """

    def __init__(
        self,
        timesteps: Callable[[torch.Tensor], torch.Tensor] | None = None,
        limit: int = _CACHE_BYTES,
    ):
        self.layers: list = []
        # products of a layer with a row; steps, and how many found their results made
        self.computed = self.steps = self.hits = 0
        self._timesteps = timesteps
        self._limit = limit
        self._size = 0
        self._results: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._pending: dict[tuple, Future] = {}
        self._vectors: OrderedDict[tuple, ModulationInput] = OrderedDict()
        self._followers: list = []  # the layers that read the one vector, once that is known
        self._seen: dict | None = None
        self._step: _Step | None = None
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._probing = False
        self._trusted = True
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, "nibble-modulation")

    # ---- what a layer asks

    def output(self, layer, input: torch.Tensor) -> torch.Tensor:
        """The layer's output for its input (…, K), on the input's device."""
        if self._probing and layer in self._followers:
            raise _StopAtModulation(ModulationInput.of(input))
        ready = None if self._step is None else self._step.take(layer, input)
        if ready is not None:
            return ready
        vector = ModulationInput.of(input)
        if self._seen is not None:
            self._seen.setdefault(_key(vector.rows), []).append(layer)
        together = [layer]
        if layer in self._followers:
            together = self._followers
        products, _ = self._requested(together, vector.rows, vector.fast)
        place = together.index(layer)
        y = _side_by_side([row[place : place + 1] for row in products])
        return y.reshape(*input.shape[:-1], -1).to(input.device, non_blocking=True)

    def clear(self) -> None:
        """Forgets all results, as when patches change."""
        with self._lock:
            self._results.clear()
            self._pending = {}  # what a thread still computes belongs to the past
            self._vectors.clear()
            self._size = 0
            self._trusted = True

    # ---- a step

    def around(self, executor, *args, **kwargs):
        """The network's output for its inputs (picture, timestep, …), once what the step's layers
        will ask for is there. executor: calls the network, and has it, with nothing around it, as
        `original`.
        """
        step = self._prepare(executor, args, kwargs)
        with self._serving(step):
            out = executor(*args, **kwargs)
        if step is None or step.was_right():
            return out
        self._trusted = False
        with self._serving(None):
            return executor(*args, **kwargs)

    @contextmanager
    def _serving(self, step: _Step | None):
        self._step = step
        # until it is known which layers read the one vector, they are watched
        self._seen = {} if step is None and not self._followers else None
        try:
            yield
            if self._seen:
                self._followers = max(self._seen.values(), key=len)
        finally:
            self._step = self._seen = None

    def _prepare(self, executor, args: tuple, kwargs: dict) -> _Step | None:
        if not self._followers or not self._trusted or torch.is_grad_enabled():
            return None
        key = _key(*_small_inputs(args, kwargs))
        new = key not in self._vectors
        if new and not self._probe(key, executor, args, kwargs):
            return None
        vector = self._vectors[key]
        products, begun = self._requested(self._followers, vector.rows, vector.fast)
        self.steps += 1
        if begun == 0:
            self.hits += 1
        if new:
            self._probe_run(executor, args, kwargs, vector)
        return _Step(self._followers, vector, _side_by_side(products), self._buffers)

    def _probe(self, key: tuple, executor, args: tuple, kwargs: dict) -> bool:
        """Lets the network run up to its first modulation layer; whether there was one."""
        self._probing = True
        try:
            executor.original(*args, **kwargs)
        except _StopAtModulation as stop:
            self._vectors[key] = stop.vector
        finally:
            self._probing = False
        while len(self._vectors) > 4096:
            self._vectors.popitem(last=False)
        self._trusted = key in self._vectors
        return self._trusted

    def _probe_run(self, executor, args: tuple, kwargs: dict, now: ModulationInput) -> None:
        """The vectors of the run's other steps, and in the thread their products."""
        vectors = []
        for timestep in self._others(args, kwargs):
            key = _key(*_small_inputs((args[0], timestep, *args[2:]), kwargs))
            if key not in self._vectors and self._probe(
                key, executor, (args[0], timestep, *args[2:]), kwargs
            ):
                vectors.append(self._vectors[key])
        if vectors:
            self._requested(
                self._followers, torch.cat([vector.rows for vector in vectors]), now.fast
            )

    def _others(self, args: tuple, kwargs: dict) -> Iterable[torch.Tensor]:
        """The network's timestep input at every step of the run, as far as the sampler says it."""
        options = kwargs.get("transformer_options") or next(
            (a for a in args if isinstance(a, dict)), {}
        )
        sigmas = options.get("sample_sigmas")
        if sigmas is None or self._timesteps is None or not isinstance(args[1], torch.Tensor):
            return []
        now = args[1]
        row = sum(layer.out_features for layer in self._followers) * 4  # bytes of a step's results
        # what is made ahead must still be there when it is asked for
        sigmas = sigmas[:-1][: max(1, self._limit // (4 * row))]
        return [
            t.to(now).expand_as(now).contiguous()
            for t in self._timesteps(sigmas.to(now.device, torch.float32)).float()
        ]

    # ---- products

    def _requested(
        self, layers: Sequence, rows: torch.Tensor, fast: bool
    ) -> tuple[list[list[_Product]], int]:
        """For each row the products of all layers with it; and how many had to be begun."""
        states = [layer.state() for layer in layers]
        new: dict[tuple, tuple] = {}
        with self._lock:
            keys = [
                [_product_key(*pair, row, fast) for pair in zip(layers, states, strict=True)]
                for row in rows
            ]
            for row, of_row in zip(rows, keys, strict=True):
                for layer, state, key in zip(layers, states, of_row, strict=True):
                    if key not in self._results and key not in self._pending:
                        new[key] = (layer, row, state)
            if new:
                future = self._thread.submit(self._compute, new, fast, self._pending)
                self._pending.update(dict.fromkeys(new, future))
            return [[_Product(key, self._known(key)) for key in of_row] for of_row in keys], len(
                new
            )

    def _known(self, key: tuple) -> torch.Tensor | Future:
        """A result, or the future that brings it."""
        if key not in self._results:
            return self._pending[key]
        self._results.move_to_end(key)
        return self._results[key]

    def _compute(
        self, new: dict[tuple, tuple], fast: bool, pending: dict
    ) -> dict[tuple, torch.Tensor]:
        """All products wanted; where bits may differ, each layer's with all its rows at once."""
        groups: dict[int, list[tuple]] = {}
        for key, (layer, _, _) in new.items():
            groups.setdefault(id(layer), []).append(key)
        made: dict[tuple, torch.Tensor] = {}
        with torch.no_grad():  # a mode of the thread, not of the program
            for keys in groups.values():
                layer, _, state = new[keys[0]]  # one request, one state of each layer
                rows = [new[key][1][None] for key in keys]
                outputs = (
                    layer.compute(torch.cat(rows), fast, state)
                    if fast
                    else torch.cat([layer.compute(row, fast, state) for row in rows])
                )
                made |= zip(keys, outputs.unbind(0), strict=True)
        with self._lock:
            self.computed += len(made)
            for key, y in made.items():
                pending.pop(key, None)
                if pending is self._pending:
                    self._results[key] = y
                    self._size += y.nbytes
            while self._size > self._limit and len(self._results) > 1:
                self._size -= self._results.popitem(last=False)[1].nbytes
        return made


def _product_key(layer, state: LayerState, row: torch.Tensor, fast: bool) -> tuple:
    return layer.name, state.key, fast, _key(row)


def _side_by_side(products: Sequence[Sequence[_Product]]) -> torch.Tensor:
    """(M, sum of N) of each row's products, once they are made: memory of its own."""
    return torch.stack([torch.cat([product.result() for product in row]) for row in products])


def _key(*tensors: torch.Tensor) -> tuple:
    """Equal only for equal dtypes, shapes and bytes."""
    return tuple(
        (
            str(t.dtype),
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for t in tensors
    )


def _small_inputs(args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The network's inputs that tell its modulation, on the CPU after one transfer: all small
    tensors but the picture and the prompt's tokens.
    """
    named = {name: value for name, value in kwargs.items() if name != "context"}
    tensors = [
        t
        for t in (*args[1:2], *args[3:], *named.values())
        if isinstance(t, torch.Tensor) and t.nbytes <= _SMALL
    ]
    flat = (
        torch.cat([t.detach().reshape(-1).float() for t in tensors]) if tensors else torch.zeros(0)
    )
    return [flat.cpu(), torch.tensor([t.numel() for t in tensors])]
