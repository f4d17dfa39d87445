"""Which layers a part has, and what its file's name says."""

import pytest

from nibble.quant.files.architectures import LayerPlan
from nibble.quant.files.part_files import PartName, read_name
from nibble.quant.job.parts import ranges


def planned(*sizes):
    """Layers of so many weights; a name with two sizes reads one input twice."""
    layers = []
    for number, size in enumerate(sizes):
        group = f"g{number}" if isinstance(size, tuple) else None
        members = size if isinstance(size, tuple) else (size,)
        layers += [
            LayerPlan(f"{number}.{i}", "w4a4", "", 1, n, False, group=group)
            for i, n in enumerate(members)
        ]
    return layers


@pytest.mark.parametrize(
    "sizes, count, wanted",
    [
        ((1, 1, 1, 1), 2, [2, 2]),
        ((6, 1, 1, 1, 1, 1, 1), 2, [6, 6]),
        ((1, 1, 10), 3, [1, 1, 10]),
        ((10, 1, 1), 3, [10, 1, 1]),
        (((3, 3), (3, 3), 3, 3), 3, [6, 6, 6]),
        ((5,), 1, [5]),
    ],
)
def test_ranges_have_about_the_same_number_of_weights(sizes, count, wanted):
    found = ranges(planned(*sizes), count)
    assert [sum(layer.N for layer in run) for run in found] == wanted
    assert sum(found, []) == planned(*sizes)


def test_layers_of_one_input_are_never_in_two_parts():
    layers = planned(2, (1, 1, 1), (4, 4, 4), 1, (1, 1))
    for count in range(1, 6):
        homes = {}
        for number, run in enumerate(ranges(layers, count)):
            for layer in run:
                homes.setdefault(layer.group or layer.name, set()).add(number)
        assert all(len(home) == 1 for home in homes.values())


def test_names_of_parts_say_of_what_they_are(tmp_path):
    name = PartName(tmp_path / "q.safetensors", 2, 4)
    assert name.path == tmp_path / "q.safetensors.part2of4"
    assert read_name(name.path) == name
    for other in ("", ".part5of4", ".part0of2", ".part1of2.partial"):
        assert read_name(tmp_path / f"q.safetensors{other}") is None
    assert read_name(tmp_path / "q.part1of2") is None
