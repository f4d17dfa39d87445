"""What a process of the GPU run has to do first: choose the module that serves the device, and the
route that whole linears take.

In a dry run a stand-in over plain torch serves the CPU, so that the very code that starts kernels
runs there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
if str(TESTS / "kernels") not in sys.path:
    sys.path.insert(0, str(TESTS / "kernels"))  # for `stand_in` and `probe`

from nibble.kernels.backends import cubins, native  # noqa: E402
from nibble.kernels.backends.cubins import routes  # noqa: E402
from stand_in import StandIn  # noqa: E402

ROUTE = "NIBBLE_BENCH_ROUTE"
"""Environment variable: the default route, for every process from now on."""
EXTENSION = "NIBBLE_BENCH_EXTENSION"
"""Environment variable: 1 measures the compiled extension in place of cubins."""
BROKEN = "NIBBLE_BENCH_BROKEN"
"""Environment variable of a dry run: routes such as "2:crash 3001:wrong", so that tests see what
becomes of the rest.
"""
HOPPER = 90


class DryModule(StandIn):
    """The stand-in with a Hopper's routes, each computed alike."""

    def gemm_w4a4_up(self, *, isa: int, **fields) -> None:
        broken = dict(word.split(":") for word in os.environ.get(BROKEN, "").split())
        if broken.get(str(isa)) == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if broken.get(str(isa)) == "wrong":
            fields["act_unsigned"] = not fields["act_unsigned"]
        super().gemm_w4a4_up(isa=isa, **fields)

    def routes(self, op: str, capability: int) -> dict[int, str]:
        return routes.of(op, HOPPER)

    def codes(self, capability: int, route: int = 0) -> int:
        return routes.codes_of(route, HOPPER) if route else native.PACKED


def ready(device: str, dry: bool) -> None:
    """Called once, before any op."""
    if dry:
        found = DryModule()
        native.module = lambda: (found, "a stand-in in plain torch")
        return
    if os.environ.get(EXTENSION) != "1":
        sys.modules["nibble_kernels"] = None  # importing it raises ImportError
    route = int(os.environ.get(ROUTE, "0"))
    if device == "cuda" and route:
        cubins.module().default_route = route
