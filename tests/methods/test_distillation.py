"""Distillation's shares of variance against a plain formula and closed forms; its teacher; what is seen once."""

import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from ssl_kit import pretrain
from ssl_kit.core.errors import UserError
from ssl_kit.core.named import find_encoder
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.distillation import Distillation, unexplained

SIZE = (16, 16)


def student(width=8):
    return Encoder("resnet18_small", {"channels": [width, width, 16, 16]}, SIZE)


@pytest.fixture
def teacher(tmp_path):
    """An encoder folder of another network, of another size."""
    torch.manual_seed(5)
    return str(
        Encoder("resnet18_small", {"channels": [8, 8, 8, 24]}, (20, 20), mean=(0.4,), std=(0.3,)).save(tmp_path / "t")
    )


def views(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, *SIZE, generator=generator)], Key(0, 0, torch.arange(count))


def test_the_loss_is_the_unexplained_variance_of_pooled_features_and_of_places(teacher):
    torch.manual_seed(0)
    method = Distillation(student(), teacher, patches=0.5).eval()
    for head in (method.head, method.patch_head):
        torch.nn.init.normal_(head.weight)
    (images,), key = views()
    shown = F.interpolate(images, (20, 20), mode="bilinear", antialias=True)
    with torch.no_grad():
        taught, own = (
            net.model.forward_features(net.normalise(x)).double()
            for net, x in ((method.teacher, shown), (method.encoder, images))
        )
        method.prepare(lambda network, most: network(shown))
    wanted = taught.mean(dim=(2, 3))
    wanted = wanted - wanted.mean(dim=0)
    spread = wanted.square().mean().sqrt()
    foretold = own.mean(dim=(2, 3)) @ method.head.weight.double().T + method.head.bias.double()
    pooled = (foretold * spread - wanted).square().sum() / wanted.square().sum()
    grid = [min(one, other) for one, other in zip(own.shape[2:], taught.shape[2:], strict=True)]
    maps = F.adaptive_avg_pool2d(taught, grid)
    made = torch.einsum(
        "oc,bchw->bohw", method.patch_head.weight[:, :, 0, 0].double(), F.adaptive_avg_pool2d(own, grid)
    )
    maps, made = (one - one.mean(dim=(2, 3), keepdim=True) for one in (maps, made))
    patches = (made - maps).square().sum() / maps.square().sum()
    got = method.loss([images], key)
    assert got["pooled"].item() == pytest.approx(pooled.item(), rel=1e-5)
    assert got["patches"].item() == pytest.approx(patches.item(), rel=1e-5)
    assert got["loss"].item() == pytest.approx((pooled + 0.5 * patches).item(), rel=1e-5)
    got["loss"].backward()
    assert method.encoder.model.conv1.weight.grad is not None
    assert all(weight.grad is None for weight in method.teacher.parameters())


def test_places_gradient_and_closed_forms():
    generator = torch.Generator().manual_seed(0)
    wanted, made = (torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    ours, plain = made.float().requires_grad_(), made.clone().requires_grad_()
    unexplained(ours, wanted.float()).backward()
    centred = [maps - maps.mean(dim=(2, 3), keepdim=True) for maps in (plain, wanted)]
    ((centred[0] - centred[1]).square().sum() / centred[1].square().sum()).backward()
    torch.testing.assert_close(ours.grad.double(), plain.grad, rtol=1e-5, atol=1e-8)
    assert unexplained(wanted + 7, wanted).item() == pytest.approx(0, abs=1e-12)
    assert unexplained(torch.full((4, 3, 5, 5), 2.0), wanted).item() == pytest.approx(1)
    assert unexplained(wanted, torch.ones(4, 3, 1, 1)).item() == 0  # one place has no other to differ from


def test_the_teacher_keeps_its_normalisation_and_stays_as_it_was(teacher):
    method = Distillation(student(), teacher)
    before = {name: value.clone() for name, value in method.teacher.state_dict().items()}
    method.train()
    assert not method.teacher.training and method.teacher.mean.flatten()[0] == pytest.approx(0.4)
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.1)
    for step in range(3):
        method.loss(*views(seed=step))["loss"].backward()
        optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in method.teacher.state_dict().items())
    assert not any(name.startswith("teacher.") for name in method.state_dict())


def test_what_is_seen_once_is_the_target_of_every_view_of_that_image(teacher):
    method = Distillation(student(), teacher, cache=True)
    features = torch.randn(10, 24)
    features[3] = torch.nan  # could not be read
    method.prepare(lambda network, most: features if most is None else None)
    known = features[[row for row in range(10) if row != 3]]
    assert torch.allclose(method.mean, known.mean(dim=0))
    (images,), _ = views(3)
    loss = method.loss([images], Key(0, 0, torch.tensor([7, 3, 0])))
    wanted = (features[[7, 0]] - method.mean) / known.var(dim=0, correction=0).mean().sqrt()
    assert loss["loss"].item() == pytest.approx((wanted.square().mean(dim=1).sum() / 3).item(), rel=1e-5)
    loss["loss"].backward()
    assert method.head.weight.grad.isfinite().all() and set(loss) == {"loss", "pooled"}


class Stop(pl.Callback):
    """As SIGTERM would, after so many steps."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("cache", [False, True])
def test_a_run_learns_what_its_teacher_sees_and_goes_on_to_the_bit(teacher, labelled_folder, tmp_path, cache):
    spec = {
        "class_path": "ssl_kit.methods.distillation.Distillation",
        "init_args": {"encoder": {"name": "resnet18_small", "args": {"channels": [8, 8, 16, 16]}}, "teacher": teacher},
    }
    spec["init_args"] |= {"cache": cache, "code": cache, "patches": 0.0}
    options = {"method": spec, "image_size": 16, "batch_size": 32, "epochs": 20, "precision": "float32"}
    made = pretrain(str(labelled_folder), run=str(tmp_path / "whole"), **options)
    assert made["chance_loss"] == 1.0
    with open(tmp_path / "whole" / "metrics.csv", newline="") as file:
        columns = file.readline().strip().split(",")
        losses = [float(row.split(",")[columns.index("loss")] or "nan") for row in file.read().splitlines()]
    losses = [loss for loss in losses if np.isfinite(loss)]
    assert losses[-1] < 0.85 < losses[0] < 1.2
    if cache:
        assert Encoder.load(find_encoder(tmp_path / "whole")).dim == 24
    stop = {"trainer": {"callbacks": [Stop(31)]}}
    with pytest.raises(SystemExit):
        pretrain(str(labelled_folder), run=str(tmp_path / "parts"), **options, **stop)
    pretrain(str(labelled_folder), run=str(tmp_path / "parts"), **options, resume=True)
    one, other = ((tmp_path / run / "encoder" / "model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert one == other


def test_what_does_not_go_together_is_refused(teacher, tmp_path):
    with pytest.raises(UserError, match="wanted a weight of at least 0"):
        Distillation(student(), teacher, patches=-1)
    with pytest.raises(UserError, match=r"nothing|not on this disk"):
        Distillation(student(), str(tmp_path / "nowhere"))
    vit = Encoder("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 3}, SIZE)
    with pytest.raises(UserError, match=r"teacher_size 32: .* takes images of 16 pixels only"):
        Distillation(student(), str(vit.save(tmp_path / "vit")), teacher_size=32)
    assert Distillation(student(), str(tmp_path / "vit")).loss(*views())["patches"].isfinite()
