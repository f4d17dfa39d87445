"""The SVDQuant nodes: make a 4-bit file, load one; save prompts to calibrate on."""

from pathlib import Path

from comfy_api.latest import io

from ..quant.svdquant.recipe import PRESET_HELP, WIDE_SHARE, Recipe
from . import file_nodes, menu, widgets
from .bridge.host import charts, folders, node_files
from .bridge.quantize import charts as file_charts
from .bridge.quantize import prompts
from .bridge.quantize.svdquant import SVDQuantRequest
from .bridge.quantized import activations as activation_widths
from .bridge.quantized import loading

NO_FILES = "(no quantized models yet)"
_CHOICE = {"auto": None, "on": True, "off": False}
_FITTED_FOR: dict[str, dict] = {
    "4 bit": {},
    "8 bit": {"act_bits": 8},
    "auto": {"wide_share": WIDE_SHARE},
}
_FORMATS = ("svdquant_w4a4", "svdquant_w4a8", "svdquant_nvfp4")


class NibbleQuantizeSVDQuant(file_nodes.QuantizeNode):
    """Quantizes a diffusion transformer to 4 bits."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleQuantizeSVDQuant",
            display_name="SVDQuant Quantize Checkpoint",
            category=menu.QUANTIZE,
            is_output_node=True,
            description=(
                "Makes a 4-bit copy of a diffusion model next to the original and charts"
                " the error of every layer. An interrupted run resumes where it stopped."
            ),
            search_aliases=[
                "nibble",
                "quantize",
                "convert to int4",
                "int4",
                "4-bit",
                "4bit",
                "svdq",
                "nunchaku",
                "gguf",
                "low vram",
                "8gb",
                "compress model",
            ],
            inputs=[*_main_inputs(), *_expert_options(), _clip_input()],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load SVDQuant Model."
                )
            ],
        )

    @classmethod
    def execute(  # noqa: PLR0913  (a recipe's widgets; the others are the request's)
        cls,
        preset,
        rank,
        solver,
        rotation,
        gptq,
        modulation,
        keep_layers,
        w4a16_layers,
        seed,
        activations="4 bit",
        format=_FORMATS[0],
        **request,
    ) -> io.NodeOutput:
        recipe = Recipe.from_preset(
            preset,
            rank=rank,
            solver=solver,
            rotation=rotation,
            gptq=_CHOICE[gptq],
            modulation=modulation,
            keep=widgets.patterns(keep_layers),
            w4a16=widgets.patterns(w4a16_layers),
            seed=seed,
            **_FITTED_FOR[activations],
            format=format,
        )
        name, report = SVDQuantRequest(recipe=recipe, node_id=cls.hidden.unique_id, **request).run()
        cls.made(name)
        chart = charts.layers_chart(
            report, name, f"SVDQuant {recipe.widths}, rank {rank}, {preset}"
        )
        return io.NodeOutput(name, ui=charts.ui(chart))


def _main_inputs() -> list[io.Input]:
    """What to quantize, and how thoroughly: the inputs that everyone sees."""
    return [
        widgets.source_input(),
        widgets.preset_input(PRESET_HELP),
        *widgets.target_inputs("-svdq-int4-r<rank>"),
        *widgets.measuring_sockets(
            positive=(
                "Prompts to calibrate on (required by 'best'). Join several with Conditioning"
                " (Combine)."
            ),
            latent="Picture size for calibration. Not connected: 512 × 512.",
        ),
    ]


def _expert_options() -> list[io.Input]:
    """Everything else, collapsed."""
    return [
        io.Int.Input(
            "rank",
            default=32,
            min=16,
            max=256,
            step=16,
            advanced=True,
            tooltip=(
                "Rank of the 16-bit low-rank branch, which carries what 4 bits cannot."
                " Higher: more accurate, larger and slower."
            ),
        ),
        io.Combo.Input(
            "solver",
            options=["alternating", "svd"],
            default="alternating",
            advanced=True,
            tooltip=(
                "alternating: fits the branch and the 4-bit part in turn and keeps the"
                " best result. svd: fits the branch once, as in the SVDQuant paper."
            ),
        ),
        io.Combo.Input(
            "rotation",
            options=["auto", "on", "off"],
            default="auto",
            advanced=True,
            tooltip=(
                "Mixes channels in groups of 64 so that no outlier stands out. auto:"
                " decided for each layer by measurement."
            ),
        ),
        io.Combo.Input(
            "gptq",
            options=["auto", "on", "off"],
            default="auto",
            advanced=True,
            tooltip=(
                "Rounds each weight so that it makes up for the rounding errors before"
                " it; needs recorded inputs. auto: on with preset 'best'."
            ),
        ),
        io.Combo.Input(
            "modulation",
            options=["w4a16", "keep"],
            default="w4a16",
            advanced=True,
            tooltip=(
                "Layers that read the prompt but not the picture: 4-bit weights (w4a16),"
                " or kept in 16 bits (keep)."
            ),
        ),
        widgets.keep_layers_input(),
        io.String.Input(
            "w4a16_layers",
            default="",
            multiline=True,
            advanced=True,
            tooltip=(
                "Layers that get 4-bit weights but keep 16-bit inputs, one pattern per"
                " line, such as *.linear2"
            ),
        ),
        *widgets.measuring_options(
            steps="Sampling steps for each calibration prompt.",
            memory_gb=4.0,
            memory=(
                "Memory for the measurements, in GB. With less, the prompts are run more often; the"
                " result is the same."
            ),
            seed="Seed for the noise of the calibration pictures and for every random choice.",
        ),
        io.Combo.Input(
            "activations",
            options=list(_FITTED_FOR),
            default="4 bit",
            advanced=True,
            optional=True,
            tooltip=(
                "What the layers' inputs will be rounded to. 8 bit: closer to the 16-bit model,"
                " same file size; as fast on Hopper, Blackwell and CPUs, slower on RTX 20 to 40."
                " auto: 8 bit in the layers that gain most, for half of the multiplications."
            ),
        ),
        io.Combo.Input(
            "format",
            options=list(_FORMATS),
            default=_FORMATS[0],
            advanced=True,
            optional=True,
            tooltip=(
                "svdquant_w4a4: runs with activations of 4 or 8 bits. svdquant_w4a8: the closest"
                " 4-bit weights, for activations of 8 bits alone. svdquant_nvfp4: 4-bit floats,"
                " which RTX 50 multiplies; other GPUs run them at 16-bit speed."
            ),
        ),
    ]


def _clip_input() -> io.Clip.Input:
    """Behind all others, so that older workflows keep theirs."""
    return io.Clip.Input(
        "clip",
        optional=True,
        tooltip=(
            "The model's text encoder: Nibble adds prompts of its own to 'positive' until there are"
            " a dozen, or uses two dozen if nothing is connected there."
        ),
    )


class NibbleSavePrompts(file_nodes.FileNode):
    """Writes prompts for the command line's quantize."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleSavePrompts",
            display_name="Save Calibration Prompts",
            category=menu.QUANTIZE,
            is_output_node=True,
            description=(
                "Saves prompts and the picture size as a file for python ComfyUI-Nibble quantize"
                " --prompts, in models/calibration_prompts. For FLUX.1."
            ),
            search_aliases=["nibble", "calibration", "save conditioning", "export prompts"],
            inputs=[
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Prompts. Join several with Conditioning (Combine).",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Picture size. Not connected: 512 × 512."
                ),
                _clip_input(),
                io.String.Input(
                    "filename",
                    default="prompts",
                    tooltip="Name of the new file, in models/calibration_prompts.",
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace an existing file of this name."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output("path", tooltip="Where the file is: for --prompts.")],
        )

    @classmethod
    def execute(cls, filename, overwrite, positive=None, latent=None, clip=None) -> io.NodeOutput:
        given = prompts.with_own(positive, clip)
        path = prompts.save(given or [], latent, filename, overwrite)
        node_files.remember(cls.node_id(), Path(path))
        lines = [["prompts", str(len(given or []))], ["file", path]]
        chart = {"kind": "facts", "title": Path(path).name, "summary": lines}
        return io.NodeOutput(path, ui=charts.ui(chart))


class NibbleLoadSVDQuant(file_nodes.ModelFilePicker):
    """Loads a quantized model, of either method."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleLoadSVDQuant",
            display_name="Load SVDQuant Model",
            category=menu.LOAD,
            has_intermediate_output=True,
            description=(
                "Loads a model made by SVDQuant Quantize Checkpoint or VQ Quantize Checkpoint, or"
                " a file from Nunchaku or comfy-kitchen. It works like any other model:"
                " samplers, LoRA, ControlNet, low VRAM."
            ),
            search_aliases=[
                "nibble",
                "load model",
                "load nibble model",
                "flux loader",
                "load flux",
                "unet loader",
                "gguf",
                "gguf loader",
                "nunchaku",
                "nunchaku loader",
                "svdq",
                "int4",
                "int8",
                "fp4",
                "4-bit",
                "4bit",
                "3-bit",
                "vq",
                "load quantized",
                "low vram",
                "8gb",
                "save vram",
                "speed up",
                "faster",
            ],
            inputs=[
                widgets.model_file_input(
                    cls.KIND,
                    NO_FILES,
                    "A quantized file in models/diffusion_models: Nibble's own (SVDQuant or VQ), or"
                    " a published svdq-int4 or svdq-fp4 file (4-bit floats: fast on RTX 50, 16-bit"
                    " speed elsewhere).",
                ),
                widgets.verify_input(),
                widgets.compute_dtype_input(),
                io.Combo.Input(
                    "modulation_in",
                    options=list(loading.MODULATION),
                    default="vram",
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "Where the 4-bit modulation layers are kept. ram: about 1.7 GB less VRAM"
                        " for FLUX; the CPU computes them."
                    ),
                ),
                io.Combo.Input(
                    "activations",
                    options=list(activation_widths.CHOICES),
                    default="auto",
                    advanced=True,
                    optional=True,
                    tooltip=(
                        "What the inputs of 4-bit layers are rounded to. 8 bit: closer to the"
                        " 16-bit model. auto: 8 bit where this device loses no speed by it, else"
                        " 4 bit. The node shows what it chose."
                    ),
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model, ready for a sampler.")],
        )

    @classmethod
    def execute(  # noqa: PLR0913 - its widgets
        cls, model_name, verify, compute_dtype, modulation_in="vram", activations="auto"
    ) -> io.NodeOutput:
        file = loading.opened(model_name, cls.KIND)
        path = folders.path_of(model_name)
        model = loading.load(path, verify, compute_dtype, modulation_in, activations)
        chart = file_charts.loaded_chart(file, model, activations)
        return io.NodeOutput(model, ui=charts.ui(chart))


NODES = [NibbleQuantizeSVDQuant, NibbleLoadSVDQuant, NibbleSavePrompts]
