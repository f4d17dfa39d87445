"""The demo's stand-in for a text encoder: four words, a fixed vector each. Needs torch alone, so
that the node can use it too.
"""

import torch

from . import world

SCORED = (  # what benches draw: every colour, shape, place and background at least twice
    "a red circle top left on black",
    "a yellow square centre on white",
    "a cyan triangle bottom right on grey",
    "a green star left on navy",
    "a purple ring bottom on white",
    "a pink cross top right on grey",
    "a blue square bottom left on navy",
    "a orange triangle top on black",
    "a red star right on grey",
    "a yellow ring top left on navy",
    "a cyan cross centre on black",
    "a green circle bottom right on white",
    "a purple triangle left on navy",
    "a pink star bottom on black",
    "a blue ring top right on white",
    "a orange cross bottom left on grey",
    "a red circle top on black",
    "a yellow square right on white",
    "a cyan star top left on grey",
    "a green ring centre on navy",
)
WORD_DIM = 64  # channels of a prompt's token embeddings and of its pooled vector


def word_table() -> torch.Tensor:
    """A fixed vector of unit variance a word, float32 (words, WORD_DIM)."""
    return torch.randn(len(world.WORDS), WORD_DIM, generator=torch.Generator().manual_seed(4))


def word_indices(prompts: list[str]) -> torch.Tensor:
    """Prompts → int64 (batch, 4); a ValueError says which fact a prompt lacks."""
    return torch.tensor(
        [[world.WORDS.index(word) for word in world.parse(prompt).words] for prompt in prompts]
    )


def embed(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Word indices (batch, 4) → token embeddings (batch, 4, WORD_DIM) and the pooled vector (batch,
    WORD_DIM), float32.
    """
    tokens = word_table()[words]
    return tokens, tokens.mean(1)
