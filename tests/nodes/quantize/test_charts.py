"""Charts of codewords: the use of codebooks, a file's facts, and a calibration at work."""

import pytest
import torch

from nibble.nodes.bridge.host import charts
from nibble.nodes.bridge.quantize import charts as vq_charts
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files import checkpoint
from nibble.quant.job.monitor import BlockError
from nibble.quant.vq4dit.codebook_usage import inspect, use_of
from nibble.quant.weights.vq import VQWeight


def test_codebook_use_counts_codewords_and_entropy():
    even = torch.arange(64, dtype=torch.uint8).repeat(2, 1)
    codes = VQWeight(even, torch.randn(256, 2).half())
    use = use_of(codes)
    assert (use.used, use.codewords, use.entropy) == (64, 256, 6.0)
    assert use.share == 0.75
    assert (
        use_of(VQWeight(torch.zeros(2, 64, dtype=torch.uint8), torch.randn(256, 2).half())).entropy
        == 0
    )


def test_charts_have_the_agreed_shape(codeword_file):
    file, model = checkpoint.open_quantized(codeword_file), loading.load(codeword_file)
    facts = vq_charts.model_chart(file, loading.vram_needed(model), model.load_device)
    told = dict(facts["details"])
    assert facts["kind"] == "facts"
    assert 3.0 < float(told["bits per weight"]) < 3.6
    assert "64 codewords of 2" in told["layers"]
    uses = inspect(file)
    mean = sum(use.bits_per_weight * use.weights for use in uses) / sum(use.weights for use in uses)
    assert vq_charts.bits_per_weight(file) == pytest.approx(mean)
    chart = vq_charts.inspect_chart(file, uses)
    assert chart["kind"] == "codebooks"
    assert len([row for row in chart["rows"] if "use" in row]) == len(file.layers)
    assert chart.keys() == charts.layers_chart(vq_charts._report(file), "", "").keys()


def test_the_live_chart_has_a_curve_for_each_block():
    shown = []

    class Shown:
        title = "calibrating"
        at = staticmethod(lambda share, text: None)
        show = shown.append

    live = vq_charts.LiveBlocks("model", "best", Shown)
    for number in range(2):
        for step, db in ((1, 10.0), (10, 12.0), (20, 14.0)):
            live(BlockError(number, 3, f"blocks.{number}", step, 20, db))
    last = shown[-1]
    assert last["kind"] == "blocks"
    assert last["blocks"] == 3
    assert [row["points"][-1] for row in last["rows"]] == [[1.0, 14.0]] * 2
    assert dict(last["summary"])["gain per block"] == "+4.0 dB"
