"""The VQ nodes: make a 2- or 3-bit file, load one, inspect one."""

from comfy_api.latest import io

from ..quant.vq4dit.codebook_usage import inspect
from ..quant.vq4dit.recipe import LAYOUTS, PRESET_HELP
from . import file_nodes, menu, widgets
from .bridge.host import charts, folders
from .bridge.host.progress import Progress
from .bridge.quantize import charts as vq_charts
from .bridge.quantize.vq4dit import VQRequest, recipe_of
from .bridge.quantized import loading

NO_FILES = "(no VQ models yet)"
_BITS = [str(bits) for bits in LAYOUTS]


class NibbleQuantizeVQ(file_nodes.QuantizeNode):
    """Vector-quantizes a diffusion transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeVQ",
            display_name="VQ Quantize Checkpoint",
            category=menu.QUANTIZE,
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
                "2bit",
                "3-bit",
                "3bit",
                "vector quantization",
                "codebook",
                "gguf",
                "low vram",
                "compress model",
            ],
            inputs=_main_inputs() + _expert_options(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load VQ Model."
                )
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913  (a recipe's widgets; the others are the request's)
        cls,
        bits,
        preset,
        codewords,
        vector,
        candidates,
        calibration_steps,
        keep_layers,
        budget_gb,
        rotation,
        modulation,
        seed,
        **request,
    ) -> io.NodeOutput:
        recipe = recipe_of(
            preset,
            int(bits),
            codewords=codewords,
            vector=vector,
            candidates=candidates,
            steps=calibration_steps,
            budget_gb=budget_gb,
            rotation=rotation,
            modulation=modulation,
            keep=widgets.patterns(keep_layers),
            seed=seed,
        )
        name, report = VQRequest(recipe=recipe, node_id=cls.hidden.unique_id, **request).run()
        cls.made(name)
        chart = charts.layers_chart(report, name, f"VQ, {bits} bits, {preset}")
        return io.NodeOutput(name, ui=charts.ui(chart))


def _main_inputs() -> list[io.Input]:
    """What to quantize, to how many bits and how thoroughly: the inputs that everyone sees."""
    return [
        widgets.source_input(),
        io.Combo.Input(
            "bits",
            options=_BITS,
            default="3",
            tooltip=(
                "Bits per weight. 3: about as close as rounding to 4 bits. 2:"
                " experimental, the smallest file; use preset 'best'. 4: closest."
            ),
        ),
        widgets.preset_input(PRESET_HELP),
        *widgets.target_inputs("-vq<bits>-<preset>"),
        *widgets.measuring_sockets(
            positive=(
                "Prompts for the calibration pictures. Not connected: random conditioning. Join"
                " several with Conditioning (Combine)."
            ),
            latent=(
                "Picture size for calibration. Not connected: 512 × 512 with prompts, 256 × 256"
                " without."
            ),
        ),
    ]


def _expert_options() -> list[io.Input]:
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
        widgets.keep_layers_input(),
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
                " where they are needed most. 0: the size that 'bits' gives."
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
        *widgets.measuring_options(
            steps="Sampling steps for each calibration picture.",
            memory_gb=2.0,
            memory=(
                "Memory for each block's inputs and outputs, in GB. With less, fewer of the sampled"
                " steps are used."
            ),
            seed="Seed for the noise of the calibration pictures and for every random choice.",
        ),
    ]


class _VQFilePicker(file_nodes.ModelFilePicker):
    """What the nodes that take a VQ file share."""

    KIND = "vq"


def _file_input() -> io.Combo.Input:
    return widgets.model_file_input(
        "vq",
        NO_FILES,
        "A file made by VQ Quantize Checkpoint, in models/diffusion_models. Other files are not"
        " listed.",
    )


class NibbleLoadVQ(_VQFilePicker):
    """Loads a vector-quantized model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadVQ",
            display_name="Load VQ Model",
            category=menu.LOAD,
            has_intermediate_output=True,
            description=(
                "Loads a 2- or 3-bit model made by VQ Quantize Checkpoint, as Load SVDQuant Model"
                " does too. It works like any other model: samplers, LoRA, ControlNet, low VRAM."
            ),
            search_aliases=["nibble", "vq4dit", "2-bit", "3-bit", "codebook", "load quantized"],
            inputs=[_file_input(), widgets.verify_input(), widgets.compute_dtype_input()],
            outputs=[io.Model.Output("model", tooltip="The model, ready for a sampler.")],
        )

    @classmethod
    def execute(cls, model_name, verify, compute_dtype) -> io.NodeOutput:
        file = loading.opened(model_name, cls.KIND)
        model = loading.load(folders.path_of(model_name), verify, compute_dtype)
        return io.NodeOutput(model, ui=charts.ui(vq_charts.loaded_chart(file, model)))


class NibbleInspectVQ(_VQFilePicker):
    """Shows what a VQ file is made of."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleInspectVQ",
            display_name="VQ Inspect",
            category=menu.QUANTIZE,
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
        file = loading.opened(model_name, cls.KIND)
        uses = inspect(file, Progress("counting"))
        return io.NodeOutput(ui=charts.ui(vq_charts.inspect_chart(file, uses)))


NODES = [NibbleQuantizeVQ, NibbleLoadVQ, NibbleInspectVQ]
