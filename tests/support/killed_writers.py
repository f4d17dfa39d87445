"""Writers killed with signal 9 at every file operation that they do, one after the other, and run
again: python killed_writers.py WRITER FOLDER [EVERY]

A killed run is a fork of a process that has trained nothing (torch's autograd cannot be forked). It
kills itself before its n-th opening, renaming or removal of a file in the folder, n = 0, EVERY, …
until it gets to its end. Prints the number of kills; what the next run leaves is compared with what
a run leaves that was not killed.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import checkout  # noqa: F401  (loads this checkout as `nibble`)
import nibble
import random_flux
import small_files
from intlora_bases import adapters, bases
from nibble.accel.caf import heads_file
from nibble.quant.cli import quantize  # noqa: F401  (imported once, not in every fork)
from nibble.quant.files import atomic
from nibble.quant.files.safetensors import TensorSpec
from nibble.quant.files.writer import Writer
from nibble.quant.intlora import file as intlora_file
from nibble.quant.intlora.adapter import Adapter
from nibble.quant.training import state

EVENTS = ("open", "os.rename", "os.remove")


def layers(folder: Path) -> None:
    """A 4-bit file's writer: three units."""
    target = folder / "model.safetensors"
    specs = [TensorSpec(f"{i}.weight", torch.float32, (64,)) for i in range(3)]
    with atomic.exclusive(target) as held:
        if target.exists():  # done already
            return
        with Writer(held, specs, "run", 100) as writer:
            for i, spec in enumerate(specs):
                if spec.name not in writer.finished:
                    writer.write(spec.name, {spec.name: torch.full((64,), float(i))}, {})
            writer.finish([{"format": "nibble"}])


def adapter(folder: Path) -> None:
    """A converted IntLoRA."""
    with atomic.exclusive(folder / "a.intlora.safetensors") as held:
        if not os.path.exists(held):
            intlora_file.save(Adapter(dict(adapters(bases()["int4"])), {"steps": 7}), held)


def training(folder: Path) -> None:
    """Trains, saves and forgets the state, as Train CAF does."""
    target, kept = folder / "a.caf.safetensors", folder / "a.caf.velocity.state"
    with atomic.exclusive(target) as held:
        if not target.exists():
            trained = small_files.train(kept)
            made = small_files.heads()
            made.facts["trained"] = float(trained["a.up"].sum())
            heads_file.save_file(made, held)
        state.forget(kept)


def couples(folder: Path) -> None:
    """Couplings, where those of another run lie already."""
    with atomic.exclusive(folder / "pairs"):
        small_files.couple(folder / "pairs", seed=8)


def before_couples(folder: Path) -> None:
    small_files.couple(folder / "pairs", count=2)


def parts(folder: Path) -> None:
    """Two parts of a model, and the run that joins them."""
    for share in ({"part": "2/2"}, {"part": "1/2"}, {"parts": 2}):
        nibble.quantize(
            folder / "m.safetensors",
            folder / "q.safetensors",
            method="stock",
            format="int8_convrot",
            quiet=True,
            **share,
        )


def before_parts(folder: Path) -> None:
    shapes = {"txt_norm.weight": (64,), "img_in.weight": (64, 64)}
    layers = [f"transformer_blocks.0.attn.{name}.weight" for name in ("to_q", "to_k", "add_q_proj")]
    random_flux.write(folder / "m.safetensors", shapes | dict.fromkeys(layers, (64, 256)))


WORK: dict[str, Callable[[Path], None]] = {
    "layers": layers,
    "adapter": adapter,
    "training": training,
    "couplings": couples,
    "parts": parts,
}
BEFORE = {"couplings": before_couples, "parts": before_parts}


def content(folder: Path) -> dict[str, bytes]:
    """Every file that is left, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def forked(work: Callable[[Path], None], folder: Path, moment: int | None) -> int:
    """Runs work in a process of its own, killed before its file operation of that number; how it
    ended: 0, or minus the signal.
    """
    child = os.fork()
    if child:
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) else status
    try:
        if moment is not None:
            _kill_at(moment, str(folder))
        work(folder)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def _kill_at(moment: int, folder: str) -> None:
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(args[0]).startswith(folder):
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)


def _warm() -> None:
    """What an optimizer imports at its first step is imported once, not in every fork."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.AdamW([parameter]).step()


def fresh(name: str, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if name in BEFORE:
        assert forked(BEFORE[name], folder, None) == 0


def main(name: str, folder: Path, every: int) -> int:
    """How many kills the writer went on from. Raises AssertionError where it did not."""
    work = WORK[name]
    _warm()
    fresh(name, folder)
    assert forked(work, folder, None) == 0
    wanted, kills = content(folder), 0
    while True:
        fresh(name, folder)
        ended = forked(work, folder, every * kills)
        if ended == 0:
            return kills
        assert ended == -signal.SIGKILL, f"operation {every * kills}: {ended}"
        assert forked(work, folder, None) == 0, f"killed at {every * kills}, it does not go on"
        left = content(folder)
        assert left.keys() == wanted.keys(), f"killed at {every * kills}: {sorted(left)}"
        assert left == wanted, f"killed at {every * kills}: other bytes"
        kills += 1


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1))
