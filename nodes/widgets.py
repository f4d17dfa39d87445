"""Inputs that several nodes share."""

from comfy_api.latest import io

from .bridge.quantize import sources
from .bridge.quantized import loading

NO_SOURCES = "(no models in models/diffusion_models)"


def patterns(text: str) -> tuple[str, ...]:
    """Layer names as users type them into a widget of several lines: a pattern a line, such as
    double_blocks.0.*; empty lines are none.
    """
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def model_file_input(kind: str | None, empty: str, tooltip: str) -> io.Combo.Input:
    """The quantized file of a `file_nodes.ModelFilePicker`. empty: what the list shows where there
    are no files.
    """
    return io.Combo.Input(
        "model_name", options=loading.quantized_files(kind) or [empty], tooltip=tooltip
    )


def verify_input() -> io.Boolean.Input:
    """Whether a loader checks the file first."""
    return io.Boolean.Input(
        "verify",
        default=True,
        advanced=True,
        tooltip="Check every tensor against its checksum before use.",
    )


def compute_dtype_input() -> io.Combo.Input:
    """What a loader's model computes in."""
    return io.Combo.Input(
        "compute_dtype",
        options=list(loading.DTYPES),
        default="default",
        advanced=True,
        tooltip=(
            "Number format of activations and 16-bit layers. default: what ComfyUI chooses for this"
            " GPU."
        ),
    )


# ---- quantizing ----------------------------------------------------------------------------------


def source_input(more: str = " Ignored when a model is connected.") -> io.Combo.Input:
    """The model to quantize. more: what the tooltip says at its end."""
    return io.Combo.Input(
        "model_name",
        options=sources.listed() or [NO_SOURCES],
        tooltip=(
            "A model in models/diffusion_models, models/checkpoints or models/diffusers, in 16 bit,"
            f" fp8, int8, mxfp8, nvfp4, W4A8, W4A4 or GGUF.{more}"
        ),
    )


def preset_input(helps: dict[str, str]) -> io.Combo.Input:
    """How thoroughly. helps: preset → what it does."""
    return io.Combo.Input(
        "preset",
        options=list(helps),
        default="fast",
        tooltip=" ".join(f"{name}: {text}" for name, text in helps.items()),
    )


def target_inputs(ending: str) -> list[io.Input]:
    """The new file's name, and whether it may replace another one. ending: of its default name."""
    return [
        io.String.Input(
            "filename",
            default="",
            tooltip=f"Name of the new file. Empty: the source's name + {ending}.",
        ),
        io.Boolean.Input(
            "overwrite",
            default=False,
            tooltip="Replace an existing file of this name that was made with other options.",
        ),
    ]


def measuring_sockets(positive: str, latent: str) -> list[io.Input]:
    """A model in place of a file, and what is sampled while it is measured; arguments: tooltips."""
    return [
        io.Model.Input(
            "model",
            optional=True,
            tooltip="Quantize this model, including its LoRAs and merges, instead of a file.",
        ),
        io.Conditioning.Input("positive", optional=True, tooltip=positive),
        io.Latent.Input("latent", optional=True, tooltip=latent),
    ]


def keep_layers_input() -> io.String.Input:
    """Layers that stay in 16 bit."""
    return io.String.Input(
        "keep_layers",
        default="",
        multiline=True,
        advanced=True,
        tooltip="Layers to keep in 16 bits, one pattern per line, such as double_blocks.0.*",
    )


def measuring_options(steps: str, memory_gb: float, memory: str, seed: str) -> list[io.Input]:
    """Sampling steps, memory and seed of the calibration pictures. steps, memory, seed: their
    tooltips.
    """
    return [
        io.Int.Input("steps", default=8, min=1, max=100, advanced=True, tooltip=steps),
        io.Float.Input(
            "memory_gb",
            default=memory_gb,
            min=0.25,
            max=256.0,
            step=0.25,
            advanced=True,
            tooltip=memory,
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            advanced=True,
            tooltip=seed,
        ),
    ]
