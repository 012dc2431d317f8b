"""`ssl-kit export`: what is written gives the same features, is proven to on real images, and says where it is from."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import DamagedError, read_manifest
from ssl_kit.data.decode import decode
from ssl_kit.encoders import exporting
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.exporting import FromPixels, run_onnx
from ssl_kit.verbs import export as module
from ssl_kit.verbs.export import export
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import plain
from ssl_kit.views.sample import sample

CNN = ("resnet18_small", {"channels": [8, 8, 16, 16]}, (16, 24), 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
VIT = ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}, (16, 16))


def as_run(folder, model):
    """A run folder with an encoder and one result of it, one of another encoder, and one of a baseline."""
    torch.manual_seed(0)
    encoder = Encoder(*model)
    encoder.save(folder / "encoder")
    (folder / "run.json").write_text(json.dumps({"method": "SimCLR", "command": "ssl-kit pretrain a|b", "seed": 3}))
    score = {"evaluation": "knn", "settings": {}, "seconds": 1.0}
    metrics = {"top1": 0.625, "top1_low": 0.6, "top1_high": 0.65}
    made_by = {"encoder_sha256": encoder.sha256, "test": "photos/test"}
    lines = [
        {**score, "features": "encoder", "metrics": metrics, "made_by": made_by},
        {**score, "features": "pixels", "metrics": {"top1": 0.5}, "made_by": {"encoder_sha256": None}},
        {**score, "features": "encoder", "metrics": {"top1": 0.111}, "made_by": {"encoder_sha256": "another"}},
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    return as_run(tmp_path_factory.mktemp("cnn"), CNN)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Six images of six sizes, higher and wider and smaller than the encoder's."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 33), (20, 70), (16, 24), (9, 11), (64, 64), (31, 48)]):
        small = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(root / f"{number}.png")
    return root


def views_of(photos, size):
    images = [decode(path.read_bytes()).image for path in sorted(photos.iterdir())]
    heights, widths = np.array([image.shape[:2] for image in images]).T
    params = sample(plain(size), 0, 0, np.arange(len(images)), 0, heights, widths)
    return images, torch.from_numpy(apply_host(images, params, size))


def test_timm_folder(cnn, photos, tmp_path):
    said = export(str(cnn), out=str(tmp_path / "out"), images=str(photos))
    assert said["difference"] < 1e-5 and said["images"] == 6
    assert said["files"] == ["README.md", "config.json", "encoder.json", "manifest.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.num_features == 16
    again = Encoder.load(tmp_path / "out")  # it is an encoder folder too
    assert again.sha256 == Encoder.load(cnn / "encoder").sha256
    assert read_manifest(tmp_path / "out")["check"]["images"] == 6


def test_the_card_says_what_was_measured_on_this_encoder(cnn, photos, tmp_path):
    export(str(cnn), out=str(tmp_path / "out"), images=str(photos))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| knn, top1 | encoder | 0.625 [0.600, 0.650] | photos/test |" in card
    assert "| knn, top1 | pixels | 0.500 |" in card and "0.111" not in card
    assert "`ssl-kit pretrain a\\|b`" in card and "import ssl_kit.encoders" in card and "| seed | 3 |" in card
    export(str(cnn / "encoder"), out=str(tmp_path / "bare"), images=str(photos))
    bare = (tmp_path / "bare" / "README.md").read_text(encoding="utf-8")
    assert "## Measured" not in bare and "## Training" not in bare and "## Use" in bare


@pytest.mark.parametrize("preprocess", [False, True])
def test_onnx_of_a_cnn_takes_any_number_of_images(cnn, photos, tmp_path, preprocess):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    said = export(str(cnn), out=str(tmp_path / "out"), format="onnx", preprocess=preprocess, images=str(photos))
    images, views = views_of(photos, (16, 24))
    with torch.inference_mode():
        wanted = Encoder.load(cnn / "encoder")(views).numpy()
    path = tmp_path / "out" / "model.onnx"
    if preprocess:
        got = np.concatenate([run_onnx(path, image[None]) for image in images])
        together = run_onnx(path, np.stack([images[0]] * 5))
        assert np.allclose(together, got[:1], atol=1e-5) and said["input"] == "pixels"
    else:
        got = run_onnx(path, views.numpy())
        assert np.allclose(run_onnx(path, views.numpy()[:1]), got[:1], atol=1e-5) and said["input"] == "images"
    assert np.abs(got - wanted).max() < 1e-3 * np.abs(wanted).max() and said["difference"] < 1e-3 * np.abs(wanted).max()


def test_onnx_of_a_vit(photos, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    run = as_run(tmp_path / "run", VIT)
    said = export(str(run), out=str(tmp_path / "out"), format="onnx", images=str(photos))
    assert said["difference"] < 1e-4 and said["files"] == ["README.md", "manifest.json", "model.onnx"]


def test_preprocessing_is_that_of_embedding(photos):
    encoder = Encoder(*CNN).eval()
    seen = []
    encoder.forward = lambda images: seen.append(images) or images.flatten(1)
    images, views = views_of(photos, (16, 24))
    for image, view in zip(images, views, strict=True):
        FromPixels(encoder)(torch.from_numpy(image)[None])
        assert (seen[-1][0] - view).abs().max() < 1.5 / 255


def test_an_export_that_differs_is_not_written(cnn, photos, tmp_path, monkeypatch):
    by_timm = module._by_timm
    monkeypatch.setattr(module, "_by_timm", lambda *arguments: by_timm(*arguments) * 1.01)
    with pytest.raises(UserError, match=r"gives other features.*nothing was written"):
        export(str(cnn), out=str(tmp_path / "out"), images=str(photos))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(module, "_by_timm", lambda *arguments: by_timm(*arguments) * np.nan)
    with pytest.raises(UserError, match="gives other features"):
        export(str(cnn), out=str(tmp_path / "out"), images=str(photos))


def test_only_earlier_exports_are_replaced(cnn, photos, tmp_path):
    out = str(tmp_path / "out")
    export(str(cnn), out=out, images=str(photos))
    with pytest.raises(UserError, match="exists: choose another --out"):
        export(str(cnn), out=out, images=str(photos))
    export(str(cnn), out=out, images=str(photos), overwrite=True)
    with pytest.raises(UserError, match="is the images"):
        export(str(cnn), out=str(photos), images=str(photos), overwrite=True)
    with pytest.raises(UserError, match="not an earlier export"):
        export(str(cnn), out=str(photos), images="digits", overwrite=True)
    assert len(list(photos.iterdir())) == 6


def test_mistakes(cnn, photos, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="--preprocess is for --format onnx"):
        export(str(cnn), out=str(tmp_path / "out"), preprocess=True)
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'ssl-kit\[onnx\]'"):
        exporting.write_onnx(Encoder(*CNN), tmp_path / "x.onnx")
    weights = cnn / "encoder" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + b"?")
    try:
        with pytest.raises(DamagedError, match=r"model\.safetensors is damaged"):
            export(str(cnn), out=str(tmp_path / "out"), images=str(photos))
    finally:
        weights.write_bytes(good)


def test_the_command_line(cnn, tmp_path, capsys):
    assert cli.main(["export", str(cnn), "--out", str(tmp_path / "out"), "--format", "timm"]) == 0
    text = capsys.readouterr().out
    assert "checked on the built-in digits" in text and "largest difference" in text
    assert f'next: python -c \'import timm; print(timm.create_model("local-dir:{tmp_path}/out"' in text
