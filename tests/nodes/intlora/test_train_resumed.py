"""Train IntLoRA, stopped: it goes on bit for bit, belongs to its pictures, and is not done
twice.
"""

import pytest
import torch

from intlora_training_runs import job, same, stopping_at, trained
from nibble.nodes.bridge.intlora import train as intlora_training
from nibble.nodes.bridge.training import dataset
from nibble.nodes.bridge.training import session as training
from nibble.quant.files import atomic
from nibble.quant.files.errors import FileRefused
from nibble.quant.training.loop import Options
from training_runs import Stop, latents


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(model, home, monkeypatch):
    options = Options(steps=6, lr=5e-3)
    whole, wanted = trained(model, home, options=options)
    for stop in (2, 3):
        stopping_at(monkeypatch, stop)
        with pytest.raises(Stop):
            intlora_training.run(job(model, filename="stopped", options=options))
        assert [path.name for path in home.glob("stopped*")] == ["stopped.intlora.state"]
    stopping_at(monkeypatch, 0)
    done, found = trained(model, home, filename="stopped", options=options)
    assert done.losses == whole.losses
    assert same(found, wanted)
    assert not list(home.glob("*.state"))


def test_a_stopped_run_of_other_pictures_is_refused_or_forgotten(model, home, monkeypatch):
    stopping_at(monkeypatch, 2)
    with pytest.raises(Stop):
        intlora_training.run(job(model))
    stopping_at(monkeypatch, 0)
    with pytest.raises(
        FileRefused, match="mine.intlora.state belongs to a training run with other options"
    ):
        intlora_training.run(job(model, latents=[latents(seed=9)]))
    done, _ = trained(model, home, latents=[latents(seed=9)], overwrite=True)
    assert len(done.losses) == 4


def test_a_run_that_is_done_is_not_done_again(model, home, monkeypatch):
    done, _ = trained(model, home)
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("trained again"))
    again = intlora_training.run(job(model))
    assert again.name == done.name
    assert again.steps == 4
    assert again.losses == pytest.approx(done.losses, rel=1e-5)
    assert all(torch.equal(tensor, again.lora[key]) for key, tensor in done.lora.items())
    with pytest.raises(FileRefused, match="exists already; switch 'overwrite' on"):
        intlora_training.run(job(model, rank=2))


def test_an_adapter_is_trained_further(model, home):
    done, first = trained(model, home)
    more, second = trained(
        model,
        home,
        filename="more",
        existing=done.name,
        options=Options(steps=2, lr=1e-9, warmup=0),
    )
    assert more.steps == 6
    assert more.losses[0] != done.losses[0]
    key = next(iter(first.layers))
    before, after = first.layers[key].factors.delta(), second.layers[key].factors.delta()
    assert (after - before).norm() < 0.02 * before.norm()
    with pytest.raises(
        FileRefused, match="has rank 4 and variant shift_add .* set rank, variant and layers"
    ):
        intlora_training.run(job(model, filename="other", existing=done.name, rank=2))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(model, home, monkeypatch):
    plain, calls = dataset.LOSSES["MSE"], []

    def spoilt(*values):
        calls.append(1)
        return plain(*values) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setitem(dataset.LOSSES, "MSE", spoilt)
    with pytest.raises(
        ValueError,
        match=(
            "the loss is nan at step 3; lower the learning rate.* The 2 steps before are kept: run"
            " again"
        ),
    ):
        intlora_training.run(job(model))
    done, adapter = trained(model, home, options=Options(steps=4, lr=1e-3, warmup=0))
    assert len(done.losses) == 4
    assert len(calls) == 5
    assert all(layer.factors.delta().isfinite().all() for layer in adapter.layers.values())


def test_a_second_run_is_refused_at_its_start_and_a_late_file_is_kept(model, home, monkeypatch):
    target = home / "mine.intlora.safetensors"
    with (
        atomic.exclusive(target),
        pytest.raises(FileRefused, match="mine.intlora.safetensors is being written by another"),
    ):
        intlora_training.run(job(model))
    real = training.run

    def late(*arguments):
        adapter = real(*arguments)
        target.write_bytes(b"another program's")
        return adapter

    monkeypatch.setattr(training, "run", late)
    with pytest.raises(FileRefused, match="mine.intlora.safetensors exists already"):
        intlora_training.run(job(model))
    assert target.read_bytes() == b"another program's"
    target.unlink()
    monkeypatch.setattr(training, "run", real)
    kept = (home / "mine.intlora.state").read_bytes()
    done, _ = trained(model, home)
    # killed between the file's renaming and the state's removal
    (home / "mine.intlora.state").write_bytes(kept)
    assert intlora_training.run(job(model)).losses == pytest.approx(done.losses, rel=1e-5)
    assert [path.name for path in home.iterdir()] == [target.name]


def test_a_full_disk_is_told_before_the_first_step(model, home, monkeypatch):
    full = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: full)
    with pytest.raises(FileRefused, match=r"The disk of .* is full: mine.intlora.state needs"):
        intlora_training.run(job(model))
    assert not list(home.iterdir())
