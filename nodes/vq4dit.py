"""VQ's nodes: make a file of 2- or 3-bit codewords, load one, look into one."""

from comfy_api.latest import io

from ..quant.files.errors import FileRefused
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
    """Quantizes a diffusion transformer to codewords."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeVQ",
            display_name="VQ Quantize Checkpoint",
            category="Nibble",
            is_output_node=True,
            description=(
                "Makes a 3-bit (or 2-bit) file of a diffusion model from codewords, beside the"
                " original, and draws what it cost layer by layer. An interrupted run goes on where"
                " it stopped."
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
            name,
            ui=charts.ui(charts.layers_chart(report, name, f"codewords, {bits} bits, {preset}")),
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
                "Bits a weight. 3: about as close as rounding to 4 bits. 2: experimental, the"
                " smallest file; use the preset 'best'. 4: closest."
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
            tooltip="Replace a file of that name that was made with other options.",
        ),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="Quantize this model, with its LoRAs and merges, in place of a file.",
        ),
        io.Conditioning.Input(
            "positive",
            optional=True,
            tooltip=(
                "Prompts to draw while calibrating. Not connected: random conditioning. Join"
                " several with Conditioning (Combine)."
            ),
        ),
        io.Latent.Input(
            "latent",
            optional=True,
            tooltip=(
                "Picture size while calibrating. Not connected: 512 × 512 with prompts, 256 × 256"
                " without."
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
                "Codewords of a layer, a power of two; together with vector in place of bits. 0: as"
                " bits says."
            ),
        ),
        io.Int.Input(
            "vector",
            default=0,
            min=0,
            max=16,
            advanced=True,
            tooltip="Weights in a codeword; together with codewords. 0: as bits says.",
        ),
        io.Int.Input(
            "candidates",
            default=0,
            min=0,
            max=8,
            advanced=True,
            tooltip=(
                "Nearest codewords that the preset vq4dit lets each sub-vector choose from. 0: the"
                " preset's."
            ),
        ),
        io.Int.Input(
            "calibration_steps",
            default=0,
            min=0,
            max=100_000,
            advanced=True,
            tooltip="Of training for each block. 0: the preset's.",
        ),
        io.String.Input(
            "keep_layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip="Layers to keep in 16 bit, a pattern a line, such as double_blocks.0.*",
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
                "Size of the whole file: each layer gets 2, 3 or 4 bits by what it needs most. 0:"
                " all have the same bits."
            ),
        ),
        io.Boolean.Input(
            "rotation",
            default=False,
            advanced=True,
            tooltip="Mixes 64 channels at a time so that none stands out; costs speed.",
        ),
        io.Combo.Input(
            "modulation",
            options=["vq", "keep"],
            default="vq",
            advanced=True,
            tooltip="Layers that see the prompt and not the picture: codewords, or kept in 16 bit.",
        ),
        io.Int.Input(
            "steps",
            default=8,
            min=1,
            max=100,
            advanced=True,
            tooltip="Sampling steps of each picture that is drawn while calibrating.",
        ),
        io.Float.Input(
            "memory_gb",
            default=2.0,
            min=0.25,
            max=256.0,
            step=0.25,
            advanced=True,
            tooltip=(
                "Memory for what a block reads and puts out, in GB. Less: fewer of the drawn steps"
                " are used."
            ),
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**53,
            control_after_generate=False,
            advanced=True,
            tooltip="Of the drawn pictures' noise and of every random choice.",
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
            "A file of VQ Quantize Checkpoint in models/diffusion_models. Others are not listed."
        ),
    )


class NibbleLoadVQ(_PicksVQFile):
    """Loads a model of codewords."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadVQ",
            display_name="Load VQ Model",
            category="Nibble",
            has_intermediate_output=True,
            description=(
                "Loads a 2- or 3-bit model made by VQ Quantize Checkpoint. It works as any other"
                " model: samplers, LoRA, ControlNet, low VRAM."
            ),
            search_aliases=["nibble", "vq4dit", "2-bit", "3-bit", "codebook", "load quantized"],
            inputs=[
                _file_input(),
                io.Boolean.Input(
                    "verify",
                    default=True,
                    advanced=True,
                    tooltip="Compare every tensor with its checksum before use.",
                ),
                io.Combo.Input(
                    "compute_dtype",
                    options=list(loading.DTYPES),
                    default="default",
                    advanced=True,
                    tooltip=(
                        "What activations and 16-bit layers are computed in. default: what ComfyUI"
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
    """Shows what a file of codewords is made of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleInspectVQ",
            display_name="VQ Inspect",
            category="Nibble",
            is_output_node=True,
            description=(
                "Draws what a VQ file is made of: bits per weight, how much of its codebooks is"
                " used, and the error of each layer."
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
