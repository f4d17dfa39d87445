"""VQ's nodes: make a file of 2- or 3-bit codewords, load one, look into one."""

from comfy_api.latest import io

from ..quant.vq4dit.codebook_usage import inspect
from ..quant.vq4dit.recipe import LAYOUTS, PRESET_HELP
from . import widgets
from .bridge.host import charts, folders
from .bridge.host.progress import Progress
from .bridge.quantize import charts as vq_charts
from .bridge.quantize.vq4dit import VQRequest, file_name, recipe_of
from .bridge.quantized import loading

NO_FILES = "(no VQ models yet)"
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
            inputs=_main_inputs() + _expert_options(),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load VQ Model."
                )
            ],
        )

    @classmethod
    def validate_inputs(  # noqa: PLR0913  (what goes together, or not)
        cls, preset, bits, codewords, vector, candidates, calibration_steps, budget_gb, rotation
    ):
        try:
            recipe_of(
                preset,
                int(bits),
                codewords=codewords,
                vector=vector,
                candidates=candidates,
                steps=calibration_steps,
                budget_gb=budget_gb,
                rotation=rotation,
            )
        except ValueError as refusal:
            return str(refusal)
        return True

    @classmethod
    def fingerprint_inputs(cls, model_name, filename, preset, bits, codewords, vector, **_):
        recipe = recipe_of(preset, int(bits), codewords=codewords, vector=vector)
        made = file_name(model_name, filename, recipe) in loading.quantized_files("vq")
        return widgets.until_made(made, loading.stamp, model_name)

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
        chart = charts.layers_chart(report, name, f"codewords, {bits} bits, {preset}")
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
                "Bits a weight. 3: about as close as rounding to 4 bits. 2: experimental, the"
                " smallest file; use the preset 'best'. 4: closest."
            ),
        ),
        widgets.preset_input(PRESET_HELP),
        *widgets.target_inputs("-vq<bits>-<preset>"),
        *widgets.measuring_sockets(
            positive=(
                "Prompts to draw while calibrating. Not connected: random conditioning. Join"
                " several with Conditioning (Combine)."
            ),
            latent=(
                "Picture size while calibrating. Not connected: 512 × 512 with prompts, 256 × 256"
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
        *widgets.measuring_options(
            steps="Sampling steps of each picture that is drawn while calibrating.",
            memory_gb=2.0,
            memory=(
                "Memory for what a block reads and puts out, in GB. Less: fewer of the drawn steps"
                " are used."
            ),
            seed="Of the drawn pictures' noise and of every random choice.",
        ),
    ]


class _VQFilePicker(widgets.ModelFilePicker):
    """What the nodes that take a VQ file share."""

    KIND = "vq"


def _file_input() -> io.Combo.Input:
    return widgets.model_file_input(
        "vq",
        NO_FILES,
        "A file of VQ Quantize Checkpoint in models/diffusion_models. Others are not listed.",
    )


class NibbleLoadVQ(_VQFilePicker):
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
            inputs=[_file_input(), widgets.verify_input(), widgets.compute_dtype_input()],
            outputs=[io.Model.Output("model", tooltip="The model, ready for a sampler.")],
        )

    @classmethod
    def execute(cls, model_name, verify, compute_dtype) -> io.NodeOutput:
        file = loading.opened(model_name, cls.KIND)
        model = loading.load(folders.path_of(model_name), verify, compute_dtype)
        return io.NodeOutput(
            model,
            ui=charts.ui(
                vq_charts.model_chart(file, loading.vram_needed(model), model.load_device)
            ),
        )


class NibbleInspectVQ(_VQFilePicker):
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
        file = loading.opened(model_name, cls.KIND)
        uses = inspect(file, Progress("counting"))
        return io.NodeOutput(ui=charts.ui(vq_charts.inspect_chart(file, uses)))


NODES = [NibbleQuantizeVQ, NibbleLoadVQ, NibbleInspectVQ]
