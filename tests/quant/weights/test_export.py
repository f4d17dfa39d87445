"""torch.export and torch.jit.trace of the modules that hold quantized weights: what is exported
computes what the module computes.
"""

import dataclasses
import io

import pytest
import torch

from intlora_bases import K, N, normal, svdquant, w4a16
from nibble.quant.intlora.linear import IntLoRALinear, rule_for
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.vq4dit.fit import LayerOptions, fit
from nibble.quant.vq4dit.student import HardVQLinear
from nibble.quant.weights.modules import as_module
from nibble.quant.weights.vq import VQWeight


def vq(scaled: bool = False, bias: bool = False, rotation: int = 0, rank: int = 0) -> VQWeight:
    generator = torch.Generator().manual_seed(1)
    return VQWeight(
        torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8),
        normal(256, 2, seed=2).half(),
        normal(N, seed=3).half() if scaled else None,
        normal(K, rank, seed=4).half() if rank else None,
        normal(N, rank, seed=5).half() if rank else None,
        normal(N, seed=6).half() if bias else None,
        rotation,
    )


def modules() -> dict[str, torch.nn.Module]:
    """Every kind of stored linear, with and without what it may lack."""
    plain = svdquant()
    bare = dataclasses.replace(plain, bias=None)
    return {
        "w4a4": as_module(plain),
        "w4a4 without a bias": as_module(bare),
        "w4a4 rotated": as_module(svdquant(rotation=64)),
        "w4a16": as_module(w4a16()),
        "w4a16 without zeros": as_module(w4a16(zeros=False)),
        "vq": as_module(vq()),
        "vq with all": as_module(vq(scaled=True, bias=True, rotation=64, rank=4)),
    }


@pytest.mark.parametrize("kind", list(modules()))
def test_an_exported_module_computes_the_same(kind):
    module, x = modules()[kind].eval(), normal(3, K, seed=9, size=1.0)
    with torch.no_grad():
        expected = module(x)
        program = torch.export.export(module, (x,))
        assert torch.equal(program.module()(x), expected)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        assert torch.equal(torch.export.load(file).module()(x), expected)


@pytest.mark.parametrize("kind", list(modules()))
def test_a_traced_module_computes_the_same(kind):
    module, x = modules()[kind].eval(), normal(3, K, seed=9, size=1.0)
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,), check_trace=False)
        assert torch.equal(traced(x), module(x))


def trainers() -> dict[str, torch.nn.Module]:
    """The modules that a layer's place is taken by while something is trained."""
    base = IntBase.of(w4a16())
    how = LayerOptions(16, 2, scaled=False, rotation=0, turns=0)
    generator = torch.Generator().manual_seed(0)
    return {
        "vq student": HardVQLinear(fit(normal(N, K), None, None, how, generator)),
        "intlora": IntLoRALinear(base, rule_for(base, "shift_add"), 2),
    }


@pytest.mark.parametrize("kind", [*modules(), *trainers()])
def test_what_a_module_lacks_is_no_buffer(kind):
    module = (modules() | trainers())[kind]
    assert None not in module._buffers.values()
    assert getattr(module, "bias", None) is None or isinstance(module.bias, torch.Tensor)
