"""ComfyUI's own vision-language encoders, small ones."""

import pytest


@pytest.fixture(scope="module")
def encoders():
    import tiny_encoders

    return {"qwen2.5": tiny_encoders.qwen_image(), "qwen3": tiny_encoders.qwen3_vl()}


@pytest.fixture(params=["qwen2.5", "qwen3"])
def clip(request, encoders):
    return encoders[request.param]
