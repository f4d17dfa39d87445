"""The surface of compiled code, through both doors, the Python module and the C library: what it
says of itself, what it refuses, and that no argument, stream or thread brings it down.
"""

import functools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nibble.kernels import which
from nibble.kernels.backends import native
from nibble.kernels.backends.compiled import Compiled
from nibble.kernels.backends.cpu_library import Library

SIZE = 1 << 18  # the largest codebook is 128 KB
BUFFER = torch.zeros(SIZE + 256, dtype=torch.uint8)
BASE = BUFFER.data_ptr() + -BUFFER.data_ptr() % 256


@pytest.fixture(scope="module", params=["extension", "library"])
def module(request):
    """The compiled code behind one of its doors."""
    if request.param == "library":
        return Compiled(request.getfixturevalue("built_library"), "library", "CPU library")
    found, reason = native.module()
    if found is None or found.kind != "extension":
        pytest.skip(f"{reason}: pip install ./kernels")
    return found


@pytest.fixture(scope="module")
def call(module):
    return functools.partial(_call, module)


def _call(module, op, **changes):
    """An op on the CPU with good arguments over one zeroed buffer, but for `changes`."""
    a = BASE
    good = {
        "quantize_down": QUANTIZE,
        "gemm_w4a4_up": PRODUCT | dict(out=a, out_dtype=0, workspace=a, workspace_size=SIZE),
        "gemm_w4a4_up_gelu_quantize_down": (
            PRODUCT
            | dict(
                mid_dtype=0,
                R2=4,
                smooth2=a,
                proj_down2=a,
                act_unsigned2=False,
                rotate2=False,
                codes2=0,
                q2=a,
                ascales2=a,
                h2=a,
                workspace=a,
                workspace_size=SIZE,
            )
        ),
        "gemv_w4a16": W4A16,
        "gemm_w4a16": W4A16,
        "gemm_vq": VQ,
        "linear_w4a8": W4A8,
    }[op]
    place = dict(device=-1, stream=0, threads=1, isa=0)
    return getattr(module, op)(**(place | good | changes))


QUANTIZE = dict(
    M=2,
    K=64,
    R=4,
    x=BASE,
    x_stride=64,
    x_dtype=0,
    smooth=BASE,
    proj_down=BASE,
    param_dtype=0,
    act_unsigned=False,
    rotate=False,
    unsigned_from=0,
    codes=0,
    q=BASE,
    ascales=BASE,
    h=BASE,
)
PRODUCT = dict(
    M=2,
    N=64,
    K=64,
    R=4,
    codes=0,
    q=BASE,
    act_unsigned=False,
    unsigned_from=0,
    ascales=BASE,
    h=BASE,
    h_stride=4,
    weight=BASE,
    weight_scale=BASE,
    proj_up=BASE,
    bias=BASE,
    param_dtype=0,
)
W4A16 = dict(
    M=2,
    N=64,
    K=64,
    x=BASE,
    x_dtype=0,
    weight=BASE,
    weight_scale=BASE,
    weight_zeros=BASE,
    bias=BASE,
    param_dtype=0,
    out=BASE,
)
VQ = dict(
    M=2,
    N=64,
    K=64,
    bits=8,
    vector=4,
    x=BASE,
    x_dtype=0,
    indices=BASE,
    codebook=BASE,
    codebook_dtype=0,
    scale=BASE,
    bias=BASE,
    param_dtype=0,
    addend=BASE,
    addend_dtype=0,
    out=BASE,
    out_dtype=0,
)


W4A8 = dict(
    M=2,
    N=64,
    K=64,
    R=4,
    group=32,
    x=BASE,
    x_stride=64,
    x_dtype=0,
    smooth=BASE,
    proj_down=BASE,
    weight=BASE,
    weight_scale=BASE,
    channel_scale=BASE,
    table=BASE,
    proj_up=BASE,
    bias=BASE,
    param_dtype=0,
    rotate=False,
    out=BASE,
)


# ---- what it says --------------------------------------------------------------------------------


def test_it_names_itself(module):
    assert (
        module.ABI == native.ABI
        and module.__version__
        and module.DEVICES in (("cpu",), ("cpu", "cuda"))
    )
    info = module.build_info()
    assert info["compiler"] and bool(info["cuda"]) == ("cuda" in module.DEVICES)
    assert module.cpu_isas()[0] == "portable" and set(module.cpu_isas()) < set(native.ISAS)


def test_it_links_neither_torch_nor_a_cuda_runtime(module):
    """One binary for every torch: such a library would be named in its list of needed ones."""
    binary = Path(module.__file__).read_bytes()
    assert b"libtorch" not in binary and b"libc10" not in binary and b"libcudart.so" not in binary


@pytest.mark.parametrize("op", native.OPS)
def test_every_op_has_a_route_and_a_workspace_on_every_architecture(module, op):
    for capability in (0, 75, 80, 86, 89, 90, 100, 120, 130) if "cuda" in module.DEVICES else (0,):
        path, why = module.route(op, capability, 4608, 3072, 3072)
        assert path and why
        assert 0 <= module.workspace_bytes(op, capability, 4608, 3072, 3072, 32) < 2**32
        assert module.codes(capability) in (0, 1)


@pytest.mark.skipif(native.module()[0] is None, reason=native.module()[1])
def test_which_tells_the_native_path():
    backend, words = which("linear_w4a4", "cpu")
    assert backend == "native" and "gemm_w4a4_up: " in words
    assert native.module()[0].__version__ in words


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("quantize_down", {"M": -1}, r"quantize_down: M is negative \(M=-1, K=64, R=4\)"),
        ("quantize_down", {"K": 65}, "K=65 is not a multiple of the group size 64"),
        ("quantize_down", {"M": 2**31}, r"M must be below 2\^31"),
        ("quantize_down", {"x": 0}, "x is null and has 128 elements"),
        ("quantize_down", {"h": BASE + 4}, "h is not aligned to 16 bytes"),
        (
            "quantize_down",
            {"x_dtype": 3},
            r"x_dtype=3 is none of 0 \(float32\), 1 \(float16\), 2 \(bfloat16\)",
        ),
        ("quantize_down", {"codes": 3}, "codes=3 is none of"),
        ("quantize_down", {"codes": 1}, "packed or int8, not 8-bit floats"),
        ("quantize_down", {"act_unsigned": True, "rotate": True}, "exclude one another"),
        ("quantize_down", {"unsigned_from": 64}, "unsigned_from=64, K=64: a multiple of the group"),
        ("quantize_down", {"x_stride": 63}, "rows of x would overlap"),
        ("quantize_down", {"x_stride": 68}, "x_stride=68 is not a multiple of 8"),
        ("quantize_down", {"isa": 4}, "isa=4 is none of"),
        ("quantize_down", {"threads": 0}, "threads=0 is less than 1"),
        ("quantize_down", {"device": -2}, "device=-2 is neither"),
        ("gemm_w4a4_up", {"N": -64}, "N is negative"),
        ("gemm_w4a4_up", {"M": 2**30, "N": 2**30, "K": 0}, r"out \(M, N\) is larger than memory"),
        ("gemm_w4a4_up", {"h_stride": 3}, "rows of h would overlap"),
        ("gemm_w4a4_up", {"act_unsigned": True, "unsigned_from": -64}, "unsigned_from=-64, K=64"),
        ("gemm_w4a4_up", {"weight": 0}, "weight is null"),
        ("gemm_w4a4_up", {"bias": 8}, "bias is not aligned"),
        ("gemm_w4a4_up", {"out_dtype": -1}, "out_dtype=-1"),
        ("gemm_w4a4_up", {"workspace": 8}, "workspace is not aligned"),
        ("gemm_w4a4_up", {"workspace_size": -1}, "workspace_size=-1 is negative"),
        ("gemm_w4a4_up_gelu_quantize_down", {"N": 32}, "N=32 is not a multiple"),
        ("gemm_w4a4_up_gelu_quantize_down", {"R2": -4}, "R2 is negative"),
        ("gemm_w4a4_up_gelu_quantize_down", {"smooth2": 0}, "smooth2 is null"),
        ("gemm_w4a4_up_gelu_quantize_down", {"codes2": 7}, "codes2=7"),
        ("gemv_w4a16", {"K": 32}, "gemv_w4a16: K=32"),
        ("gemm_w4a16", {"out": 0}, "gemm_w4a16: out is null"),
        ("gemm_vq", {"bits": 0}, r"gemm_vq: bits=0 is outside 1\.\.12"),
        ("gemm_vq", {"bits": 13}, "bits=13"),
        ("gemm_vq", {"vector": 3}, "vector=3 is none of 1, 2, 4, 8"),
        ("gemm_vq", {"K": 68}, "K=68 is not a multiple of 8"),
        ("gemm_vq", {"K": 72, "bits": 3}, "K=72: a row of indices does not fill whole bytes"),
        ("gemm_vq", {"codebook": 0}, "codebook is null and has 1024 elements"),
        ("gemm_vq", {"indices": 0}, "indices is null"),
        ("gemm_vq", {"addend": 8}, "addend is not aligned"),
        ("gemm_vq", {"out_dtype": 5}, "out_dtype=5"),
        ("linear_w4a8", {"group": 48}, "linear_w4a8: group=48 is none of 16, 32, 64"),
        ("linear_w4a8", {"K": 2**17 + 64, "x_stride": 2**18}, r"K=131136 is more than 2\^17"),
        ("linear_w4a8", {"x_stride": 32}, "rows of x would overlap"),
        ("linear_w4a8", {"table": 0}, "table is null and has 16 elements"),
        ("linear_w4a8", {"weight_scale": 0}, "weight_scale is null and has 128 elements"),
        ("linear_w4a8", {"channel_scale": 8}, "channel_scale is not aligned"),
    ],
)
def test_wrong_values_are_named(call, op, change, words):
    with pytest.raises(ValueError, match=words):
        call(op, **change)


@pytest.mark.parametrize("value", ["1", None, 1.5, 2**70, -(2**70)])
def test_wrong_types_are_refused(call, value):
    for name in ("M", "x", "isa"):
        with pytest.raises(TypeError):
            call("quantize_down", **{name: value})


def test_wrong_names_are_refused(module, call):
    with pytest.raises(TypeError, match=r"quantize_down: no such arguments: \['N'\]"):
        call("quantize_down", N=64)
    with pytest.raises(TypeError, match="quantize_down: device is missing"):
        module.quantize_down(M=2)


def test_a_call_of_another_build_is_refused(module):
    """Structs of another size: the sources on the two sides differ."""
    door = native.optional(native.MODULE)[0]
    if module.kind == "library":
        door = Library(Path(module.__file__), "")
    with pytest.raises(ValueError, match="gemm_vq: a call of 3 bytes, and this build's has"):
        door.gemm_vq(b"abc")


def test_questions_refuse_too(module):
    for ask in (
        lambda: module.route("gemm", 0, 1, 1, 1),
        lambda: module.workspace_bytes("gemm", 0, 1, 1, 1, 1),
        lambda: module.codes(-1),
        lambda: module.route("gemv_w4a16", 0, -1, 1, 1),
        lambda: module.capability(-2),
        lambda: module.capability(64),
    ):
        with pytest.raises(ValueError):
            ask()


def test_an_instruction_set_that_the_cpu_lacks_is_refused(module, call):
    for name in set(native.ISAS) - {"best", *module.cpu_isas()}:
        with pytest.raises((RuntimeError, ValueError)):
            call("quantize_down", isa=native.ISAS[name])


def test_a_build_for_the_cpu_says_so(module, call):
    if "cuda" in module.DEVICES:
        pytest.skip("this build has CUDA")
    for ask in (
        lambda: call("quantize_down", device=0),
        lambda: module.capability(0),
        lambda: module.route("gemv_w4a16", 90, 1, 1, 64),
    ):
        with pytest.raises(ValueError, match="built without CUDA"):
            ask()


SIZES = st.sampled_from([-(2**63), -64, -1, 0, 1, 3, 4, 63, 64, 65, 128])
HUGE = st.sampled_from([2**31 - 64, 2**31, 2**40, 2**62, 2**63 - 1])
CODES = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 4, 2**31 - 1])
POINTERS = st.sampled_from([0, BASE, BASE + 16, BASE + 4, BASE + 1])
FIELDS = {
    name: SIZES
    for name in ("M", "N", "K", "R", "R2", "x_stride", "h_stride", "unsigned_from", "threads")
} | {"workspace_size": SIZES, "scratch_size": SIZES}
FIELDS |= {
    name: CODES
    for name in (
        "isa",
        "x_dtype",
        "param_dtype",
        "out_dtype",
        "mid_dtype",
        "codebook_dtype",
        "addend_dtype",
        "codes",
        "codes2",
    )
}
FIELDS |= {
    name: st.booleans() for name in ("act_unsigned", "rotate", "act_unsigned2", "rotate2")
} | {"device": st.sampled_from([-3, -2, -1])}
FIELDS |= {
    "bits": st.sampled_from([-1, 0, 1, 3, 6, 8, 12, 13, 2**31 - 1]),
    "vector": st.sampled_from([-8, 0, 1, 2, 3, 4, 8, 16]),
    "group": st.sampled_from([-16, 0, 8, 16, 32, 64, 128]),
}


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_argument_brings_the_process_down(call, data):
    """Anything is either computed or refused with words. Sizes that memory cannot hold come with no
    memory.
    """
    op = data.draw(st.sampled_from(native.OPS))
    names = {
        "quantize_down": [*QUANTIZE],
        "gemm_w4a4_up": [*PRODUCT, "out", "out_dtype", "workspace", "workspace_size"],
        "gemm_vq": [*VQ],
        "linear_w4a8": [*W4A8, "scratch", "scratch_size"],
        "gemm_w4a4_up_gelu_quantize_down": [
            *PRODUCT,
            "R2",
            "mid_dtype",
            "smooth2",
            "rotate2",
            "codes2",
            "q2",
            "h2",
            "workspace",
        ],
    }
    changed = data.draw(
        st.lists(
            st.sampled_from([*names.get(op, W4A16), "isa", "threads", "device"]),
            unique=True,
            max_size=6,
        )
    )
    changes = {name: data.draw(FIELDS.get(name, POINTERS), label=name) for name in changed}
    if data.draw(st.booleans(), label="huge"):
        sizes = [name for name in names.get(op, W4A16) if name in ("M", "N", "K", "R", "R2")]
        changes |= {name: 0 for name in names.get(op, W4A16) if FIELDS.get(name) is None}
        changes |= {
            name: 0
            for name in ("q", "ascales", "h", "q2", "ascales2", "h2", "proj_down2")
            if name in names.get(op, ())
        }
        changes |= {data.draw(st.sampled_from(sizes)): data.draw(HUGE)}
    try:
        call(op, **changes)
    # TypeError: a number that its C type cannot hold
    except (ValueError, TypeError, RuntimeError) as refusal:
        assert str(refusal)
