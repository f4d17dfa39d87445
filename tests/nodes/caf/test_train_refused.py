"""What Train CAF refuses before anything is loaded, in words."""

import pytest
import torch

from caf_training_runs import job, pairs, trained
from nibble.nodes.bridge.caf import load as caf_model
from nibble.nodes.bridge.caf import train as caf_training
from nibble.quant.files.errors import FileRefused


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rank": -1}, "rank -1 is not between 0"),
        ({"rank": 4000}, "rank 4000 is not between 0 and 128"),
        ({"h": 2.5}, "h = 2.5 is outside 0 to 2"),
        ({"layers": ("nothing.*",)}, "No linear layer of the model is called nothing"),
        ({"filename": "../mine"}, "leads out of the folder"),
    ],
)
def test_wrong_inputs_are_refused_in_words(dense_model, data, folder, monkeypatch, changes, said):
    monkeypatch.setattr(caf_training, "run_session", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises((ValueError, FileRefused), match=said):
        caf_training.train(job(dense_model, data, **changes))
    assert not list(folder.iterdir())


def test_wrong_models_and_couplings_are_refused_in_words(dense_model, data, tmp_path, folder):
    with pytest.raises(
        ValueError,
        match=(
            "couplings are of 4 x 4 x 4, and this model's latents have 16 channels in 2 dimensions"
        ),
    ):
        caf_training.train(job(dense_model, pairs(tmp_path / "small", shape=(4, 4, 4))))
    with pytest.raises(ValueError, match="couplings are of 16 x 1 x 4 x 4"):
        caf_training.train(job(dense_model, pairs(tmp_path / "video", shape=(16, 1, 4, 4))))
    done, _ = trained(dense_model, data, folder)
    with pytest.raises(
        ValueError,
        match=(
            "already has the heads of mine.caf.safetensors; connect the model from before Load CAF"
        ),
    ):
        caf_training.train(job(caf_model.load(dense_model, done.name), data, filename="more"))
    epsilon = dense_model.clone()
    epsilon.add_object_patch("model_sampling", torch.nn.Identity())
    with pytest.raises(ValueError, match="Train CAF needs a model that leads from noise"):
        caf_training.train(job(epsilon, data, filename="more"))
    dense_model.cached_patcher_init = None
    with pytest.raises(
        FileRefused,
        match=(
            "cannot load it a second time; connect Load SVDQuant Model, Load VQ Model or Load"
            " Diffusion Model"
        ),
    ):
        caf_training.train(job(dense_model, data, filename="more"))
