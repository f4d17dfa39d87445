"""Train IntLoRA on two latents of the tests' FLUX."""

import torch

from nibble.nodes.bridge.intlora import train as intlora_training
from nibble.nodes.bridge.intlora.train import Job
from nibble.nodes.bridge.training import watch as training_watch
from nibble.nodes.bridge.training.session import Settings
from nibble.quant.intlora import file
from nibble.quant.training.loop import Options
from training_runs import Stop, caption, latents

FP32 = Settings(dtype="fp32")


def job(model, **changes) -> Job:
    defaults = {
        "latents": [latents()],
        "positive": [[caption()]],
        "filename": "mine",
        "options": Options(steps=4, lr=5e-3, warmup=0),
        "settings": FP32,
        "rank": 4,
        "preview_every": 0,
    }
    return Job(model, **defaults | changes)


def trained(model, loras, **changes) -> tuple:
    """(what `run` returns, the adapter in the file)."""
    done = intlora_training.run(job(model, **changes))
    return done, file.read(loras / done.name)


def same(a, b) -> bool:
    return a.layers.keys() == b.layers.keys() and all(
        torch.equal(tensor, b.layers[key].tensors()[name])
        for key, layer in a.layers.items()
        for name, tensor in layer.tensors().items()
    )


def stopping_at(monkeypatch, step: int) -> None:
    """The user presses Stop after a step."""

    def check():
        stopping_at.calls += 1
        if stopping_at.calls == step:
            raise Stop

    stopping_at.calls = 0
    monkeypatch.setattr(training_watch.Progress, "check", staticmethod(check))
