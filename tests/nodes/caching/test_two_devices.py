"""Caches where ComfyUI's MultiGPU CFG Split draws the prompt on one device and its negative on
another, with CPUs in the place of GPUs: as many steps are reused, and the picture is the same.
"""

import comfy.model_management
import comfy.multigpu
import pytest
import torch

from caching_runs import draw
from flux_runs import decibels
from nibble.nodes.bridge.caching.apply import apply_teacache
from nibble.nodes.bridge.caching.settings import TeaCacheSettings


@pytest.mark.parametrize("first", ["cache", "split"])
def test_a_cache_and_a_split_go_together_in_either_order(dense_model, first, monkeypatch):
    records = []
    settings = TeaCacheSettings(0.4)

    def cached(model):
        return apply_teacache(model, settings, watch=records.append)

    alone = draw(cached(dense_model), 3.0)
    reused = records[-1].reused
    devices = [comfy.model_management.get_torch_device(), torch.device("cpu", 1)]
    monkeypatch.setattr(
        comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices
    )
    if first == "cache":
        model = comfy.multigpu.create_multigpu_deepclones(cached(dense_model), 2)
    else:
        model = cached(comfy.multigpu.create_multigpu_deepclones(dense_model, 2))
    assert decibels(alone, draw(model, 3.0)) > 60
    assert records[-1].reused == reused > 0
