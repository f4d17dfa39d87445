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
from .encoders import Encoder, encoder_of
from .record import KEY, Prompt
from .scoring import kept_tokens, token_scores
from .shortened import Shortened, mask_of_next, window_of

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


class Pruner:
    """The pruning of one CLIP: settings, and the state of the run that is under way. Lives in the
    hooks' closures, never on the model.
    """

    def __init__(
        self,
        settings: PruneSettings,
        encoder: Encoder,
        watch: Callable[[Prompt], None] = lambda prompt: None,
    ):
        if settings.mode == "drop" and encoder.kind.whole:
            raise ValueError(
                f"{encoder.kind.whole}, so that no token can be dropped; set mode to scatter."
            )
        layers, least = len(encoder.transformer.model.layers), encoder.first_layer
        for stage in settings.stages:
            if not least <= stage.layer < layers:
                fed = f" and feeds the picture in until layer {least - 1}" if least > 1 else ""
                raise ValueError(
                    f"layer {stage.layer} is not one that can be pruned before: this encoder has"
                    f" {layers} layers{fed}; choose from {least} to {layers - 1}."
                )
        self.settings = settings
        self.encoder = encoder
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
        self._short = Shortened()

    # ---- what the prompt holds

    def recording(self, process_tokens: Callable) -> Callable:
        """SDClipModel.process_tokens that remembers where the images are. Several prompts at once
        share no positions: they run unpruned.
        """

        def process(tokens, device):
            embeds, attention, count, info = process_tokens(tokens, device)
            self.reset()
            pictures = self.encoder.pictures(tokens, info)
            if pictures is None or (pictures and len(embeds) > 1):
                log.warning(
                    "Nibble: FEATHER prunes one prompt at a time, whose images are all used; this"
                    " run is not pruned."
                )
            elif pictures:
                config = self.encoder.transformer.model.config
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
                return self._generated(begun, layer, args, kwargs)
            rows = self.prompt.mask(begun).nonzero().flatten().to(x.device)
            if len(rows) == x.shape[1]:
                return None
            mask, freqs = self._short.of(
                rows, window_of(layer), kwargs.get("attention_mask"), kwargs["freqs_cis"]
            )
            self._full = (x, rows)
            return args, {**kwargs, "x": x[:, rows], "attention_mask": mask, "freqs_cis": freqs}

        return hook

    def after(self, index: int) -> Callable:
        """Forward hook: the short output goes back to its places in the full sequence."""

        def hook(layer, args, kwargs, output):
            if index == self.layers - 1:
                self.running = False
                self._short.forget()
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

    def _generated(self, begun: int, layer: torch.nn.Module, args, kwargs) -> tuple | None:
        """What a layer with a window is given of one generated token: its short cache reaches back
        further than the window does.
        """
        x, cache, window = kwargs.get("x"), kwargs.get("past_key_value"), window_of(layer)
        if self.prompt is None or self.running or not window or not cache or x.shape[1] != 1:
            return None
        rows = self.prompt.mask(begun).nonzero().flatten().to(x.device)
        mask = mask_of_next(rows, self.prompt.length, cache[2], window, x)
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})


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
    encoder = encoder_of(clip)
    pruner = Pruner(settings, encoder, watch)
    clip = clip.clone()
    patcher = clip.patcher
    wraps = {
        encoder.path("process_tokens"): pruner.recording,
        encoder.path("encode"): pruner.encoding,
        encoder.path("generate"): pruner.generating,
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
        layers, handles = pruner.encoder.transformer.model.layers, []
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
