"""State goes through safetensors and JSON unchanged; damage is found; hostile content is refused."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, sha256
from ssl_kit.training.checkpoint import SafeCheckpointIO, generators, newest, set_generators

STATE = {
    "global_step": 7,
    "tuple": (1, 2.5, None, "text", True),
    "numbers": {0: {"lr": 0.1 + 0.2}, 1: {}},
    "nested": [{"weight": torch.arange(6.0).reshape(2, 3)}, torch.tensor(3, dtype=torch.int64)],
    "half": torch.ones(3, dtype=torch.bfloat16),
    "array": np.arange(4, dtype=np.uint32),
    "$": "a key that looks like a tag",
}


def save(folder, state=STATE):
    SafeCheckpointIO().save_checkpoint(state, folder)
    return folder


def test_state_comes_back_as_it_was(tmp_path):
    loaded = SafeCheckpointIO().load_checkpoint(save(tmp_path / "step-1"))
    assert loaded["tuple"] == STATE["tuple"] and loaded["numbers"] == STATE["numbers"]
    assert loaded["$"] == STATE["$"] and list(loaded) == list(STATE)
    assert torch.equal(loaded["nested"][0]["weight"], STATE["nested"][0]["weight"])
    assert torch.equal(loaded["nested"][1], STATE["nested"][1]) and loaded["nested"][1].ndim == 0
    assert loaded["half"].dtype == torch.bfloat16
    assert np.array_equal(loaded["array"], STATE["array"]) and loaded["array"].dtype == np.uint32
    assert sorted(path.name for path in (tmp_path / "step-1").iterdir()) == [
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]


def test_shared_tensors_and_views_are_stored_apart(tmp_path):
    base = torch.arange(10.0)
    state = {"global_step": 0, "a": base[2:5], "b": base}
    loaded = SafeCheckpointIO().load_checkpoint(save(tmp_path / "c", state))
    assert torch.equal(loaded["a"], base[2:5]) and torch.equal(loaded["b"], base)


def test_the_memory_format_comes_back(tmp_path):
    weight = torch.rand(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    loaded = SafeCheckpointIO().load_checkpoint(save(tmp_path / "c", {"global_step": 0, "momentum": weight}))
    assert torch.equal(loaded["momentum"], weight) and loaded["momentum"].stride() == weight.stride()


def test_generators_continue_where_they_were():
    state = generators()
    wanted = (torch.rand(3), np.random.rand(3), random.random())
    set_generators(state)
    got = (torch.rand(3), np.random.rand(3), random.random())
    assert torch.equal(got[0], wanted[0]) and np.array_equal(got[1], wanted[1]) and got[2] == wanted[2]


def test_the_newest_that_verifies_is_taken_and_the_fallback_said(tmp_path, capsys):
    save(tmp_path / "step-00000010")
    save(tmp_path / "step-00000020")
    assert newest(tmp_path).name == "step-00000020"
    (tmp_path / "step-00000020" / "state.json").write_text("{}")
    assert newest(tmp_path).name == "step-00000010"
    assert "step-00000020" in capsys.readouterr().err
    (tmp_path / "step-00000010" / "state.safetensors").unlink()
    with pytest.raises(DamagedError):
        newest(tmp_path)
    assert newest(tmp_path / "empty") is None


def test_only_what_is_written_here_is_read(tmp_path):
    folder = save(tmp_path / "c", {"global_step": 0, "tuple": (1, 2)})
    rest = json.loads((folder / "state.json").read_text())
    rest["tuple"] = {"$": "python/object/apply:os.system", "items": ["true"]}
    (folder / "state.json").write_text(json.dumps(rest))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = sha256(folder / "state.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="does not write"):
        SafeCheckpointIO().load_checkpoint(folder)


def test_an_object_cannot_be_stored(tmp_path):
    with pytest.raises(TypeError, match="/thing is a object"):
        save(tmp_path / "c", {"global_step": 0, "thing": object()})
    assert not (tmp_path / "c").exists()


def test_no_pickle_in_the_tensors(tmp_path):
    folder = save(tmp_path / "c")
    tensors = load_file(folder / "state.safetensors")
    assert set(tensors) == {"/nested/0/weight", "/nested/1", "/half", "/array"}
    save_file(tensors, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "state.safetensors").read_bytes()
