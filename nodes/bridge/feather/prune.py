"""FEATHER on a CLIP socket: hooks on a vision-language encoder's layers that let image tokens drop
out half-way.

A layer that runs on fewer tokens gets its rows of the hidden states, of the rotary embedding and of
the mask gathered, and its output scattered back, which is bit for bit what a sequence without those
tokens gives; with every token kept, no tensor is touched. Two ways to leave the encoder:

    scatter  the pruned tokens go out as they were when they were pruned: the conditioning keeps its
      length
    drop     they are taken out of the conditioning, so that the diffusion transformer attends to
      fewer tokens as well

Hooks are put on when ComfyUI loads this CLIP and taken off when it unloads it, loads another one of
the same weights, or forgets it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.patcher_extension import PatcherInjection

from ....accel import feather
from ....accel.feather import Stage
from .record import KEY, Prompt, picture_of
from .scoring import kept_tokens, positions_at, token_scores

log = logging.getLogger("nibble")
MODES = ("scatter", "drop")


@dataclass(frozen=True)
class PruneSettings:
    """What to prune. criterion: one of feather.CRITERIA; mode: one of MODES. The grid of a stage is
    FEATHER's alone.
    """

    stages: tuple[Stage, ...]
    criterion: str = "feather"
    mode: str = "scatter"

    def __post_init__(self):
        if self.criterion not in feather.CRITERIA:
            raise ValueError(
                f"criterion {self.criterion!r} is not one of {', '.join(feather.CRITERIA)}"
            )
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not one of {', '.join(MODES)}")


def encoder_of(clip) -> tuple[str, torch.nn.Module]:
    """(attribute of the CLIP's model, its language model's transformer) of an encoder that FEATHER
    fits.

    Raises ValueError, naming the encoder, for one without visual tokens or of another build.
    """
    model = clip.patcher.model
    for name, part in model.named_children():
        transformer = getattr(part, "transformer", None)
        layers = getattr(getattr(transformer, "model", None), "layers", None)
        if (
            layers is None
            or not hasattr(transformer, "visual")
            or getattr(transformer.model, "fixed_kv", False)
        ):
            continue
        if all(
            hasattr(layer, "input_layernorm")
            and hasattr(getattr(layer, "self_attn", None), "q_proj")
            for layer in layers
        ):
            return name, transformer
    raise ValueError(
        f"FEATHER prunes visual tokens, and {type(model).__name__.rstrip('_')} has no vision tower"
        " and layers that it knows; connect a Qwen2.5-VL or Qwen3-VL text encoder, such as that of"
        " Qwen-Image-Edit."
    )


def first_layer(transformer: torch.nn.Module) -> int:
    """The first layer that tokens can be pruned before: Qwen3-VL adds to the image after each of
    its first layers (DeepStack).
    """
    return max(1, len(getattr(transformer.visual, "deepstack_visual_indexes", ())))


class Pruner:
    """The pruning of one CLIP: settings, and the state of the run that is under way. Lives in the
    hooks' closures, never on the model.
    """

    def __init__(
        self,
        settings: PruneSettings,
        transformer: torch.nn.Module,
        watch: Callable[[Prompt], None] = lambda prompt: None,
    ):
        layers, least = len(transformer.model.layers), first_layer(transformer)
        for stage in settings.stages:
            if not least <= stage.layer < layers:
                fed = f" and feeds the picture in until layer {least - 1}" if least > 1 else ""
                raise ValueError(
                    f"layer {stage.layer} is not one that can be pruned before: this encoder has"
                    f" {layers} layers{fed}; choose from {least} to {layers - 1}."
                )
        self.settings = settings
        self.transformer = transformer
        self.watch = watch
        self.layers = layers
        self.stages = sorted(
            (stage for stage in settings.stages if stage.keep < 1), key=lambda stage: stage.layer
        )
        self.reset()

    def reset(self) -> None:
        """Forgets the run that is under way; hooks do nothing until a prompt is recorded."""
        self.prompt: Prompt | None = None
        self.running = self.dropped = False
        # a layer's whole input and the rows that run, between its two hooks
        self._full: tuple[torch.Tensor, torch.Tensor] | None = None
        # rows, mask and positions of the stage, and what they were gathered from
        self._short: tuple | None = None

    # ---- what the prompt holds

    def recording(self, process_tokens: Callable) -> Callable:
        """SDClipModel.process_tokens that remembers where the images are. Several prompts at once
        share no positions: they run unpruned.
        """

        def process(tokens, device):
            embeds, attention, count, info = process_tokens(tokens, device)
            data = [
                item["data"]
                for row in tokens
                for item in row
                if isinstance(item, dict) and item.get("type") == "image"
            ]
            images = sorted((e for e in info if e.get("type") == "image"), key=lambda e: e["index"])
            self.reset()
            if data and (len(embeds) > 1 or len(data) != len(images)):
                log.warning(
                    "Nibble: FEATHER prunes one prompt at a time, whose images are all used; this"
                    " run is not pruned."
                )
            elif data:
                config = self.transformer.model.config
                pictures = [picture_of(e, pixels) for e, pixels in zip(images, data, strict=True)]
                self.prompt = Prompt(
                    length=embeds.shape[1],
                    last=int(attention[0].nonzero().max()),
                    pictures=pictures,
                    layers=self.layers,
                    width=config.hidden_size,
                    hidden=config.intermediate_size,
                    begins=tuple(stage.layer for stage in self.stages),
                )
                self.running = True
            return embeds, attention, count, info

        return process

    def encoding(self, encode: Callable) -> Callable:
        """SDClipModel.encode that in mode drop gives the kept tokens only, z (1, n, d) or (1,
        layers, n, d), and leaves nothing behind if it fails.
        """

        def encode_kept(tokens):
            try:
                z, *rest = encode(tokens)
            except BaseException:
                self.reset()
                raise
            if self.prompt is not None and self.settings.mode == "drop":
                left = self.prompt.mask().to(z.device)
                self.dropped = True
                return z[..., left, :], *(_without(part, left) for part in rest)
            return z, *rest

        return encode_kept

    def generating(self, generate: Callable) -> Callable:
        """SDClipModel.generate that leaves nothing behind."""

        def generate_and_forget(*args, **kwargs):
            try:
                return generate(*args, **kwargs)
            finally:
                self.reset()

        return generate_and_forget

    def reporting(self, encode: Callable) -> Callable:
        """encode_token_weights whose conditioning says what was kept (under KEY, a Prompt's
        fields), for the report.
        """

        def encode_and_tell(*args, **kwargs):
            out, pooled, *extra = encode(*args, **kwargs)
            prompt, dropped = self.prompt, self.dropped
            self.reset()
            if prompt is None:
                return out, pooled, *extra
            extras = extra[0] if extra else {}
            if self.settings.mode == "drop":
                if not dropped:
                    raise ValueError(
                        "this encoder puts its conditioning together in a way of its own, so that"
                        " no token can be dropped; set mode to scatter."
                    )
                _refuse_entries_of_pruned_tokens(extras, prompt, out.shape[-2])
            fields = {**vars(prompt), "pictures": [vars(picture) for picture in prompt.pictures]}
            return out, pooled, extras | {KEY: fields}

        return encode_and_tell

    # ---- what the layers do

    def before(self, index: int) -> Callable:
        """Forward pre-hook of layer `index`: gathers the rows that are left."""
        begun = sum(stage.layer <= index for stage in self.stages)

        def hook(layer, args, kwargs):
            x, self._full = kwargs.get("x"), None
            if not self._prefill(x):
                return None
            rows, mask, freqs = self._gathered(
                begun, x.device, kwargs.get("attention_mask"), kwargs["freqs_cis"]
            )
            if len(rows) == x.shape[1]:
                return None
            self._full = (x, rows)
            return args, {**kwargs, "x": x[:, rows], "attention_mask": mask, "freqs_cis": freqs}

        return hook

    def after(self, index: int) -> Callable:
        """Forward hook: the short output goes back to its places in the full sequence."""

        def hook(layer, args, kwargs, output):
            if index == self.layers - 1:
                self.running, self._short = False, None
            if self._full is None:
                return None
            (x, rows), self._full = self._full, None
            y, *rest = output
            x[:, rows] = y  # in place, as the layer itself works
            return x, *rest

        return hook

    def scoring(self, number: int) -> Callable:
        """Forward pre-hook of the layer before stage `number`: scores the image tokens, and decides
        who stays from the stage on.
        """
        stage = self.stages[number]

        def hook(layer, args, kwargs):
            x = kwargs.get("x")
            if not self._prefill(x):
                return
            prompt, criterion = self.prompt, self.settings.criterion
            scores = token_scores(prompt, criterion, layer, x, kwargs["freqs_cis"])
            for picture in prompt.pictures:
                own = scores[picture.start : picture.start + picture.count]
                picture.masks.append(kept_tokens(picture, own, stage, criterion))
            if number == len(self.stages) - 1:
                self.watch(self.prompt)

        return hook

    def _prefill(self, x: torch.Tensor | None) -> bool:
        """Whether this call is the prompt itself: not a generated token, whose keys are in the
        cache, short or not.
        """
        return self.running and x is not None and x.shape[:2] == (1, self.prompt.length)

    def _gathered(self, begun: int, device, mask, freqs) -> tuple:
        """Rows, mask and positions of a stage: gathered once, as all its layers get the
        same ones.
        """
        source = (begun, id(mask), id(freqs))
        if self._short is None or self._short[0] != source:
            self._short = None  # the last stage's, gone before this one's is made
            rows = self.prompt.mask(begun).nonzero().flatten().to(device)
            short = None if mask is None else mask[..., rows[:, None], rows]
            # the last keeps the ids theirs
            self._short = (source, (rows, short, positions_at(freqs, rows)), (mask, freqs))
        return self._short[1]


def _without(part: object, left: torch.Tensor) -> object:
    """One of the encoder's further results, its attention mask without the pruned tokens."""
    if not isinstance(part, dict) or "attention_mask" not in part:
        return part
    mask = part["attention_mask"]
    return {**part, "attention_mask": mask[..., left.to(mask.device)]}


def _refuse_entries_of_pruned_tokens(extras: dict, prompt: Prompt, length: int) -> None:
    """Raises ValueError where the conditioning holds a tensor with an entry for every token, pruned
    ones too.
    """
    pruned = prompt.length - int(prompt.mask().sum())
    for key, value in extras.items():
        if pruned and isinstance(value, torch.Tensor) and length + pruned in value.shape:
            raise ValueError(
                f"the conditioning of this encoder also holds {key}, with an entry for each token,"
                " so that none can be dropped; set mode to scatter."
            )


def prune(clip, settings: PruneSettings, watch: Callable[[Prompt], None] = lambda prompt: None):
    """A CLIP whose encoder prunes visual tokens, in place of any earlier pruning of this CLIP; the
    given one stays as it is.

    `watch` gets every prompt with images when its last stage has decided. Raises ValueError for an
    encoder or layers that do not fit.
    """
    name, transformer = encoder_of(clip)
    pruner = Pruner(settings, transformer, watch)
    clip = clip.clone()
    patcher = clip.patcher
    wraps = {
        f"{name}.process_tokens": pruner.recording,
        f"{name}.encode": pruner.encoding,
        f"{name}.generate": pruner.generating,
        "encode_token_weights": pruner.reporting,
    }
    if patcher.injections.pop(KEY, None):
        for path in wraps:
            patcher.object_patches.pop(path, None)
    if pruner.stages:
        for path, wrap in wraps.items():
            patcher.add_object_patch(path, wrap(patcher.get_model_object(path)))
        patcher.set_injections(KEY, [_injection(pruner)])
    return clip


def _injection(pruner: Pruner) -> PatcherInjection:
    """Puts the hooks on. ComfyUI forgets a patcher that nothing refers to without ejecting it, so
    its end takes them off as well.
    """
    removers: list[weakref.finalize] = []

    def inject(patcher) -> None:
        eject(patcher)
        layers, handles = pruner.transformer.model.layers, []
        for number, stage in enumerate(pruner.stages):
            handles.append(
                layers[stage.layer - 1].register_forward_pre_hook(
                    pruner.scoring(number), with_kwargs=True
                )
            )
        for index in range(pruner.stages[0].layer, pruner.layers):
            handles.append(
                layers[index].register_forward_pre_hook(pruner.before(index), with_kwargs=True)
            )
            handles.append(
                layers[index].register_forward_hook(pruner.after(index), with_kwargs=True)
            )
        removers.append(weakref.finalize(patcher, _remove, handles))

    def eject(_patcher) -> None:
        pruner.reset()
        while removers:
            removers.pop()()

    return PatcherInjection(inject, eject)


def _remove(handles: list) -> None:
    for handle in handles:
        handle.remove()
