"""What ComfyUI asks of every node before a graph runs: a linked input is not known yet, a value
from the API can be anything, and a node whose file is there does not run again.
"""

import inspect
import math
from types import SimpleNamespace

import folder_paths
import pytest
from comfy_api.internal import _ComfyNodeInternal, first_real_override

from nibble.nodes import NODES
from nibble.nodes.bridge.host import node_files
from nibble.nodes.intlora import NibbleMergeIntLoRA
from nibble.nodes.svdquant import NibbleQuantizeSVDQuant
from nibble.nodes.vq4dit import NibbleQuantizeVQ

WRONG = (None, "abc", "", 5, -1.5, True, math.nan, [], [1, 2], {}, (None,))


def overriding(method: str) -> list[type]:
    assert all(issubclass(node, _ComfyNodeInternal) for node in NODES)
    return [node for node in NODES if first_real_override(node, method) is not None]


def defaults(node: type) -> dict:
    """Every input with its default, as a prompt has it; sockets are links, thus None."""
    values = {}
    for part in node.INPUT_TYPES().values():
        for name, spec in part.items():
            options = spec[1] if len(spec) > 1 else {}
            choices = spec[0] if isinstance(spec[0], list) else options.get("options") or [None]
            values[name] = options.get("default", choices[0])
    values.pop("unique_id", None)
    return values


def given(node: type, values: dict) -> dict:
    """The same as ComfyUI hands them to the node's methods."""
    if not node.INPUT_IS_LIST:
        return values
    return {name: (None,) if value is None else [value] for name, value in values.items()}


def asked(method, node: type, values: dict):
    """A method's answer to those inputs that ComfyUI would give it."""
    names = inspect.getfullargspec(method)
    taken = values if names.varkw else {k: v for k, v in values.items() if k in names.args}
    return method(**given(node, taken))


@pytest.mark.parametrize("node", overriding("fingerprint_inputs"), ids=lambda node: node.__name__)
def test_a_linked_input_leaves_a_node_s_fingerprint_as_it_is(node):
    values = defaults(node)
    for name in values:
        for value in WRONG:
            first, again = (
                asked(node.fingerprint_inputs, node, values | {name: value}) for _ in range(2)
            )
            assert first == again, (name, value)


@pytest.mark.parametrize("node", overriding("validate_inputs"), ids=lambda node: node.__name__)
def test_a_node_answers_in_words_whatever_it_is_asked(node):
    """A linked input (None) may be right; an input that is missing is ComfyUI's to complain of."""
    values = {name: None for name in defaults(node)}
    assert asked(node.validate_inputs, node, values) is True
    assert isinstance(asked(node.validate_inputs, node, {}), (bool, str))
    for name in values:
        for value in WRONG:
            answer = asked(node.validate_inputs, node, values | {name: value})
            assert answer is True or (isinstance(answer, str) and answer), (name, value)


def test_all_nodes_that_read_or_make_a_file_were_asked():
    assert len(overriding("fingerprint_inputs")) == 23
    assert len(overriding("validate_inputs")) == 16


@pytest.mark.parametrize(
    "node, wrong",
    [
        (NibbleQuantizeSVDQuant, dict(rank=24)),
        (NibbleQuantizeSVDQuant, dict(preset="quick")),
        (NibbleQuantizeVQ, dict(codewords=100)),
        (NibbleQuantizeVQ, dict(bits="9")),
    ],
)
def test_a_wrong_value_of_a_recipe_is_told_once(node, wrong):
    """ComfyUI tells a refusal of validate_inputs once for each input named there."""
    named = inspect.getfullargspec(node.validate_inputs).args
    assert not wrong.keys() & set(named)
    assert set(named) <= {"cls", "model_name", "model"}
    prompt = defaults(node) | wrong
    kept = {name: value for name, value in prompt.items() if name != "memory_gb"}
    hidden = SimpleNamespace(unique_id=None)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=next(iter(wrong))):
        patch.setattr(node, "hidden", hidden, raising=False)
        node.execute(**kept)


def test_a_source_is_looked_for_only_where_no_model_is_connected(folder):
    for node in (NibbleQuantizeSVDQuant, NibbleQuantizeVQ):
        assert node.validate_inputs("flux.safetensors") is True
        assert "gone.safetensors is not in" in node.validate_inputs("gone.safetensors")
        assert node.validate_inputs("gone.safetensors", model=None) is True


def test_a_node_runs_again_where_its_file_is_gone_or_another_one(folder, monkeypatch):
    node = NibbleMergeIntLoRA
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"), raising=False)
    monkeypatch.setattr(node_files, "_made", {})
    before = node.fingerprint_inputs()
    node.made("flux.safetensors")
    assert node.fingerprint_inputs() == before, "the second time nothing runs"
    (folder / "flux.safetensors").write_bytes(b"another")
    changed = node.fingerprint_inputs()
    assert changed != before
    node.made("flux.safetensors")
    assert node.fingerprint_inputs() == changed
    (folder / "flux.safetensors").unlink()
    gone = {node.fingerprint_inputs(), node.fingerprint_inputs(), before, changed}
    assert len(gone) == 4, "until it is made again"
    folder_paths.filename_list_cache.clear()
