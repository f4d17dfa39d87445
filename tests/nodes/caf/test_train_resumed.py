"""Train CAF, stopped: it goes on bit for bit, belongs to its inputs, and is not done twice."""

import pytest
import torch

from caf_training_runs import job, pairs, same, stopping_at, trained
from nibble.accel.caf import flow
from nibble.nodes.bridge.caf import train as caf_training
from nibble.quant.files import atomic
from nibble.quant.files.errors import FileRefused
from training_runs import Stop


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(dense_model, data, folder, monkeypatch):
    whole, wanted = trained(dense_model, data, folder)
    states = ["stopped.caf.acceleration.state", "stopped.caf.velocity.state"]
    for stop, left in ((2, states[1:]), (3, states[1:]), (4, states), (6, states)):
        with monkeypatch.context() as patched:
            stopping_at(patched, stop)
            with pytest.raises(Stop):
                caf_training.train(job(dense_model, data, filename="stopped"))
        assert sorted(path.name for path in folder.glob("stopped*")) == left
    done, found = trained(dense_model, data, folder, filename="stopped")
    assert done.losses == whole.losses
    assert same(found, wanted)
    assert found.facts == wanted.facts
    assert not list(folder.glob("*.state"))


def test_a_stopped_run_of_other_inputs_is_refused_or_forgotten(
    dense_model, data, tmp_path, folder, monkeypatch
):
    with monkeypatch.context() as patched:
        stopping_at(patched, 4)
        with pytest.raises(Stop):
            caf_training.train(job(dense_model, data))
    others = pairs(tmp_path / "others", seed=5)
    for changes in (
        {"data": others},
        {"steps": 4},
        {"rank": 2},
        {"h": 1.0},
        {"options": {"seed": 1}},
    ):
        with pytest.raises(
            FileRefused,
            match="mine.caf.velocity.state belongs to a training run with other options",
        ):
            caf_training.train(job(dense_model, changes.pop("data", data), **changes))
    done, _ = trained(dense_model, others, folder, overwrite=True)
    assert len(done.losses) == 6
    assert not list(folder.glob("*.state"))


def test_a_run_that_is_done_is_not_done_again(dense_model, data, folder, monkeypatch):
    done, _ = trained(dense_model, data, folder)
    monkeypatch.setattr(caf_training, "run_session", lambda *_: pytest.fail("trained again"))
    again = caf_training.train(job(dense_model, data))
    assert again.name == done.name
    assert again.steps == 6
    assert again.losses == pytest.approx(done.losses, rel=1e-5)
    for changes in ({"rank": 2}, {"options": {"lr": 1e-4}}, {"steps": 2}):
        with pytest.raises(FileRefused, match="exists already; switch 'overwrite' on"):
            caf_training.train(job(dense_model, data, **changes))


def test_loras_on_the_model_belong_to_the_inputs(dense_model, data):
    def patched(value):
        own = dense_model.clone()
        own.add_patches(
            {
                "diffusion_model.double_blocks.0.img_attn.proj.weight": (
                    "diff",
                    (torch.full((128, 128), value),),
                )
            },
            0.5,
        )
        return own

    names = caf_training._layers(job(dense_model, data))
    told = [
        caf_training._data(job(which, data), names)
        for which in (dense_model, dense_model, patched(1.0), patched(1.0), patched(2.0))
    ]
    assert told[0] == told[1]
    assert told[2] == told[3]
    assert len(set(told)) == 3


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_good(
    dense_model, data, folder, monkeypatch
):
    plain, calls = flow.acceleration_loss, []

    def spoilt(*values):
        calls.append(1)
        return plain(*values) * (float("nan") if len(calls) == 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(flow, "acceleration_loss", spoilt)
        with pytest.raises(
            ValueError,
            match=(
                "the loss is nan at step 3; lower the learning rate.* The 2 steps before are kept:"
                " run again"
            ),
        ):
            caf_training.train(job(dense_model, data))
    done, _ = trained(dense_model, data, folder, options={"lr": 1e-3})
    assert len(done.losses) == 6


def test_states_that_a_kill_left_beside_the_finished_file_go(
    dense_model, data, folder, monkeypatch
):
    """Killed between the file's last renaming and the states' removal."""
    with monkeypatch.context() as patched:
        stopping_at(patched, 6)
        with pytest.raises(Stop):
            caf_training.train(job(dense_model, data))
    left = {path: path.read_bytes() for path in folder.glob("*.state")}
    assert len(left) == 2
    done, _ = trained(dense_model, data, folder)
    for path, content in left.items():
        path.write_bytes(content)
    monkeypatch.setattr(caf_training, "run_session", lambda *_: pytest.fail("trained again"))
    assert caf_training.train(job(dense_model, data)).name == done.name
    assert [path.name for path in folder.iterdir()] == [done.name]


def test_a_second_run_is_refused_at_its_start_and_a_late_file_is_kept(
    dense_model, data, folder, monkeypatch
):
    target = folder / "mine.caf.safetensors"
    with (
        atomic.exclusive(target),
        pytest.raises(FileRefused, match="mine.caf.safetensors is being written by another run"),
    ):
        caf_training.train(job(dense_model, data))
    real = caf_training.run_session

    def late(*arguments):
        real(*arguments)
        target.write_bytes(b"another program's")

    monkeypatch.setattr(caf_training, "run_session", late)
    with pytest.raises(FileRefused, match="mine.caf.safetensors exists already"):
        caf_training.train(job(dense_model, data))
    assert target.read_bytes() == b"another program's"
    assert len(list(folder.glob("*.state"))) == 2, "what was trained is kept"
