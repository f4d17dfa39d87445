"""Memory and processor time of each arm's training step."""

import ctypes
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch

from bench.intlora.arms import ARMS, Bench
from nibble.demo import pictures
from nibble.quant.intlora import train


def memory(kind: str) -> float:
    """VmRSS (now) or VmHWM (the peak since it was reset), MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(kind))


def kept_for_backward(value) -> float:
    """MB of tensors that one loss keeps for its backward pass, the model's own weights aside."""
    seen: dict[int, int] = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value(torch.Generator().manual_seed(1)).backward()
    return sum(seen.values()) / 2**20


def measure(bench: Bench, arm: str, checkpointing: bool, send) -> None:
    """Sends an arm's memory and time; run in a process of its own."""
    flux = pictures.load_flux()
    layers = bench.attach(flux, ARMS[arm])
    value = bench.loss(flux, 0.75, bench.options.batch)
    kept = kept_for_backward(value)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, seconds, last = memory("VmRSS"), [], time.process_time()
    blocks = [*flux.transformer_blocks, *flux.single_transformer_blocks] if checkpointing else []
    for _ in train.steps(layers, value, train.Options(steps=6), checkpointed=blocks):
        seconds.append(time.process_time() - last)
        last = time.process_time()
    row = {
        "arm": arm,
        "checkpointing": checkpointing,
        "peak MB over the attached model": memory("VmHWM") - before,
        "CPU seconds a step": float(np.median(seconds[1:])),
    }
    send(row if checkpointing else row | {"MB kept for backward": kept})


def cost(bench: Bench, save) -> None:
    """Each arm's cost, each in a fork of its own: seconds are of one core's work, whatever else the
    machine does.
    """
    rows, context = [], multiprocessing.get_context("fork")
    for arm in bench.options.arms:
        for checkpointing in (False, True):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(bench, arm, checkpointing, sender.send))
            process.start()
            sender.close()
            rows.append(receiver.recv())
            process.join()
            print(rows[-1], flush=True)
            save(rows)
