"""Which functions a block of code calls, and with what: by their code objects, under whatever name
a module imported them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def recorded_calls(*functions: Callable) -> Iterator[dict[str, list[dict]]]:
    """A function's name → the arguments of each of its calls, in order."""
    names = {function.__code__: function.__name__ for function in functions}
    calls: dict[str, list[dict]] = {name: [] for name in names.values()}

    def profile(frame, event, _argument):
        if event == "call" and frame.f_code in names:
            calls[names[frame.f_code]].append(dict(frame.f_locals))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@contextmanager
def planned_and_opened_once(target, *functions: Callable) -> Iterator[dict[str, list[dict]]]:
    """Asserts of one quantization: the plan is made once, and a target that exists is opened once
    in all. Records the calls of other functions beside.
    """
    from nibble.quant.files.architectures import plan
    from nibble.quant.files.safetensors import _read_header

    existed = os.path.exists(target)
    with recorded_calls(plan, _read_header, *functions) as calls:
        yield calls
    opened = [os.path.realpath(call["path"]) for call in calls["_read_header"]]
    assert len(calls["plan"]) == 1
    assert opened.count(os.path.realpath(target)) == (1 if existed else 0)
