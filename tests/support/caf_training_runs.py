"""Train CAF on couplings that can be learned: every picture is its prompt's."""

import torch

from nibble.accel.caf import couplings, heads_file
from nibble.nodes.bridge.caf import train as caf_training
from nibble.nodes.bridge.caf.train import RECIPE, Options, TrainingJob
from nibble.nodes.bridge.training import watch as training_watch
from nibble.nodes.bridge.training.session import Settings
from training_runs import Stop, caption

FP32 = Settings(dtype="fp32")

SHAPE = (16, 4, 4)


def pairs(
    where, count: int = 9, prompts: list | None = None, seed: int = 0, shape=SHAPE
) -> couplings.Couplings:
    """Couplings that can be learned: every picture is its prompt's, and a little of its noise."""
    prompts = [[caption(1)]] if prompts is None else prompts
    found = couplings.create(
        where, {"seed": seed, "shape": list(shape)}, [prompt[0] for prompt in prompts]
    )
    for i in range(count):
        noise = couplings.noise(seed, i, shape)
        found.add(
            i,
            noise,
            0.3 * noise + couplings.noise(seed + 1000, i % len(prompts), shape),
            [i % len(prompts)],
        )
    return couplings.read(where)


def job(model, data, **changes) -> TrainingJob:
    steps = changes.pop("steps", 3)
    options = Options(
        **RECIPE | {"steps": steps, "lr": 5e-3, "warmup": 0} | changes.pop("options", {})
    )
    defaults = {
        "filename": "mine",
        "options": options,
        "settings": FP32,
        "rank": 4,
        "h": 1.5,
        "preview_every": 0,
    }
    return TrainingJob(model, data, **defaults | changes)


def trained(model, data, folder, **changes) -> tuple:
    """(what `run` returns, the adapter in the file)."""
    done = caf_training.train(job(model, data, **changes))
    return done, heads_file.read_file(folder / done.name)


def same(a, b) -> bool:
    return all(
        torch.equal(tensor, b.head(kind).tensors()[name])
        for kind in caf_training.PHASES
        for name, tensor in a.head(kind).tensors().items()
    )


def stopping_at(monkeypatch, step: int) -> None:
    """The user presses Stop after a step, counted over both nets; 0: never."""
    calls = []

    def watched(self, done, *rest):
        calls.append(done)
        if done == step:
            raise Stop

    monkeypatch.setattr(training_watch.Watch, "__call__", watched)
