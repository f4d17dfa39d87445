"""Quantize on a Farm: what is asked of the farm's process, what its lines become, Stop, and the
sentences; and one run in order, whose file is the command line's.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import pytest

from checkout import ROOT
from nibble.nodes.bridge.host import progress
from nibble.nodes.bridge.quantize import farm, farm_process
from nibble.nodes.bridge.quantize.farm import FarmRequest
from nibble.quant.cli.measure import another
from nibble.quant.files import atomic
from nibble.quant.files.errors import FileRefused

QUICK = "--rank 16 --solver svd --rotation off --memory-cap 0"
RUNNING = {
    "event": "farm",
    "made": 0,
    "running": [{"job": "a", "worker": "node1-ab12", "layers": [3, 42]}],
    "weights": [10, 100],
    "notes": [],
    "ended": {},
}
NOWHERE = "no machine of the cluster has 8 cores; or say less in the jobs file (worker: cpus, gpus)"


def line(**changes) -> str:
    return json.dumps(RUNNING | changes)


@pytest.fixture
def stand_in(monkeypatch):
    """Makes the farm's process a program that prints lines and then runs some code; returns the
    command lines that were asked for.
    """
    asked = []

    def use(lines: list[str], then: str = "") -> list:
        code = f"import sys, time\nfor line in {lines!r}: print(line, flush=True)\n{then}"
        command = farm_process.command

        def instead(*arguments):
            asked.append(command(*arguments))
            return [sys.executable, "-c", code]

        monkeypatch.setattr(farm_process, "command", instead)
        return asked

    return use


@pytest.fixture
def told(monkeypatch):
    """What the node's page is told."""
    events = []

    class Server:
        client_id = "browser"

        def send_sync(self, event, data, client):
            events.append((event, data))

    monkeypatch.setattr(progress, "PromptServer", type("P", (), {"instance": Server()}))
    monkeypatch.setattr(progress, "PAUSE", -1.0)
    return events


@pytest.fixture(autouse=True)
def temp(monkeypatch, tmp_path_factory):
    """ComfyUI's temp folder."""
    folder = tmp_path_factory.mktemp("temp")
    monkeypatch.setattr(farm.folder_paths, "get_temp_directory", lambda: str(folder))
    return folder


@pytest.fixture
def ray(monkeypatch):
    """As if Ray was installed."""
    monkeypatch.setattr(farm.on_ray, "is_installed", lambda: True)


@pytest.fixture
def settings(monkeypatch, tmp_path_factory):
    """The file in ComfyUI's user folder that names a cluster; not there yet."""
    folder = tmp_path_factory.mktemp("user")
    monkeypatch.setattr(farm.farm_settings.folder_paths, "get_user_directory", lambda: str(folder))
    return folder / "nibble-farm.json"


def request(**changes) -> FarmRequest:
    return FarmRequest(**({"model_name": "flux.safetensors", "options": QUICK} | changes))


def jobs_in(temp) -> dict:
    (file,) = temp.glob("nibble-farm-*.json")
    return json.loads(file.read_text())


# ---- what is asked


def test_on_this_machine_it_works_here_in_order_and_never_asks_for_ray(folder, temp, stand_in):
    asked = stand_in([line(ended={"a": "no"}, running=[])], "sys.exit(1)")
    with pytest.raises(ValueError, match="^no$"):
        request().run()
    (words,) = asked
    assert words[:3] == [sys.executable, str(farm_process.PACK), "farm"]
    assert words[-1] == "--in-order"
    assert "--address" not in words
    assert jobs_in(temp)["jobs"] == [
        {
            "source": str(folder / "flux.safetensors"),
            "target": str(folder / "flux-svdq-int4-r16.safetensors"),
            "parts": 1,
            "recipe": "node",
        }
    ]


def test_the_cluster_a_worker_and_the_widgets_reach_the_farm(folder, temp, stand_in, ray, settings):
    settings.write_text('{"address": " head:6379 ", "pack": "/opt/nibble", "cpus": 2}')
    asked = stand_in([line(ended={"a": "no"}, running=[])], "sys.exit(1)")
    with pytest.raises(ValueError, match="^no$"):
        request(
            where="cluster",
            method="vq",
            options="--bits 2 --keep 'double_blocks.0.*' --keep x",
            worker="cpus=4 memory=24.5",
            parts=3,
            overwrite=True,
        ).run()
    assert asked[0][-2:] == ["--address", "head:6379"]
    content = jobs_in(temp)
    assert content["recipes"]["node"] == {
        "bits": 2,
        "keep": ["double_blocks.0.*", "x"],
        "method": "vq",
        "preset": "fast",
        "overwrite": True,
    }
    (job,) = content["jobs"]
    assert job["target"] == str(folder / "flux-vq2-fast.safetensors")
    assert (job["pack"], job["cpus"], job["memory"]) == ("/opt/nibble", 4, 24.5)
    assert job["parts"] == 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"options": "--rnak 64"}, "options: quantize has no option '--rnak'"),
        ({"options": "--rank many"}, "options: .*--rank"),
        ({"options": "--keep 'a"}, "options: .*No closing quotation.*close the quotes"),
        ({"options": "--preset best"}, "--preset is a widget of this node, 'preset'"),
        ({"options": "--driven"}, "driven is the farm's own business"),
        ({"options": "--bits 3"}, "--bits belongs to --method vq"),
        ({"preset": "vq4dit"}, "vq4dit"),
        ({"worker": "gpus"}, "worker: 'gpus' cannot be read; give NAME=VALUE"),
        ({"worker": "python=/bin/sh"}, "worker: 'python=/bin/sh' cannot be read"),
        ({"options": "--prompts /etc/passwd"}, "--prompts passwd is not in models/"),
        ({"worker": "gpus=all"}, "worker: gpus is 'all'; give a number"),
        ({"worker": "cpus=-1"}, "worker: cpus is '-1'; give a number"),
        ({"filename": "../x"}, "filename|name"),
        ({"model_name": "gone.safetensors"}, "gone.safetensors is not in ComfyUI's"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(folder, stand_in, changes, sentence):
    asked = stand_in([])
    with pytest.raises(ValueError, match=sentence):
        request(**changes).run()
    assert not asked


def test_a_cluster_without_ray_is_refused_in_words(folder, monkeypatch, settings):
    settings.write_text('{"address": "auto"}')
    monkeypatch.setattr(farm.on_ray, "is_installed", lambda: False)
    with pytest.raises(ValueError, match="needs Ray, .*pip install ray.*choose 'this machine'"):
        request(where="cluster").run()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "knows of no cluster: write .*HOST:6379.*nibble-farm.json"),
        ("{", "names no cluster"),
        ("[]", "names no cluster"),
        ("{}", "names no cluster"),
        ('{"address": ""}', "address is ''"),
        ('{"address": "auto", "adress": "x"}', "there is no 'adress'"),
    ],
)
def test_only_this_comfyui_s_own_settings_name_a_cluster(
    folder, stand_in, ray, settings, text, sentence
):
    asked = stand_in([])
    if text is not None:
        settings.write_text(text)
    with pytest.raises(FileRefused, match=sentence):
        request(where="cluster").run()
    assert not asked


def test_a_file_that_another_run_is_writing_is_refused_at_once(folder, stand_in):
    asked = stand_in([])
    with atomic.exclusive(folder / "flux-svdq-int4-r16.safetensors"):
        with pytest.raises(FileRefused, match="is being written"):
            request().run()
    assert not asked


# ---- what comes back


def test_lines_become_layers_worker_and_what_is_waited_for(folder, stand_in, told):
    lines = [
        line(running=[], weights=[0, 0], notes=[NOWHERE]),
        "a package that prints",
        line(),
        line(ended={"a": "no"}, running=[]),
    ]
    stand_in(lines, "sys.exit(1)")
    with pytest.raises(ValueError, match="^no$"):
        request(node_id="7").run()
    events = [data for event, data in told if event == "nibble_progress"]
    waiting, working = events[1:3]
    assert waiting["name"].endswith("say less in 'worker' (cpus, gpus)")
    assert (working["title"], working["unit"], working["resumes"]) == ("quantizing", "layer", True)
    assert (working["done"], working["count"], working["share"]) == (3, 42, 0.1)
    assert working["name"] == "node1-ab12"


def test_layers_of_parts_are_told_together_also_of_those_that_have_ended(told):
    watch = farm._Watch(progress.Progress("quantizing", "7", unit="layer"), "head:6379")
    assert told[-1][1]["name"] == "looking for the cluster at head:6379"
    part = {"job": "a, part 1 of 2", "worker": "node1", "layers": [5, 20]}
    other = {"job": "a, part 2 of 2", "worker": "node2", "layers": [4, 22]}
    watch.hear(RUNNING | {"running": [part, other]})
    last = told[-1][1]
    assert (last["done"], last["count"], last["name"]) == (9, 42, "node1, node2")
    watch.hear(RUNNING | {"running": [other | {"layers": [6, 22]}]})
    last = told[-1][1]
    assert (last["done"], last["count"], last["name"]) == (11, 42, "node2")
    watch.hear(RUNNING | {"running": []})
    assert told[-1][1]["name"] == "waiting for a worker"
    watch.hear(RUNNING | {"running": [], "made": 1})
    assert told[-1][1]["name"] == ""


@pytest.mark.parametrize(
    ("lines", "then", "sentence"),
    [
        (
            [line(ended={"a": "x.safetensors is a VAE.", "a, part 2 of 2": "lost"}, running=[])],
            "sys.exit('nibble: 1 could not be made; see page.html')",
            "^x.safetensors is a VAE",
        ),
        (
            [line(ended={"a": str(another(SimpleNamespace(target=Path("x"))))})],
            "sys.exit('nibble: 1 could not be made; see page.html')",
            "^x exists and was .*; choose another name, or switch 'overwrite' on.$",
        ),
        (
            [line(running=[])],
            "sys.exit('a\\nnibble: There is no Ray; leave --address out to work on this machine')",
            "^There is no Ray; choose 'this machine'$",
        ),
        ([], "raise RuntimeError('no room')", r"code 1 \(RuntimeError: no room\)"),
        ([line()], "import os; os._exit(9)", r"code 9 \(without a word\); Run goes on"),
    ],
)
def test_every_sentence_reaches_the_node(folder, stand_in, lines, then, sentence):
    stand_in(lines, then)
    with pytest.raises(ValueError, match=sentence):
        request().run()


def test_a_file_that_the_cluster_wrote_elsewhere_is_told(folder, temp, stand_in, monkeypatch):
    stand_in([line(ended={"a": "done"}, running=[])])
    entry = {"workers": ["node1-ab12"], "seconds": 3, "result": {}, "state": "done"}
    monkeypatch.setattr(farm.farm_report, "earlier", lambda base: {"a": entry})
    with pytest.raises(FileRefused, match="node1-ab12 has made flux.*share ComfyUI's models"):
        request().run()


# ---- Stop


@pytest.mark.parametrize("heeds", [True, False], ids=["ends with its input", "has to be killed"])
def test_stop_ends_the_farm(folder, stand_in, told, tmp_path, monkeypatch, heeds):
    """The farm hears of it by the end of its input."""
    monkeypatch.setattr(farm_process, "ENDING", 20.0 if heeds else 0.2)
    mark = tmp_path / "ended"
    then = f"sys.stdin.read(); open({str(mark)!r}, 'w')" if heeds else "time.sleep(600)"
    stand_in([line()], then)
    ended, end = [], farm_process._end
    monkeypatch.setattr(farm_process, "_end", lambda process: (end(process), ended.append(process)))
    hear = farm._Watch.hear

    def stop(self, event):
        hear(self, event)
        comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(farm._Watch, "hear", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        request(node_id="7").run()
    assert ended[0].returncode == (0 if heeds else -9)
    assert mark.exists() == heeds
    assert told[-1][1]["stopped"]
    assert (told[-1][1]["done"], told[-1][1]["count"]) == (3, 42)


# ---- a run


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_gives_the_command_line_s_bytes_and_is_not_made_twice(
    parts, folder, temp, tmp_path_factory
):
    typed = tmp_path_factory.mktemp("typed") / "typed.safetensors"
    words = ["quantize", str(folder / "flux.safetensors"), str(typed), *QUICK.split()]
    subprocess.run([sys.executable, str(ROOT), *words], check=True, capture_output=True)
    made = request(filename="by farm", parts=parts).run()
    assert made.name == "by farm.safetensors"
    target = folder / made.name
    assert target.read_bytes() == typed.read_bytes()
    assert made.by.count(", ") == 1
    assert "second" in made.by
    assert any(row.db is not None for row in made.report.rows)
    assert made.report.seconds > 0
    stamp = target.stat().st_mtime_ns
    (report,) = temp.glob("*-farm.json")
    assert json.loads(report.read_text())["jobs"][0]["state"] == "done"
    again = request(filename="by farm", parts=parts).run()
    assert json.loads(report.read_text())["jobs"][0]["state"] == "done before"
    assert again.by.endswith(", in an earlier run")
    assert target.stat().st_mtime_ns == stamp
    assert again.report.rows == made.report.rows
