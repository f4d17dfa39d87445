"""What a W4A4 linear costs the CPU that starts it on a GPU, through cubins: microseconds of a
FLUX-sized layer, with a driver that does nothing: `python -m nibble bench launch_overhead`.

The driver is a few lines of C, compiled here, so that what is seen is what the pack adds: checks,
memory for the result and for scratch, launches. A real driver adds two launches of its own, a few
microseconds each on any computer. `planned anew` is what every call would cost if nothing were
kept. Needs a C compiler and no GPU; memory is the CPU's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("", "support")]
import torch  # noqa: E402

import checkout  # noqa: E402, F401
from bench import machine  # noqa: E402
from cases import Case, make_input, make_w4a4  # noqa: E402
from every_kernel import EveryKernel  # noqa: E402
from nibble.kernels.backends import native, native_w4a4  # noqa: E402
from nibble.kernels.backends.cubins import driver  # noqa: E402
from nibble.kernels.backends.cubins.module import CubinModule  # noqa: E402
from nibble.kernels.ops import eager  # noqa: E402
from nibble.kernels.params import W4A4Params  # noqa: E402

OUT = Path(__file__).with_name("results") / "launch-overhead.json"
LAYER = Case("flux", 4608, 3072, 3072, R=32)
TURNS = 16
GPUS = {"RTX 20": 75, "RTX 30 and 40": 89, "Hopper": 90, "RTX 50": 120}
DRIVER = """
typedef void *p; typedef unsigned u;
int capability;
int cuInit(u flags) { return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 16 ? 128 : which == 75 ? capability / 10 : capability % 10;
    return 0;
}
int cuDevicePrimaryCtxRetain(p *context, int device) { *context = (p)1000; return 0; }
int cuCtxGetCurrent(p *context) { *context = (p)1000; return 0; }
int cuThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cuModuleLoadData(p *module, p code) { *module = (p)1; return 0; }
int cuModuleGetFunction(p *function, p module, char *name) { *function = (p)2; return 0; }
int cuFuncSetAttribute(p function, int which, int value) { return 0; }
int cuTensorMapEncodeTiled() { return 0; }
int cuLaunchKernel(p f, u x, u y, u z, u a, u b, u c, u s, p t, p *v, p e) { return 0; }
int cuLaunchKernelEx(p config, p function, p *values, p extra) { return 0; }
"""


def empty_driver(folder: Path) -> Path:
    """The compiled driver. Raises SystemExit without a C compiler."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        raise SystemExit("this bench needs a C compiler: it makes a driver that does nothing")
    source, made = folder / "driver.c", folder / "driver.so"
    source.write_text(DRIVER)
    subprocess.run([compiler, "-O2", "-w", "-shared", "-fPIC", "-o", made, source], check=True)
    return made


def least(call: Callable[[], object], rounds: int, number: int = 100) -> float:
    """Microseconds of a call, the least of all rounds."""
    call()
    return min(timeit.repeat(call, number=number, repeat=rounds)) / number * 1e6


@torch.inference_mode()
def measure(lib: ctypes.CDLL, capability: int, rounds: int) -> dict[str, float]:
    """Microseconds of a linear's parts on one GPU."""
    ctypes.c_int.in_dll(lib, "capability").value = capability
    module = CubinModule(driver.Driver(lib), EveryKernel())
    device, codes = torch.device("cuda", 0), module.codes(capability)
    p = W4A4Params(**make_w4a4(LAYER, torch.bfloat16))
    x = make_input(LAYER, torch.bfloat16)
    place = {"device": 0, "stream": 0, "threads": 1, "isa": 0}
    with (
        mock.patch.object(native, "on", lambda device: module),
        mock.patch.object(native, "gpu", lambda device: (capability, codes)),
        mock.patch.object(native, "place", lambda device, isa: place),
    ):
        layer = native_w4a4.LinearCall(native_w4a4.layer_operands(p, torch.bfloat16), device)
        found = {"checks": least(lambda: eager.plain_facts(x, p[:6], tuple(p[6:])), rounds)}
        found["call"] = least(lambda: layer(x), rounds)
        layer.op = lambda **fields: module.linear_w4a4(**fields, **layer.arguments)
        found["call, planned anew"] = least(lambda: layer(x), rounds)
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 2 if options.quick else 10
    with tempfile.TemporaryDirectory() as folder:
        lib = driver.typed(ctypes.CDLL(str(empty_driver(Path(folder)))))
        us: dict[str, dict[str, float]] = {name: {} for name in GPUS}
        # in turns, for a machine is slow for seconds at a time
        for _ in range(1 if options.quick else TURNS):
            for name, capability in GPUS.items():
                for part, value in measure(lib, capability, rounds).items():
                    us[name][part] = min(value, us[name].get(part, value))
    for row in us.values():
        row["both"] = round(row["checks"] + row["call"], 1)
    found = {"cpu": machine.cpu_name(), "torch": torch.__version__, "us": us}
    print(f"us of Python around a linear (M, K, N = 4608, 3072, 3072) on {found['cpu']}")
    for name, row in us.items():
        print(f"{name:<14}" + "".join(f"{part:>22} {value:6.1f}" for part, value in row.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
