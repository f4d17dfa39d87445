"""The inputs that the nodes which train share."""

from comfy_api.latest import io

from .bridge.training.session import DTYPES


def overwrite():
    """Whether a file of that name may be replaced."""
    return io.Boolean.Input(
        "overwrite",
        default=False,
        tooltip=(
            "Replace an existing file of this name, and discard a stopped run that"
            " had other inputs."
        ),
    )


def accumulation():
    """Batches a step."""
    return io.Int.Input(
        "grad_accumulation_steps",
        default=1,
        min=1,
        max=1024,
        advanced=True,
        tooltip=(
            "Batches per step: works like a larger batch without its memory, because"
            " the batches run one after another."
        ),
    )


def memory() -> list:
    """What decides about memory: the dtype, checkpointing and offloading."""
    return [
        io.Combo.Input(
            "training_dtype",
            options=list(DTYPES),
            default="bf16",
            advanced=True,
            tooltip=(
                "Number format of the model while training. Use fp32 on a CPU and on"
                " cards older than the RTX 30 series. none: the same as when sampling."
            ),
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            advanced=True,
            tooltip=(
                "Stores only the inputs of each block and computes the block twice: much"
                " less memory, more time."
            ),
        ),
        io.Boolean.Input(
            "offloading",
            default=False,
            advanced=True,
            tooltip=(
                "Keeps the weights in RAM and streams them: for models larger than the VRAM. Slow."
            ),
        ),
    ]
