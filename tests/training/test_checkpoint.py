"""State goes through safetensors and JSON unchanged; damage is found; hostile content is refused."""

import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Tiny, train

from ssl_kit.core import files
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, FullError, sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.training import checkpoint
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO, generators, newest, resumable, set_generators
from ssl_kit.training.guard import Guard
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import Optim

STATE = {
    "global_step": 7,
    "tuple": (1, 2.5, None, "text", True),
    "numbers": {0: {"lr": 0.1 + 0.2}, 1: {}},
    "nested": [{"weight": torch.arange(6.0).reshape(2, 3)}, torch.tensor(3, dtype=torch.int64)],
    "half": torch.ones(3, dtype=torch.bfloat16),
    "infinite": [math.inf, -math.inf],
    "a/b": torch.zeros(1),
    "a": {"b": torch.ones(1)},
    "array": np.arange(4, dtype=np.uint32),
    "$": "a key that looks like a tag",
}


def save(folder, state=STATE):
    SafeCheckpointIO().save_checkpoint(state, folder)
    return folder


def test_state_comes_back_as_it_was(tmp_path):
    loaded = SafeCheckpointIO().load_checkpoint(save(tmp_path / "c"))
    assert loaded["tuple"] == STATE["tuple"] and loaded["numbers"] == STATE["numbers"]
    assert loaded["$"] == STATE["$"] and list(loaded) == list(STATE)
    assert torch.equal(loaded["nested"][0]["weight"], STATE["nested"][0]["weight"])
    assert torch.equal(loaded["nested"][1], STATE["nested"][1]) and loaded["nested"][1].ndim == 0
    assert loaded["half"].dtype == torch.bfloat16
    assert loaded["infinite"] == STATE["infinite"] and (loaded["a/b"], loaded["a"]["b"]) == (0, 1)
    assert np.array_equal(loaded["array"], STATE["array"]) and loaded["array"].dtype == np.uint32
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
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


@pytest.mark.parametrize(("saved", "visible"), [(2, 1), (1, 2), (2, 0), (0, 1), (2, 2), (0, 0)])
def test_generators_of_the_gpus_that_are_there_are_restored(saved, visible, monkeypatch, capsys):
    """Only what torch says of GPUs, and is told, is put in its place: there may be none here."""
    told = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)

    def set_rng_state(state, device):
        assert int(device) < visible, "invalid device ordinal"
        told[int(device)] = state.tolist()

    monkeypatch.setattr(torch.cuda, "set_rng_state", set_rng_state)
    monkeypatch.setattr(torch.cuda.random, "set_rng_state", set_rng_state)
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    if saved:
        state["cuda"] = [torch.full((4,), device, dtype=torch.uint8) for device in range(saved)]
    set_generators(state)
    assert told == {device: [device] * 4 for device in range(min(saved, visible))}
    said = capsys.readouterr().out
    assert (f"saved with {saved} GPU" in said and f"{visible} " in said) if saved != visible else not said


def at(folder, step):
    return save(folder / f"step-{step:08d}", {**STATE, "global_step": step})


def test_the_newest_that_verifies_is_taken_and_the_fallback_said(tmp_path, capsys):
    at(tmp_path, 10)
    at(tmp_path, 20)
    assert newest(tmp_path).name == "step-00000020"
    (tmp_path / "step-00000020" / "state.json").write_text("{}")
    assert newest(tmp_path).name == "step-00000010"
    assert "step-00000020" in capsys.readouterr().err
    (tmp_path / "step-00000010" / "state.safetensors").unlink()
    with pytest.raises(DamagedError):
        newest(tmp_path)
    assert newest(tmp_path / "empty") is None


FOREIGN = {
    "a class": {"$": "python/object/apply:os.system", "items": ["true"]},
    "a tensor that is not there": {"$": "tensor", "name": "/nowhere"},
    "a dict of triples": {"$": "dict", "items": [[1, 2, 3]]},
    "a dict whose keys are lists": {"$": "dict", "items": [[[1], 2]]},
    "a tuple of nothing": {"$": "tuple"},
    "a number in words": {"$": "float", "value": "1e5"},
    "half an array": {"$": "array", "name": "/half"},  # numpy has no bfloat16
}


def rewritten(folder, name, text):
    """A checkpoint with another file of that name, and its sha256 in the manifest."""
    (folder / name).write_text(text)
    manifest = read_sealed(folder / "manifest.json")
    manifest["files"][name] = sha256(folder / name)
    write_sealed(folder / "manifest.json", manifest)
    return folder


@pytest.mark.parametrize("what", FOREIGN)
def test_only_what_is_written_here_is_read(tmp_path, what):
    folder = save(tmp_path / "c", {"global_step": 7, "half": STATE["half"], "tuple": (1, 2)})
    assert SafeCheckpointIO().load_checkpoint(folder)["tuple"] == (1, 2)
    rest = json.loads((folder / "state.json").read_text())
    rest["tuple"] = FOREIGN[what]
    with pytest.raises(DamagedError):
        SafeCheckpointIO().load_checkpoint(rewritten(folder, "state.json", json.dumps(rest)))


@pytest.mark.parametrize("text", ["[1, 2]", "null", "[" * 900 + "]" * 900])
def test_a_state_that_is_none_is_refused(tmp_path, text):
    with pytest.raises(DamagedError):
        SafeCheckpointIO().load_checkpoint(rewritten(save(tmp_path / "c"), "state.json", text))


def test_tensors_that_are_none_are_refused(tmp_path):
    with pytest.raises(DamagedError):
        SafeCheckpointIO().load_checkpoint(rewritten(save(tmp_path / "c"), "state.safetensors", "no tensors"))


@pytest.mark.parametrize("wrong", ["int64", "float16", "shape", "missing", "nan", "none"])
def test_weights_of_another_model_are_refused(tmp_path, wrong):
    own = torch.nn.Linear(3, 2).state_dict()
    weight = own["weight"]
    stored = {
        "int64": own | {"weight": weight.long()},
        "float16": own | {"weight": weight.half()},
        "shape": own | {"weight": weight[:1]},
        "missing": {"weight": weight},
        "nan": own | {"weight": torch.full_like(weight, float("nan"))},
        "none": [weight],
    }
    folder = save(tmp_path / "c", {"global_step": 0, "state_dict": stored[wrong]})
    SafeCheckpointIO().load_checkpoint(folder)
    with pytest.raises(DamagedError, match=r"weights|NaN"):
        SafeCheckpointIO(lambda: own).load_checkpoint(folder)
    honest = save(tmp_path / "d", {"global_step": 0, "state_dict": dict(own)})
    assert SafeCheckpointIO(lambda: own).load_checkpoint(honest)["global_step"] == 0


def test_code_to_be_called_is_refused(tmp_path):
    with pytest.raises(DamagedError, match="_instantiator"):
        SafeCheckpointIO().load_checkpoint(
            save(tmp_path / "c", {"global_step": 0, "hyper_parameters": {"_instantiator": "os.system"}})
        )


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "state.safetensors"])
def test_every_flipped_bit_and_every_truncation_is_found(tmp_path, file):
    path, generator = at(tmp_path, 20) / file, random.Random(file)
    data = path.read_bytes()
    damaged = [data[: generator.randrange(len(data))] for _ in range(30)] + [data[:-1]]
    for _ in range(200):
        flipped, bit = bytearray(data), generator.randrange(8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for number, content in enumerate(damaged):
        path.write_bytes(content)
        with pytest.raises(DamagedError):
            newest(tmp_path)
            raise AssertionError(f"damage {number} was not found")
    path.write_bytes(data)
    assert newest(tmp_path) is not None


def test_a_checkpoint_of_format_1_is_refused_in_words(tmp_path):
    at(tmp_path, 10)
    folder = at(tmp_path, 20)
    write_sealed(folder / "manifest.json", read_sealed(folder / "manifest.json") | {"format": 1})
    for read in (lambda: newest(tmp_path), lambda: SafeCheckpointIO().load_checkpoint(folder)):
        with pytest.raises(
            UserError, match=r"step-00000020 is a checkpoint of format 1, .* format 2: .* --init"
        ) as found:
            read()
        assert not isinstance(found.value, DamagedError)  # which would go on from the checkpoint before it
    assert not resumable(tmp_path)


def test_a_checkpoint_under_another_name_is_refused(tmp_path):
    shutil.copytree(at(tmp_path, 10), tmp_path / "step-00000020")
    assert newest(tmp_path).name == "step-00000010"


SGD = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0)


def saving(folder, minutes=0, **options):
    """Eight steps, each saved."""
    train(Tiny(SGD), Loop(checkpoints=Checkpoints(folder, minutes, **options)), plugins=[SafeCheckpointIO()])


def kept(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def test_the_newest_two_are_kept_and_none_of_a_future_that_did_not_come(tmp_path):
    at(tmp_path, 20)
    (tmp_path / "step-00000020" / "state.json").write_text("{}")  # damaged: the run was resumed from before it
    saving(tmp_path)
    assert kept(tmp_path) == [7, 8]


def test_an_unhealthy_step_is_not_saved_in_passing(tmp_path, monkeypatch):
    monkeypatch.setattr(Guard, "healthy", lambda self: False)
    saving(tmp_path)
    assert kept(tmp_path) == [8]


@pytest.mark.parametrize("fails", ["check_space", "save_file"])
def test_a_full_disk_is_said_and_the_run_goes_on_or_stops_as_told(tmp_path, monkeypatch, capsys, fails):
    saved = []

    def full(*args, **options):
        saved.append(args)
        if 3 <= len(saved) <= 5:
            raise OSError(28, os.strerror(28)) if fails == "save_file" else FullError("there is no room")
        original(*args, **options)

    original = getattr(checkpoint, fails)
    monkeypatch.setattr(checkpoint, fails, full)
    saving(tmp_path / "goes on")
    assert kept(tmp_path / "goes on") == [7, 8] and capsys.readouterr().err.count("The run goes on") == 3
    saved.clear()
    with pytest.raises(FullError):
        saving(tmp_path / "stops", when_full="stop")
    assert kept(tmp_path / "stops") == [1, 2]
    saved[:] = [(), ()]
    with pytest.raises(FullError):  # the last state is needed
        saving(tmp_path / "needed", minutes=10)
    assert not any(path.name.startswith(".") for path in (tmp_path / "needed").glob("*"))


def test_room_is_looked_for_before_a_checkpoint_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(FullError, match=r"1\.0 MiB of free space and 1\.0 are needed"):
        save(tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_an_object_cannot_be_stored(tmp_path):
    with pytest.raises(TypeError, match="/thing is a object"):
        save(tmp_path / "c", {"global_step": 0, "thing": object()})
    assert not (tmp_path / "c").exists()


def test_no_pickle_in_the_tensors(tmp_path):
    folder = save(tmp_path / "c")
    tensors = load_file(folder / "state.safetensors")
    assert set(tensors) == {"/nested/0/weight", "/nested/1", "/half", "/array", "/a/b", "/a/b 4"}
    save_file(tensors, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "state.safetensors").read_bytes()
