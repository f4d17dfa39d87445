"""LoRAs of peft beside quantized layers: `pipe.load_lora_weights`, `add_adapter`, training.

    y = Q(x) + scaling * B (A dropout(x))       LoRA (arXiv:2106.09685), equation 3

peft asks each LoraConfig which layers of others it knows (`_register_custom_module`); diffusers
makes that configuration itself, where nobody can reach it, so ours is entered in each as it is
made. For other layers nothing changes.
"""

import warnings
from typing import Any

import peft
from peft.tuners.lora import Linear

from ..weights.base import StoredLinear

_EXACT = (
    "weights are 4-bit integers here, into which a LoRA cannot be merged exactly; leave it beside"
    " them, or use the node Merge and Save"
)


class QuantizedLinear(Linear):
    """A LoRA beside a quantized linear, which stays as it is."""

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():
            # peft's of every layer that it does not know
            warnings.filterwarnings("ignore", "Unsupported layer type")
            super().__init__(*args, **kwargs)

    def resolve_lora_variant(self, *args: Any, **kwargs: Any) -> None:
        """Plain LoRA alone. Raises ValueError for what reads the 16-bit weights."""
        config = kwargs.get("config")
        if getattr(config, "use_dora", kwargs.get("use_dora", False)):
            raise ValueError(f"DoRA needs the 16-bit weights: {_EXACT}")

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError."""
        raise ValueError(_EXACT)


def register() -> None:
    """Enters the layer in every LoraConfig from now on; once is enough."""
    config: Any = peft.LoraConfig
    made = config.__post_init__
    if getattr(made, "of_nibble", False):
        return

    def entered(self: Any) -> None:
        made(self)
        self._register_custom_module({StoredLinear: QuantizedLinear})

    entered.of_nibble = True  # type: ignore[attr-defined]
    config.__post_init__ = entered


register()
