"""The report: errors by what they were measured on, and what they mean for pictures."""

import pytest

from nibble.quant.files.report import DATA_FREE, NOISE, PICTURES, SYNTHETIC, LayerRow, Report, look


def row(db: float, on: str, why: str = "") -> LayerRow:
    return LayerRow("layer", "w4a4", why, db, 100, 30, on=on)


def test_measured_and_synthetic_errors_are_never_one_figure():
    report = Report("FLUX.1", [row(30, PICTURES), row(20, SYNTHETIC), row(40, SYNTHETIC)])
    lines = [value for label, value in report.summary() if label == "error"]
    assert lines[0].startswith("median 30.0 dB, worst 30.0 dB; measured on pictures")
    assert lines[1].startswith("median 30.0 dB, worst 20.0 dB; on synthetic inputs")
    looks = [value for label, value in report.summary() if label == "pictures"]
    assert looks == [look(30)]


def test_nothing_is_said_of_pictures_where_nothing_was_measured():
    assert "pictures" not in dict(Report("FLUX.1", [row(30, SYNTHETIC)]).summary())
    assert "pictures" in dict(Report("FLUX.1", [row(30, NOISE)]).summary())
    old = dict(Report("FLUX.1", [row(30, "")]).summary())
    assert old["error"] == "median 30.0 dB, worst 30.0 dB"


@pytest.mark.parametrize(
    "db, word",
    [(45, "good"), (28, "good"), (27.9, "fair"), (15, "fair"), (14.9, "poor"), (-3, "poor")],
)
def test_the_scale(db, word):
    assert look(db).startswith(word)


def test_data_free_layers_are_counted():
    report = Report("FLUX.1", [row(30, PICTURES), row(29, PICTURES, f"linear; {DATA_FREE}")])
    assert dict(report.summary())["data-free"].startswith("1 layer,")
    assert "data-free" not in dict(Report("FLUX.1", [row(30, PICTURES)]).summary())


def test_reports_of_earlier_files_are_read():
    text = Report("FLUX.1", [row(30, "")]).to_json().replace(',"on":""', "")
    assert Report.from_json(text).rows[0].on == ""
