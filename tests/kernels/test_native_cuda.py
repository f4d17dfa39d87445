"""The compiled ops on a GPU as programs use them: captured into graphs, on many streams, in both
forms of codes, bit for bit the same.
"""

import pytest
import torch

import flat_native
from cases import Case, make_input, make_w4a4, make_w4a16
from compare import assert_twice_plain
from nibble.kernels import ops, reference, which
from nibble.kernels.backends import native

BF16 = torch.bfloat16
CASE, SECOND = (
    Case("gpu", 300, 1024, 768, R=32),
    Case("second", 300, 768, 256, R=32, act_unsigned=True),
)
ORDER = ("weight", "weight_scale", "smooth_factor", "proj_down", "proj_up", "bias")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device in this machine")
    module, reason = native.serving(torch.device("cuda", torch.cuda.current_device()))
    if module is None:
        pytest.skip(reason)


def layer(case):
    parameters = make_w4a4(case, BF16, device="cuda")
    return [parameters[name] for name in ORDER]


def programs():
    """Every public op as a function of one x (M, K)."""
    first, second, w4a16 = layer(CASE), layer(SECOND), make_w4a16(CASE, BF16, device="cuda")
    lists = [[first[i], first[i]] for i in (0, 1, 3, 4, 5)]
    return {
        "linear_w4a4": lambda x: ops.linear_w4a4(x, *first),
        "linear_w4a16": lambda x: ops.linear_w4a16(x, **w4a16),
        "gemv_w4a16": lambda x: ops.gemv_w4a16(x[:2], **w4a16),
        "mlp_w4a4": lambda x: ops.mlp_w4a4(x, first, second, act_unsigned2=True),
        "linear_w4a4_grouped": lambda x: torch.cat(ops.linear_w4a4_grouped(x, first[2], *lists), 1),
    }


NAMES = ["linear_w4a4", "linear_w4a16", "gemv_w4a16", "mlp_w4a4", "linear_w4a4_grouped"]


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_op_is_chosen(name):
    backend, words = which(name, "cuda")
    assert backend == "native", words


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_replays_what_was_captured(name):
    run = programs()[name]
    x = make_input(CASE, BF16, device="cuda")
    other = make_input(CASE, BF16, seed=5, device="cuda")
    expected = run(x), run(other)
    buffer = x.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(buffer)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(buffer)
    for values, wanted in zip((x, other), expected, strict=True):
        buffer.copy_(values)
        graph.replay()
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_streams_do_not_disturb_each_other(name):
    run = programs()[name]
    inputs = [make_input(CASE, BF16, seed=seed, device="cuda") for seed in range(4)]
    expected = [run(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for _ in range(5):
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(run(x))
    torch.cuda.synchronize()
    for index, y in enumerate(found):
        assert torch.equal(y, expected[index % 4])


def test_an_op_waits_for_what_its_stream_does_before():
    run, side = programs()["linear_w4a4"], torch.cuda.Stream()
    x = make_input(CASE, BF16, device="cuda")
    expected = run(x)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(x)
        y = run(late)
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("unsigned", [False, True])
def test_both_forms_of_codes_give_the_same_product(unsigned):
    """What quantize_down hands to the product on this GPU, and the packed codes of the
    public op.
    """
    weight, scale, smooth, down, up, bias = layer(CASE)
    x = make_input(CASE, BF16, device="cuda")
    own = native.gpu(torch.device("cuda", torch.cuda.current_device()))[1]
    results = []
    for form in {native.PACKED, own}:
        q, ascales, h = flat_native.quantize_down(BF16, x, smooth, down, unsigned, 0, codes=form)
        results.append(
            flat_native.gemm_w4a4_up(
                BF16, q, ascales, h, weight, scale, up, bias, unsigned, torch.float32
            )
        )
    codes, ascales, h = reference.quantize_down(x, smooth, down, unsigned)
    exact = reference.gemm_w4a4_up(
        codes,
        ascales.double(),
        h.double(),
        weight,
        scale.double(),
        up.double(),
        bias.double(),
        unsigned,
    )
    plain = reference.gemm_w4a4_up(codes, ascales, h, weight, scale, up, bias, unsigned)
    for y in results:
        assert_twice_plain(y.to(BF16), exact, plain.to(BF16))


def test_float32_parameters_stay_with_the_reference_and_say_so():
    assert which("linear_w4a4", "cuda", torch.float32)[0] == "reference"
    assert "float16 or bfloat16" in which("linear_w4a4", "cuda", torch.float32)[1]


def test_memory_is_given_back():
    run, x = programs()["mlp_w4a4"], make_input(CASE, BF16, device="cuda")
    run(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        run(x)
    assert torch.cuda.memory_allocated() == before


def test_a_wrong_device_is_refused_with_words():
    with pytest.raises(ValueError, match="weight is on cpu and the activations are on cuda:0"):
        ops.linear_w4a4(
            make_input(CASE, BF16, device="cuda"), layer(CASE)[0].cpu(), *layer(CASE)[1:]
        )
    with pytest.raises((ValueError, RuntimeError)):
        native.on(torch.device("cuda", 0)).capability(63)
    assert ops.linear_w4a4(make_input(CASE, BF16, device="cuda"), *layer(CASE)).isfinite().all()
