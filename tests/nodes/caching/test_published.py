"""Published coefficients in the nodes: which model gets which, with what threshold and window, and
what the artist is told.
"""

import comfy.supported_models
import pytest
import torch

import tiny_models
from caching_runs import STEPS, conditioning, draw
from nibble.accel.caching import coefficients
from nibble.accel.caching.steps import Window
from nibble.nodes.bridge.caching import apply as applying
from nibble.nodes.bridge.caching import settings as caching_settings
from nibble.nodes.bridge.caching.apply import apply_teacache, notes
from nibble.nodes.bridge.caching.models import traits_of
from nibble.nodes.bridge.caching.settings import TeaCacheSettings

ENTRIES = {entry.model: entry for entry in coefficients.every()}
AXES = dict(axes_dim=[16, 56, 56])  # of a head's rotary embedding: 128 channels
FLUX_1 = AXES | dict(hidden_size=3072, num_heads=24, depth=19, depth_single_blocks=38)
FLUX_2 = dict(axes_dim=[32] * 4, hidden_size=6144, num_heads=48, depth=8, depth_single_blocks=48)
HUNYUAN = AXES | dict(hidden_size=3072, num_heads=24, depth=20, depth_single_blocks=40)
HIDREAM = dict(num_layers=16, num_single_layers=32, attention_head_dim=128, num_attention_heads=20)
LUMINA = dict(dim=2304, n_heads=24, n_kv_heads=8, n_layers=26, axes_dims=[32, 32, 32])
Z_IMAGE = dict(dim=3840, n_heads=30, n_kv_heads=30, n_layers=30, axes_dims=[32, 48, 48])
COG_2B = dict(num_attention_heads=30, attention_head_dim=64, num_layers=30)
COG_5B = dict(num_attention_heads=48, attention_head_dim=64, num_layers=42)
WAN_14B = dict(dim=5120, num_heads=40, num_layers=40)
# entry → its tiny family, the real model's width and depth, and what else it is chosen by
REAL = {
    "FLUX.1 dev": ("flux", FLUX_1),
    "FLUX.2 dev": ("flux2", FLUX_2),
    "Qwen-Image": (
        "qwen-image",
        dict(num_layers=60, attention_head_dim=128, num_attention_heads=24),
    ),
    "Z-Image": ("z-image", Z_IMAGE),
    "Lumina 2": ("lumina 2", LUMINA),
    "HiDream I1 Full": ("hidream i1", HIDREAM),
    "HunyuanVideo": ("hunyuan video", HUNYUAN),
    "LTX-Video 2B": ("ltxv", dict(num_layers=28, attention_head_dim=64, num_attention_heads=32)),
    "CogVideoX 2B": ("cogvideox", COG_2B),
    "CogVideoX 5B, 5B I2V": ("cogvideox", COG_5B),
    "CogVideoX 1.5 5B I2V": ("cogvideox", COG_5B | dict(patch_size_t=2, in_channels=32)),
    "Wan 2.1 T2V 1.3B": ("wan 2.1", dict(dim=1536, num_heads=12, num_layers=30)),
    "Wan 2.1 T2V 14B": ("wan 2.1", WAN_14B),
    "Wan 2.1 I2V 14B 480P": ("wan 2.1", WAN_14B | dict(in_dim=36, model_type="i2v")),
    "Mochi 1": ("mochi", dict(depth=48, num_heads=24, hidden_size_x=3072, mlp_ratio_x=4.0)),
    "Cosmos 1 7B": ("cosmos 1", dict(model_channels=4096, num_blocks=28, num_heads=32)),
}
# models of the same classes that nobody has fitted
OTHERS = {
    "FLUX.1 Fill": ("flux", FLUX_1 | dict(in_channels=96)),
    "NewBie": ("lumina 2", LUMINA | dict(n_layers=36)),
    "HunyuanVideo I2V": ("hunyuan video", HUNYUAN | dict(in_channels=33)),
    "LTX-Video 13B": ("ltxv", dict(num_layers=48, attention_head_dim=128, num_attention_heads=32)),
    "Wan 2.2 I2V 14B": ("wan 2.1", WAN_14B | dict(in_dim=36)),
    "Wan 2.1 VACE 14B": ("wan 2.1 vace", WAN_14B),
    "Wan 2.2 TI2V 5B": ("wan 2.2 5b", dict(dim=3072, num_heads=24, num_layers=30)),
    "Cosmos 1 14B": ("cosmos 1", dict(model_channels=5120, num_blocks=36, num_heads=40)),
}


def facts(family: str, sizes: dict) -> tuple[str, dict]:
    """Class and traits of a model of that size, built without memory."""
    made = tiny_models.FAMILIES[family]
    config = getattr(comfy.supported_models, made.config)(dict(made.options | sizes))
    config.unet_config.update(made.options | sizes)
    config.set_inference_dtype(torch.float32, None)
    network = config.get_model({}, "", device="meta").diffusion_model
    return type(network).__name__, traits_of(network)


@pytest.mark.parametrize("name", REAL | OTHERS)
def test_a_model_of_comfyui_gets_its_own_entry_or_none(name):
    family, sizes = (REAL | OTHERS)[name]
    kind, traits = facts(family, sizes)
    found = coefficients.lookup(kind, traits | {"reference": False, "large": False})
    assert (found.model if found else None) == (name if name in REAL else None)


WIDGETS = {
    "preset": "balanced",
    "threshold": 0.03,
    "start": 0.0,
    "end": 1.0,
    "calibration": "none",
    "rule": "auto",
    "extrapolation": "auto",
    "first_steps": 1,
    "last_steps": 1,
    "level": "auto",
    "store": "gpu",
}


def chosen(model, **widgets):
    return caching_settings.teacache(model, **(WIDGETS | widgets))


@pytest.fixture
def as_flux(monkeypatch):
    """The tests' random FLUX is taken for one of FLUX.1's size."""
    monkeypatch.setattr(
        "nibble.nodes.bridge.caching.models.traits_of",
        lambda network: {"hidden": 3072, "blocks": [19, 38], "in_channels": 64},
    )


@pytest.fixture
def rules(monkeypatch):
    """The rule of every run that is made, and the guess that its skipped steps get."""
    made = []
    make = applying.Run

    def noted(**facts):
        made.append((facts["rule"], facts["reuse"], facts["record"]))
        return make(**facts)

    monkeypatch.setattr(applying, "Run", noted)
    return made


@pytest.mark.parametrize(
    "widgets, order",
    [
        ({}, 1),
        ({"rule": "error"}, 1),
        ({"rule": "teacache"}, 0),
        ({"rule": "teacache", "extrapolation": "line"}, 1),
        ({"rule": "teacache", "extrapolation": "parabola"}, 2),
        ({"extrapolation": "reuse"}, 0),
        # without blocks to watch it is the rule error, with that rule's own guess
        ({"rule": "teacache", "level": "step"}, 1),
    ],
)
def test_teacache_s_rule_reuses_and_the_presets_extrapolate(dense_model, rules, widgets, order):
    draw(apply_teacache(dense_model, chosen(dense_model, **widgets).settings))
    (rule, reuse, record) = rules[-1]
    assert reuse.order == order
    assert record.threshold == rule.threshold


def test_the_threshold_and_the_window_are_those_of_what_is_sampled(dense_model, as_flux, rules):
    """FLUX.1 dev and Kontext are the same model until a reference picture comes."""
    choice = chosen(dense_model, rule="teacache")
    assert "FLUX.1 dev or FLUX.1 Kontext, threshold 0.4 or 0.15" in choice.subtitle
    cached = apply_teacache(dense_model, choice.settings)
    draw(cached)
    assert rules[-1][0].threshold == 0.4
    assert rules[-1][0].polynomial == ENTRIES["FLUX.1 dev"].polynomial
    draw(cached, positive=conditioning(reference_latents=[torch.zeros(1, 16, 8, 8)]))
    assert rules[-1][0].threshold == 0.15
    assert rules[-1][0].window == Window(0.2, 0.9, 1, 1)
    custom = chosen(dense_model, rule="teacache", preset="custom", threshold=0.07)
    draw(apply_teacache(dense_model, custom.settings))
    assert rules[-1][0].threshold == 0.07


def test_wan_s_plain_set_is_a_choice(monkeypatch, rules):
    """Nothing chosen, as in graphs of before: the set with five steps at the start."""
    model = tiny_models.build("wan 2.1")
    wan = {"hidden": 5120, "blocks": [40], "in_dim": 16, "model_type": "t2v"}
    monkeypatch.setattr("nibble.nodes.bridge.caching.models.traits_of", lambda network: wan)
    for more, name, threshold, window in (
        ({}, "Wan 2.1 T2V 14B", 0.15, Window(first=5, last=1)),
        ({"coefficients": "plain"}, "Wan 2.1 T2V 14B, plain", 0.15, Window(first=1, last=1)),
        ({"coefficients": "plain", "preset": "fast"}, "Wan 2.1 T2V 14B, plain", 0.2, Window()),
    ):
        choice = chosen(model, rule="teacache", **more)
        assert f"coefficients of {name}, threshold {threshold:g}" in choice.subtitle
        tiny_models.sample(apply_teacache(model, choice.settings), "wan 2.1", 6)
        rule, _, record = rules[-1]
        assert rule.polynomial == ENTRIES[name].polynomial
        assert (rule.threshold, rule.window) == (threshold, window)
        assert record.done == 6
    with pytest.raises(ValueError, match="coefficients is one of auto, plain, not 'best'"):
        chosen(model, coefficients="best")


def test_the_node_says_which_rule_it_uses(dense_model, as_flux):
    assert chosen(dense_model).subtitle.startswith("rule error:")
    assert chosen(dense_model, rule="teacache").subtitle.startswith("rule teacache,")


def test_who_has_no_coefficients_learns_what_to_do(dense_model):
    settings = chosen(dense_model, rule="teacache").settings
    assert settings.threshold == 0.1  # the paper's slow
    (said,) = notes(dense_model, settings)
    assert "no published TeaCache coefficients for Flux of this size" in said
    assert "Run Calibrate Cache" in said
    assert "rule 'error'" in said
    assert notes(dense_model, chosen(dense_model).settings) == []


def test_who_may_have_another_model_of_that_shape_learns_it(dense_model, as_flux):
    (said,) = notes(dense_model, chosen(dense_model, rule="teacache").settings)
    assert "those of FLUX.1 dev. For FLUX.1 schnell and Krea" in said
    assert "Calibrate Cache" in said


@pytest.mark.parametrize("family", ["hidream i1", "lumina 2", "cogvideox", "mochi", "wan 2.1"])
def test_a_threshold_of_zero_computes_every_step_with_every_polynomial(family):
    """Negative polynomials took from the sum: steps were skipped at 0."""
    model = tiny_models.build(family)
    plain = tiny_models.sample(model, family, STEPS)
    kind = type(model.model.diffusion_model).__name__
    for name, entry in ENTRIES.items():
        if REAL.get(name, ("",))[0] != family:
            continue
        records = []
        settings = TeaCacheSettings(
            0.0, rule="teacache", coefficients=entry.polynomial, feature=entry.feature
        )
        found = tiny_models.sample(
            apply_teacache(model, settings, watch=records.append), family, STEPS
        )
        assert torch.equal(found, plain), (kind, name)
        assert records[-1].reused == 0
