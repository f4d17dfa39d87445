"""A vision-language encoder whose answer is known: ComfyUI's Qwen2.5-VL, its weights set by hand,
that finds a coloured square.

A picture of grey noise has three squares of 3 x 3 patches: red, green, blue. The last token asks
for one colour, and the last layer answers with the square's place: attention to the patches of that
colour, whose coordinates it averages. Every layer's query and key match the colour:

    logit(patch) = sharpness (1 + contrast [colour is the wanted one] + noise) sum over the layer's
    frequencies of cos(distance · frequency)

In the layers that score for pruning the sum runs over the frequencies of the height, so that
distant rows score less (the long-range decay of RoPE that FEATHER's paper finds at the root of
FastV's failure); the last layer uses frequencies that hardly turn within a picture. Shallow layers
see the colour less clearly than deep ones. Nothing here says that a trained model is like this: it
is a world where the claim can be checked.
"""

from unittest import mock

import comfy.sd
import comfy.text_encoders.llama
import comfy.text_encoders.qwen_image
import comfy.text_encoders.qwen_vl
import torch

LAYERS, WIDTH, TOKEN = 8, 64, 28  # 28 pixels a token
STAGES = (2, 4)  # the layers that the two stages are before
COLOURS = torch.eye(3)
# channels of the residual stream
COLOUR, IMAGE, WANTED, NOISE, PLACE, FOUND = (
    slice(0, 3),
    3,
    slice(4, 7),
    7,
    slice(8, 11),
    slice(12, 15),
)
# rotary frequencies: of the height, and the slowest of the width
TURNING, STILL = range(16, 24), range(60, 64)
# of the colour above the rest; how much noise the layer before each stage adds
CONTRAST, HAZE = 0.12, {1: 3.0, 3: 0.5}
# a channel so large that RMSNorm divides all tokens by the same
STEADY, WEIGHT = 20, 20.0
ASK = 11  # token ids 11, 12, 13 ask for red, green, blue


class Tower(torch.nn.Module):
    """A vision tower that is a linear map: mean colour, a random projection of the pixels (the
    noise), and the patch's place in the raster.
    """

    def __init__(self, **_):
        super().__init__()
        self.register_buffer(
            "pattern", torch.randn(4 * 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(5))
        )

    def forward(self, patches, grid):
        rows, columns = (int(side) // 2 for side in grid[0][1:])
        pixels = patches.reshape(rows * columns, 4, 3, -1)
        x = torch.zeros(rows * columns, WIDTH)
        x[:, COLOUR] = (pixels.mean((1, 3)) * 0.27 / 0.3).clamp(-1, 1.5)
        x[:, NOISE] = (
            (pixels - pixels.mean((1, 3), keepdim=True)).flatten(1)
            @ self.pattern
            / self.pattern.norm()
        )
        x[:, IMAGE], x[:, STEADY] = 1, WEIGHT
        y, x_ = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        x[:, PLACE] = torch.stack(
            [y.flatten() / rows, x_.flatten() / columns, torch.ones(rows * columns)], 1
        )
        return x


class Tokenizer:
    """None: prompts are given as tokens."""

    def __init__(self, **_):
        pass


class Target:
    """What comfy.sd.CLIP builds from."""

    clip, tokenizer, params = comfy.text_encoders.qwen_image.te(), Tokenizer, {}


def build():
    """The CLIP."""
    sizes = dict(
        vocab_size=16,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    with mock.patch.object(comfy.text_encoders.qwen_vl, "Qwen2VLVisionTransformer", Tower):
        clip = comfy.sd.CLIP(
            Target, model_options={"qwen25_7b_model_config": sizes, "dtype": torch.float32}
        )
    model = clip.cond_stage_model.qwen25_7b.transformer.model
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0 if "norm" in name else 0.0)
    model.embed_tokens.weight.data[:, STEADY] = WEIGHT
    for colour in range(3):
        model.embed_tokens.weight.data[ASK + colour, WANTED.start + colour] = 2
    for index, layer in enumerate(model.layers):
        _match(
            layer.self_attn,
            STILL if index == LAYERS - 1 else TURNING,
            4000 if index == LAYERS - 1 else 100,
            HAZE.get(index, 0),
        )
    for channel in range(3):  # the last layer copies the place of what it attends to
        model.layers[-1].self_attn.v_proj.weight.data[channel, PLACE.start + channel] = 1
        model.layers[-1].self_attn.o_proj.weight.data[FOUND.start + channel, channel] = 1
    return clip


def _match(attention, frequencies, sharpness: float, haze: float) -> None:
    """q and k whose product is sharpness (1 + contrast colour + noise) on each frequency; a
    rotation pairs channel i with i + 64.
    """
    each = len(frequencies) // 4  # a part for the base and one for each colour
    for number, frequency in enumerate(frequencies):
        part = number // each
        for colour in range(3):
            if part == 0:
                attention.q_proj.weight.data[frequency, WANTED.start + colour] = sharpness
            elif part == colour + 1:
                attention.q_proj.weight.data[frequency, WANTED.start + colour] = sharpness
        if part == 0:
            attention.k_proj.weight.data[frequency, IMAGE] = 1
            attention.k_proj.weight.data[frequency, NOISE] = haze * CONTRAST
        else:
            attention.k_proj.weight.data[frequency, COLOUR.start + part - 1] = CONTRAST


def picture(
    rows: int, columns: int, seed: int, top: float | None = None
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """((1, H, W, 3), corner patches (row, column) of the red, green and blue square); `top` puts
    the red one at that height, 0 to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.45 + 0.1 * torch.randn(1, rows * TOKEN, columns * TOKEN, 3, generator=generator)
    corners: list[tuple[int, int]] = []
    while len(corners) < 3:
        y, x = (int(torch.randint(side - 2, (), generator=generator)) for side in (rows, columns))
        y = round(top * (rows - 3)) if top is not None and not corners else y
        if all(max(abs(y - a), abs(x - b)) > 2 for a, b in corners):
            corners.append((y, x))
    for (y, x), colour in zip(corners, COLOURS, strict=True):
        pixels[0, y * TOKEN : (y + 3) * TOKEN, x * TOKEN : (x + 3) * TOKEN] += 0.3 * colour
    return pixels.clamp(0, 1), corners


def prompt(pixels: torch.Tensor, colour: int = 0) -> dict:
    """Tokens of a prompt: the picture, five empty words, the question."""
    return {
        "qwen25_7b": [
            [({"type": "image", "data": pixels}, 1.0), *[(1, 1.0)] * 5, (ASK + colour, 1.0)]
        ]
    }


def answer(conditioning: torch.Tensor, rows: int, columns: int) -> tuple[float, float]:
    """(row, column) of the centre that the last token found."""
    row, column, one = conditioning[0, -1, FOUND].tolist()
    return row / one * rows, column / one * columns


def right(found: tuple[float, float], corner: tuple[int, int]) -> bool:
    """Whether a place is inside the square."""
    return all(side - 0.5 <= place <= side + 2.5 for place, side in zip(found, corner, strict=True))
