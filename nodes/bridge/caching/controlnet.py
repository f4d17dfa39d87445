"""ControlNets that run only for steps that are computed.

ComfyUI runs a ControlNet before it asks the model. A stand-in is put in its place for the run:
asked, it returns a promise, which the caching wrapper resolves when the step is to be computed, and
leaves alone when it is not.
"""

from __future__ import annotations

from collections.abc import Callable


class Deferred(dict):
    """A ControlNet's result, {"input", "middle", "output"} → lists, computed when first looked at.
    `skip` makes it empty for this call.
    """

    def __init__(self, compute: Callable[[], dict | None]):
        super().__init__()
        self._compute, self.skip, self._known, self._value = compute, False, False, None

    def resolve(self) -> dict | None:
        """The ControlNet's own result; None where it has none at this step."""
        if not self._known:
            self._value, self._known = self._compute(), True
            super().update(self._value or {})
        return self._value

    def _look(self) -> None:
        if not self.skip:
            self.resolve()

    def get(self, key, default=None):
        self._look()
        return [] if self.skip or key not in self.keys() else super().get(key, default)

    def __getitem__(self, key):
        self._look()
        return [] if self.skip else super().__getitem__(key)

    def __contains__(self, key) -> bool:
        self._look()
        return not self.skip and super().__contains__(key)


class LazyControl:
    """Stands for a ControlNet in one call of the sampler: get_control promises, everything else is
    the ControlNet's own.
    """

    def __init__(self, control: object):
        self._control = control

    def __getattr__(self, name: str):
        return getattr(self._control, name)

    def get_control(self, *args, **kwargs) -> Deferred:
        return Deferred(lambda: self._control.get_control(*args, **kwargs))


def deferring(key: str) -> Callable:
    """A CALC_COND_BATCH wrapper that defers every ControlNet of a call whose run caches (`key` in
    its transformer_options).

    One stand-in for each ControlNet and call: ComfyUI batches conditionings that share one object.
    """

    def wrapper(executor, model, conds, x_in, timestep, model_options):
        if key not in model_options.get("transformer_options", {}):
            return executor(model, conds, x_in, timestep, model_options)
        lazy: dict[int, LazyControl] = {}

        def deferred(cond: dict) -> dict:
            control = cond.get("control")
            if control is None:
                return cond
            return cond | {"control": lazy.setdefault(id(control), LazyControl(control))}

        conds = [None if group is None else [deferred(cond) for cond in group] for group in conds]
        return executor(model, conds, x_in, timestep, model_options)

    return wrapper
