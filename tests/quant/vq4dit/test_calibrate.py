"""Calibration block by block: what it leaves alone, what the ratios do, and the orderings of the
methods on a toy DiT.
"""

import copy

import pytest
import torch
from torch import nn

import toy_dit as toy
from nibble.quant.calibration.teacher import Teacher
from nibble.quant.vq4dit import calibrate, trajectory
from nibble.quant.vq4dit.calibrate import BlockCalibrator, BlockTargets, block_of, learn
from nibble.quant.vq4dit.fit import LayerOptions, fit
from nibble.quant.vq4dit.recipe import Recipe
from nibble.quant.vq4dit.student import HardVQLinear, RowSlice, SoftVQLinear

FIRST = toy.LAYERS[:5]


def fitted(n=32, k=64, codewords=16, seed=0, how=None):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * 0.1
    return (
        fit(
            weight,
            torch.zeros(n),
            None,
            how or LayerOptions(codewords, 2, scaled=False, rotation=0, turns=0),
            generator,
        ),
        weight,
    )


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, dict(
        model.named_modules()
    )


def unchanged(model, before):
    tensors, modules = before
    return (
        all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
        and modules == dict(model.named_modules())
        and not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
    )


@pytest.mark.parametrize("bits", [2, 3])
def test_each_method_is_closer_than_the_one_before(bits):
    """Output error of the whole toy on a trajectory that nothing was fitted on: k-means > its
    codebooks trained > the paper > best.
    """
    steps = 160
    arms = {
        "k-means": Recipe.from_preset("vq4dit", bits=bits, candidates=1, steps=0),
        "codebooks": Recipe.from_preset("vq4dit", bits=bits, candidates=1, steps=steps),
        "paper": Recipe.from_preset("vq4dit", bits=bits, steps=steps),
        "best": Recipe.from_preset("best", bits=bits, steps=40),
    }
    errors = {name: toy.error(toy.quantized(recipe)) for name, recipe in arms.items()}
    print(errors)
    assert errors["codebooks"] < 0.85 * errors["k-means"]
    assert errors["best"] < 0.9 * errors["paper"]
    assert errors["paper"] < 0.9 * errors["codebooks"]


def test_two_candidates_beat_one():
    """One block on its own inputs, where nothing else plays a part."""
    errors = {
        n: toy.error(
            toy.quantized(Recipe.from_preset("vq4dit", bits=3, candidates=n, steps=240), FIRST)
        )
        for n in (1, 2)
    }
    assert errors[2] < 0.8 * errors[1]


def test_the_teacher_is_left_alone_even_when_stopped():
    model = toy.trained()
    before = state(model)

    class Stop(Exception):
        pass

    def stop(step, steps, db):
        if step > 10:
            raise Stop

    with pytest.raises(Stop):
        toy.quantized(Recipe.from_preset("best", steps=30), FIRST, stop)
    assert unchanged(model, before)
    toy.quantized(Recipe.from_preset("vq4dit", steps=10), FIRST)
    assert unchanged(model, before)


def test_the_student_shares_the_layers_that_are_not_its_own():
    calibrator = BlockCalibrator(toy.teacher(), FIRST)
    model, student = calibrator.teacher.model, calibrator.student
    assert student.get_submodule("blocks.0.qkv") is model.get_submodule("blocks.0.qkv")
    # not to be quantized: copied, and frozen
    assert student.get_submodule("blocks.1.qkv") is not model.get_submodule("blocks.1.qkv")
    calibrator.install("blocks.0.qkv", HardVQLinear(fitted(192, 64)[0]))
    assert isinstance(student.blocks[0].qkv, RowSlice)
    assert isinstance(model.blocks[0].qkv, nn.Linear)


def test_blocks_come_in_the_order_of_the_model_and_inputs_from_the_student():
    calibrator = BlockCalibrator(toy.teacher(), list(reversed(toy.LAYERS)))
    assert list(calibrator.blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(calibrator.calls) == 6
    inputs, stats = calibrator.inputs("blocks.1")
    targets = calibrator.targets("blocks.1", inputs)
    # nothing is quantized yet
    assert targets.decibels(calibrator.student.blocks[1]) > 120
    assert stats["blocks.1.qkv"].count == 6 * 24 * toy.TOKENS
    calibrator.install(
        "blocks.0.fc1",
        HardVQLinear(
            fit(
                toy.trained().blocks[0].fc1.weight,
                None,
                None,
                LayerOptions(4, 2, rotation=0),
                torch.Generator(),
            )
        ),
    )
    changed, _ = calibrator.inputs("blocks.1")
    assert not torch.equal(changed[0].args[0], inputs[0].args[0])
    # what the teacher puts out stays the aim
    assert torch.equal(calibrator.targets("blocks.1", changed).targets[0][0], targets.targets[0][0])


def test_a_cap_on_memory_thins_out_the_calls():
    calibrator = BlockCalibrator(toy.teacher(), FIRST)
    inputs, _ = calibrator.inputs("blocks.0")
    whole = calibrator.targets("blocks.0", inputs)
    size = sum(call.nbytes for call in whole.inputs) + sum(
        t.nbytes for target in whole.targets for t in target
    )
    calibrator.teacher.cap = size // 2
    assert len(calibrator.targets("blocks.0", inputs).inputs) == 3
    assert len(whole.inputs) == 6


def test_calls_are_replayed_with_tensors_of_their_own():
    class Spoiler(nn.Module):
        def forward(self, x, options=None):
            x += options["more"][0]
            return {"out": (x, "text")}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.after = Spoiler(), Spoiler()

        def forward(self, x, options=None):
            self.block(x, options=options)
            return self.after(x, options=options)

    model, x = Model(), torch.ones(2)
    calls = trajectory.record(
        model, lambda: model(x.clone(), options={"more": (torch.ones(2),), "name": "a"})
    )
    for _ in range(2):
        given = trajectory.inputs_of(model, "block", 1, calls, "cpu")
        results = trajectory.outputs_of(model, "block", 1, calls, "cpu")
        assert given[0].args[0].tolist() == [1, 1]
        assert results[0][0].tolist() == [2, 2]
        assert given[0].kwargs["options"]["name"] == "a"
    assert trajectory.order(model, ["after", "block"], calls[0], "cpu") == {"block": 1, "after": 1}


def test_it_works_where_gradients_are_off():
    """Hosts sample under inference mode; training leaves it by itself."""
    with torch.inference_mode():
        student = toy.quantized(Recipe.from_preset("best", steps=3), FIRST)
    assert not any(p.requires_grad for p in toy.trained().parameters())
    assert toy.error(student) < 0.5


def test_names_of_blocks():
    assert [
        block_of(name)
        for name in (
            "double_blocks.3.img_attn.qkv",
            "transformer_blocks.11.ff.net.0.proj",
            "mod.lin",
            "a.blocks.2",
        )
    ] == ["double_blocks.3", "transformer_blocks.11", "mod.lin", "a.blocks.2"]


# ---- ratios --------------------------------------------------------------------------------------


def test_ratios_start_as_mixtures_and_end_as_codes():
    start, weight = fitted()
    soft = SoftVQLinear(start, weight, 2)
    ratios = soft.z.softmax(-1)
    assert torch.allclose(ratios.sum(1), torch.ones(len(ratios)))
    assert not soft.codebook.requires_grad
    # a mixture is nearer than the nearest
    assert (soft.matrix() - weight).square().mean() < (start.matrix() - weight).square().mean()
    assert soft.regularity() > 0.1
    with torch.no_grad():
        soft.z[:100] = torch.tensor([9.0, 0.0])
        soft.z[100:200] = torch.tensor([0.0, 9.0])
    soft.freeze()
    assert soft.frozen[:200].all()
    assert not soft.hard
    decided = soft.candidates.gather(
        1, torch.cat([torch.zeros(100), torch.ones(100)]).long()[:, None]
    )[:, 0]
    # exactly one-hot
    assert torch.equal(soft.matrix().reshape(-1, 2)[:200], soft.codebook[decided.long()])
    soft.matrix().square().sum().backward()
    assert not soft.z.grad[:200].any()
    assert soft.z.grad[300:].any()
    before = soft.matrix().reshape(-1, 2)[:200].clone()
    soft.harden()
    assert soft.hard
    assert soft.codebook.requires_grad
    assert not soft.z.requires_grad
    assert soft.regularity() == 0
    assert torch.equal(soft.matrix().reshape(-1, 2)[:200], before)
    assert torch.equal(soft.fitted().matrix(), soft.matrix())


def test_a_layer_of_which_almost_all_is_decided_becomes_hard():
    start, weight = fitted()
    soft = SoftVQLinear(start, weight, 2)
    with torch.no_grad():
        soft.z[:] = torch.tensor([9.0, 0.0])
        soft.z[0] = 0
    soft.freeze()
    # the first candidate is the nearest codeword
    assert soft.hard
    assert torch.equal(soft.codes, start.codes.int())


def test_one_candidate_is_plain_vector_quantization():
    start, weight = fitted()
    assert torch.equal(SoftVQLinear(start, weight, 1).matrix(), start.matrix())
    assert torch.equal(HardVQLinear(start).matrix(), start.matrix())


@pytest.mark.parametrize("rotation", [0, 64])
def test_parts_compute_their_rows(rotation):
    start, _ = fitted(48, 64, how=LayerOptions(16, 2, rotation=rotation, turns=0))
    layer, x = HardVQLinear(start), torch.randn(5, 64)
    whole = RowSlice(layer, 0, 48)
    assert torch.equal(
        torch.cat([RowSlice(layer, 0, 16)(x), RowSlice(layer, 16, 48)(x)], -1), whole(x)
    )
    assert torch.allclose(whole(x), start.pack(torch.float32).forward(x), atol=1e-5)
    assert torch.allclose(whole.weight @ x[0], whole(x)[0], atol=1e-5)
    assert whole(x.bfloat16()).dtype == torch.bfloat16


# ---- training ------------------------------------------------------------------------------------


def lesson_of(module, count=4):
    generator = torch.Generator().manual_seed(3)
    inputs = [
        trajectory.Call((torch.randn(16, 64, generator=generator),), {}) for _ in range(count)
    ]
    return BlockTargets(inputs, [[module(call.args[0])] for call in inputs], "cpu")


def test_training_never_ends_worse_than_it_began_and_repeats_itself(monkeypatch):
    start, weight = fitted()
    target = nn.Linear(64, 32, bias=False).requires_grad_(False)
    target.weight.copy_(weight)

    def trained(seed):
        layer = HardVQLinear(start)
        block = RowSlice(layer, 0, 32)
        return (
            learn(
                block, {"x": layer}, lesson_of(target), Recipe.from_preset("best", steps=20), seed
            ),
            layer.fitted(),
        )

    (before, after), first = trained(1)
    assert after > before
    assert torch.equal(first.codebook, trained(1)[1].codebook)
    assert not torch.equal(first.codebook, trained(2)[1].codebook)
    monkeypatch.setattr(calibrate, "TUNING_RATE", 100.0)
    (before, after), spoiled = trained(1)
    assert after == before
    assert torch.equal(spoiled.codebook, start.codebook)


def test_what_overflows_is_named():
    start, _ = fitted()
    layer = HardVQLinear(start)
    targets = lesson_of(nn.Linear(64, 32).requires_grad_(False))
    targets.targets[2][0][0, 0] = torch.inf
    targets.powers = [1.0]
    with pytest.raises(ValueError, match="NaN or infinite"):
        learn(RowSlice(layer, 0, 32), {"x": layer}, targets, Recipe.from_preset("best", steps=8), 0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="no linear layer called 'blocks.9.qkv'"):
        BlockCalibrator(toy.teacher(), ["blocks.9.qkv"])
    with pytest.raises(ValueError, match="never called the model"):
        BlockCalibrator(Teacher(copy.deepcopy(toy.trained()), lambda: None), FIRST)
