"""One of each small file that Nibble writes, and what reads it."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from intlora_bases import adapters, bases
from nibble.accel.caf import couplings, heads_file
from nibble.accel.caf.adapter import CAFAdapter
from nibble.quant.intlora import file as intlora_file
from nibble.quant.intlora.adapter import Adapter
from nibble.quant.training import loop, state

SHAPE = (2, 3, 4)
IDENTITY = {"seed": 7, "shape": list(SHAPE)}


class Net(nn.Module):
    """The least that CAF's heads go beside."""

    def __init__(self):
        super().__init__()
        self.img_in = nn.Linear(8, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5)])


def heads(rank: int = 2, seed: int = 0) -> CAFAdapter:
    """Heads full of numbers, no two alike."""
    made = CAFAdapter.create(Net(), ["blocks.0", "blocks.1"], rank, 1.5)
    draw = torch.Generator().manual_seed(seed)
    for head in (made.velocity, made.acceleration):
        for tensor in head.tensors().values():
            tensor.data = torch.randn(tensor.shape, generator=draw)
    made.facts |= {"steps": 3, "losses": {"velocity": [0.5], "acceleration": [0.25]}}
    return made


def train(path: Path, steps: int = 4, optimizer: str = "AdamW") -> dict[str, torch.Tensor]:
    """A tiny training that keeps its state at `path`; the parameters afterwards."""
    draw = torch.Generator().manual_seed(0)
    trained = {
        name: nn.Parameter(torch.randn(shape, generator=draw))
        for name, shape in (("a.down", (4, 16)), ("a.up", (8, 4)))
    }

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(3, 16, generator=generator)
        return (x @ trained["a.down"].T @ trained["a.up"].T).square().mean()

    options = loop.Options(steps=steps, save_every=1, optimizer=optimizer)
    list(loop.steps(trained, loss, options, "tiny", path))
    return {name: parameter.detach() for name, parameter in trained.items()}


def couple(folder: Path, count: int = 3, seed: int = 7) -> couplings.Couplings:
    """Couplings of two prompts, a pair a file."""
    prompts = [[torch.arange(6.0).reshape(1, 2, 3), {"guidance": 3.5}], [torch.ones(1, 2, 3), {}]]
    found = couplings.create(folder, IDENTITY | {"seed": seed}, prompts, overwrite=True)
    for pair in range(count):
        if pair not in found:
            noise = couplings.noise(seed, pair, SHAPE)
            found.add(pair, noise, 0.5 * noise + pair % 2, [pair % 2])
    return found


def read_couplings(path: Path) -> None:
    """All of the folder that a file lies in."""
    found = couplings.read(path.parent)
    if len(found) != 3:
        raise AssertionError("a pair is gone without a word")
    found.batch(range(len(found)))
    list(found.captions)


def files(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Kind → (a file of it, what reads it whole)."""
    heads_file.save_file(heads(), folder / "a.caf.safetensors")
    heads_file.save_file(heads(rank=0), folder / "whole.caf.safetensors")
    intlora_file.save(
        Adapter(dict(adapters(bases()["int4"])), {"steps": 7}), folder / "a.intlora.safetensors"
    )
    train(folder / "a.intlora.state")
    captions = couple(folder / "pairs").captions.path
    return {
        "CAF": (folder / "a.caf.safetensors", heads_file.read_file),
        "CAF, whole layers": (folder / "whole.caf.safetensors", heads_file.read_file),
        "IntLoRA": (folder / "a.intlora.safetensors", intlora_file.read),
        "training state": (folder / "a.intlora.state", state.State),
        "couplings' index": (folder / "pairs" / "couplings.json", read_couplings),
        "couplings' captions": (captions, read_couplings),
        "couplings' pairs": (folder / "pairs" / "pairs-00000001.safetensors", read_couplings),
    }
