"""What holds on an accelerator: `pytest -m gpu`; and that the program which measures it runs, in small, anywhere."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image

from ssl_kit import pretrain
from ssl_kit.core.machine import use_tf32
from ssl_kit.data.module import ImageData
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.methods.simclr import nt_xent
from ssl_kit.views.batch import made_on_device
from ssl_kit.views.device import DeviceViews
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import ViewRecipe
from ssl_kit.views.sample import sample

ROOT = Path(__file__).parent.parent
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SMALL = {"name": "resnet18_small", "args": {"channels": [8, 8, 16, 16]}}
METHOD = {"class_path": "ssl_kit.methods.simclr.SimCLR", "init_args": {"encoder": SMALL}}


def gpu(test):
    """Only with `-m gpu`, which lets the suite see GPUs."""
    for mark in GPU:
        test = mark(test)
    return test


def pictures(count, side):
    """(count, side, side, 3) uint8, smooth and noisy."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 5, 5, 3), np.uint8)
    smooth = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in coarse]
    return (
        (np.stack(smooth).astype(np.int16) + rng.integers(-9, 10, (count, side, side, 3))).clip(0, 255).astype(np.uint8)
    )


def test_the_measurements_run_here_in_small(tmp_path):
    rows = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--quick", "--json", str(rows)]
    subprocess.run([*command, "--only", "gpu/loss,gpu/knn,gpu/embed,gpu/simclr-r18/bare,gpu/mae,gpu/start"], check=True)
    made = {row["id"]: row for row in json.loads(rows.read_text())}
    assert set(made) >= {"gpu/loss/1024/plain", "gpu/knn/50000/faiss-cpu", "gpu/embed/forward", "gpu/mae-vit/bare"}
    assert made["gpu/start/seconds"]["note"] == "no data given"
    for name in ("gpu/loss/1024/plain", "gpu/knn/50000/faiss-cpu", "gpu/embed/forward", "gpu/simclr-r18/bare"):
        assert made[name]["ratio"] > 0 and made[name]["ours"] > 0, made[name]


@gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("size", "stored"), [(32, 32), (224, 256)])
def test_device_views_are_those_of_the_host_under_tf32(compiled, size, stored):
    images, sides = pictures(16, stored), np.full(16, stored)
    view = ViewRecipe(blur=0.5, solarize=0.2).build((size, size), 3, 1)[0]
    params = sample(view, 0, 0, np.arange(16), 0, sides, sides)
    use_tf32(True)
    there = torch.from_numpy(images).cuda().permute(0, 3, 1, 2)
    made = DeviceViews(compiled)(there, torch.from_numpy(params).cuda(), view.size).cpu().numpy()
    assert np.abs(made - apply_host(images, params, view.size)).max() <= 2 / 255
    assert torch.get_float32_matmul_precision() == "high"


@gpu
@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_neighbours_are_those_of_faiss(metric):
    rng = np.random.default_rng(0)
    gallery = normalised(rng.standard_normal((20_000, 64), np.float32))
    gallery[10_000:] = gallery[:10_000]  # every row twice
    queries = normalised(rng.standard_normal((200, 64), np.float32))
    scores, ids = search(gallery, queries, 20, metric=metric, device="cuda")
    wanted, names = search(gallery, queries, 20, metric=metric)
    assert np.abs(scores - wanted).max() < 1e-5 and (ids == names).mean() > 0.99


@gpu
@pytest.mark.parametrize("rows", [1_024, 12_288])
def test_the_loss_is_that_of_float64_by_the_matrix_and_in_blocks(rows):
    use_tf32(False)
    z = torch.randn(rows, 64, device="cuda", requires_grad=True)
    exact = z.detach().double().requires_grad_()
    unit = F.normalize(exact, dim=1)
    s = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
    wanted, got = F.cross_entropy(s, torch.arange(rows, device="cuda").roll(rows // 2)), nt_xent(z, 0.2)
    wanted.backward()
    got.backward()
    assert float(got) == pytest.approx(float(wanted), abs=1e-4)
    assert float((z.grad - exact.grad).norm() / exact.grad.norm()) < 1e-4


class Spoil(pl.Callback):
    """Puts an infinite gradient into step 3; whether that changed a weight."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2:
            self.weights = [weight for weight in pl_module.parameters() if weight.grad is not None]
            self.before = [weight.detach().clone() for weight in self.weights]
            self.weights[0].grad[(0,) * self.weights[0].ndim] = torch.inf

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            self.same = all(torch.equal(*pair) for pair in zip(self.weights, self.before, strict=True))


def trained(run, steps, *callbacks, images=None, **options):
    trainer = {"max_steps": steps, "callbacks": list(callbacks), "deterministic": True}
    settings = {"method": METHOD, "batch_size": 16, "epochs": 100, "image_size": 16, "trainer": trainer, **options}
    return pretrain(pictures(64, 16) if images is None else images, run=str(run), **settings)


@gpu
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_bad_step_changes_no_weight(tmp_path, precision):
    spoil = Spoil()
    trained(tmp_path / "run", 5, spoil, precision=precision)
    assert spoil.same


class Stop(pl.Callback):
    """As SIGTERM would, after five steps."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            signal.raise_signal(signal.SIGTERM)


@gpu
def test_a_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    trained(tmp_path / "whole", 10)
    with pytest.raises(SystemExit):
        trained(tmp_path / "parts", 10, Stop())
    trained(tmp_path / "parts", 10, resume=True)
    whole, parts = (tmp_path / run / "encoder" / "model.safetensors" for run in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@gpu
@pytest.mark.parametrize("kind", ["of one size", "of several sizes", "files"])
def test_batches_arrive_as_the_host_would_have_made_them(tmp_path, kind):
    """Pinned, copied on a stream of their own, used again: many steps, each held to the host's views."""
    images = list(pictures(96, 24))
    if kind == "of several sizes":
        images[5] = images[5][:20]
    if kind == "files":
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    source = open_source(tmp_path, in_memory=False) if kind == "files" else open_source(images)
    views = ViewRecipe(blur=0.5).build((16, 16), 3, 2)
    seen = []

    class Look(pl.LightningModule):
        def training_step(self, batch, _):
            seen.append((batch["key"].epoch, batch["key"].index.cpu(), [view.cpu() for view in batch["views"]]))
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Look()
    module.weight = torch.nn.Parameter(torch.zeros(1))
    data = ImageData(source, {0: views}, batch_size=16, seed=0, views_on="device")
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(accelerator="cuda", devices=1, max_steps=30, max_epochs=-1, **options).fit(module, datamodule=data)
    assert len(seen) == 30
    for epoch, index, made in seen:
        stored = [source.read([row])[0] if kind != "files" else images[row] for row in index.tolist()]
        for which, (view, got) in enumerate(zip(views, made, strict=True)):
            heights, widths = np.array([image.shape[:2] for image in stored]).T
            params = sample(view, 0, epoch, index.numpy(), which, heights, widths)
            wanted = apply_host([np.ascontiguousarray(image) for image in stored], params, view.size)
            assert np.abs(got.numpy() - wanted).max() <= 4 / 255


@gpu
def test_code_of_two_step_sizes_and_of_views_that_grow_is_compiled_before_the_first_step(tmp_path, capsys):
    options = {"compile": "on", "batch_size": 19, "grow": {1: 8}, "trainer": {"max_steps": 12}}
    pretrain(pictures(70, 16), run=str(tmp_path / "run"), method=METHOD, image_size=16, epochs=100, **options)
    said = capsys.readouterr().out
    assert "compiled for 17 and 18 images at once" in said and "anew" not in said


@gpu
@pytest.mark.parametrize("recipe", ["vae_cifar10", "mae_cifar10_tiny", "dino_cifar10_small", "byol_cifar10_small"])
def test_packaged_recipes_train(tmp_path, recipe):
    images = pictures(64, 32)
    made = pretrain(images, recipe=recipe, run=str(tmp_path / "run"), batch_size=16, epochs=1, trainer={"max_steps": 3})
    assert made["status"] == "finished" and made["device"].startswith("cuda") and made["peak_memory"]["device"] > 0


@gpu
def test_compiled_views_of_deep_and_many_banded_images():
    rng = np.random.default_rng(0)
    for channels, kind in ((5, np.uint16), (1, np.uint8)):
        images = rng.integers(0, np.iinfo(kind).max, (8, 20, 20, channels), kind)
        view = ViewRecipe(preset="simclr").fitted("simclr", (16, 16), channels).build((16, 16), channels, 1)[0]
        params = sample(view, 0, 0, np.arange(8), 0, np.full(8, 20), np.full(8, 20))
        stored, store = torch.arange(8).cuda(), torch.from_numpy(images).cuda()
        (made,) = made_on_device(
            [stored], [torch.from_numpy(params).cuda()], [view], make=DeviceViews(True), store=store
        )
        assert np.abs(made.cpu().numpy() - apply_host(images, params, view.size)).max() <= 2 / 255
