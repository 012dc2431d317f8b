"""Every encoder obeys one contract: size stated, input normalised inside, a folder that timm alone can load."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import update_bn

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, sha256, write_sealed
from ssl_kit.core.named import PACKAGED, results_folder
from ssl_kit.core.reading import Reading
from ssl_kit.core.sealed import read_sealed
from ssl_kit.encoders import Encoder, find_encoder
from ssl_kit.encoders.pretrained import initialise, load_pretrained
from ssl_kit.encoders.wrapped import settled
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.search import search

CASES = [
    ("resnet18_small", {"channels": [8, 8, 16, 24]}, (32, 32), 3),
    ("resnet50_small", {"channels": [4, 4, 8, 8]}, (16, 16), 3),
    ("resnet18", {"channels": [8, 8, 16, 24]}, (96, 96), 3),
    ("resnet18_small", {"channels": [8, 8, 16, 24], "num_classes": 5}, (32, 32), 1),
    ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 24, "depth": 3}, (16, 24), 3),
    ("lcnet_035", {}, (32, 32), 3),  # its head has a layer of its own, wider than the last feature map
    ("vit_small_patch16_dinov3", {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}, (16, 24), 3),
]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def build(name, args, size, channels):
    torch.manual_seed(0)
    return Encoder(name, args, size, channels, MEAN[:channels], STD[:channels]).eval()


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[3]}-{len(case[1])}")
def encoder(request):
    return build(*request.param)


def images(encoder, count=3):
    return torch.rand(count, encoder.channels, *encoder.image_size, generator=torch.Generator().manual_seed(1))


def test_states_its_dimension(encoder):
    features = encoder(images(encoder))
    assert features.shape == (3, encoder.dim) and features.dtype == torch.float32


def test_normalises_its_input(encoder):
    batch = images(encoder)
    mean = torch.tensor(MEAN[: encoder.channels]).reshape(1, -1, 1, 1)
    std = torch.tensor(STD[: encoder.channels]).reshape(1, -1, 1, 1)
    assert torch.equal(encoder(batch), encoder.model((batch - mean) / std).float())


def test_folder_loads_with_timm_alone_and_with_load(encoder, tmp_path):
    encoder.save(tmp_path / "encoder", {"made": "here"})
    batch = images(encoder)
    wanted = encoder(batch)
    loaded = Encoder.load(tmp_path / "encoder")
    assert torch.equal(loaded(batch), wanted) and not loaded.training and loaded.sha256 == encoder.sha256
    model = timm.create_model(f"local-dir:{tmp_path}/encoder", pretrained=True).eval()
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    mean, std = (torch.tensor(config[key]).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    assert (model((batch - mean) / std) - wanted).abs().max() <= 1e-5
    assert config["input_size"][1:] == encoder.image_size


def test_weights_that_layers_share_are_kept_under_both_names(tmp_path):
    encoder = Encoder("coat_tiny", None, (32, 32)).eval()
    batch = images(encoder, 1)
    assert torch.equal(Encoder.load(encoder.save(tmp_path / "encoder"))(batch), encoder(batch))


def test_a_code_comes_from_any_one_classifier():
    encoder = Encoder("dla46x_c", {"num_classes": 5}, (32, 32)).eval()  # a convolution
    batch = images(encoder)
    assert torch.allclose(encoder(batch), encoder.model(encoder.normalise(batch)), atol=1e-5)
    with pytest.raises(UserError, match="levit_128s has several classifiers, a code needs one"):
        Encoder("levit_128s", None, (64, 64)).set_code(5)


def test_a_code_keeps_float32_under_autocast():
    encoder = build(
        "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_classes": 5}, (16, 16), 3
    )
    with torch.autocast("cpu", torch.bfloat16):
        code, pooled = encoder(images(encoder)), encoder.pooled(images(encoder))
    assert code.dtype == torch.float32 and torch.equal(code, encoder.code(pooled.float()))
    assert not torch.equal(code, code.bfloat16().float())
    assert torch.equal(encoder(images(encoder)), encoder.model(encoder.normalise(images(encoder))))


def test_layers_concatenate_the_last_stages(encoder):
    batch = images(encoder)
    assert torch.equal(encoder.layers(batch, 1), encoder(batch))
    deeper = encoder.layers(batch, 2)
    assert deeper.shape[0] == 3 and deeper.shape[1] > encoder.model.num_features
    with pytest.raises(UserError, match="ask for fewer"):
        encoder.layers(batch, 99)


def test_fresh_has_other_weights_and_the_same_preprocessing(encoder):
    fresh = encoder.fresh(seed=1)
    assert fresh.preprocessing() == encoder.preprocessing() and fresh.dim == encoder.dim
    assert not torch.equal(fresh(images(encoder)), encoder(images(encoder)))
    assert torch.equal(fresh(images(encoder)), encoder.fresh(seed=1)(images(encoder)))


def test_which_bands_and_values_are_meant_travels_in_the_folder(tmp_path):
    made = Encoder("resnet18_small", {"channels": [4, 4, 4, 4]}, (16, 16), 2)
    made.reading = Reading(2, ("red", "nir")).within({"uint16": ((0, 4095), (3, 900))})
    made.save(tmp_path / "encoder")
    assert Encoder.load(tmp_path / "encoder").reading == made.reading == made.fresh().reading
    record = read_sealed(tmp_path / "encoder" / "encoder.json")
    record["preprocessing"]["range"] = {"uint16": [[9, 1]]}
    write_sealed(tmp_path / "encoder" / "encoder.json", record)
    with pytest.raises(DamagedError, match=r"range is .*; wanted \[low, high\]"):
        Encoder.load(tmp_path / "encoder")


def test_a_standard_resnet_needs_nothing_of_ours_to_load(tmp_path):
    encoder = build(*CASES[2])
    encoder.save(tmp_path / "encoder")
    batch = images(encoder)
    np.save(tmp_path / "batch.npy", batch.numpy())
    np.save(tmp_path / "wanted.npy", encoder(batch).detach().numpy())
    code = (
        "import sys, timm, torch, numpy as np\n"
        "model = timm.create_model('local-dir:encoder', pretrained=True).eval()\n"
        "config = timm.data.resolve_data_config(model.pretrained_cfg)\n"
        "mean, std = (torch.tensor(config[k]).reshape(1, -1, 1, 1) for k in ('mean', 'std'))\n"
        "features = model((torch.from_numpy(np.load('batch.npy')) - mean) / std).detach().numpy()\n"
        "assert not any(name.startswith('ssl_kit') for name in sys.modules)\n"
        "print(np.abs(features - np.load('wanted.npy')).max())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1e-5


def test_small_stem_keeps_the_resolution():
    encoder = build(*CASES[0])
    stem = encoder.model.act1(encoder.model.bn1(encoder.model.conv1(images(encoder))))
    assert stem.shape == (3, 8, 32, 32)
    assert encoder.model.maxpool(stem) is stem
    assert [info["reduction"] for info in encoder.model.feature_info] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_changed_file_is_refused(tmp_path, file):
    build(*CASES[0]).save(tmp_path / "encoder")
    path = tmp_path / "encoder" / file
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=file):
        Encoder.load(tmp_path / "encoder")


def test_no_name_reaches_outside_timm():
    for name in ("local-dir:/etc", "hf-hub:timm/resnet18", "os.system", "resnet18_smal"):
        with pytest.raises(UserError, match="no timm model is called"):
            Encoder(name)
    with pytest.raises(UserError, match="does not take these arguments"):
        Encoder("resnet18_small", {"channelz": [1]})


def test_init_checks_how_much_matched(tmp_path):
    source = build(*CASES[0])
    source.save(tmp_path / "encoder")
    target = build(*CASES[0])
    with torch.no_grad():
        target.model.conv1.weight.zero_()
    found = initialise(target, str(tmp_path / "encoder"))
    assert found == 1 and torch.equal(target.model.conv1.weight, source.model.conv1.weight)

    weights = load_file(tmp_path / "encoder" / "model.safetensors")
    renamed = {(f"module.{name}" if name.startswith("layer4") else name): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "encoder" / "model.safetensors")
    record = read_sealed(tmp_path / "encoder" / "encoder.json")
    record["sha256"] = sha256(tmp_path / "encoder" / "model.safetensors")
    write_sealed(tmp_path / "encoder" / "encoder.json", record)
    before = {name: value.clone() for name, value in target.model.state_dict().items()}
    with pytest.raises(UserError, match=r"matches \d+\.\d% of the weights.*layer4"):
        initialise(target, str(tmp_path / "encoder"))
    assert all(torch.equal(before[name], value) for name, value in target.model.state_dict().items())


def test_an_encoder_that_a_killed_writer_had_moved_away_is_found(tmp_path):
    build(*CASES[0]).save(tmp_path / "run" / "encoder")
    (tmp_path / "run" / ".encoder.a1b2c3d4.old").mkdir()
    (tmp_path / "run" / "encoder").rename(tmp_path / "run" / ".encoder.a1b2c3d4.old" / "encoder")
    assert Encoder.load(find_encoder(tmp_path / "run")).dim == 24


def test_find_encoder_takes_a_run_or_an_encoder_folder(tmp_path):
    build(*CASES[0]).save(tmp_path / "run" / "encoder")
    assert find_encoder(tmp_path / "run") == tmp_path / "run" / "encoder" == find_encoder(tmp_path / "run" / "encoder")
    with pytest.raises(UserError, match="does not exist"):
        find_encoder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a run folder or an encoder folder"):
        find_encoder(tmp_path)


@pytest.mark.parametrize("name", PACKAGED)
def test_an_encoder_of_the_package_is_found_by_its_name_and_serves_without_training(
    name, labelled_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = find_encoder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 3_000_000
    assert results_folder(folder, None) == Path(f"{name}-evaluation")  # not in the package
    embed(name, str(labelled_folder), out="EMB")
    assert json.loads(Path("EMB/manifest.json").read_text())["encoder"] == name  # wherever the package lies
    (asked,) = search("EMB", [str(labelled_folder / "a/000.png")], k=1)["queries"]
    assert asked["results"][0]["id"] == "a/000.png"
    assert load_pretrained(name).sha256 == Encoder.load(folder).sha256
    Path(name).mkdir()
    with pytest.raises(UserError, match=r"holds no encoder\.json"):  # what is named so here goes before it
        find_encoder(name)


def test_an_untrained_network_is_measured_with_batch_norms_that_have_seen_the_images(encoder):
    """As `torch.optim.swa_utils.update_bn` settles a copy; afterwards nothing has changed."""
    views, asked = torch.rand(100, encoder.channels, *encoder.image_size), images(encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    momenta = [getattr(part, "momentum", None) for part in encoder.modules()]
    wanted = copy.deepcopy(encoder)
    update_bn(views.chunk(2), wanted)
    plain = encoder(asked)
    with torch.inference_mode(), settled(encoder, lambda: views):
        assert not any(part.training for part in encoder.modules())
        inside = encoder(asked)
    assert torch.allclose(inside, wanted.eval()(asked), atol=1e-5)
    has_norms = any(isinstance(part, torch.nn.BatchNorm2d) for part in encoder.modules())
    assert torch.equal(inside, plain) != has_norms
    assert torch.equal(encoder(asked), plain) and momenta == [
        getattr(one, "momentum", None) for one in encoder.modules()
    ]
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_a_network_that_has_seen_images_is_measured_as_it_is():
    encoder = build(*CASES[0])
    one = torch.rand(1, 3, 32, 32)
    with settled(encoder, lambda: one):  # of one image nothing can be told
        plain = encoder(one)
    encoder.train()(torch.rand(8, 3, 32, 32))
    seen = encoder.eval()(one)
    with settled(encoder, lambda: pytest.fail("images were asked for")):
        assert torch.equal(encoder(one), seen) and not torch.equal(seen, plain)
    encoder.train()
    with settled(encoder, lambda: one):
        assert all(part.training for part in encoder.modules())
