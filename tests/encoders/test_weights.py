"""What an encoder folder may say of itself: a timm model, plain arguments, preprocessing; weights that bear it out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.encoders.encoder import CONFIG, RECORD, WEIGHTS, Encoder
from ssl_kit.encoders.pretrained import initialise
from ssl_kit.encoders.weights import _at_most, check_arguments

ARGS = {"channels": [4, 4, 8, 8]}
VIT = {"architecture": "vit_tiny_patch16_224"}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    return Encoder("resnet18_small", ARGS, (16, 16)).save(tmp_path / "encoder")


def rewritten(folder, config=None, record=None, weights=None):
    """The folder as a stranger would rewrite it: all hashes are right."""
    if weights is not None:
        save_file(weights, folder / WEIGHTS)
    text = json.loads((folder / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(text))
    entries = read_sealed(folder / RECORD)
    entries |= {"sha256": sha256(folder / WEIGHTS), "config_sha256": sha256(folder / CONFIG)}
    entries["preprocessing"] |= record or {}
    write_sealed(folder / RECORD, entries)
    return folder


def test_a_rewritten_folder_that_is_honest_loads(folder):
    loaded = Encoder.load(rewritten(folder, record={"mean": [0.4, 0.5, 0.6]}))
    assert loaded.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6]) and not loaded.training


@pytest.mark.parametrize(
    "config",
    [
        {"architecture": "hf-hub:a/b"},
        {"architecture": "local-dir:."},
        {"architecture": 5},
        *(
            {"model_args": ARGS | extra}
            for extra in ({"checkpoint_path": "x.pth"}, {"pretrained": True}, {"cache_dir": "."})
        ),
        {"model_args": ARGS | {"pretrained_cfg": {"file": "x.pth"}}},
        {"model_args": ARGS | {"act_layer": "os.system"}},
        {"model_args": [1]},
        {"pretrained_cfg": {"url": "http://localhost/x"}},
        {"pretrained_cfg": {"file": "x.pth"}},
        *(
            VIT | {"model_args": args}
            for args in ({"depth": 10**30}, {"depth": 2**16}, {"patch_size": 0}, {"embed_dim": 2**16})
        ),
        {"model_args": {"channels": [[[[[[4]]]]]]}},
    ],
)
def test_models_that_are_none_or_from_elsewhere_are_refused(folder, config):
    with pytest.raises(UserError):
        Encoder.load(rewritten(folder, config))


@pytest.mark.parametrize(
    "record",
    [
        *({"image_size": size} for size in ([10**9, 10**9], [0, 16], [16], "16", [16.0, 16.0], None)),
        *({"channels": value} for value in (0, 10**6, "3", None)),
        *({"mean": value} for value in ("0.5", [0.1, 0.2], [], None, [True])),
        *({"std": value} for value in ([0.0], [-1.0], [1, 0, 1])),
    ],
)
def test_preprocessing_that_is_none_is_refused(folder, record):
    with pytest.raises(DamagedError, match=r"encoder\.json"):
        Encoder.load(rewritten(folder, record=record))


def test_weights_that_do_not_fit_are_refused(folder):
    weights = load_file(folder / WEIGHTS)
    name = "conv1.weight"
    nan = weights[name].clone()
    nan[0, 0, 0, 0] = float("nan")
    for changed in (
        weights | {name: weights[name].to(torch.int64)},
        weights | {name: weights[name].half()},
        weights | {name: torch.zeros(1, *weights[name].shape)},
        weights | {"more": torch.zeros(1)},
        {key: value for key, value in weights.items() if key != name},
        weights | {name: nan},
    ):
        with pytest.raises(DamagedError, match=r"model\.safetensors"):
            Encoder.load(rewritten(folder, weights=changed))


def test_a_start_takes_no_whole_numbers_and_no_nan(folder):
    weights = load_file(folder / WEIGHTS)
    encoder = Encoder("resnet18_small", ARGS, (16, 16))
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(half, folder / WEIGHTS)
    (folder / RECORD).unlink()  # a timm folder from elsewhere
    assert initialise(encoder, str(folder)) == 1
    save_file({name: value.to(torch.int64) for name, value in weights.items()}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"matches 0\.0%|matches \d"):
        initialise(encoder, str(folder))
    save_file({**weights, "conv1.weight": torch.full_like(weights["conv1.weight"], float("inf"))}, folder / WEIGHTS)
    with pytest.raises(DamagedError, match="NaN or infinite"):
        initialise(encoder, str(folder))


def test_the_features_must_be_as_many_as_the_record_says(folder):
    entries = read_sealed(folder / RECORD)
    write_sealed(folder / RECORD, entries | {"dim": 9})
    with pytest.raises(DamagedError, match="says 9 features, the model has 8"):
        Encoder.load(folder)


def test_arguments_of_recipes_are_judged_too():
    with pytest.raises(UserError, match="checkpoint_path"):
        Encoder("resnet18_small", ARGS | {"checkpoint_path": "x.pth"}, (16, 16))
    check_arguments({"a": [1, (2, 3)], "b": {"c": 0.5}, "d": None, "e": "relu", "f": True}, "x")
    for value in (2**17, float("nan"), "x" * 300, object(), [0] * 2_000, {1: 2}):
        with pytest.raises(UserError):
            check_arguments({"a": value}, "x")


def test_building_stops_at_the_budget_and_not_in_other_threads():
    from threading import Thread

    for build in (
        lambda: nn.Linear(10, 11),
        lambda: nn.BatchNorm2d(40),
        lambda: nn.Sequential(*map(nn.Linear, [9] * 3, [9] * 3)),
    ):
        with pytest.raises(DamagedError, match="too large"), _at_most(100, DamagedError("too large")):
            build()
    with _at_most(100, DamagedError("too large")):
        made = []
        thread = Thread(target=lambda: made.append(nn.Linear(100, 100)))
        thread.start()
        thread.join()
    assert made and nn.Linear(100, 100) is not None
