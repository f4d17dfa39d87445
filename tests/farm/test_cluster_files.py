"""The files of docs/clusters start what docs/farm.md says: they parse, agree with one another and
with pyproject.toml about Ray's version, and their commands are ones that `nibble farm` and `ray
start` take. Against the operator's and SkyPilot's own schemas they were checked by hand
(docs/farm.md).
"""

import contextlib
import importlib
import io
import re
import shlex

import pytest

import checkout

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
FOLDER = checkout.ROOT / "docs" / "clusters"
PAGE = checkout.ROOT / "docs" / "farm.md"
cli = importlib.import_module("nibble.__main__")
# of `ray start --help`, 2.60.0
RAY_START = {
    *("--head", "--address", "--port", "--block", "--include-dashboard", "--num-cpus"),
    *("--num-gpus", "--memory", "--resources", "--node-ip-address", "--node-name"),
}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def texts() -> dict[str, str]:
    paths = [PAGE, *sorted(FOLDER.iterdir())]
    return {path.name: path.read_text(encoding="utf-8") for path in paths}


def clusters() -> list[tuple[str, dict]]:
    job = documents("kuberay-job.yaml")[0]["spec"]["rayClusterSpec"]
    return [("kuberay.yaml", documents("kuberay.yaml")[-1]["spec"]), ("kuberay-job.yaml", job)]


def groups() -> list[tuple[str, dict]]:
    """Name of a group of pods → the group, of both files of Kubernetes."""
    found = []
    for file, spec in clusters():
        found.append((f"{file} head", spec["headGroupSpec"]))
        found += [(f"{file} {group['groupName']}", group) for group in spec["workerGroupSpecs"]]
    return found


def test_all_files_parse_and_are_what_the_page_calls_them():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"(clusters/{path.name})" in page for path in FOLDER.iterdir())
    assert all(documents(path.name) for path in FOLDER.glob("*.yaml"))
    kinds = [document["kind"] for document in documents("kuberay.yaml")]
    assert kinds == ["PersistentVolumeClaim", "NetworkPolicy", "RayCluster"]
    assert [document["kind"] for document in documents("kuberay-job.yaml")] == ["RayJob"]


def test_one_version_of_ray_within_the_extra():
    named = re.compile(r"\b(?:ray:|ray\[default\]==|farm:|Ray )(\d+\.\d+\.\d+)")
    versions = {version for text in texts().values() for version in named.findall(text)}
    versions |= {spec["rayVersion"] for _, spec in clusters()}
    assert versions == {"2.60.0"}
    project = (checkout.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = re.search(r'^farm = \[.*?"ray(?:\[\w+\])?([^"]*)"', project, re.M | re.S)
    assert extra is not None
    specifiers = pytest.importorskip("packaging.specifiers")
    assert specifiers.SpecifierSet(extra[1].strip()).contains("2.60.0"), extra[1]


def test_commands_of_the_farm_are_taken():
    found = [
        shlex.split(line.strip("` "), comments=True)[2:]
        for text in texts().values()
        for line in re.findall(r"python \S+ farm [^\n`]*", text)
    ]
    assert len(found) >= 3
    for command in found:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                cli._parser().parse_args(command)
            except SystemExit:
                pytest.fail(f"{command}: {said.getvalue()}")


def test_options_of_ray_start_exist():
    lines = [line for text in texts().values() for line in re.findall(r"ray start [^\n`]*", text)]
    used = {option for line in lines for option in re.findall(r"--[a-z-]+", line)}
    assert {"--head", "--address"} <= used <= RAY_START
    with contextlib.suppress(ImportError):
        scripts = importlib.import_module("ray.scripts.scripts")
        known = {option for parameter in scripts.start.params for option in parameter.opts}
        assert known >= RAY_START


@pytest.mark.parametrize("name, group", groups(), ids=[name for name, _ in groups()])
def test_every_pod_is_behind_the_policy_and_sees_the_models(name, group):
    claim, policy, _ = documents("kuberay.yaml")
    template = group["template"]
    assert (
        template["metadata"]["labels"].items()
        >= policy["spec"]["podSelector"]["matchLabels"].items()
    )
    (volume,) = template["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    (container,) = template["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/models"}]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == name.endswith("gpu")


def test_only_pods_of_the_farm_and_the_operator_reach_its_ports():
    claim, policy, _ = documents("kuberay.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    own, operator = policy["spec"]["ingress"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert own == {"from": [{"podSelector": policy["spec"]["podSelector"]}]}
    assert [port["port"] for port in operator["ports"]] == [8265]


def test_every_cluster_asks_for_a_token():
    assert all(spec["authOptions"] == {"mode": "token"} for _, spec in clusters())
    assert "RAY_AUTH_MODE=token" in documents("skypilot.yaml")[0]["run"]


def test_skypilot_writes_to_a_file_system_and_only_reads_a_bucket():
    (task,), (volume,) = documents("skypilot.yaml"), documents("skypilot-volume.yaml")
    assert task["volumes"] == {"/models": volume["name"]}
    assert volume["config"]["access_mode"] == "ReadWriteMany"
    assert task["file_mounts"]["/sources"]["mode"] == "MOUNT"
    assert "/sources" not in task["run"]
