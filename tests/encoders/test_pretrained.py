"""Pretrained models come from this disk alone, whole, with their own preprocessing, and equal timm's own."""

import json
import socket

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import sha256
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.pretrained import freeze, load_pretrained

NAME, HUB = "test_resnet.r160_in1k", "models--timm--test_resnet.r160_in1k"  # timm's own model for tests, 160 px


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_):
        raise AssertionError("something looks for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=1000).eval()


@pytest.fixture
def cache(tmp_path, monkeypatch, model):
    """The hub's cache on this disk, holding the model's weights."""
    snapshot = tmp_path / "hub" / HUB / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub" / HUB / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    save_file(model.state_dict(), snapshot / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.fixture
def folder(tmp_path, model):
    """A timm folder that timm itself wrote."""
    timm.models.save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    return tmp_path / "theirs"


def by_timm(model, images):
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    mean, std = (torch.tensor(config[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return model.forward_head(model.forward_features((images - mean) / std), pre_logits=True)


def test_cached_weights_give_timms_features_at_their_own_size(cache, model):
    encoder = load_pretrained(f"timm:{NAME}")
    images = torch.rand(2, 3, *encoder.image_size)
    assert encoder.image_size == (160, 160) and not encoder.training
    with torch.inference_mode():
        assert torch.equal(encoder(images), by_timm(model, images))
    assert encoder.dim == encoder(images).shape[1] == model.num_features
    assert encoder.sha256 == sha256(cache / "model.safetensors")


def test_a_folder_of_timms_gives_timms_features(folder, model):
    encoder = load_pretrained(str(folder))
    images = torch.rand(2, 3, *encoder.image_size)
    with torch.inference_mode():
        assert torch.equal(encoder(images), by_timm(model, images))
    encoder.save(folder / "ours")  # without the classifier
    assert Encoder.load(folder / "ours").args["num_classes"] == 0


def test_a_transformer_of_its_own_size_and_arguments(tmp_path):
    torch.manual_seed(1)
    args = {"depth": 2, "img_size": 64}
    theirs = timm.create_model("test_vit", num_classes=7, **args).eval()
    config = {"input_size": [3, 64, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    timm.models.save_for_hf(
        theirs, tmp_path / "vit", model_config={"model_args": args, "pretrained_cfg": config}, safe_serialization=True
    )
    encoder = load_pretrained(str(tmp_path / "vit"))
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(config[name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        expected = theirs.forward_head(theirs.forward_features((images - mean) / std), pre_logits=True)
        assert encoder.image_size == (64, 64) and torch.equal(encoder(images), expected)
    assert load_pretrained(str(tmp_path / "vit"), channels=1).mean.flatten().tolist() == pytest.approx([0.2])


def test_grey_images_get_the_sum_of_the_first_layer(cache, model):
    encoder = load_pretrained(f"timm:{NAME}", channels=1)
    first = model.pretrained_cfg["first_conv"]
    summed = model.get_submodule(first).weight.sum(dim=1, keepdim=True)
    assert torch.allclose(encoder.model.get_submodule(first).weight, summed)


def test_our_own_folders_are_read_as_they_are(tmp_path):
    Encoder("resnet18_small", {"channels": [4, 4, 8, 8], "num_classes": 6}, (16, 16)).save(tmp_path / "run" / "encoder")
    assert load_pretrained(str(tmp_path / "run")).dim == 6
    with pytest.raises(UserError, match="takes images of 3 channels, here they have 1"):
        load_pretrained(str(tmp_path / "run"), channels=1)


def test_nothing_is_fetched(cache):
    for given, told in (
        ("timm:resnet18.a1_in1k", "no weights of resnet18.a1_in1k in timm's cache"),
        ("timm:test_resnet.nonsense", "Invalid pretrained tag"),
        ("timm:resnet18_small", "no weights of resnet18_small"),
        ("timm:hf-hub:timm/resnet18", "no timm model is called"),
        ("resnet18", "resnet18 is not on this disk; wanted timm:NAME"),
    ):
        with pytest.raises(UserError, match=told):
            load_pretrained(given)


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_that_lacks_weights_is_refused_not_filled_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["bn1.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"does not hold the weights of its config.json: 'bn1.weight'"):
        load_pretrained(str(folder))
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_pretrained(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_pretrained(str(folder))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_args": {"checkpoint_path": "/tmp/x.pth"}},
            r"config.json: model_args: checkpoint_path are no arguments of a model",
        ),
        ({"model_args": {"pretrained_cfg_overlay": {}}}, "pretrained_cfg_overlay are no arguments"),
        ({"model_args": {"no_such_argument": 1}}, "does not take these arguments"),
        ({"architecture": "hf-hub:timm/resnet18"}, "no timm model is called"),
        ({"architecture": 7}, "names no architecture"),
        ({"pretrained_cfg": {"input_size": [3, 160]}}, "input_size, mean, std or num_classes are missing or odd"),
        ({"pretrained_cfg": None}, "lacks pretrained_cfg"),
        ({"num_classes": 10**9}, "wanted few plain numbers|more than the"),
    ],
)
def test_a_strangers_config_says_which_model_and_nothing_else(folder, changes, told):
    edited(folder, **changes)
    with pytest.raises(UserError, match=told):
        load_pretrained(str(folder))


def test_weights_of_nan_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["bn1.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"'bn1.weight' holds NaN"):
        load_pretrained(str(folder))


def test_cached_weights_of_another_model_are_refused(cache):
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), cache / "model.safetensors")
    with pytest.raises(UserError, match=f"does not hold the weights of {NAME}"):
        load_pretrained(f"timm:{NAME}")


def test_a_strangers_config_cannot_point_to_other_weights(folder, model, tmp_path):
    torch.manual_seed(5)
    other = timm.create_model(NAME, num_classes=1000).eval()
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    described = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    edited(folder, pretrained_cfg={**described, "file": str(tmp_path / "other.safetensors"), "custom_load": True})
    images = torch.rand(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(load_pretrained(str(folder))(images), by_timm(model, images))


@pytest.mark.parametrize(
    ("name", "args", "blocks", "lowest", "next_one"),
    [
        ("resnet18_small", {"channels": [8, 8, 8, 8]}, 3, "layer2.0", "layer2.1"),
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 3}, 2, "blocks.1", "blocks.2"),
    ],
)
def test_frozen_blocks_learn_nothing_and_keep_their_statistics(name, args, blocks, lowest, next_one):
    encoder = Encoder(name, args, (16, 16)).train()
    share = freeze(encoder, blocks)
    before = {key: value.clone() for key, value in encoder.model.state_dict().items()}
    optimiser = torch.optim.SGD([one for one in encoder.parameters() if one.requires_grad], lr=0.1)
    encoder.train(False).train()  # as a look at the features does
    encoder(torch.rand(8, 3, 16, 16)).square().sum().backward()
    optimiser.step()
    moved = {key for key, value in encoder.model.state_dict().items() if not torch.equal(value, before[key])}
    assert not [key for key in moved if key.startswith((f"{lowest}.", "conv1", "patch_embed", "pos_embed"))]
    assert any(key.startswith(f"{next_one}.") for key in moved) and 0 < share < 1
    stem = "conv1" if "conv1.weight" in before else "patch_embed"
    assert not [one for key, one in encoder.model.named_parameters() if key.startswith(stem) and one.requires_grad]
    with pytest.raises(UserError, match=r"--freeze 50: .* blocks above its stem; wanted fewer"):
        freeze(encoder, 50)
