"""IntLoRA on a 4-bit model of every family: converted, applied, merged, saved, trained; or refused
in a sentence.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

import class_walk
import tiny_models
from class_walk import draw, relative
from nibble.nodes.bridge.intlora import convert, files, merge, save, train
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.nodes.bridge.training.session import Settings
from nibble.quant.training.loop import Options
from what_families_can import NOT_TRAINED

NEAR = 0.1  # of a picture, where 16-bit factors stand for each other


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    class_walk.widen(monkeypatch)
    class_walk.put_folders([files.LORAS, files.FOLDER, loading.FOLDER], tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(params=class_walk.EVERY)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, folders, monkeypatch):
    path = class_walk.quantized(name, folders / loading.FOLDER)
    return class_walk.load(name, path, monkeypatch)


def test_a_lora_is_converted_applied_merged_and_saved(name, model, folders, monkeypatch):
    ours = {layer for layer, m in class_walk.linears(model).items() if layouts.is_ours(m.weight)}
    tensors = class_walk.lora_tensors(tiny_models.build(name), ours)
    save_file(tensors, folders / files.LORAS / class_walk.LORA)
    done = convert.convert_lora(convert.ConvertJob(model, class_walk.LORA))
    assert not done.left_out
    lora = class_walk.with_lora(model, load_file(folders / files.LORAS / class_walk.LORA))
    wanted, plain = draw(lora, name), draw(model, name)
    effect = relative(plain, wanted)
    beside, _ = merge.apply(model, done.name, 1.0)
    assert relative(draw(beside, name), wanted) < max(NEAR, 0.25 * effect)
    merged, report = merge.apply(model, done.name, 1.0, "merge")
    assert report.layers
    assert 0 < relative(draw(merged, name), plain)
    saved = save.save_merged(save.SaveJob(beside, "merged"))
    again = class_walk.load(name, folders / loading.FOLDER / saved.name, monkeypatch)
    assert relative(draw(again, name), draw(beside, name)) < max(NEAR, 0.25 * effect)
    assert relative(draw(model, name), plain) == 0, "the model itself is as it was"


def job(model, name: str, base: str) -> train.Job:
    return train.Job(
        model,
        [{"samples": tiny_models.latent(name, seed=8)}],
        [tiny_models.prompt(name)],
        "mine",
        options=Options(steps=2, lr=1e-2, warmup=0),
        settings=Settings(dtype="fp32"),
        rank=2,
        preview_every=0,
        base=base,
    )


@pytest.mark.parametrize("base", train.BASES[:2])
def test_an_intlora_is_trained_or_refused_in_words(name, model, base):
    trained = model if base == train.INTEGERS else class_walk.dense(name)
    if name in NOT_TRAINED:
        sentence = class_walk.refusal(lambda: train.run(job(trained, name, base)))
        assert NOT_TRAINED[name] in sentence
        return
    plain = draw(trained, name)
    done = train.run(job(trained, name, base))
    assert all(torch.isfinite(torch.tensor(done.losses)))
    worn, _ = merge.apply(trained, done.name, 1.0)
    assert relative(draw(worn, name), plain) > 0
    assert relative(draw(trained, name), plain) == 0
