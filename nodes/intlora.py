"""The IntLoRA nodes: convert an ordinary LoRA to a 4-bit model's integers, apply one to a model,
merge and save what is on a 4-bit model.
"""

from comfy_api.latest import io

from . import file_nodes, menu
from .bridge.host import charts
from .bridge.intlora import files
from .bridge.intlora.charts import conversion_chart, merge_chart
from .bridge.intlora.convert import ConvertJob, convert_lora
from .bridge.intlora.fold import BRANCHES
from .bridge.intlora.merge import MODES, apply
from .bridge.intlora.save import SaveJob, save_merged

NO_LORAS = "(no LoRAs in models/loras)"
NO_FILES = "(no IntLoRA files yet)"


class NibbleConvertIntLoRA(file_nodes.FileNode):
    """An ordinary LoRA as an adapter of a 4-bit model's integers."""

    STAMPS = {"lora_name": files.stamp}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleConvertIntLoRA",
            display_name="Convert LoRA to IntLoRA",
            category=menu.LORA,
            is_output_node=True,
            description=(
                "Turns an ordinary LoRA into one for the integer weights of a 4-bit"
                " model, without training, and charts how much of it each layer keeps."
            ),
            search_aliases=["nibble", "intlora", "lora", "convert lora", "int4"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "From Load SVDQuant Model. The IntLoRA fits this 4-bit file and no other."
                    ),
                ),
                io.Combo.Input(
                    "lora_name",
                    options=files.ordinary_files() or [NO_LORAS],
                    tooltip="A LoRA in models/loras, made for this model.",
                ),
                io.Float.Input(
                    "target_error",
                    default=0.02,
                    min=0.0005,
                    max=0.5,
                    step=0.0005,
                    round=0.0001,
                    tooltip=(
                        "How much of the LoRA each layer may lose: 0.02 is 2 %. Lower: wider"
                        " merged integers."
                    ),
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip=(
                        "Name of the new file in models/intlora. Empty: the LoRA's name. Ends in"
                        " .intlora.safetensors."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace an existing file of this name."
                ),
                io.Int.Input(
                    "k",
                    default=-1,
                    min=-1,
                    max=12,
                    advanced=True,
                    tooltip=(
                        "Extra bits below the 4-bit grid, the same for all layers. -1: chosen for"
                        " each layer to meet the target error."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "intlora_name", tooltip="The new file's name; connect it to Apply IntLoRA."
                )
            ],
        )

    @classmethod
    def execute(cls, model, lora_name, target_error, filename, overwrite, k) -> io.NodeOutput:
        done = convert_lora(
            ConvertJob(
                model=model,
                lora_name=lora_name,
                target=target_error,
                k=None if k < 0 else k,
                filename=filename,
                overwrite=overwrite,
                node_id=cls.hidden.unique_id,
            )
        )
        cls.made(done.name, files.FOLDER)
        return io.NodeOutput(done.name, ui=charts.ui(conversion_chart(done, lora_name)))


class NibbleApplyIntLoRA(file_nodes.FileNode):
    """A 4-bit model with an adapter on it."""

    STAMPS = {"intlora_name": files.stamp}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleApplyIntLoRA",
            display_name="Apply IntLoRA",
            category=menu.LORA,
            has_intermediate_output=True,
            description=(
                "Puts an IntLoRA on the model that it was made for. Several can be chained, with"
                " each other and with Load LoRA. The connected model is never changed."
            ),
            search_aliases=["nibble", "intlora", "lora", "apply lora", "load intlora"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The 4-bit model that the IntLoRA was made for, or the 16-bit one that it"
                        " was trained on."
                    ),
                ),
                io.Combo.Input(
                    "intlora_name",
                    options=files.adapter_files() or [NO_FILES],
                    tooltip=(
                        "A file in models/intlora, from Convert LoRA to IntLoRA or Train IntLoRA."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly it is applied. 0: the connected model, bit for bit.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="branch",
                    tooltip=(
                        "branch: computed beside the 4-bit weights, exact, at a small cost."
                        " merge: fitted into the 4-bit weights, free while sampling; keeps most"
                        " of the LoRA, and fitting takes a while."
                    ),
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.Model.Output("model", tooltip="The model with the IntLoRA applied.")],
        )

    @classmethod
    def validate_inputs(cls, intlora_name=None):
        return file_nodes.valid_file(files.path_of, intlora_name)

    @classmethod
    def execute(cls, model, intlora_name, strength, mode) -> io.NodeOutput:
        patched, done = apply(model, intlora_name, strength, mode, cls.hidden.unique_id)
        return io.NodeOutput(patched, ui=None if done is None else charts.ui(merge_chart(done)))


class NibbleMergeIntLoRA(file_nodes.FileNode):
    """A 4-bit model with LoRAs on it, as a 4-bit file of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NibbleMergeIntLoRA",
            display_name="Merge and Save",
            category=menu.LORA,
            is_output_node=True,
            description=(
                "Saves a 4-bit model, with the IntLoRAs and LoRAs on it, as a new 4-bit"
                " file, and charts how much of them each layer kept. The original file is"
                " never changed."
            ),
            search_aliases=[
                "nibble",
                "intlora",
                "lora",
                "merge lora",
                "bake lora",
                "save model",
                "int4",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A model from Load SVDQuant Model, followed by Apply IntLoRA or Load LoRA."
                    ),
                ),
                io.String.Input(
                    "filename",
                    default="",
                    tooltip=(
                        "Name of the new file in models/diffusion_models. Empty: the model's name +"
                        " -merged."
                    ),
                ),
                io.Combo.Input(
                    "branch",
                    options=list(BRANCHES),
                    default=BRANCHES[0],
                    tooltip=(
                        "wider: keeps all of the LoRA; the 16-bit branch grows by the LoRA's"
                        " rank. same size: fits it into the 4-bit weights, at no extra cost;"
                        " keeps most of it."
                    ),
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace an existing file of this name that holds something else.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.Combo.Output(
                    "model_name", tooltip="The new file's name; connect it to Load SVDQuant Model."
                )
            ],
        )

    @classmethod
    def execute(cls, model, filename, branch, overwrite) -> io.NodeOutput:
        done = save_merged(
            SaveJob(
                model=model,
                filename=filename,
                branch=branch,
                overwrite=overwrite,
                node_id=cls.hidden.unique_id,
            )
        )
        cls.made(done.name)
        return io.NodeOutput(done.name, ui=charts.ui(merge_chart(done)))


NODES = [NibbleConvertIntLoRA, NibbleApplyIntLoRA, NibbleMergeIntLoRA]
