"""Where each of ComfyUI's transformers can be hooked, as data: nothing of a model is imported,
everything is looked up on the instance at call time.

A family is found by the class name of the diffusion model or of one of its bases. A model without
an entry is cached at the level of whole steps, which needs nothing from it. `docs` of the nodes
show this table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import attrgetter

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ....accel.caching import coefficients

# what a schedule reuses: the whole model's work, kinds of blocks, or the sub-layers inside them
DEPTHS = ("step", "block", "sublayer")


@dataclass(frozen=True)
class Blocks:
    """One list of a model's blocks.

    attribute: the list's name on the model, with dots where it lies deeper
    kind: what SmoothCache calls these blocks
    replace: the key of patches_replace["dit"] that reaches them, or None where the list itself is
        shadowed in the instance
    image, text, vector: the names of the token streams and of the timestep's embedding among a
        block's arguments (a number: position)
    returns: what a shadowed block returns
    parts: what can be kept one by one: sub-modules, and "attn" where `joint` names the two
        sub-modules that have its projections (see `joint_attention`)
    later: parts that calibrations of before do not know, and that are computed with them
    """

    attribute: str
    kind: str
    replace: str | None = None
    image: str | int = "img"
    text: str | int | None = "txt"
    vector: str | int = "vec"
    returns: tuple[str, ...] = ("img",)
    parts: tuple[str, ...] = ()
    joint: tuple[str, ...] = ()
    later: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    feature: TeaCache's F, one of `features`, where no published polynomial asks for another
    timestep: the sub-module that embeds the timestep alone, where an entry's F is what it gives and
        the blocks receive something made of it
    batch: the dimension of the batch in block tensors
    image_last: in a joined stream the image's tokens come after the text's
    wrapper: the model calls DIFFUSION_MODEL wrappers (else APPLY_MODEL carries the hooks)
    """

    blocks: tuple[Blocks, ...]
    feature: str = "tokens"
    timestep: str = ""
    batch: int = 0
    image_last: bool = True
    wrapper: bool = True

    @property
    def hook(self) -> str:
        """The kind of wrapper that reaches the blocks."""
        return WrappersMP.DIFFUSION_MODEL if self.wrapper else WrappersMP.APPLY_MODEL

    def network(self, wrapped: torch.nn.Module) -> torch.nn.Module:
        """The diffusion model, of the module that such a wrapper is around."""
        return wrapped if self.wrapper else wrapped.diffusion_model

    @property
    def level(self) -> str:
        """The deepest level that the hooks allow: "sublayer" or "blocks"."""
        return "sublayer" if any(blocks.parts for blocks in self.blocks) else "blocks"


_FLUX = ModelFamily(
    (
        Blocks(
            "double_blocks",
            "double",
            "double_block",
            parts=("attn", "img_mlp", "txt_mlp"),
            joint=("img_attn", "txt_attn"),
            later=("attn",),
        ),
        Blocks("single_blocks", "single", "single_block", text=None),
    ),
    "modulated",
)
_WAN = ModelFamily(
    (
        Blocks(
            "blocks", "block", "double_block", text=None, parts=("self_attn", "cross_attn", "ffn")
        ),
    ),
    "vector",
    timestep="time_embedding",
)
_LUMINA = ModelFamily(
    (Blocks("layers", "layer", image=0, text=None, vector=3, parts=("attention", "feed_forward")),),
    "first_residual",
)
FAMILIES: dict[str, ModelFamily] = {
    "Flux": _FLUX,
    "Chroma": ModelFamily(_FLUX.blocks, "tokens"),
    "ChromaRadiance": ModelFamily(_FLUX.blocks, "tokens"),
    "HunyuanVideo": _FLUX,
    "QwenImageTransformer2DModel": ModelFamily(
        (
            Blocks(
                "transformer_blocks", "block", "double_block", parts=("attn", "img_mlp", "txt_mlp")
            ),
        ),
        "modulated",
    ),
    "WanModel": _WAN,
    # its pose runs through the same parts of a block
    "WanAnimate2Model": ModelFamily(
        (Blocks("blocks", "block", "double_block", text=None),), "vector"
    ),
    "LTXVModel": ModelFamily(
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
    "HiDreamImageTransformer2DModel": ModelFamily(
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
        "timestep",
        timestep="t_embedder",
        image_last=False,
    ),
    "CogVideoXTransformer3DModel": ModelFamily(
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
    "GeneralDIT": ModelFamily(
        (Blocks("blocks", "block", image=0, text=None, vector=1),), "modulated", batch=3
    ),
    "MiniTrainDIT": ModelFamily(
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
    "AsymmDiTJoint": ModelFamily(
        (Blocks("blocks", "block", "double_block"),), "modulated", wrapper=False
    ),
    # SD3
    "OpenAISignatureMMDITWrapper": ModelFamily(
        (Blocks("joint_blocks", "joint", "double_block"),), wrapper=False
    ),
    # AuraFlow
    "MMDiT": ModelFamily(
        (
            Blocks("double_layers", "double", "double_block"),
            Blocks("single_layers", "single", "single_block", text=None),
        )
    ),
    # its replacement cannot call the block
    "Kandinsky5": ModelFamily(
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
    "LensTransformer2DModel": ModelFamily(
        (
            Blocks(
                "transformer_blocks", "block", "double_block", parts=("attn", "img_mlp", "txt_mlp")
            ),
        )
    ),
    "MageFlowTransformer2DModel": ModelFamily(
        (
            Blocks(
                "transformer_blocks", "block", "double_block", parts=("attn", "img_mlp", "txt_mlp")
            ),
        )
    ),
    "JoyImageTransformer3DModel": ModelFamily(
        (
            Blocks(
                "double_blocks",
                "double",
                "double_block",
                parts=("attn", "img_mlp", "txt_mlp"),
                later=("attn",),
            ),
        )
    ),
    "Hunyuan3Dv2": ModelFamily(_FLUX.blocks),
    # Krea 2
    "SingleStreamDiT": ModelFamily(
        (Blocks("blocks", "block", image=0, text=None, vector=1, parts=("attn", "mlp")),)
    ),
    "Ideogram4Transformer2DModel": ModelFamily(
        (
            Blocks(
                "layers", "layer", image=0, text=None, vector=3, parts=("attention", "feed_forward")
            ),
        )
    ),
    "PixArtMS": ModelFamily(
        (Blocks("blocks", "block", image=0, text=None, vector=2),), wrapper=False
    ),
    "OmniGen2Transformer2DModel": ModelFamily(
        (Blocks("layers", "layer", image=0, text=None, vector=3),), wrapper=False
    ),
    "BooguTransformer2DModel": ModelFamily(
        (
            Blocks(
                "double_stream_layers", "double", image=0, text=1, vector=4, returns=("img", "txt")
            ),
            Blocks("single_stream_layers", "single", image=0, text=None, vector=3),
        ),
        wrapper=False,
    ),
    "ErnieImageModel": ModelFamily(
        (Blocks("layers", "layer", image=0, text=None, vector=2),), image_last=False, wrapper=False
    ),
    "HunYuanDiT": ModelFamily(
        (Blocks("blocks", "block", "double_block", text=None),), wrapper=False
    ),
    # Hunyuan3D 2.1
    "HunYuanDiTPlain": ModelFamily(
        (Blocks("blocks", "block", image=0, text=None, vector=1),), wrapper=False
    ),
    # Stable Audio 1 and 3; its replacement leaves out what inpainting adds to each block
    "AudioDiffusionTransformer": ModelFamily(
        (
            Blocks(
                "transformer.layers",
                "layer",
                image=0,
                text=None,
                vector="global_cond",
                parts=("self_attn", "cross_attn", "ff"),
            ),
        ),
        wrapper=False,
    ),
    "PixDiT_T2I": ModelFamily(
        (Blocks("patch_blocks", "block", image=0, text=1, vector=2, returns=("img", "txt")),)
    ),
}
# what classes call the width of their tokens
_WIDTHS = ("hidden_size", "dim", "inner_dim", "hidden_size_x", "model_channels")
# two latents in one stream; a model that keeps state of its own between calls
_BY_STEP = {"LTXAVModel", "CausalWanModel"}


def family_of(diffusion_model: torch.nn.Module) -> ModelFamily | None:
    """The entry of a model's class or nearest base, with the lists of blocks that this model has;
    None: whole steps only.
    """
    for cls in type(diffusion_model).__mro__:
        if cls.__name__ in _BY_STEP:
            return None
        family = FAMILIES.get(cls.__name__)
        if family is not None:
            there = [blocks for blocks in family.blocks if _count(diffusion_model, blocks)]
            return dataclasses.replace(family, blocks=tuple(there)) if there else None
    return None


def level_of(model: ModelPatcher) -> str:
    """The deepest level that a model's hooks allow: "sublayer", "blocks" or "step"."""
    family = family_of(model.model.diffusion_model)
    return "step" if family is None else family.level


def block_list(diffusion_model: torch.nn.Module, blocks: Blocks) -> list:
    """The blocks in the order in which they run, whether the model keeps a list or a dictionary."""
    held = attrgetter(blocks.attribute)(diffusion_model)
    return list(held.values() if hasattr(held, "values") else held)


def _count(diffusion_model: torch.nn.Module, blocks: Blocks) -> int:
    """How many such blocks a model has, which may not have the list either."""
    try:
        return len(attrgetter(blocks.attribute)(diffusion_model))
    except AttributeError:
        return 0


def published(
    model: ModelPatcher, reference: bool = False, large: bool = False, plain: bool = False
) -> coefficients.Shipped | None:
    """Published coefficients for a loaded model. reference: it edits a reference picture (Kontext);
    large: 720p video; plain: see `coefficients.lookup`.
    """
    network = model.model.diffusion_model
    traits = traits_of(network) | {"reference": reference, "large": large}
    return coefficients.lookup(type(network).__name__, traits, plain)


def published_for(model: ModelPatcher, plain: bool = False) -> list[coefficients.Shipped]:
    """Every entry that a loaded model may get, by what it will be given to sample."""
    found = [
        published(model, reference, large, plain)
        for reference in (False, True)
        for large in (False, True)
    ]
    return [entry for i, entry in enumerate(found) if entry and entry not in found[:i]]


def traits_of(diffusion_model: torch.nn.Module) -> dict:
    """What published coefficients are chosen by: width, numbers of blocks, and what the family's
    own configuration says.
    """
    family = family_of(diffusion_model)
    widths = (getattr(diffusion_model, name, None) for name in _WIDTHS)
    lists = family.blocks if family else ()
    keyframes = getattr(getattr(diffusion_model, "img_emb", None), "emb_pos", None)
    traits = {
        "hidden": next((width for width in widths if isinstance(width, int)), None),
        "blocks": [_count(diffusion_model, blocks) for blocks in lists],
        "keyframes": keyframes is not None,  # Wan 2.1 from a first and a last frame
    }
    for name in ("model_type", "patch_size_t", "in_channels", "in_dim"):
        if hasattr(diffusion_model, name):
            traits[name] = getattr(diffusion_model, name)
    return traits
