"""The model that Train CAF trains beside, as both nets of a pair of heads."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ....accel.caf import flow
from ....accel.caf.adapter import CAFAdapter, attached, presented_by
from ....accel.caf.heads import Model, acceleration_net, velocity_net
from ..training.session import Session
from .load import LEAST_LEVEL
from .straight import coordinates_of

STEPS = 2  # of CAF's sampler in previews and measurements


class Student:
    """The session's model as both nets, by the heads of an adapter.

    The head of the last call stays on until the next one, or until it is closed: blocks that are
    computed again in the backward pass need it.
    """

    def __init__(self, session: Session, adapter: CAFAdapter):
        self.session = session
        self.adapter = adapter
        self._where = coordinates_of(session.inner.model_sampling)
        self._on = contextlib.ExitStack()

    def close(self) -> None:
        """Takes the heads off the model."""
        self._on.close()

    def velocity(self, x: Tensor, t: Tensor, captions: Sequence[int]) -> Tensor:
        """x (batch, …), t (batch,), a caption each → the initial velocity."""
        return velocity_net(self._model("velocity", captions), self.adapter.h)(x, t)

    def acceleration(self, x: Tensor, t: Tensor, start: Tensor, captions: Sequence[int]) -> Tensor:
        """As `velocity`, and start (batch, …) → the acceleration."""
        return acceleration_net(self._model("acceleration", captions), self.adapter.h)(x, t, start)

    def sample(self, noise: Tensor, captions: Sequence[int]) -> Tensor:
        """noise (batch, …) → data, in STEPS."""
        return flow.sample(
            lambda x, t: self.velocity(x, t, captions),
            lambda x, t, start: self.acceleration(x, t, start, captions),
            noise,
            flow.uniform(STEPS),
            ahead=flow.AHEAD,
            h=self.adapter.h,
        )

    def _model(self, head: str, captions: Sequence[int]) -> Model:
        def ask(x: Tensor, level: Tensor, start: Tensor | None) -> Tensor:
            level = level.clamp_min(LEAST_LEVEL)
            groups = self.session.groups(captions, torch.zeros_like(x[:1]))
            parts = []
            for rows in groups:
                given = None if start is None else start[rows]
                group_captions = [captions[row] for row in rows]
                parts.append(self._call(head, x[rows], level[rows], given, group_captions))
            order = torch.tensor([row for rows in groups for row in rows], device=x.device)
            return torch.cat(parts)[order.argsort()]

        return ask

    def _call(
        self, head: str, z: Tensor, level: Tensor, start: Tensor | None, captions: list[int]
    ) -> Tensor:
        """dz/ds towards the data, as the model with a head sees it."""
        branches, place = self.adapter.head(head), self.adapter.input_layer
        sigma = self._where.sigma(level)
        x = self._where.own(z, sigma)
        presented = None
        if start is not None and branches.extra is not None:
            shown = self._where.own(start, sigma)
            presented = presented_by(
                self.session.model, place, lambda: self.session.denoised(shown, sigma, captions)
            )
        self._on.close()
        strength = self.adapter.strength(level)
        self._on.enter_context(attached(self.session.model, branches, place, presented, strength))
        return self._where.velocity(x, self.session.denoised(x, sigma, captions), sigma)
