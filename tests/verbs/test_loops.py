"""Our parts in somebody else's loop: what they are given, and that it is what a run of ours would see."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from stripes import pattern
from torch import nn

import ssl_kit
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.encoders.wrapped import Wrapped
from ssl_kit.methods.simclr import nt_xent
from ssl_kit.training.curves import read_curves
from ssl_kit.verbs.loops import Monitor, ViewLoader

ROOT = Path(__file__).parents[2]


def arrays(each=20):
    """Stripes of four directions, (4 each, 16, 16, 3), and their labels."""
    images = np.stack([pattern(label, number) for label in range(4) for number in range(each)])
    return images, np.repeat(np.arange(4), each)


def test_a_loader_shows_every_image_once_an_epoch_shuffled_anew():
    images, labels = arrays()
    loader = ViewLoader((images, labels), "plain", batch_size=32, count=1, seed=3, epochs=2)
    seen = [(views[0], known) for views, known in loader]
    assert len(seen) == len(loader) == 6 and {len(known) for _, known in seen} == {26, 27}
    stored = torch.from_numpy(images.transpose(0, 3, 1, 2) / 255).float()
    for epoch in range(2):
        order = permutation(3, epoch, 80)
        made, known = (torch.cat(part) for part in zip(*seen[3 * epoch : 3 * epoch + 3], strict=True))
        assert torch.equal(known, torch.from_numpy(labels[order]))
        assert torch.allclose(made, stored[order], atol=1e-6)


def test_iterating_again_goes_on_and_an_epoch_can_be_set():
    make = lambda: ViewLoader(arrays(), "simclr", batch_size=40, seed=1)
    first, second = (torch.cat([views[0] for views, _ in loader]) for loader in [make()] * 2)
    assert not torch.equal(first, second)
    later = make()
    next(iter(later))  # a loop that stops early has seen this epoch
    assert torch.equal(torch.cat([views[0] for views, _ in later]), second)
    later.epoch = 0
    assert torch.equal(torch.cat([views[0] for views, _ in later]), first)


def test_files_without_labels_in_two_lines(tmp_path):
    for number in range(10):
        Image.fromarray(pattern(number % 4, number, 24)).save(tmp_path / f"{number}.png")
    for (one, other), labels in ViewLoader(tmp_path, "byol", batch_size=4, size=16):
        assert one.shape == other.shape == (len(labels), 3, 16, 16) and (labels == -1).all()
        assert not torch.equal(one, other)


def test_processes_share_a_batch(monkeypatch):
    whole = list(ViewLoader(arrays(), batch_size=40))
    parts = []
    for number in range(2):
        monkeypatch.setattr("ssl_kit.verbs.loops.rank", lambda number=number: number)
        monkeypatch.setattr("ssl_kit.verbs.loops.world_size", lambda: 2)
        parts.append(list(ViewLoader(arrays(), batch_size=20)))
    for (views, labels), *halves in zip(whole, *parts, strict=True):
        assert torch.equal(labels, torch.cat([known for _, known in halves]))
        assert torch.equal(views[1], torch.cat([made[1] for made, _ in halves]))


def test_too_large_a_batch_is_refused_at_once():
    with pytest.raises(UserError, match="fewer than one step"):
        ViewLoader(arrays(), batch_size=100)
    with pytest.raises(UserError, match="epochs 0"):
        ViewLoader(arrays(), epochs=0)


class Plain(pl.LightningModule):
    """A LightningModule as others write it: SimCLR's loss on whatever the loader gives, a pooled map as features."""

    def __init__(self, collapse=False):
        super().__init__()
        layers = [nn.Conv2d(3, 24, 5, 2), nn.BatchNorm2d(24), nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(24, 32, 3)]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.losses, self.collapse = [], collapse

    def training_step(self, batch, batch_idx):
        first, second = (self.backbone(view).flatten(1) for view in batch[0])
        loss = (first - 1).square().mean() if self.collapse else nt_xent(torch.cat([first, second]), 0.2)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5 if self.collapse else 0.1)


def trained(folder, *callbacks, epochs=25, module=None, **options):
    torch.manual_seed(0)
    module = module or Plain()
    loader = ViewLoader(arrays(60), "simclr", batch_size=24)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=list(callbacks), default_root_dir=folder, **quiet | options)
    trainer.fit(module, loader)
    return module


def test_a_monitor_ends_in_a_report_and_changes_nothing(tmp_path):
    alone = trained(tmp_path)
    watched = trained(tmp_path, Monitor((arrays(90)[0][::3], arrays(90)[1][::3]), tmp_path / "seen"))
    assert watched.losses == alone.losses and watched.backbone.training
    assert all(
        torch.equal(a, b) for a, b in zip(alone.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    rows = read_curves(tmp_path / "seen" / "metrics.csv")
    looks = [row for row in rows if "effective_rank" in row]
    assert [row["step"] for row in looks] == [0, 100, 200, 250]
    assert {"knn_top1", "crops_top1", "turned", "embedding_std"} <= set(looks[-1]) and looks[-1]["turned"] > 0.01
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(np.mean(alone.losses[:20]), rel=1e-5) and steps[-1]["epoch"] == 25
    record = json.loads((tmp_path / "seen" / "run.json").read_text())
    assert record["status"] == "finished" and record["method"] == "Plain" and record["dim"] == 32
    assert record["verdict"]["state"] in (tmp_path / "seen" / "report.html").read_text()


def test_a_collapse_is_called_one(tmp_path):
    trained(tmp_path, Monitor(arrays(30)[0], tmp_path / "seen"), module=Plain(collapse=True))
    record = json.loads((tmp_path / "seen" / "run.json").read_text())
    assert record["verdict"]["state"] == "collapsed"


def test_without_images_of_its_own_it_looks_at_those_of_the_training(tmp_path):
    named = trained(tmp_path, Monitor(arrays(), tmp_path / "named"))
    assert trained(tmp_path, Monitor()).losses == named.losses
    looks = [
        [row for row in read_curves(tmp_path / name / "metrics.csv") if "effective_rank" in row]
        for name in ("monitor", "named")
    ]
    assert looks[0][0]["step"] == 0 and "knn_top1" in looks[0][0] and looks[0][0]["turned"] == 0
    assert looks[0][-1]["turned"] == looks[1][-1]["turned"] > 0.01  # from the weights before the first step on


def test_a_monitor_refuses_what_it_cannot_judge(tmp_path):
    trained(tmp_path, Monitor(), epochs=1)
    with pytest.raises(UserError, match="holds a run already"):
        trained(tmp_path, Monitor(), epochs=1)
    trained(tmp_path, Monitor(overwrite=True), epochs=1)
    with pytest.raises(UserError, match="has no head; encoder= may be backbone"):
        trained(tmp_path / "a", Monitor(encoder="head"), epochs=1)

    class Normalised(Plain):
        def on_before_batch_transfer(self, batch, _):
            return [(view - 0.5) / 0.2 for view in batch[0]], batch[1]

    with pytest.raises(UserError, match=r"wanted \[0, 1\], or the mean= and std="):
        trained(tmp_path / "b", Monitor(), epochs=1, module=Normalised())
    trained(tmp_path / "c", Monitor(mean=0.5, std=0.2), epochs=1, module=Normalised())


class Colours(nn.Module):
    """Mean and spread of each channel, by a fixed head; says nothing of its size."""

    def __init__(self):
        super().__init__()
        self.head, self.dropout = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, images):
        return self.head(self.dropout(torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)))


def test_any_module_is_evaluated_beside_its_baselines(tmp_path):
    images, labels = arrays(40)
    coloured = np.stack([np.roll(image // 2, label, axis=2) for image, label in zip(images, labels, strict=True)])
    coloured[..., 0] += (60 * (labels % 2)[:, None, None]).astype(np.uint8)
    module = Colours().train()
    found = ssl_kit.evaluate(module, (coloured, labels % 2), out=str(tmp_path), only="knn", verbose=False)
    scores = {row["features"]: row["metrics"]["top1"] for row in found["results"]}
    assert set(scores) == {"encoder", "pixels", "pca", "random_init"} and found["encoder"] == "Colours"
    assert scores["encoder"] > 0.7 and (tmp_path / "report.html").exists()
    assert module.training and module.head.training
    options = {"out": str(tmp_path), "baselines": "none"}
    twice = [ssl_kit.evaluate(module, (coloured, labels % 2), only="instances", **options) for _ in range(2)]
    metrics = [[row["metrics"] for row in one["results"]] for one in twice]
    assert metrics[0] == metrics[1] and [row["features"] for row in twice[0]["results"]] == ["encoder"]
    with torch.no_grad():
        module.head.weight.zero_()
    changed = ssl_kit.evaluate(module, (coloured, labels % 2), only="knn", **options)
    assert changed["results"][0]["metrics"]["top1"] < scores["encoder"]  # nothing of its old weights is kept


def test_a_module_that_is_no_encoder_is_refused():
    with pytest.raises(UserError, match="no known stages"):
        ssl_kit.evaluate(Colours(), arrays(), layers=2)
    with pytest.raises(UserError, match=r"makes \(\) of 2 images"):
        Wrapped(type("Loss", (nn.Module,), {"forward": lambda self, images: images.mean()})(), (8, 8))


def test_a_module_whose_weights_cannot_be_drawn_anew_has_no_untrained_one_beside_it(capsys):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    fresh = Wrapped(module, (8, 8)).fresh(0)
    assert not torch.equal(fresh.module[1].weight, module[1].weight)
    module.token = nn.Parameter(torch.zeros(1))
    assert Wrapped(module, (8, 8)).fresh(0) is None


def test_the_examples_change_six_lines_at_most(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    loops = import_module("loops")
    assert {name: loops.changed(name) for name in loops.NAMES} == {"lightly_cifar": 6, "plain_loop": 5}


def test_a_training_that_lightning_resumes_goes_on_with_its_curves(tmp_path):
    watch = lambda: Monitor(arrays(30), tmp_path / "seen")
    trainer = trained(tmp_path, watch(), epochs=5).trainer
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(UserError, match="holds a run already"):
        trained(tmp_path, watch(), epochs=10)
    torch.manual_seed(0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    again = pl.Trainer(max_epochs=10, callbacks=[watch()], default_root_dir=tmp_path, **quiet)
    loader = ViewLoader(arrays(60), "simclr", batch_size=24)
    loader.epoch = 5
    again.fit(Plain(), loader, ckpt_path=tmp_path / "half.ckpt")
    rows = read_curves(tmp_path / "seen" / "metrics.csv")
    assert [row["step"] for row in rows if "loss" in row] == [20, 40, 50, 60, 80, 100]
    assert [row["step"] for row in rows if "effective_rank" in row] == [0, 50, 100]
    assert rows[-1]["turned"] > 0.01 and rows[-1]["seconds"] > rows[3]["seconds"]
