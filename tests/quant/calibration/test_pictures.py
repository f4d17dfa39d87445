"""What is drawn while layers are watched: how many pictures, which are held out, and prompts that
are drawn at random like the given ones.
"""

import pytest
import torch

from nibble.quant.calibration import pictures
from nibble.quant.calibration.pictures import Conditioning


@pytest.mark.parametrize(
    "prompts, drawn, given",
    [(1, 17, [0, 0]), (3, 16, [0, 1, 2]), (16, 16, list(range(16))), (30, 30, list(range(30)))],
)
def test_few_prompts_are_joined_by_others_like_them(prompts, drawn, given):
    order = pictures.order(prompts)
    assert (len(order), order[-len(given) :]) == (drawn, given)
    assert len(set(order[: -len(given)])) == drawn - len(given)
    numbers = torch.arange(drawn)
    held = numbers[pictures.is_held_out(numbers, drawn)].tolist()
    assert held[-1] == drawn - 1
    assert len(held) == 4
    assert set(order) >= set(range(prompts)), "every prompt is drawn"


@pytest.mark.parametrize(
    "drawn, expected",
    [
        (1, []),
        (3, [2]),
        (13, [4, 8, 12]),
        (16, [3, 7, 11, 15]),
        (30, [8, 15, 22, 29]),
        (100, [11, 19, 27, 35, 43, 51, 59, 67, 75, 83, 91, 99]),
    ],
)
def test_a_quarter_of_few_pictures_is_held_out_and_an_eighth_of_many(drawn, expected):
    numbers = torch.arange(drawn)
    assert numbers[pictures.is_held_out(numbers, drawn)].tolist() == expected


def test_a_single_prompt_is_seen_and_held_out():
    order = pictures.order(1)
    held = pictures.is_held_out(torch.arange(len(order)), len(order)).tolist()
    assert {held[i] for i, prompt in enumerate(order) if prompt == 0} == {True, False}


def test_random_prompts_have_the_spread_of_the_given_ones():
    draw = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.5, 4, 32)
    given = [
        Conditioning(
            3 + spread * torch.randn(400, 32, generator=draw), torch.randn(8, generator=draw)
        )
        for _ in range(6)
    ]
    given[0].tokens[0, 5] = 1e4  # as the first token of a language model
    made = pictures.like(given, seed=1)
    assert len(made) == pictures.ENOUGH_PICTURES - 6
    tokens = torch.cat([prompt.tokens[1:] for prompt in made])
    torch.testing.assert_close(tokens.std(0), spread, rtol=0.3, atol=0)
    torch.testing.assert_close(tokens.mean(0), torch.full((32,), 3.0), rtol=0.15, atol=0)
    again = pictures.like(given, seed=1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0].tokens, pictures.like(given, seed=2)[0].tokens)


def test_enough_prompts_are_left_alone():
    prompt = Conditioning(torch.randn(4, 8))
    assert pictures.like([prompt] * pictures.ENOUGH_PICTURES, seed=0) == []
    assert pictures.like([prompt], seed=0)[0].pooled is None
