"""The chart of a training: thinned, smoothed phase by phase, its lowest point of all steps."""

import pytest

from nibble.nodes.bridge.training import curve


def test_the_curve_is_thinned_and_its_lowest_point_is_of_all_steps():
    losses = [1.0] * 700 + [0.0] * 100 + [1.0] * 200
    chart = curve.curve_chart(losses, 2000, "t")
    assert chart["kind"] == "curve"
    assert len(chart["points"]) == len(chart["smooth"]) == 250
    assert chart["points"][-1] == [1000, 1.0]
    assert chart["lowest"][0] == 800
    assert chart["lowest"][1] < 0.2
    assert ["step", "1000 of 2000"] in chart["summary"]
    assert curve.curve_chart([], 5, "t")["points"] == []
    assert curve.smoothed([2.0, 2.0, 2.0], 5) == pytest.approx([2.0, 2.0, 2.0])
    assert curve.smoothed([3.0, 1.0], 1) == [3.0, 1.0]


def test_each_phase_of_the_curve_is_smoothed_on_its_own():
    losses = [1.0] * 500 + [5.0] * 499
    chart = curve.curve_chart(losses, 1000, "t", phases=[("velocity", 0), ("acceleration", 500)])
    assert chart["phases"] == [["velocity", 0], ["acceleration", 500]]
    assert {mean for step, mean in chart["smooth"] if step <= 500} == {1.0}
    assert [500, 1.0] in chart["points"]
    assert [mean for step, mean in chart["smooth"] if step > 500] == pytest.approx([5.0] * 125)
    assert chart["lowest"][0] > 500
    assert chart["summary"][1:3] == [["velocity loss", "1"], ["acceleration loss", "5"]]
    begun = curve.curve_chart(
        losses[:20], 1000, "t", phases=[("velocity", 0), ("acceleration", 500)]
    )
    assert [label for label, _ in begun["summary"]] == ["step", "velocity loss", "lowest"]
    assert "phases" not in curve.curve_chart([1.0], 5, "t")
    assert (
        curve.curve_chart([], 6, "t", phases=[("velocity", 0), ("acceleration", 3)])["points"] == []
    )
