"""The GPU run, walked through on the CPU: so that a GPU meets no mistake in Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if not hasattr(os, "fork"):
    pytest.skip("its sections are forked", allow_module_level=True)

from bench.gpu import ceilings, counters, instances, smoke, start, table  # noqa: F401
from nibble.kernels.backends.cubins import kernels, library, nvrtc, routes

BENCH = Path(__file__).with_name("bench_gpu.py")
HOPPER = routes.of("gemm_w4a4_up", 90)


def run(out: Path, *arguments: str, **surroundings: str) -> tuple[dict, str]:
    """(the file, what was printed) of a dry run."""
    command = [sys.executable, str(BENCH), "--dry", "--out", str(out), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **surroundings}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads(out.read_text()), result.stdout


def test_every_section_runs_dry(tmp_path):
    found, printed = run(tmp_path / "gpu.json", "--seconds", "3600")
    states = {name: facts["state"] for name, facts in found.items() if name != "command"}
    names = (
        "environment probe smoke correctness robustness ceilings products transformer layers"
        " counters memcheck"
    )
    assert states == dict.fromkeys(names.split(), "finished"), printed
    assert len(found["probe"]["rows"]) == 24
    assert set(found["smoke"]["alive"]) == set(HOPPER) and found["smoke"]["dead"] == {}, printed
    assert found["smoke"]["default"] == 0
    assert found["correctness"]["checks"] >= 60 and found["correctness"]["failed"] == 0, printed
    assert found["robustness"]["failed"] == [], printed
    (sizes,) = found["products"]["summary"].values()
    assert set(HOPPER.values()) < sizes.keys()
    assert {"sm90, activations of 8 bits", "sm100, activations of 8 bits"} < sizes.keys()
    models = [row["model"] for row in found["transformer"]["rows"]]
    assert "nibble" in models and "nibble, fused MLP, by mma.sync s8" in models
    assert found["memcheck"]["rows"][0]["ok"], printed
    assert "==== summary ====" in printed and "correctness: 0 of" in printed


def test_a_route_that_is_wrong_or_crashes_is_dead_and_the_rest_goes_on(tmp_path):
    only = ("--only", "correctness", "products")
    broken = {"NIBBLE_BENCH_BROKEN": "2:crash 3001:wrong 3:wrong"}
    found, printed = run(tmp_path / "gpu.json", *only, **broken)
    dead = found["smoke"]["dead"]
    assert set(dead) == {"gemm_w4a4_up 2", "gemm_w4a4_up 3001", "gemm_w4a4_up 3"}, printed
    assert dead["gemm_w4a4_up 2"] == "ended by SIGKILL" and "error" in dead["gemm_w4a4_up 3"]
    assert set(found["smoke"]["alive"]) == set(HOPPER) - {2, 3, 3001}
    assert found["smoke"]["default"] == 3002
    assert found["correctness"]["failed"] == 0
    (sizes,) = found["products"]["summary"].values()
    assert "sm80" not in sizes and "sm80, 64 tokens" in sizes
    assert "DEAD gemm_w4a4_up 2: ended by SIGKILL" in printed


def test_a_run_that_is_out_of_time_says_so_and_keeps_what_it_has(tmp_path):
    found, printed = run(tmp_path / "gpu.json", "--seconds", "7")
    assert found["memcheck"] == {**found["memcheck"], "state": "out of time"}, printed
    assert "==== summary ====" in printed


@pytest.mark.parametrize(
    "dead, default",
    [((), 0), ((3003,), 3001), ((3, 3001), 3002), ((3, 3001, 3002, 3003), 4), ((2,), 0)],
)
def test_whole_linears_take_what_is_alive(dead, default):
    alive = [number for number in HOPPER if number not in dead]
    assert smoke.default_route(alive, HOPPER) == default


def test_other_gpus_take_their_own_path():
    for capability, own in ((75, 1), (89, 2), (120, 4)):
        known = routes.of("gemm_w4a4_up", capability)
        assert smoke.default_route(list(known), known) == 0
        others = [number for number in known if number != own]
        assert smoke.default_route(others, known) in others


@pytest.mark.parametrize("capability", [75, 89, 90, 120])
def test_what_is_compiled_beforehand_is_what_the_routes_start(capability):
    found = instances.wanted(capability)
    assert len(found) == len(set(found))
    names = " ".join(kernel.name for kernel in found)
    for path, mma in routes.MMAS.items():
        wanted = path in routes.of("gemm_w4a4_up_gelu_quantize_down", capability)
        assert (f"gemm_w4a4<{mma}, bf16, 64" in names) == wanted
    assert ("sm90::gemm_kernel<Codes::e4m3, bf16, 2, 128>" in names) == (capability == 90)
    arch = kernels.architecture(capability)
    assert set(found) >= {kernel for kernel in kernels.of(arch) if "vq_gemm" in kernel.name}


@pytest.mark.parametrize("name", ["read", "multiply"])
def test_the_kernels_of_the_ceilings_compile(name):
    try:
        nvrtc.architectures()
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    compiled = nvrtc.compile_kernel(ceilings._kernel(name), "90a")
    assert library.resources(compiled.log)["spills"] == 0


def test_what_ncu_prints_is_read():
    name = "sm__issue_active.avg.pct_of_peak_sustained_active"
    text = (
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        f'"0","gemm_kernel","{name}","%","61.2"\n'
        '"0","gemm_kernel","gpu__time_duration.sum","us","9"\n'
        '"1","gemm_w4a4","gpu__time_duration.sum","us","12"\n'
    )
    first, second = counters.rows_of(text)
    assert first == {"kernel": "gemm_kernel", "issue_percent": "61.2 %", "time": "9 us"}
    assert second["time"] == "12 us"
    assert counters.rows_of("nothing") == []


def test_the_table_tells_of_a_run_that_ended_early():
    rows = [{"group": "mma", "name": "x", "ok": False, "wrong": 3, "of": 128, "worst": 1.0}]
    said = "\n".join(table.lines({"probe": {"rows": rows, "state": "running", "seconds": 3}}))
    assert "probes: 0 of 1 right" in said and "WRONG x: 3 of 128" in said
    assert "probe: running" in said and "products: none measured" in said
