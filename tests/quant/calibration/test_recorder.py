"""Finding, replacing and recording linears of any module."""

import pytest
import torch
from torch import nn

from nibble.quant.calibration.recorder import Recorder, collect, find_linears
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.weights.linears import replace


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 128),
        nn.Sequential(nn.GELU(), nn.Linear(128, 64)),
        nn.LayerNorm(64),
        nn.Linear(64, 3),
    )


NAMES = ["0", "1.1", "3"]


def batches() -> list[torch.Tensor]:
    return [torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_linears_are_found_by_name():
    assert list(find_linears(model())) == NAMES


def test_replaced_module_runs_and_the_old_one_is_returned():
    net = model()
    old = net[1][1]
    assert replace(net, "1.1", nn.Identity()) is old
    assert isinstance(net[1][1], nn.Identity)
    with pytest.raises(ValueError, match="no module called '1.9'"):
        replace(net, "1.9", nn.Identity())


def test_recording_changes_no_result_and_leaves_no_hook():
    net, x = model(), batches()[0]
    before = net(x)
    with Recorder(net, NAMES) as recorder:
        assert torch.equal(net(x), before)
    net(x)
    assert recorder.stats["0"].count == 40
    torch.testing.assert_close(
        recorder.stats["1.1"].mean, net[1][0](net[0](x)).flatten(0, 1).mean(0)
    )


def test_hooks_are_gone_after_an_error():
    net = model()
    with pytest.raises(RuntimeError, match="stop"), Recorder(net, NAMES):
        raise RuntimeError("stop")
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_passes_stay_under_the_cap_and_keep_every_name():
    shapes = {f"layer{i}": 64 * (1 + i % 3) for i in range(10)}
    cap = 3 * InputStats.bytes_needed(192, samples=8)
    parts = Recorder.passes(shapes, shapes, cap, samples=8)
    assert [name for part in parts for name in part] == list(shapes)
    assert len(parts) > 1
    assert all(
        sum(InputStats.bytes_needed(shapes[n], samples=8) for n in part) <= cap for part in parts
    )


def test_needed_bytes_are_those_of_full_statistics():
    stats = InputStats.empty(128, samples=16, hessian_block=64)
    stats.update(torch.randn(50, 128))
    held = sum(
        t.nbytes
        for t in (
            stats.mean,
            stats.mean_square,
            stats.held_mean,
            stats.held_mean_square,
            stats.products,
            stats.samples,
        )
    )
    assert held == InputStats.bytes_needed(128, samples=16, hessian_block=64)


def test_a_layer_over_the_cap_is_refused_by_name():
    with pytest.raises(ValueError, match="recording big takes .* MB"):
        Recorder.passes(["big"], {"big": 6400}, 1000)
    with pytest.raises(ValueError, match="record them in passes"):
        Recorder(model(), NAMES, memory_cap_bytes=InputStats.bytes_needed(128) + 1)


def test_many_passes_give_the_statistics_of_one():
    def collected(cap: int) -> tuple[dict, list]:
        net, reports = model(), []
        stats = collect(
            net,
            NAMES,
            lambda: [net(x) for x in batches()],
            cap,
            lambda *done: reports.append(done),
            samples=16,
        )
        return stats, reports

    one, reports_of_one = collected(10**9)
    many, reports_of_many = collected(InputStats.bytes_needed(128, samples=16))
    assert reports_of_one == [(1, 1)]
    assert reports_of_many == [(1, 3), (2, 3), (3, 3)]
    for name in NAMES:
        for found in ("mean", "mean_square", "hessian", "samples", "owners"):
            assert torch.equal(getattr(one[name], found), getattr(many[name], found)), found


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no linear layer called '7'"):
        collect(model(), ["7"], lambda: None, 10**9)
