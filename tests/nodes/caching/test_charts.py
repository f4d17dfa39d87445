"""The strip's JSON from a run's record."""

import json
import math

from nibble.accel.caching.steps import Decision, Record, Step
from nibble.nodes.bridge.caching import charts as caching_charts


def record(*decisions: Decision, total: int = 5, **facts) -> Record:
    """A run in which these decisions have been taken so far."""
    found = Record(total=total, **facts)
    for index, decision in enumerate(decisions):
        found.add(Step(index, total, 1 - index / total), decision, first_stream=True)
    return found


def test_steps_to_come_are_empty_cells():
    chart = caching_charts.strip_chart(
        record(Decision(True, "first"), Decision(False, "reused", 0.125), threshold=0.25),
        "TeaCache",
        "words",
    )
    assert [cell["computed"] for cell in chart["cells"]] == [True, False, None, None, None]
    assert chart["cells"][1] == {
        "step": 1,
        "sigma": 0.8,
        "computed": False,
        "why": "reused",
        "change": 0.125,
    }
    assert chart["cells"][4] == {
        "step": 4,
        "sigma": None,
        "computed": None,
        "why": "",
        "change": None,
    }
    assert (chart["threshold"], chart["rows"], chart["forwards"], chart["measure"]) == (
        0.25,
        [],
        None,
        None,
    )


def test_json_holds_no_infinity():
    chart = caching_charts.strip_chart(
        record(Decision(True, "new", math.inf), Decision(True, "threshold", math.nan)), "TeaCache"
    )
    assert [cell["change"] for cell in chart["cells"]] == [None] * 5
    json.dumps(chart, allow_nan=False)


def test_rows_say_how_many_whole_steps_their_parts_add_up_to():
    """attn is 1/4 of the model's work, mlp 1/2; the rest is always done."""
    found, shares = Record(total=3), {"attn": 0.25, "mlp": 0.5}
    found.add_rows(Step(0, 3, 1.0), {"attn": True, "mlp": True}, shares)
    found.add_rows(Step(1, 3, 0.5), {"attn": True, "mlp": False}, shares)
    chart = caching_charts.strip_chart(found, "SmoothCache")
    assert chart["rows"] == [
        {"name": "attn", "computed": [True, True, None]},
        {"name": "mlp", "computed": [True, False, None]},
    ]
    assert chart["forwards"] == 1.5


def test_the_measure_is_named_where_it_is_not_teacaches():
    assert (
        caching_charts.strip_chart(record(kind="error"), "TeaCache")["measure"] == "estimated error"
    )
