"""Files of prompts: what is written is read, plain ones too, and what is none is refused."""

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.files import prompts
from nibble.quant.files.errors import FileRefused


def test_prompts_of_different_lengths_come_back(tmp_path):
    path = tmp_path / "p.safetensors"
    tokens = [torch.randn(4, 8), torch.randn(7, 8)]
    stored = prompts.Prompts(tokens, torch.randn(2, 3), (64, 96), 2.5)
    prompts.write(path, stored)
    found = prompts.read(path)
    assert all(torch.equal(a, b) for a, b in zip(found.tokens, tokens, strict=True))
    assert torch.equal(found.pooled, stored.pooled)
    assert (found.size, found.guidance) == ((64, 96), 2.5)


def test_a_plain_file_tells_no_size(tmp_path):
    path = tmp_path / "p.safetensors"
    save_file({"tokens": torch.randn(2, 4, 8).half(), "pooled": torch.randn(2, 3)}, path)
    found = prompts.read(path)
    assert (len(found.tokens), found.size, found.guidance) == (2, None, None)
    assert found.tokens[0].dtype == torch.float32


@pytest.mark.parametrize(
    "tensors, metadata, said",
    [
        ({"pooled": torch.zeros(2, 3)}, {}, "lacks the tensors"),
        ({"tokens": torch.zeros(2, 4, 8), "pooled": torch.zeros(3, 3)}, {}, "holds no prompts"),
        ({"tokens": torch.zeros(4, 8), "pooled": torch.zeros(4, 3)}, {}, "holds no prompts"),
        (
            {"tokens": torch.full((1, 4, 8), torch.nan), "pooled": torch.zeros(1, 3)},
            {},
            "not finite",
        ),
        (
            {"tokens": torch.zeros(1, 4, 8), "pooled": torch.zeros(1, 3)},
            {"height": "-3", "width": "8"},
            "its height is -3",
        ),
    ],
)
def test_what_holds_no_prompts_is_refused_in_a_sentence(tmp_path, tensors, metadata, said):
    path = tmp_path / "p.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(FileRefused, match=said) as refusal:
        prompts.read(path)
    assert "p.safetensors" in str(refusal.value)
