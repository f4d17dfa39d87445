"""What a jobs file asks for, and how one with a slip is refused before any work."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nibble.farm import jobs, jobs_file
from nibble.farm.jobs import Job, Order
from nibble.quant.files.errors import FileRefused

pytest.importorskip("yaml")


def model(path, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": torch.zeros(2, 2)}, path, metadata or None)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b", "more/c"):
        model(tmp_path / f"{name}.safetensors")
    return tmp_path


def read(folder, text, name="jobs.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return jobs_file.read(path)[1]


def test_models_times_recipes(folder):
    found = read(
        folder,
        """
        recipes:
          int4: {preset: fast, rank: 64, gptq: false}
          vq3: {method: vq, bits: 3, keep: [x.*, y]}
        models: "*.safetensors"
        target: out/{recipe}/{model}.safetensors
        worker: {cpus: 2, python: /opt/python}
        """,
    )
    worker = {"cpus": 2, "python": "/opt/python"}
    int4 = ("--preset=fast", "--rank=64", "--no-gptq")
    vq3 = ("--method=vq", "--bits=3", "--keep=x.*", "--keep=y")
    assert found == [
        Job(
            f"out/{recipe}/{name}.safetensors",
            folder / f"{name}.safetensors",
            folder / f"out/{recipe}/{name}.safetensors",
            recipe,
            options,
            worker,
        )
        for name in "ab"
        for recipe, options in (("int4", int4), ("vq3", vq3))
    ]


def test_a_job_of_its_own_adds_to_its_recipe(folder):
    (job,) = read(
        folder,
        """
        recipes: {int4: {rank: 64}}
        worker: {cpus: 2}
        jobs:
          - {source: a.safetensors, target: x.safetensors, options: {rank: 16}, gpus: 1, parts: 3}
        """,
    )
    assert (job.name, job.options, job.parts) == ("x.safetensors", ("--rank=64", "--rank=16"), 3)
    assert job.worker == {"cpus": 2, "gpus": 1}


def test_json_says_the_same(folder):
    content = {"models": ["a.safetensors", "more/*"], "recipes": {"i": {"rank": 16}}}
    as_json = read(folder, json.dumps(content), "jobs.json")
    assert as_json == read(folder, json.dumps(content))
    assert [job.target for job in as_json] == [
        folder / "quantized" / f"{name}-i.safetensors" for name in "ac"
    ]


def test_models_may_be_named_by_whole_paths(folder):
    found = read(folder, f"folder: more\nmodels: {folder}/[ab].safetensors")
    assert [job.source.name for job in found] == ["a.safetensors", "b.safetensors"]


def test_a_recipe_may_be_called_by_a_number(folder):
    (job,) = read(folder, "recipes: {1: {rank: 16}}\njobs: [{source: a.safetensors, recipe: 1}]")
    assert (job.recipe, job.options) == ("1", ("--rank=16",))


def test_prompts_are_found_in_the_folder_wherever_a_worker_runs(folder):
    (job,) = read(folder, "recipes: {r: {prompts: p.safetensors}}\nmodels: a.safetensors")
    assert job.options[-1] == f"--prompts={folder / 'p.safetensors'}"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("models: z*", "matches no model"),
        ("recipes: {r: {rnak: 4}}\nmodels: a*", "recipe r: quantize has no option 'rnak'"),
        ("recipes: {r: {preset: quick}}\nmodels: a*", "recipe r: .*invalid choice: 'quick'"),
        ("recipes: {r: {driven: true}}\nmodels: a*", "driven is the farm's own business"),
        ("recipes: {r: [rank]}\nmodels: a*", "recipe r is \\['rank'\\]"),
        ("jobs: [{source: z.safetensors}]", "job 1: its source .*z.safetensors does not exist"),
        ("jobs: [{target: z.safetensors}]", "job 1: its source"),
        ("jobs: [{source: a.safetensors, recipe: q}]", "job 1: there is no recipe 'q', only svdq"),
        ("jobs: [{source: a.safetensors, parts: 0}]", "job 1: parts is 0"),
        ("jobs: [{source: a.safetensors, cpus: -1}]", "job 1: cpus is -1"),
        ("jobs: [{source: a.safetensors, sauce: b}]", "job 1 has no 'sauce'"),
        ("jobs: [a.safetensors]", "job 1 is 'a.safetensors'"),
        ("job: []", "the file has no 'job'"),
        ("worker: {cores: 4}", "worker has no 'cores'"),
        ("worker: {memory: lots}", "worker: memory is 'lots'"),
        ("folder: nowhere", "nowhere does not exist"),
        ("worker: {gpus: 1.5}", "gpus is 1.5; above 1 give a whole number"),
        ("worker: {retries: 3000000000}", "retries is 3000000000; give 0 to 1000"),
        ("worker: {memory: .inf}", "memory is inf; give 0 to 100000"),
        ("worker: {cpus: .nan}", "cpus is nan; give 0 to 4096"),
        ('worker: {pack: "a\\0b"}', "pack holds a character"),
        ("models: a*\ntarget: '{model:>9999999999}'", "and no {model:>9999999999}"),
        ("[" * 100_000, "nested too deep"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nworker: {pack: [*a,*a,*a,*a]}", "the file has no 'a'"),
        ("{}", "neither models nor jobs"),
        ("", "the file is empty"),
        ("a: [", "expected"),
        ("models: a*\ntarget: '{name}.safetensors'", "hold {model} and {recipe}, and no {name}"),
    ],
)
def test_a_slip_is_told_before_any_work(folder, text, sentence):
    with pytest.raises(FileRefused, match=f"^jobs.yaml: .*{sentence}"):
        read(folder, text)


def test_two_jobs_of_one_target_are_refused(folder):
    found = read(folder, "models: '*.safetensors'\ntarget: one.safetensors")
    with pytest.raises(ValueError, match="one.safetensors would be made of a.* and of b"):
        jobs.each_once(found)
    roundabout = replace(found[1], target=folder / "more" / ".." / "one.safetensors")
    with pytest.raises(ValueError, match="would be made of"):
        jobs.each_once([found[0], roundabout])
    assert jobs.each_once([found[0], found[0]]) == [found[0]]


def test_models_of_a_folder(folder):
    model(folder / "quantized" / "a-svdq.safetensors", format="nibble")
    for number in (1, 2):
        model(folder / f"big-0000{number}-of-00002.safetensors")
    model(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    (folder / "pipeline" / "model_index.json").write_text("{}")
    (folder / "notes.txt").write_text("")
    names = [path.relative_to(folder).as_posix() for path in jobs.models_in(folder)]
    assert names == [
        "pipeline",
        "a.safetensors",
        "b.safetensors",
        "big-00001-of-00002.safetensors",
        "more/c.safetensors",
    ]
    targets = [Order(folder).jobs_of(folder / name)[0].name for name in (names[0], names[3])]
    assert targets == ["quantized/pipeline-svdq.safetensors", "quantized/big-svdq.safetensors"]


def test_recipes_are_typed_as_quantize_has_them():
    assert jobs.recipe_typed("vq3=--method vq --bits 3") == (
        "vq3",
        ("--method", "vq", "--bits", "3"),
    )
    for text, sentence in (("--bits 3", "has no name"), ("a=--bits x", "invalid int")):
        with pytest.raises(ValueError, match=sentence):
            jobs.recipe_typed(text)
