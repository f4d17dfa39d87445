"""TeaCache's published entries against what their authors print, number by number.

SOURCES is written from the authors' files, not from ours. Where they name fewer than three
thresholds, `printed` holds those that they do name.
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from checkout import ROOT
from nibble.accel.caching import coefficients
from nibble.accel.caching.steps import Step, Window

TEACACHE = "ali-vilab/TeaCache@7c10efc, "
PORT = "welltop-cn/ComfyUI-TeaCache@91dff8e, "
MLX = "IonDen/mlx-teacache, "


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a source says. first, last: steps always computed; start, end: shares of the run
    outside of which all are; fitted: the range of d that the fit has seen.
    """

    source: str
    numbers: str
    feature: str
    printed: tuple[float, ...]
    first: int = 1
    last: int = 1
    start: float = 0.0
    end: float = 1.0
    fitted: tuple[float, float] | None = None


FLUX = "4.98651651e+02 -2.83781631e+02 5.58554382e+01 -3.82021401e+00 2.64230861e-01"
COGVIDEO = TEACACHE + "TeaCache4CogVideoX1.5/teacache_sample_video.py"
WAN_PLAIN = TEACACHE + "TeaCache4Wan2.1/teacache_generate.py"
WAN = WAN_PLAIN + ", use_ret_steps"
SOURCES = {
    "FLUX.1 dev": Printed(
        source=TEACACHE + "TeaCache4FLUX/teacache_flux.py",
        numbers=FLUX,
        feature="modulated",
        printed=(0.25, 0.4, 0.6),
    ),
    # the README's table has the start, the end and the threshold
    "FLUX.1 Kontext": Printed(
        source=PORT + "nodes.py, README.md",
        numbers="-1.04655119e+03 3.12563399e+02 -1.69500694e+01 4.10995971e-01 3.74537863e-02",
        feature="modulated",
        printed=(0.22,),
        start=0.2,
        end=0.9,
    ),
    "FLUX.2 dev": Printed(
        source="NVIDIA/TensorRT-LLM, pipeline_flux2.py, FLUX2_TEACACHE_COEFFICIENTS",
        numbers="1.04582360e+02 -6.87605554e+00 -8.61659379e-02 5.37600252e-02",
        feature="modulated",
        printed=(0.2,),
    ),
    "FLUX.2 klein base 4B": Printed(
        source=MLX + "scripts/_calibration_flux2_klein_base_4b.json@000a3e0",
        numbers="-1841.022165607874 848.4417137572868 -131.3554469956159 8.179509586828413 0.0",
        feature="modulated",
        printed=(0.17,),
        fitted=(0.028261402621865273, 0.21984468400478363),
    ),
    "Qwen-Image": Printed(
        source=MLX + "scripts/_calibration_qwen.json@0ce38f0, signal A",
        numbers="45.1442944188745 -52.91131412057809 17.078368811436963 0.10393043235768819 0.0",
        feature="modulated",
        printed=(0.25, 0.3),
        fitted=(0.09283242676308609, 0.7861665809833119),
    ),
    "Z-Image": Printed(
        source=MLX + "scripts/_calibration_z_image.json@8c58698, signal B",
        numbers="-898.9907628349583 367.7086118008557 -45.41511572598643 3.95114319842774 0.0",
        feature="first_residual",
        printed=(0.12, 0.15),
        fitted=(0.027887196237753466, 0.25914120883567665),
    ),
    # its version 2, which the file has in a comment and the README beside version 1
    "Lumina 2": Printed(
        source=TEACACHE + "TeaCache4Lumina2/teacache_lumina2.py, v2",
        numbers=(
            "225.7042019806413 -608.8453716535591 304.1869942338369 124.21267720116742"
            " -1.4089066892956552"
        ),
        feature="modulated",
        printed=(0.2, 0.3, 0.5),
    ),
    "HiDream I1 Full": Printed(
        source=TEACACHE + "TeaCache4HiDream-I1/teacache_hidream_i1.py",
        numbers="-3.13605009e+04 -7.12425503e+02 4.91363285e+01 8.26515490e+00 1.08053901e-01",
        feature="timestep",
        printed=(0.17, 0.25, 0.3),
        first=0,
        last=0,
        start=0.1,
    ),
    "HunyuanVideo": Printed(
        source=TEACACHE + "TeaCache4HunyuanVideo/teacache_sample_video.py",
        numbers="7.33226126e+02 -4.01131952e+02 6.75869174e+01 -3.14987800e+00 9.61237896e-02",
        feature="modulated",
        printed=(0.1, 0.15),
    ),
    "LTX-Video 2B": Printed(
        source=TEACACHE + "TeaCache4LTX-Video/teacache_ltx.py",
        numbers="2.14700694e+01 -1.28016453e+01 2.31279151e+00 7.92487521e-01 9.69274326e-03",
        feature="modulated",
        printed=(0.03, 0.05),
    ),
    "CogVideoX 2B": Printed(
        source=COGVIDEO,
        numbers="-3.10658903e+01 2.54732368e+01 -5.92380459e+00 1.75769064e+00 -3.61568434e-03",
        feature="vector",
        printed=(0.1, 0.2, 0.3),
    ),
    "CogVideoX 5B, 5B I2V": Printed(
        source=COGVIDEO,
        numbers="-1.53880483e+03 8.43202495e+02 -1.34363087e+02 7.97131516e+00 -5.23162339e-02",
        feature="vector",
        printed=(0.1, 0.2, 0.3),
    ),
    "CogVideoX 1.5 5B": Printed(
        source=COGVIDEO,
        numbers="2.50210439e+02 -1.65061612e+02 3.57804877e+01 -7.81551492e-01 3.58559703e-02",
        feature="vector",
        printed=(0.1, 0.2, 0.3),
    ),
    "CogVideoX 1.5 5B I2V": Printed(
        source=COGVIDEO,
        numbers="1.22842302e+02 -1.04088754e+02 2.62981677e+01 -3.06009921e-01 3.71213220e-02",
        feature="vector",
        printed=(0.1, 0.2, 0.3),
    ),
    "Wan 2.1 T2V 1.3B": Printed(
        source=WAN,
        numbers="-5.21862437e+04 9.23041404e+03 -5.28275948e+02 1.36987616e+01 -4.99875664e-02",
        feature="vector",
        printed=(0.05, 0.1),
        first=5,
        last=0,
    ),
    "Wan 2.1 T2V 14B": Printed(
        source=WAN,
        numbers="-3.03318725e+05 4.90537029e+04 -2.65530556e+03 5.87365115e+01 -3.15583525e-01",
        feature="vector",
        printed=(0.1, 0.2),
        first=5,
        last=0,
    ),
    "Wan 2.1 I2V 14B 480P": Printed(
        source=WAN,
        numbers="2.57151496e+05 -3.54229917e+04 1.40286849e+03 -1.35890334e+01 1.32517977e-01",
        feature="vector",
        printed=(0.2, 0.3),
        first=5,
        last=0,
    ),
    "Wan 2.1 I2V 14B 720P": Printed(
        source=WAN,
        numbers="8.10705460e+03 2.13393892e+03 -3.72934672e+02 1.66203073e+01 -4.17769401e-02",
        feature="vector",
        printed=(0.2, 0.3),
        first=5,
        last=0,
    ),
    # one step computed at each end: ret_steps = 1 * 2, cutoff_steps = sample_steps * 2 - 2; the
    # README's table has the thresholds
    "Wan 2.1 T2V 1.3B, plain": Printed(
        source=WAN_PLAIN,
        numbers="2.39676752e+03 -1.31110545e+03 2.01331979e+02 -8.29855975e+00 1.37887774e-01",
        feature="timestep",
        printed=(0.05, 0.07, 0.08),
    ),
    "Wan 2.1 T2V 14B, plain": Printed(
        source=WAN_PLAIN,
        numbers="-5784.54975374 5449.50911966 -1811.16591783 256.27178429 -13.02252404",
        feature="timestep",
        printed=(0.14, 0.15, 0.2),
    ),
    "Wan 2.1 I2V 14B 480P, plain": Printed(
        source=WAN_PLAIN,
        numbers="-3.02331670e+02 2.23948934e+02 -5.25463970e+01 5.87348440e+00 -2.01973289e-01",
        feature="timestep",
        printed=(0.13, 0.19, 0.26),
    ),
    "Wan 2.1 I2V 14B 720P, plain": Printed(
        source=WAN_PLAIN,
        numbers="-114.36346466 65.26524496 -18.82220707 4.91518089 -0.23412683",
        feature="timestep",
        printed=(0.18, 0.2, 0.3),
    ),
    "Mochi 1": Printed(
        source=TEACACHE + "TeaCache4Mochi/teacache_mochi.py",
        numbers="-3.51241319e+03 8.11675948e+02 -6.09400215e+01 2.42429681e+00 3.05291719e-03",
        feature="modulated",
        printed=(0.06, 0.09),
    ),
    "Cosmos 1 7B": Printed(
        source=TEACACHE + "TeaCache4Cosmos/teacache_sample_video_t2v.py",
        numbers="2.71156237e+02 -9.19775607e+01 2.24437250e+00 2.08355751e+00 1.41776330e-01",
        feature="modulated",
        printed=(0.3, 0.4),
    ),
}
ENTRIES = {entry.model: entry for entry in coefficients.every()}


def test_every_entry_has_its_source_and_every_source_its_entry():
    assert list(ENTRIES) == list(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_an_entry_says_what_its_source_prints(name):
    entry, printed = ENTRIES[name], SOURCES[name]
    assert list(entry.polynomial.coefficients) == [float(n) for n in printed.numbers.split()]
    assert entry.source == printed.source
    assert entry.feature == printed.feature
    assert set(printed.printed) <= set(entry.thresholds)
    assert list(entry.thresholds) == sorted(set(entry.thresholds))
    assert len(entry.thresholds) == 3
    assert (entry.first, entry.last) == (printed.first, printed.last)
    assert (entry.start, entry.end) == (printed.start, printed.end)
    known = (entry.polynomial.x_min, entry.polynomial.x_max)
    assert known == (printed.fitted or (None, None))


@pytest.mark.parametrize("name", SOURCES)
def test_a_larger_change_never_freezes_a_run(name):
    """The fits turn negative: Wan 2.1 14B at 0.082, HiDream at 0.068. From there on the change
    counts as the fit's last peak, and never as less than nothing.
    """
    entry = ENTRIES[name]
    counted = [entry.polynomial(d) for d in np.linspace(0, 2, 4001)]
    assert min(counted) >= 0
    bare = np.poly1d([float(n) for n in SOURCES[name].numbers.split()])
    real = [root.real for root in bare.roots if abs(root.imag) < 1e-9 and root.real > 0.02]
    falls = [root for root in real if bare.deriv()(root) < 0]
    if falls:
        assert min(counted[int(2000 * min(falls)) :]) > 0.05


@pytest.mark.parametrize(
    "name, d, counted",
    [
        ("Wan 2.1 T2V 14B", 0.12, 0.341926),
        ("HiDream I1 Full", 0.25, 0.391807),
        ("FLUX.1 Kontext", 0.5, 0.286854),
        ("Mochi 1", 0.3, 0.098698),
        # no peak: as printed
        ("FLUX.1 dev", 0.0528, 0.180343),
        # below and above the range of the fit: as at its ends
        ("FLUX.2 klein base 4B", 0.0035, 0.144227),
        ("Z-Image", 0.001, 0.082298),
        ("Z-Image", 1.0, 0.318944),
    ],
)
def test_changes_beyond_the_fit_count_as_its_edge(name, d, counted):
    assert ENTRIES[name].polynomial(d) == pytest.approx(counted, abs=2e-6)


def test_hidream_computes_the_first_tenth():
    """The official loop: `cnt < num_steps * 0.1`."""
    window = ENTRIES["HiDream I1 Full"].window(Window(first=1, last=0))
    for total in (10, 20, 30, 50):
        computed = [i for i in range(total) if window.forbids(Step(i, total, 0.0))]
        assert computed == [i for i in range(total) if i < total * 0.1]


def test_a_window_that_was_asked_for_stays_within_the_published_one():
    kontext, wan = ENTRIES["FLUX.1 Kontext"], ENTRIES["Wan 2.1 T2V 14B"]
    assert kontext.window(Window()) == Window(0.2, 0.9, 1, 1)
    assert kontext.window(Window(0.3, 0.5)) == Window(0.3, 0.5, 1, 1)
    assert kontext.window(Window(0.95, 1.0)) == Window(0.95, 0.95, 1, 1)
    assert wan.window(Window(first=2, last=3)) == Window(0.0, 1.0, 5, 3)
    # none at all was asked for
    assert wan.window(Window(first=0, last=0)) == Window(0.0, 1.0, 0, 0)


def test_every_entry_names_the_size_of_its_model():
    """A model of the same class and another size (LTX-Video 13B, Cosmos 14B) was not fitted."""
    for entry in json.loads(coefficients.DATA.read_text(encoding="utf-8")):
        assert {"hidden", "blocks"} <= set(entry["when"]), entry["model"]


FLUX_1 = {"hidden": 3072, "blocks": [19, 38], "in_channels": 64, "reference": False}
WAN_14B = {"hidden": 5120, "blocks": [40], "in_dim": 16, "model_type": "t2v", "large": False}
HUNYUAN = {"hidden": 3072, "blocks": [20, 40], "in_channels": 16}


@pytest.mark.parametrize(
    "name, facts, model",
    [
        ("Flux", FLUX_1, "FLUX.1 dev"),
        ("Flux", FLUX_1 | {"reference": True}, "FLUX.1 Kontext"),
        # FLUX.1 Fill
        ("Flux", FLUX_1 | {"in_channels": 384}, None),
        ("Flux", FLUX_1 | {"hidden": 256}, None),
        ("WanModel", WAN_14B, "Wan 2.1 T2V 14B"),
        # Wan 2.2 I2V 14B, which ComfyUI calls t2v
        ("WanModel", WAN_14B | {"in_dim": 36}, None),
        ("WanModel", WAN_14B | {"in_dim": 36, "model_type": "i2v", "keyframes": True}, None),
        (
            "WanModel",
            WAN_14B | {"in_dim": 36, "model_type": "i2v", "keyframes": False},
            "Wan 2.1 I2V 14B 480P",
        ),
        # these call themselves t2v too
        ("VaceWanModel", WAN_14B, None),
        ("WanModel_S2V", WAN_14B, None),
        ("HunyuanVideo", HUNYUAN, "HunyuanVideo"),
        ("HunyuanVideo", HUNYUAN | {"in_channels": 33}, None),
        ("LTXVModel", {"hidden": 2048, "blocks": [28]}, "LTX-Video 2B"),
        ("LTXVModel", {"hidden": 4096, "blocks": [48]}, None),
        ("GeneralDIT", {"hidden": 4096, "blocks": [28]}, "Cosmos 1 7B"),
        ("GeneralDIT", {"hidden": 5120, "blocks": [36]}, None),
        ("NextDiT", {"hidden": 2304, "blocks": [26]}, "Lumina 2"),
        ("NextDiT", {"hidden": 2304, "blocks": [36]}, None),
        ("SomethingElse", {}, None),
    ],
)
def test_coefficients_are_chosen_by_the_models_own_facts(name, facts, model):
    found = coefficients.lookup(name, facts)
    assert (found.model if found else None) == model


@pytest.mark.parametrize("facts", [WAN_14B, WAN_14B | {"hidden": 1536, "blocks": [30]}])
def test_wan_s_plain_set_is_given_to_who_asks(facts):
    """And to nobody else: graphs of before keep the set that they had."""
    kept = coefficients.lookup("WanModel", facts)
    asked = coefficients.lookup("WanModel", facts, plain=True)
    assert (kept.plain, kept.feature, kept.first, kept.last) == (False, "vector", 5, 0)
    assert (asked.plain, asked.feature, asked.first, asked.last) == (True, "timestep", 1, 1)
    assert asked.model == f"{kept.model}, plain"
    one = coefficients.lookup("Flux", FLUX_1, plain=True)
    assert one.model == "FLUX.1 dev"  # where there is one


def test_a_model_of_the_same_shape_is_named():
    """Nothing tells these apart: who has the other one must be able to see it."""
    assert "Wan 2.2 T2V 14B" in ENTRIES["Wan 2.1 T2V 14B"].unfitted
    assert "Dev" in ENTRIES["HiDream I1 Full"].unfitted
    assert "Turbo" in ENTRIES["Z-Image"].unfitted
    assert "Edit" in ENTRIES["Qwen-Image"].unfitted


@pytest.mark.parametrize("page", ["NibbleApplyTeaCache.md", "NibbleApplyTeaCache/zh.md"])
def test_the_help_page_names_every_entry(page):
    text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
    joint = "；" if "zh" in page else "; "
    assert joint.join(ENTRIES) in text
