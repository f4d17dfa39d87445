"""The compiled module's results: the reference's on every instruction set, whatever the threads."""

import threading

import pytest
import torch

import flat_native
from cases import SMALL, Case, make_input, make_w4a4, make_w4a16, options
from compare import assert_same, assert_twice_plain
from nibble.kernels import ops, reference
from nibble.kernels.backends import native

module, reason = native.module()
pytestmark = pytest.mark.skipif(module is None, reason=f"{reason}: pip install ./kernels")

ISAS = module.cpu_isas() if module else ()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_instruction_set_gives_the_references_results(case, isa):
    dtype, number = torch.float32, native.ISAS[isa]
    x, parameters = make_input(case), make_w4a4(case, torch.float32)
    smooth, down = parameters["smooth_factor"], parameters["proj_down"]
    found = flat_native.quantize_down(
        dtype, x, smooth, down, case.act_unsigned, case.rotation, isa=number
    )
    q, ascales, h = reference.quantize_down(x, smooth, down, **options(case))
    if not case.rotation:
        assert_same(found[0], q)
        assert_same(found[1], ascales)
    rest = {name: parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")}
    y = flat_native.gemm_w4a4_up(
        dtype, q, ascales, h, *rest.values(), case.act_unsigned, dtype, isa=number
    )
    exact = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in rest.items()
    }
    truth = reference.gemm_w4a4_up(
        q, ascales.double(), h.double(), **exact, act_unsigned=case.act_unsigned
    )
    assert_twice_plain(
        y, truth, reference.gemm_w4a4_up(q, ascales, h, **rest, act_unsigned=case.act_unsigned)
    )


@pytest.mark.parametrize(
    "case", [SMALL[0], SMALL[3], SMALL[-1], Case("many", 70, 192, 300, R=20)], ids=str
)
def test_the_number_of_threads_does_not_change_a_bit(case, monkeypatch):
    """The number is told, not set: torch's own solvers go wrong in a process that calls
    set_num_threads.
    """
    x, w4a4, w4a16 = make_input(case, torch.bfloat16), make_w4a4(case), make_w4a16(case)
    found = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(
            (
                ops.linear_w4a4(x, **w4a4, **options(case)),
                ops.linear_w4a16(x, **w4a16),
                ops.gemv_w4a16(x, **w4a16),
            )
        )
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_python_threads_run_ops_side_by_side():
    case = SMALL[0]
    x, parameters = make_input(case), make_w4a4(case)
    expected, wrong = ops.linear_w4a4(x, **parameters), []

    def work():
        for _ in range(20):
            if not torch.equal(ops.linear_w4a4(x, **parameters), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
