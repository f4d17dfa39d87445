"""The VQ nodes: make a 2- or 3-bit file, load one, inspect one."""

from comfy_api.latest import io

from ..quant.files.checkpoint import FileRefused
from ..quant.vq4dit.codebook_usage import inspect
from ..quant.vq4dit.recipe import LAYOUTS, PRESET_HELP
from .bridge.host import charts
from .bridge.host.patterns import patterns
from .bridge.host.progress import Progress
from .bridge.quantize import charts as vq_charts
from .bridge.quantize import job as quantizing
from .bridge.quantize import vq4dit as vq
from .bridge.quantized import loading

NO_SOURCES = "(no models in models/diffusion_models)"
NO_FILES = "(no VQ models yet)"
KIND = "vq"
_BITS = [str(bits) for bits in LAYOUTS]


class NibbleQuantizeVQ(io.ComfyNode):
    """Vector-quantizes a diffusion transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeVQ",
            display_name="VQ Quantize Checkpoint",
            category="Nibble",
            is_output_node=True,
            description=(
                "Makes a 3-bit (or 2-bit) copy of a diffusion model next to the original"
                " by vector quantization: each layer stores small groups of weights as"
                " indices into a codebook. Charts the error of every layer. An"
                " interrupted run resumes where it stopped."
            ),
            search_aliases=[
                "nibble",
                "quantize",
                "vq4dit",
                "2-bit",
                "3-bit",
                "vector quantization",
                "codebook",
                "compress model",
            ],
            inputs=_sources() + _expert_options(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load VQ Model."
                )
            ],
        )

    @classmethod
    def validate_inputs(
        cls, preset, bits, codewords, vector, candidates, calibration_steps, budget_gb, rotation
    ):
        try:
            vq.recipe_of(
                preset,
                int(bits),
                codewords,
                vector,
                candidates,
                calibration_steps,
                budget_gb,
                rotation,
            )
        except ValueError as refusal:
            return str(refusal)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name, filename, preset, bits, codewords, vector, **_):
        name = vq.file_name(
            model_name, filename, vq.recipe_of(preset, int(bits), codewords, vector)
        )
        # unequal to itself: runs until its file is there
        return loading.stamp(model_name) if name in loading.quantized_files(KIND) else float("nan")

    @classmethod
    def execute(
        cls,
        model_name,
        bits,
        preset,
        filename,
        overwrite,
        codewords,
        vector,
        candidates,
        calibration_steps,
        keep_layers,
        budget_gb,
        rotation,
        modulation,
        steps,
        memory_gb,
        seed,
        model=None,
        positive=None,
        latent=None,
    ) -> io.NodeOutput:
        recipe = vq.recipe_of(
            preset,
            int(bits),
            codewords,
            vector,
            candidates,
            calibration_steps,
            budget_gb,
            rotation,
            modulation=modulation,
            keep=patterns(keep_layers),
            seed=seed,
        )
        name, report = vq.run(
            vq.Job(
                model_name,
                recipe,
                filename,
                overwrite,
                model,
                positive,
                latent,
                steps,
                memory_gb,
                cls.hidden.unique_id,
            )
        )
        return io.NodeOutput(
            name, ui=charts.ui(charts.layers_chart(report, name, f"VQ, {bits} bits, {preset}"))
        )


def _sources() -> list:
    """What to quantize, to how many bits and how thoroughly: the inputs that everyone sees."""
    help_text = " ".join(f"{name}: {text}" for name, text in PRESET_HELP.items())
    return [
        io.Combo.Input(
            "model_name",
            options=quantizing.sources() or [NO_SOURCES],
            tooltip=(
                "A 16-bit, fp8 or ComfyUI-quantized model in models/diffusion_models. Ignored when"
                " a model is connected."
            ),
        ),
        io.Combo.Input(
            "bits",
            options=_BITS,
            default="3",
            tooltip=(
                "Bits per weight. 3: about as close as rounding to 4 bits. 2:"
                " experimental, the smallest file; use preset 'best'. 4: closest."
            ),
        ),
        io.Combo.Input("preset", options=list(PRESET_HELP), default="fast", tooltip=help_text),
        io.String.Input(
            "filename",
            default="",
            tooltip="Name of the new file. Empty: the source's name + -vq<bits>-<preset>.",
        ),
        io.Boolean.Input(
            "overwrite",
            default=False,
            tooltip="Replace an existing file of this name that was made with other options.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="Quantize this model, including its LoRAs and merges, instead of a file.",
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip=(
                "Prompts for the calibration pictures. Not connected: random"
                " conditioning. Join several with Conditioning (Combine)."
            ),
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip=(
                "Picture size for calibration. Not connected: 512 × 512 with prompts, 256"
                " × 256 without."
            ),
        ),
    ]


def _expert_options() -> list:
    """Everything else, collapsed."""
    return [
        io.Int.Input(
            "codewords",
            default=0,
            min=0,
            max=65536,
            advanced=True,
            tooltip=(
                "Entries (codewords) in each layer's codebook, a power of two; used"
                " together with vector, instead of bits. 0: set by bits."
            ),
        ),
        io.Int.Input(
            "vector",
            default=0,
            min=0,
            max=16,
            advanced=True,
            tooltip=(
                "Weights in each codebook entry; used together with codewords. 0: set by bits."
            ),
        ),
        io.Int.Input(
            "candidates",
            default=0,
            min=0,
            max=8,
            advanced=True,
            tooltip=(
                "With preset vq4dit: how many of the nearest codebook entries each group"
                " of weights may choose from. 0: the preset's value."
            ),
        ),
        io.Int.Input(
            "calibration_steps",
            default=0,
            min=0,
            max=100_000,
            advanced=True,
            tooltip="Training steps for each block. 0: the preset's value.",
        ),
        io.String.Input(
            "keep_layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip=("Layers to keep in 16 bits, one pattern per line, such as double_blocks.0.*"),
        ),
        io.Float.Input(
            "budget_gb",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=0.001,
            round=False,
            advanced=True,
            tooltip=(
                "Size of the whole file, in GB: each layer gets 2, 3 or 4 bits, more"
                " where they are needed most. 0: the same bits for all layers."
            ),
        ),
        io.Boolean.Input(
            "rotation",
            default=False,
            advanced=True,
            tooltip=("Mixes channels in groups of 64 so that no outlier stands out; costs speed."),
        ),
        io.Combo.Input(
            "modulation",
            options=["vq", "keep"],
            default="vq",
            advanced=True,
            tooltip=(
                "Layers that read the prompt but not the picture: quantized as well (vq),"
                " or kept in 16 bits (keep)."
            ),
        ),
        io.Int.Input(
            "steps",
            default=8,
            min=1,
            max=100,
            advanced=True,
            tooltip="Sampling steps for each calibration picture.",
        ),
        io.Float.Input(
            "memory_gb",
            default=2.0,
            min=0.25,
            max=256.0,
            step=0.25,
            advanced=True,
            tooltip=(
                "Memory for each block's inputs and outputs, in GB. With less, fewer of"
                " the sampled steps are used."
            ),
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            advanced=True,
            tooltip=("Seed for the noise of the calibration pictures and for every random choice."),
        ),
    ]


class _PicksVQFile(io.ComfyNode):
    """What the nodes that take a VQ file share."""

    @classmethod
    def validate_inputs(cls, model_name=None):
        try:
            if model_name is not None:  # a linked name is known only when the graph runs
                loading.opened(model_name, KIND)
        except FileRefused as refusal:
            return str(refusal)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name, **_):
        return loading.stamp(model_name)


def _file_input() -> io.Combo.Input:
    return io.Combo.Input(
        "model_name",
        options=loading.quantized_files(KIND) or [NO_FILES],
        tooltip=(
            "A file made by VQ Quantize Checkpoint, in models/diffusion_models. Other"
            " files are not listed."
        ),
    )


class NibbleLoadVQ(_PicksVQFile):
    """Loads a vector-quantized model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadVQ",
            display_name="Load VQ Model",
            category="Nibble",
            has_intermediate_output=True,
            description=(
                "Loads a 2- or 3-bit model made by VQ Quantize Checkpoint. It works like"
                " any other model: samplers, LoRA, ControlNet, low VRAM."
            ),
            search_aliases=["nibble", "vq4dit", "2-bit", "3-bit", "codebook", "load quantized"],
            inputs=[
                _file_input(),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    advanced=True,
                    tooltip="Check every tensor against its checksum before use.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(loading.DTYPES),
                    default="default",
                    advanced=True,
                    tooltip=(
                        "Number format of activations and 16-bit layers. default: what ComfyUI"
                        " chooses for this GPU."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, ready for a sampler.")],
        )

    @classmethod
    def execute(cls, model_name, verify, compute_dtype) -> io.NodeOutput:
        file = loading.opened(model_name, KIND)
        model = loading.load(loading.model_path(model_name), verify, compute_dtype)
        return io.NodeOutput(
            model,
            ui=charts.ui(
                vq_charts.model_chart(file, loading.vram_needed(model), model.load_device)
            ),
        )


class NibbleInspectVQ(_PicksVQFile):
    """Shows what a VQ file is made of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleInspectVQ",
            display_name="VQ Inspect",
            category="Nibble",
            is_output_node=True,
            description=(
                "Charts what a VQ file is made of: bits per weight, how much of its"
                " codebooks is used, and the error of each layer."
            ),
            search_aliases=["nibble", "vq4dit", "codebook", "bits per weight", "entropy"],
            inputs=[_file_input()],
            outputs=[],
        )

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        file = loading.opened(model_name, KIND)
        uses = inspect(file, Progress("counting"))
        return io.NodeOutput(ui=charts.ui(vq_charts.inspect_chart(file, uses)))


NODES = [NibbleQuantizeVQ, NibbleLoadVQ, NibbleInspectVQ]
