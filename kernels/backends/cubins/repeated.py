"""Launches that are planned once and started again at other addresses.

A layer's parameters stay where they are; from one call to the next only x, the result and scratch
memory lie elsewhere. So a layer keeps its launches for each number of tokens, with every place in
their arguments that holds one of those addresses: a call writes a few pointers and starts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .plans import Launch, Matrix

if TYPE_CHECKING:
    from .module import CubinModule, Device

MOVING = ("x", "addend", "out")
"""Arguments of ops that lie elsewhere at every call, besides what lies in scratch memory."""
KEPT = 8
"""Kinds of call (tokens, dtype, GPU) that a layer keeps launches for, and addresses that a matrix
is kept described at: torch's allocator gives the same ones again and again.
"""


class _Pointer(NamedTuple):
    """A pointer that moves: `field` of `owner` is the address `of` plus `offset`."""

    owner: Any
    field: str
    of: str
    offset: int


class _Moved(NamedTuple):
    """A matrix that moves: argument `number` of launch `launch`; `described`: to the copy engine,
    by its address.
    """

    launch: int
    number: int
    matrix: Matrix
    of: str
    offset: int
    described: dict[int, ctypes.Array]


def _pointers(value: Any) -> Iterator[tuple[Any, str, int]]:
    """Every pointer within a kernel's argument, that is not null: where it is, and its address."""
    if isinstance(value, ctypes.c_void_p) and value.value:
        yield value, "value", value.value
    elif isinstance(value, ctypes.Structure):
        for name, kind, *_ in value._fields_:
            inside = getattr(value, name)
            if kind is ctypes.c_void_p and inside:
                yield value, name, inside
            elif issubclass(kind, ctypes.Structure):
                yield from _pointers(inside)


class _Where:
    """Which of the addresses that move a pointer belongs to."""

    def __init__(self, fields: dict[str, Any]):
        self.bases = {fields[name]: name for name in MOVING if fields.get(name)}
        self.scratch = fields.get("scratch", 0)
        self.end = self.scratch + fields.get("scratch_size", 0)

    def find(self, address: int) -> tuple[str, int] | None:
        """(name, bytes behind it), or None for what stays where it is."""
        if self.scratch <= address < self.end:
            return "scratch", address - self.scratch
        name = self.bases.get(address)
        return None if name is None else (name, 0)


class Repeated:
    """Launches of one call, ready to be started at other addresses.

    fields: the call's arguments, among which are those of MOVING, scratch and scratch_size.
    """

    def __init__(self, device: Device, launches: list[Launch], fields: dict[str, Any]):
        self.device = device
        where = _Where(fields)
        self.pointers: list[_Pointer] = []
        self.matrices: list[_Moved] = []
        for number, launch in enumerate(launches):
            for place, value in enumerate(launch.arguments):
                if isinstance(value, Matrix):
                    found = where.find(value.base)
                    if found:
                        self.matrices.append(_Moved(number, place, value, *found, {}))
                    continue
                for owner, field, address in _pointers(value):
                    found = where.find(address)
                    if found:
                        self.pointers.append(_Pointer(owner, field, *found))
        self.ready = device.ready(launches)

    def start(self, addresses: dict[str, int], stream: int) -> None:
        """addresses: where MOVING and the scratch memory lie this time."""
        for owner, field, of, offset in self.pointers:
            setattr(owner, field, addresses[of] + offset)
        for moved in self.matrices:
            self.ready[moved.launch].replace(moved.number, self._described(moved, addresses))
        self.device.cuda.start(self.device.context, self.ready, stream)

    def _described(self, moved: _Moved, addresses: dict[str, int]) -> ctypes.Array:
        base = addresses[moved.of] + moved.offset
        found = moved.described.get(base)
        if found is None:
            if len(moved.described) >= KEPT:
                moved.described.clear()
            found = self.device.cuda.matrix(moved.matrix._replace(base=base))
            moved.described[base] = found
        return found


Plan = Callable[["Device", int, dict[str, Any]], list[Launch]]
"""(GPU, route, the op's arguments) -> its launches."""


class RepeatedCall:
    """An op with the arguments that its layer has, called with the others as the module's op is.

    A call takes what it repeats away and puts it back, so calls from two threads never share one.
    """

    def __init__(self, module: CubinModule, plan: Plan, arguments: dict[str, Any]):
        self.module, self.plan, self.arguments = module, plan, arguments
        self._kept: dict[tuple, Repeated] = {}

    def __call__(  # noqa: PLR0913 - the arguments of every op
        self,
        *,
        device: int,
        stream: int,
        threads: int,
        isa: int,
        x: int,
        out: int,
        addend: int = 0,
        scratch: int = 0,
        scratch_size: int = 0,
        **tokens: int,
    ) -> None:
        addresses = {"x": x, "out": out, "addend": addend, "scratch": scratch}
        kind = (device, isa, addend > 0, *tokens.values())
        found = self._kept.pop(kind, None)
        if found is None:
            given = {name: address for name, address in addresses.items() if address}
            block = {"scratch_size": scratch_size} if scratch else {}
            found = self._planned(device, isa, tokens | given | block)
        found.start(addresses, stream)
        if len(self._kept) >= KEPT:
            self._kept.clear()
        self._kept[kind] = found

    def _planned(self, device: int, isa: int, fields: dict[str, int]) -> Repeated:
        there, whole = self.module.on(device), self.arguments | fields
        return Repeated(there, self.plan(there, isa or self.module.default_route, whole), whole)
