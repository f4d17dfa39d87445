"""Caching of whole steps: for any model, around its call, outside anything that torch.compile sees.

What is kept is the velocity d = (x - denoised) / sigma, the derivative that every sampler
integrates (for flow models the model's own output); a reused step returns x - sigma * d with d
guessed from the last computed ones. Under samplers that add fresh noise it is `denoised` itself. A
computed step returns what the model returned, untouched.
"""

from __future__ import annotations

import torch

from ....accel.caching.error_control import ErrorStream
from ....accel.caching.steps import Step
from .run import KEY, Run, Stream, deferred_control, options_of, substitute


def around_model(executor, *args, **kwargs):
    """The APPLY_MODEL wrapper."""
    options = options_of(args, kwargs)
    if options is None:
        return executor(*args, **kwargs)
    run: Run = options[KEY]
    x, sigma = args[0], args[1]
    step = run.step(sigma)
    streams = run.streams_of(options, step, x)
    decisions = [stream.rule.decide(step, stream.history.nodes) for stream in streams]
    level = sigma.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    if not run.settle(step, streams, decisions):
        guesses = [stream.history.guess(step.sigma, x) for stream in streams]
        guess = guesses[0].clone() if len(guesses) == 1 else torch.cat(guesses)
        return guess if run.noisy else x - level * guess
    control = deferred_control(args, kwargs)
    if control is not None:
        args, kwargs = substitute(args, kwargs, control, control.resolve())
    denoised = executor(*args, **kwargs)
    value = denoised.clone() if run.noisy else (x - denoised) / level
    for stream, piece in zip(streams, value.chunk(len(streams)), strict=True):
        keep(stream, step, piece)
    return denoised


def keep(stream: Stream, step: Step, value: torch.Tensor) -> None:
    """Remembers what a step computed; a rule that controls errors first learns how wrong the guess
    for it would have been.
    """
    history = stream.history
    if (
        isinstance(stream.rule, ErrorStream)
        and len(history) > stream.rule.rule.reuse.order
        and step.sigma not in history.nodes
    ):
        guess = history.guess(step.sigma, value)
        error = (guess - value).abs().float().mean() / value.abs().float().mean()
        stream.rule.measured(step, history.nodes, float(error))
    history.store(step.sigma, value)
