"""Checkpoints, encoder folders and recipes that somebody wrote to do harm, each made from an honest one.

`checkpoints` and `encoders` write one folder per case and give what would load it; every hash and seal in them is
right, as a stranger would make them. What must never happen is that the file `canary` comes to be.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzz import write_quickly
from safetensors.torch import load_file, save_file

from ssl_kit.core.files import MANIFEST, sha256
from ssl_kit.core.named import find_encoder
from ssl_kit.core.sealed import SEAL, read_json
from ssl_kit.encoders.encoder import CONFIG, RECORD, WEIGHTS, Encoder
from ssl_kit.encoders.pretrained import initialise, load_pretrained
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.training.checkpoint import SafeCheckpointIO, newest

ARGS, SIZE = {"channels": [4, 4, 8, 8]}, (16, 16)
_DIGITS = "9" * 5_000


class Case(NamedTuple):
    """A hostile thing and the call that a user would make with it."""

    name: str
    load: Callable[[], object]


class Gadget:
    """Unpickling it runs a command."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def learner() -> SimCLR:
    """What the checkpoints are of."""
    torch.manual_seed(0)
    return SimCLR(Encoder("resnet18_small", ARGS, SIZE), projection=(16, 8))


def honest(place: Path) -> None:
    """The checkpoint and the encoder folder that all cases start from."""
    method = learner()
    state = {"epoch": 0, "global_step": 3, "state_dict": method.state_dict(), "loops": {"a": (1, None)}}
    SafeCheckpointIO().save_checkpoint(state, place / "honest" / "checkpoints" / "step-00000003")
    method.encoder.save(place / "honest" / "encoder")


def resume(folder: Path) -> int:
    """What `--resume` does with the checkpoints of a run, up to the weights."""
    path = newest(folder / "checkpoints")
    assert path is not None, "there is one"
    method = learner()
    state = SafeCheckpointIO(method.state_dict).load_checkpoint(path)
    method.load_state_dict(state["state_dict"])
    return len(state)


def pickles(canary: Path) -> dict[str, bytes]:
    """The same gadget in every dress that torch has had."""
    new, old, tar, squeezed = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    gadget = Gadget(canary)
    torch.save({"state_dict": gadget}, new)
    torch.save({"state_dict": gadget}, old, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(gadget)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(gadget))
        file.writestr("archive/data/0", bytes(50_000_000))
    bare = {f"pickle of protocol {number}": pickle.dumps(gadget, number) for number in (0, 2, 4)}
    made = {"torch zip": new, "torch legacy": old, "torch legacy tar": tar, "zip bomb": squeezed}
    return bare | {name: data.getvalue() for name, data in made.items()}


def headers() -> dict[str, bytes]:
    """Safetensors files whose header lies."""

    def file(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    entry = lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    many = {f"t{row}": entry("F32", [0], [0, 0]) for row in range(60_000)}
    twice = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    return {
        "header of 2^63 bytes": file({}, b"", 2**63),
        "header of 20 MB": file(b"{" + b" " * 20_000_000 + b"}"),
        "header of 60,000 tensors": file(many),
        "header that nests": file(b"[" * 100_000),
        "overlapping tensors": file({"a": entry("F32", [2], [0, 8]), "b": entry("F32", [2], [4, 12])}, bytes(12)),
        "tensor beyond the file": file({"a": entry("F32", [1000], [0, 4000])}, bytes(8)),
        "bytes that no tensor has": file({"a": entry("F32", [1], [0, 4])}, bytes(4_000)),
        "shape of 2^80": file({"a": entry("F32", [2**40, 2**40], [0, 4])}, bytes(4)),
        "shape that overflows": file({"a": entry("F32", [2**32, 2**32, 0, 1], [0, 4])}, bytes(4)),
        "shape and bytes disagree": file({"a": entry("F32", [3], [0, 4])}, bytes(4)),
        "negative shape": file({"a": entry("F32", [-1], [0, 4])}, bytes(4)),
        "type that nobody has": file({"a": entry("F8_E8M0", [4], [0, 4])}, bytes(4)),
        "one name twice": file(twice, bytes(4)),
    }


def spoilt(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights that fit in name only."""
    name = next(name for name in tensors if name.endswith("conv1.weight"))
    put = lambda value: {**tensors, name: value}
    weight, first = tensors[name], tensors[name].clone()
    first.view(-1)[0] = float("nan")
    return {
        "one NaN weight": put(first),
        "infinite weights": put(torch.full_like(weight, float("inf"))),
        "weights of int64": put(weight.to(torch.int64)),
        "weights of float16": put(weight.half()),
        "weights of another shape": put(torch.zeros(1, *weight.shape)),
        "weights left out": {key: value for key, value in tensors.items() if key != name},
        "a tensor too many": {**tensors, "more": torch.zeros(1)},
    }


def checkpoints(place: Path) -> Iterator[Case]:
    """Checkpoints of a run that is to be resumed."""
    canary = place / "canary"
    source = place / "honest" / "checkpoints" / "step-00000003"
    contents = {name: pickles(canary)[name] for name in pickles(canary)} | headers()
    for name, data in contents.items():
        yield _checkpoint(place, name, lambda folder, data=data: (folder / "state.safetensors").write_bytes(data))
    wrong = spoilt(load_file(source / "state.safetensors"))
    del wrong["a tensor too many"]  # state.json names the tensors: another one is not looked at
    for name, tensors in wrong.items():
        yield _checkpoint(place, name, lambda folder, tensors=tensors: save_file(tensors, folder / "state.safetensors"))
    state = json.loads((source / "state.json").read_text())
    run = {"_instantiator": "os.system", "command": f"touch {canary}"}
    words: dict[str, bytes] = {
        "state.json: a pickle": pickle.dumps(Gadget(canary)),
        "state.json: a class to be called": json.dumps(
            state | {"loops": {"$": "!!python/object/apply:os.system"}}
        ).encode(),
        "state.json: _instantiator": json.dumps(state | {"hyper_parameters": run}).encode(),
        "state.json: nests": b"[" * 100_000 + b"]" * 100_000,
        "state.json: a number of 5,000 digits": f'{{"global_step": {_DIGITS}}}'.encode(),
        "state.json: 2.6 million lists": b"[" + b"[]," * 2_600_000 + b"[]]",
        "state.json: 60 MB": b'{"a": "' + b"x" * 60_000_000 + b'"}',
    }
    for name, data in words.items():
        yield _checkpoint(place, name, lambda folder, data=data: (folder / "state.json").write_bytes(data))
    for name, files in {
        "manifest: leaves its folder": {"../../../../../../etc/passwd": sha256("/etc/passwd")},
        "manifest: an absolute path": {"/etc/passwd": sha256("/etc/passwd")},
        "manifest: no files": {},
    }.items():
        yield _checkpoint(place, name, lambda folder: None, lambda entries, files=files: entries | {"files": files})
    for name, text in {
        "manifest: nests": "[" * 100_000,
        "manifest: a number of 5,000 digits": f'{{"step": {_DIGITS}, "files": {{}}}}',
        "manifest: 60 MB": '{"a": "' + "x" * 60_000_000 + '"}',
    }.items():
        yield _checkpoint(place, name, lambda folder: None, text=text)
    yield _checkpoint(place, "state.safetensors: a pipe", lambda folder: _pipe(folder / "state.safetensors"))
    yield _checkpoint(place, "state.safetensors: /dev/zero", lambda folder: _link(folder / "state.safetensors"))


def _checkpoint(
    place: Path,
    name: str,
    change: Callable[[Path], object],
    entries: Callable[[dict[str, Any]], dict[str, Any]] = lambda entries: entries,
    text: str | None = None,
) -> Case:
    folder = _place(place, "checkpoint", name)
    shutil.copytree(place / "honest" / "checkpoints", folder / "checkpoints")
    inside = folder / "checkpoints" / "step-00000003"
    change(inside)
    manifest = read_json(inside / MANIFEST)
    manifest.pop(SEAL)
    regular = [file for file in manifest["files"] if (inside / file).is_file()]
    manifest["files"] |= {file: sha256(inside / file) for file in regular}
    write_quickly(inside / MANIFEST, entries(manifest))
    if text is not None:
        (inside / MANIFEST).write_text(text)
    return Case(f"checkpoint: {name}", lambda: resume(folder))


def encoders(place: Path) -> Iterator[Case]:
    """Encoder folders that are to be loaded, or to start from."""
    canary, source = place / "canary", place / "honest" / "encoder"
    dressed = pickles(canary)
    (place / "gadget.pth").write_bytes(dressed["torch zip"])
    for name, data in (dressed | headers()).items():
        yield _encoder(place, name, weights=data)
    for name, tensors in spoilt(load_file(source / WEIGHTS)).items():
        yield _encoder(place, name, weights=tensors)
    gadget = str(place / "gadget.pth")
    for name, config in {
        "architecture of the hub": {"architecture": "hf-hub:somebody/something"},
        "architecture in a folder": {"architecture": f"local-dir:{place / 'honest' / 'encoder'}"},
        "architecture that is a path": {"architecture": "../../x"},
        "checkpoint_path": {"model_args": ARGS | {"checkpoint_path": gadget}},
        "pretrained": {"model_args": ARGS | {"pretrained": True}},
        "pretrained_cfg with a file": {"model_args": ARGS | {"pretrained_cfg": {"file": gadget}}},
        "pretrained_cfg of the hub": {"model_args": ARGS | {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}},
        "cache_dir": {"model_args": ARGS | {"cache_dir": str(place)}},
        "weights behind an address": {"pretrained_cfg": {"url": "http://localhost/x.pth", "custom_load": True}},
        "weights in another file": {"pretrained_cfg": {"file": gadget}},
        "a width of 10^6": {"architecture": "vit_tiny_patch16_224", "model_args": {"embed_dim": 10**6}},
        "a depth of 10^6": {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**6}},
        "a depth of 10^30": {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 10**30}},
        "patches of 0": {"architecture": "vit_tiny_patch16_224", "model_args": {"patch_size": 0}},
        "a width of 65,536": {"model_args": {"channels": [65_536] * 4}},
        "a depth of 60,000": {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 60_000, "embed_dim": 3}},
        "layers of 10^4 stages": {"model_args": {"layers": [1] * 10_000}},
        "arguments that nest": {"model_args": {"channels": [[[[[[4]]]]]]}},
        "an activation by its path": {"model_args": ARGS | {"act_layer": "os.system"}},
        "a name of 10^5 letters": {"architecture": "x" * 100_000},
    }.items():
        yield _encoder(place, name, config=config)
    for name, record in {
        "an image size of 10^9": {"image_size": [10**9, 10**9]},
        "an image size of 16,384": {"image_size": [16_384, 16_384]},
        "10^6 channels": {"channels": 10**6, "mean": [0.5], "std": [0.2]},
        "a standard deviation of 0": {"std": [0.0]},
        "a mean in words": {"mean": "0.5"},
    }.items():
        yield _encoder(place, name, record={"preprocessing": record})
    for name, text in {
        "encoder.json: nests": "[" * 100_000,
        "encoder.json: a number of 5,000 digits": f'{{"dim": {_DIGITS}}}',
        "encoder.json: NaN": '{"dim": NaN}',
        "encoder.json: 60 MB": '{"a": "' + "x" * 60_000_000 + '"}',
    }.items():
        yield _encoder(place, name, text=text)
    yield from _elsewhere(place, dressed["torch zip"])


def _elsewhere(place: Path, data: bytes) -> Iterator[Case]:
    """Formats that are not read, wherever a user might put them."""
    for file in ("pytorch_model.bin", "model.pt", "checkpoint.pth", "last.ckpt"):
        folder = _place(place, "encoder", f"only {file}")
        (folder / file).write_bytes(data)
        shutil.copy(place / "honest" / "encoder" / CONFIG, folder)
        yield Case(f"encoder: only {file}", lambda folder=folder: Encoder.load(find_encoder(folder)))
        yield Case(f"--init {file}", lambda folder=folder: initialise(learner().encoder, str(folder)))
        yield Case(f"--baseline {file}", lambda folder=folder: load_pretrained(str(folder)))
    folder = _place(place, "encoder", "timm folder with a pickle")
    (folder / WEIGHTS).write_bytes(data)
    shutil.copy(place / "honest" / "encoder" / CONFIG, folder)
    yield Case("--init a pickle", lambda: initialise(learner().encoder, str(folder)))
    yield Case("--baseline a pickle", lambda: load_pretrained(str(folder)))
    piped = _encoder(place, "weights in a pipe")
    _pipe(place / "encoder" / "weights in a pipe" / WEIGHTS)
    yield piped


def _encoder(
    place: Path,
    name: str,
    weights: bytes | dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
    record: dict[str, Any] | None = None,
    text: str | None = None,
) -> Case:
    folder = _place(place, "encoder", name)
    shutil.copytree(place / "honest" / "encoder", folder, dirs_exist_ok=True)
    if isinstance(weights, bytes):
        (folder / WEIGHTS).write_bytes(weights)
    elif weights is not None:
        save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(read_json(folder / CONFIG) | (config or {})))
    entries = read_json(folder / RECORD)
    entries.pop(SEAL)
    entries |= {"sha256": sha256(folder / WEIGHTS), "config_sha256": sha256(folder / CONFIG)}
    entries["preprocessing"] |= (record or {}).get("preprocessing", {})
    write_quickly(folder / RECORD, entries)
    if text is not None:
        (folder / RECORD).write_text(text)
    return Case(f"encoder: {name}", lambda: Encoder.load(find_encoder(folder)))


def _place(place: Path, kind: str, name: str) -> Path:
    folder = place / kind / name.replace("/", "_")
    folder.mkdir(parents=True)
    return folder


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")
