"""Where each of ComfyUI's transformers can be hooked, as data: nothing of a model is imported,
everything is looked up on the instance at call time.

A family is found by the class name of the diffusion model or of one of its bases. A model without
an entry is cached at the level of whole steps, which needs nothing from it. `docs` of the nodes
show this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

LEVELS = ("sublayer", "blocks", "step")


@dataclass(frozen=True)
class Blocks:
    """One list of a model's blocks.

    attribute: the list's name on the model. kind: what SmoothCache calls these blocks. replace: the
        key of patches_replace["dit"] that reaches
    them, or None where the list itself is shadowed in the instance. image, text, vector: the names
    of the token streams and of the timestep's embedding among a block's arguments (a number:
    position). returns: what a shadowed block returns. parts: sub-modules whose outputs can be kept
    one by one.
    """

    attribute: str
    kind: str
    replace: str | None = None
    image: str | int = "img"
    text: str | int | None = "txt"
    vector: str | int = "vec"
    returns: tuple[str, ...] = ("img",)
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """A family of models.

    feature: TeaCache's F, one of FEATURES, where no published polynomial asks for another. batch:
        the dimension of the batch in block tensors.
    image_last: in a joined stream the image's tokens come after the text's. wrapper: the model
        calls DIFFUSION_MODEL wrappers (else APPLY_MODEL
    carries the hooks).
    """

    blocks: tuple[Blocks, ...]
    feature: str = "tokens"
    batch: int = 0
    image_last: bool = True
    wrapper: bool = True

    @property
    def level(self) -> str:
        return "sublayer" if any(blocks.parts for blocks in self.blocks) else "blocks"


_FLUX = Adapter(
    (
        Blocks("double_blocks", "double", "double_block", parts=("img_mlp", "txt_mlp")),
        Blocks("single_blocks", "single", "single_block", text=None),
    ),
    "modulated",
)
_WAN = Adapter(
    (
        Blocks(
            "blocks", "block", "double_block", text=None, parts=("self_attn", "cross_attn", "ffn")
        ),
    ),
    "vector",
)
_LUMINA = Adapter(
    (Blocks("layers", "layer", image=0, text=None, vector=3, parts=("attention", "feed_forward")),),
    "first_residual",
)
TABLE: dict[str, Adapter] = {
    "Flux": _FLUX,
    "Chroma": Adapter(_FLUX.blocks, "tokens"),
    "ChromaRadiance": Adapter(_FLUX.blocks, "tokens"),
    "HunyuanVideo": _FLUX,
    "QwenImageTransformer2DModel": Adapter(
        (
            Blocks(
                "transformer_blocks", "block", "double_block", parts=("attn", "img_mlp", "txt_mlp")
            ),
        ),
        "modulated",
    ),
    "WanModel": _WAN,
    "LTXVModel": Adapter(
        (
            Blocks(
                "transformer_blocks",
                "block",
                "double_block",
                text=None,
                parts=("attn1", "attn2", "ff"),
            ),
        ),
        "modulated",
    ),
    "NextDiT": _LUMINA,
    "HiDreamImageTransformer2DModel": Adapter(
        (
            Blocks(
                "double_stream_blocks",
                "double",
                image="image_tokens",
                text="text_tokens",
                vector="adaln_input",
                returns=("img", "txt"),
            ),
            Blocks(
                "single_stream_blocks",
                "single",
                image="image_tokens",
                text=None,
                vector="adaln_input",
            ),
        ),
        "vector",
        image_last=False,
    ),
    "CogVideoXTransformer3DModel": Adapter(
        (
            Blocks(
                "blocks",
                "block",
                image="hidden_states",
                text="encoder_hidden_states",
                vector="temb",
                returns=("img", "txt"),
            ),
        ),
        "vector",
    ),
    "GeneralDIT": Adapter(
        (Blocks("blocks", "block", image=0, text=None, vector=1),), "modulated", batch=3
    ),
    "MiniTrainDIT": Adapter(
        (
            Blocks(
                "blocks",
                "block",
                image=0,
                text=None,
                vector=1,
                parts=("self_attn", "cross_attn", "mlp"),
            ),
        ),
        "tokens",
    ),
    "AsymmDiTJoint": Adapter(
        (Blocks("blocks", "block", "double_block"),), "modulated", wrapper=False
    ),
    # SD3
    "OpenAISignatureMMDITWrapper": Adapter(
        (Blocks("joint_blocks", "joint", "double_block"),), wrapper=False
    ),
    # AuraFlow
    "MMDiT": Adapter(
        (
            Blocks("double_layers", "double", "double_block"),
            Blocks("single_layers", "single", "single_block", text=None),
        )
    ),
    # its replacement cannot call the block
    "Kandinsky5": Adapter(
        (
            Blocks(
                "visual_transformer_blocks",
                "block",
                image=0,
                text=None,
                vector=2,
                parts=("self_attention", "cross_attention", "feed_forward"),
            ),
        )
    ),
    "LensTransformer2DModel": Adapter(
        (
            Blocks(
                "transformer_blocks", "block", "double_block", parts=("attn", "img_mlp", "txt_mlp")
            ),
        )
    ),
    "MageFlowTransformer2DModel": Adapter(
        (
            Blocks(
                "transformer_blocks", "block", "double_block", parts=("attn", "img_mlp", "txt_mlp")
            ),
        )
    ),
    "JoyImageTransformer3DModel": Adapter(
        (Blocks("double_blocks", "double", "double_block", parts=("img_mlp", "txt_mlp")),)
    ),
    "Hunyuan3Dv2": Adapter(_FLUX.blocks),
    # Krea 2
    "SingleStreamDiT": Adapter(
        (Blocks("blocks", "block", image=0, text=None, vector=1, parts=("attn", "mlp")),)
    ),
    "Ideogram4Transformer2DModel": Adapter(
        (
            Blocks(
                "layers", "layer", image=0, text=None, vector=3, parts=("attention", "feed_forward")
            ),
        )
    ),
    "PixArtMS": Adapter((Blocks("blocks", "block", image=0, text=None, vector=2),), wrapper=False),
    "OmniGen2Transformer2DModel": Adapter(
        (Blocks("layers", "layer", image=0, text=None, vector=3),), wrapper=False
    ),
    "BooguTransformer2DModel": Adapter(
        (
            Blocks(
                "double_stream_layers", "double", image=0, text=1, vector=4, returns=("img", "txt")
            ),
            Blocks("single_stream_layers", "single", image=0, text=None, vector=3),
        ),
        wrapper=False,
    ),
    "ErnieImageModel": Adapter(
        (Blocks("layers", "layer", image=0, text=None, vector=2),), image_last=False, wrapper=False
    ),
    "HunYuanDiT": Adapter((Blocks("blocks", "block", "double_block", text=None),), wrapper=False),
    # Hunyuan3D 2.1
    "HunYuanDiTPlain": Adapter(
        (Blocks("blocks", "block", image=0, text=None, vector=1),), wrapper=False
    ),
    "PixDiT_T2I": Adapter(
        (Blocks("patch_blocks", "block", image=0, text=1, vector=2, returns=("img", "txt")),)
    ),
}
# two latents in one stream; a model that keeps state of its own between calls
_BY_STEP = {"LTXAVModel", "CausalWanModel"}


def adapter_of(diffusion_model: torch.nn.Module) -> Adapter | None:
    """The entry of a model's class or nearest base whose lists of blocks are all there; None: whole
    steps only.
    """
    for cls in type(diffusion_model).__mro__:
        if cls.__name__ in _BY_STEP:
            return None
        found = TABLE.get(cls.__name__)
        if found:
            return (
                found
                if all(
                    len(getattr(diffusion_model, blocks.attribute, ())) for blocks in found.blocks
                )
                else None
            )
    return None


def block_list(diffusion_model: torch.nn.Module, blocks: Blocks) -> list:
    """The blocks in the order in which they run, whether the model keeps a list or a dictionary."""
    held = getattr(diffusion_model, blocks.attribute)
    return list(held.values() if hasattr(held, "values") else held)


def modulated(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor | None:
    """The first block's norm of the image's tokens, scaled and shifted by the timestep, as each
    family names these things; None for others.
    """
    # LTX-Video
    if hasattr(block, "scale_shift_table"):
        table = block.scale_shift_table[None, None].to(image) + vector.reshape(
            image.shape[0], vector.shape[1], block.scale_shift_table.shape[0], -1
        )
        return (
            torch.nn.functional.rms_norm(image, image.shape[-1:]) * (1 + table[:, :, 1])
            + table[:, :, 0]
        )
    # Mochi
    if hasattr(block, "mod_x"):
        return torch.nn.functional.rms_norm(image, image.shape[-1:]) * (
            1 + block.mod_x(vector).chunk(4, dim=1)[0].unsqueeze(1)
        )
    # Cosmos 1: (T, H, W, B, D)
    if hasattr(block, "blocks"):
        part = block.blocks[0]
        lora = arguments.get("adaln_lora_B_3D")
        shift, scale, _ = (part.adaLN_modulation(vector) + (0 if lora is None else lora)).chunk(
            3, dim=1
        )
        return part.norm_state(image) * (1 + scale) + shift
    if not hasattr(block, "img_norm1"):
        return None
    found = vector[0] if isinstance(vector, (tuple, list)) else block.img_mod(vector)
    # FLUX, HunyuanVideo
    if isinstance(found, (tuple, list)):
        return block.img_norm1(image) * (1 + found[0].scale[:, :1]) + found[0].shift[:, :1]
    # Qwen-Image
    shift, scale, _ = found.chunk(2, dim=-1)[0].chunk(3, dim=-1)
    return block.img_norm1(image) * (1 + scale[: image.shape[0]].unsqueeze(1)) + shift[
        : image.shape[0]
    ].unsqueeze(1)


def embedding(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor | None:
    """The embedding of the timestep that the first block receives."""
    return vector if isinstance(vector, torch.Tensor) else None


def tokens(
    block: torch.nn.Module, image: torch.Tensor, vector: object, arguments: dict
) -> torch.Tensor:
    """The image's tokens as they enter the first block."""
    return image


# "first_residual", what the first block adds, is not here: it takes that block's output, see
# caching_blocks.
FEATURES: dict[str, Callable[..., torch.Tensor | None]] = {
    "modulated": modulated,
    "vector": embedding,
    "tokens": tokens,
}


def facts_of(diffusion_model: torch.nn.Module) -> dict:
    """What published coefficients are chosen by: width, numbers of blocks, and what the family's
    own configuration says.
    """
    adapter = adapter_of(diffusion_model)
    widths = (getattr(diffusion_model, name, None) for name in ("hidden_size", "dim", "inner_dim"))
    width = next((value for value in widths if isinstance(value, int)), None)
    found = {
        "hidden": width,
        "blocks": (
            [len(getattr(diffusion_model, b.attribute)) for b in adapter.blocks] if adapter else []
        ),
    }
    return found | {
        name: getattr(diffusion_model, name)
        for name in ("model_type", "patch_size_t", "in_channels")
        if hasattr(diffusion_model, name)
    }


def classes_of(diffusion_model: torch.nn.Module) -> list[str]:
    """Names of a model's class and its bases, nearest first."""
    return [cls.__name__ for cls in type(diffusion_model).__mro__]
