import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_cost, bench_fusions, bench_machines

BENCHES = sorted(Path(__file__).parent.glob("bench_*.py"))


def run(bench: str | Path, *arguments: object, **surroundings: str) -> str:
    """Standard output of a bench in a process of its own."""
    command = [
        sys.executable,
        str(Path(__file__).with_name(bench) if isinstance(bench, str) else bench),
        *map(str, arguments),
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **surroundings}
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("bench", BENCHES, ids=lambda path: path.stem)
def test_a_bench_starts_on_its_own_and_explains_itself(bench):
    assert "--out" in run(bench, "--help")


def test_the_bench_of_ops_says_who_is_faster_and_why_a_peer_is_missing(tmp_path):
    out = tmp_path / "ops.json"
    printed = run("bench_ops.py", "--quick", "--out", out)
    found = json.loads(out.read_text())
    assert "times as fast as the peer" in printed
    assert found["environment"]["command"].startswith("python bench_ops.py")
    row = found["rows"][0]
    assert {"nibble", "torch bfloat16", "torch float32"} <= row["timings"].keys()
    assert all(row["absent"].values())
    assert row["fastest"] == min(row["timings"], key=lambda name: row["timings"][name]["ms"])
    assert row["difference"] < 0.05


@pytest.mark.skipif(not shutil.which("cc"), reason="the bench makes its driver with a C compiler")
def test_the_bench_of_launches_has_a_row_for_each_kind_of_gpu(tmp_path):
    out = tmp_path / "launches.json"
    run("bench_launch_overhead.py", "--quick", "--out", out)
    rows = json.loads(out.read_text())["us"].values()
    assert len(rows) == 4
    assert all({"checks", "call", "call, planned anew", "both"} == row.keys() for row in rows)


def test_the_bench_of_codebook_ops_compares_with_dense_and_decoded_weights(tmp_path):
    out = tmp_path / "vq.json"
    printed = run("bench_vq_ops.py", "--quick", "--out", out)
    found = json.loads(out.read_text())
    assert "times as fast as the peer" in printed
    assert found["summary"].keys() == {"2 bit", "3 bit"}
    for row in found["rows"]:
        assert {
            "nibble gemm_vq",
            "torch bfloat16",
            "torch float32",
            "decode, then torch bfloat16",
        } <= row["timings"].keys()
        assert row["difference"] < 0.02
        assert row["index_bytes"] * 8 == row["N"] * row["K"] // row["vector"] * row["bits"]


def test_the_estimate_on_paper_adds_up(tmp_path):
    """One layer by hand: on an RTX 4090, 2 * 4608 * 3072 * 3072 products at 1321.2 TOP/s are 65.8
    microseconds, and they bind.
    """
    out = tmp_path / "roofline.json"
    run("bench_roofline.py", "--out", out)
    gpus = {entry["gpu"]: entry for entry in json.loads(out.read_text())["gpus"]}
    first = gpus["RTX 4090"]["layers"][0]
    assert first["bounds_ms"]["mma"] == pytest.approx(0.0658, abs=1e-4)
    assert first["binds"] == "mma"
    # 128 x 128 codes of 4 bits on both sides and their scales, 8960 bytes, in 512 clocks
    assert gpus["RTX 4090"]["l2"]["128 x 128"]["bytes_a_clock"] == pytest.approx(17.5, abs=0.01)
    assert gpus["H100"]["l2"]["128 x 128"]["bytes_a_clock"] == pytest.approx(34, abs=0.1)
    blackwell = gpus["RTX 5090"]
    assert blackwell["times_as_fast_reachable"] < 0.7 * blackwell["times_as_fast_at_best"]
    assert blackwell["measured"]["source"].startswith("github.com/")
    assert "times_as_fast_reachable" not in gpus["RTX 4090"], "nobody's figure, so none"
    assert gpus["A100"]["layers"][0]["binds"] == "rescale"


def test_the_bench_of_loras_counts_what_a_rank_costs(tmp_path):
    """16 more ranks of a 3072 x 3072 layer are 2 * 16 / 3072 of its products and 16 * 6144 numbers
    of 16 bits.
    """
    out = tmp_path / "lora.json"
    run(
        "bench_lora.py",
        "--parts",
        "rank",
        "--shapes",
        "proj",
        "--tokens",
        "8",
        "--rounds",
        "1",
        "--out",
        out,
    )
    row = json.loads(out.read_text())["rank"]["rows"][0]
    assert row["operations"]["16"] == pytest.approx(2 * 16 / 3072, abs=1e-5)
    assert row["bytes"]["16"] == 2 * 16 * 6144
    assert row["ratio"]["+0"] == 1
    assert {"+128", "beside 128"} <= row["ms"].keys()


def test_the_whole_takes_as_much_longer_as_its_layers_do():
    """Two layers of 6 seconds of their own, worked on at once, took 8; ten of them take five times
    as long, and so do the core's 12 seconds.
    """
    small = {f"{n}.weight": (64, 128) for n in "ab"}
    large = {f"{n}.weight": (64, 128) for n in "abcdefghij"} | {"norm.weight": (64,)}
    rows = [{"name": name, "action": "w4a4", "seconds": 6.0} for name in "ab"]
    whole = bench_cost.extrapolate(
        {"rows": rows, "seconds": 8.0, "cpu_seconds": 12.0}, small, large
    )
    assert whole["seconds"] == pytest.approx(40)
    assert whole["core_minutes"] == pytest.approx(1)
    assert whole["weights"] == 10 * 64 * 128 + 64


def test_the_bench_of_modulation_counts_bytes_and_hits(tmp_path):
    """FLUX.1 dev: 38 layers of 18432 x 3072, 38 of 9216 x 3072 and one of 6144 x 3072, at half a
    byte and a 32nd for scales, and 2 bytes an output.
    """
    out = tmp_path / "modulation.json"
    run(
        "bench_modulation.py",
        "--rounds",
        "1",
        "--copies",
        "1",
        "--share",
        "77",
        "--step",
        "0",
        "--out",
        out,
    )
    found = json.loads(out.read_text())
    outputs = 38 * (18432 + 9216) + 6144
    assert found["bytes"] == {
        "layers": 77,
        "weights": outputs * 3072 * 17 // 32 + 2 * outputs,
        "a_step": 2 * outputs,
    }
    assert [row["ready"] for row in found["run"]["runs"]] == [26, 28]
    assert found["run"]["products"] == 28


def test_the_bench_of_constant_acceleration_counts_calls_alike(tmp_path):
    """Hardly trained nets, one picture: every method is there, and with two calls Adams-Bashforth
    but for the last step is Euler's method.
    """
    out = tmp_path / "caf.json"
    run(
        "bench_caf.py",
        "--out",
        out,
        "--train-steps",
        2,
        "--prompts",
        1,
        "--shifts",
        3,
        "--calls",
        2,
    )
    found = json.loads(out.read_text())
    assert len(found["mixture"]["rows"]) == 12
    assert all(row["errors"].keys() == {"2", "3", "5"} for row in found["mixture"]["rows"])
    psnr = {row["method"]: row["psnr"] for row in found["training-free"]["rows"]}
    assert (
        psnr["lms, order 2"]
        == pytest.approx(psnr["euler"], abs=0.01)
        != psnr["constant acceleration, limit None"]
    )


def test_the_bench_of_the_distilled_demo_asks_as_often_as_it_says(tmp_path):
    """Hardly trained heads, one prompt: two calls of CAF are two steps of Euler's method if the
    second is asked ahead, and one if not.
    """
    out, kept = tmp_path / "distilled.json", tmp_path / "couplings.pt"
    torch.save(
        (torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8), torch.zeros(3, 4, dtype=torch.long)),
        kept,
    )
    run(
        "bench_caf_distilled.py",
        "--out",
        out,
        "--couplings",
        kept,
        "--train-steps",
        1,
        "--prompts",
        1,
        "--calls",
        2,
    )
    found = json.loads(out.read_text())
    psnr = {(row["method"], row["schedule"], row["calls"]): row["psnr"] for row in found["rows"]}
    assert found["couplings"] == 3
    assert len(psnr) == len(found["rows"])
    assert psnr["euler", "even", 2] == pytest.approx(psnr["dpmpp_2m", "even", 2], abs=1e-3), (
        "their first and last steps are alike"
    )
    assert psnr["CAF, h = 1, ahead 0.5", "even t", 2] == pytest.approx(
        psnr["euler", "even", 2], abs=0.5
    )
    assert psnr["CAF, h = 1", "even t", 2] < psnr["CAF, h = 1, ahead 0.5", "even t", 2]


def test_the_bench_of_fusions_counts_what_is_saved(tmp_path):
    out = tmp_path / "fusions.json"
    run("bench_fusions.py", "--tokens", 8, "--hidden", 64, "--rounds", 2, "--out", out)
    rows = {row["what"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {"linear2", "mlp"}
    assert all(len(row["timings"]) == 2 for row in rows.values())


def test_bytes_of_fusions_at_flux_s_size():
    """By hand: copies of x 283 MB, a second result and the addition 113 MB, h once more 1 MB."""
    one, two = bench_fusions.linear2_bytes(4608, 3072)
    assert round((two - one) / 1e6) == 398
    fused, plain = bench_fusions.mlp_bytes(4096, 3072)
    assert round((plain - fused) / 1e6) == 302


def test_pictures_of_two_machines_are_compared_as_computed_and_as_saved():
    """By hand: all of a picture one level of 255 apart is 20 log10(255) = 48.13 dB; a thousandth of
    a level is not seen in what is saved.
    """
    here = torch.full((2, 4, 4, 3), 100 / 255)
    other = here.clone()
    equal = bench_machines.compared(other, here)
    assert (equal["equal"], equal["equal as saved"], equal["psnr"]) == (2, 2, None)
    other[0] += 1e-3 / 255
    assert bench_machines.compared(other, here)["equal as saved"] == 2
    other[1] += 1 / 255
    found = bench_machines.compared(other, here)
    assert (found["equal"], found["equal as saved"]) == (0, 1)
    assert found["largest difference of levels"] == 1
    assert found["worst psnr"] == pytest.approx(48.13, abs=0.01)
