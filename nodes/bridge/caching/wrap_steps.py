"""Caching of whole steps: for any model, around its call, outside anything that torch.compile sees.

What is kept is the velocity of `accel/caching/flow_time.py`, which has the same size in every
schedule (for flow models it is the model's own output); a reused step returns the data that a
velocity guessed from the last computed ones points to. Under samplers that add fresh noise it is
`denoised` itself. A computed step returns what the model returned, untouched.
"""

from __future__ import annotations

import torch

from ....accel.caching.error_control import ErrorDecider
from ....accel.caching.steps import Step
from .run import Stream, deferred_control, model_call, substitute


def around_model(executor, *args, **kwargs):
    """The APPLY_MODEL wrapper."""
    sigma = args[1] if len(args) > 1 else None
    call = model_call(args, kwargs, sigma)
    if call is None:
        return executor(*args, **kwargs)
    x, step, streams = args[0], call.step, call.streams
    decisions = [stream.decider.decide(step, stream.history.nodes) for stream in streams]
    level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    if not call.run.commit(step, streams, decisions):
        guesses = [stream.history.guess(step.time, x) for stream in streams]
        guess = guesses[0].clone() if len(guesses) == 1 else torch.cat(guesses)
        return guess if call.run.noisy else call.run.flow.denoised(x, guess, level)
    control = deferred_control(args, kwargs)
    if control is not None:
        args, kwargs = substitute(args, kwargs, control, control.resolve())
    denoised = executor(*args, **kwargs)
    noisy = call.run.noisy
    value = denoised.clone() if noisy else call.run.flow.velocity(x, denoised, level)
    for stream, piece in zip(streams, value.chunk(len(streams)), strict=True):
        remember(stream, step, piece)
    return denoised


def remember(stream: Stream, step: Step, value: torch.Tensor) -> None:
    """Keeps what a step computed; a decider that controls errors first learns how wrong the guess
    for it would have been.
    """
    history, decider = stream.history, stream.decider
    if (
        isinstance(decider, ErrorDecider)
        and decider.can_guess(history.nodes)
        and step.time not in history.nodes
        and history.fits(value)
    ):
        guess = history.guess(step.time, value)
        error = (guess - value).abs().float().mean() / value.abs().float().mean()
        decider.measured(step, history.nodes, float(error))
    history.store(step.time, value)
