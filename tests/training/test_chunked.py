"""Gradient caching: the gradient of the large batch, statistics counted once, nothing held, through the CLI too."""

import csv
import weakref

import pytest
import torch
from tiny_runs import stopped_after
from torch import nn

from ssl_kit import cli
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.training.chunked import buffers_kept, chunked

SIZE = (8, 8)


class Parts:
    """Chunks of given views; counts the chunks whose views somebody holds."""

    def __init__(self, views, sizes):
        self.views = [view.split(sizes) for view in views]
        self.alive = weakref.WeakSet()
        self.asked, self.most = [], 0

    def __len__(self):
        return len(self.views[0])

    def __getitem__(self, number):
        made = [view[number].clone() for view in self.views]
        self.alive.add(made[0])
        self.most = max(self.most, len(self.alive))
        self.asked.append(number)
        return made, Key(0, 0, torch.arange(len(made[0])))


def simclr(norm=None, seed=0):
    torch.manual_seed(seed)
    args = {"channels": [8, 8, 8, 16], **({"norm_layer": norm} if norm else {})}
    method = SimCLR(Encoder("resnet18_small", args, SIZE), projection=(32, 16))
    if norm:  # a head without batch statistics
        method.heads = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))])
    return method


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(count, 3, *SIZE, generator=generator)
    return [first, (first + 0.2 * torch.rand(first.shape, generator=generator)).clamp(0, 1)]


def step(method, views, chunks=None):
    """Loss and gradients of one training step."""
    method.zero_grad()
    batch = {"views": views, "key": Key(0, 0, torch.arange(len(views[0])))}
    if chunks is not None:
        batch |= {"views": [], "chunks": chunks}
    loss = method.training_step(batch, 0)["loss"]
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in method.named_parameters()}


def difference(gradients, wanted):
    """Largest difference over all parameters, relative to the largest gradient."""
    largest = max(gradient.abs().max() for gradient in wanted.values())
    return max((gradients[name] - wanted[name]).abs().max() for name in wanted) / largest


def test_without_batch_statistics_it_is_the_gradient_of_the_large_batch():
    method, views = simclr("groupnorm1"), images(1024)
    loss, wanted = step(method, views)
    parts = Parts(views, [64] * 16)
    cached, gradients = step(method, views, parts)
    assert cached == pytest.approx(loss, rel=1e-6)
    assert difference(gradients, wanted) <= 1e-5
    assert parts.asked == [*range(16), *reversed(range(16))]


def per_chunk(method, views, sizes):
    """The reference for batch norm: every chunk normalises its own samples, all in one graph."""
    parts = zip(*(view.split(sizes) for view in views), strict=True)
    z = [method.project(list(part), Key(0, 0, torch.arange(0))).unflatten(0, (2, -1)) for part in parts]
    return torch.cat(z, dim=1).flatten(0, 1)


def test_batch_norm_normalises_each_chunk_and_counts_its_statistics_once():
    views, sizes = images(40), [16, 16, 8]
    method, reference = simclr(), simclr()
    loss, gradients = step(method, views, Parts(views, sizes))
    wanted = reference.contrast(per_chunk(reference, views, sizes))["loss"]
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    assert difference(gradients, {name: parameter.grad for name, parameter in reference.named_parameters()}) <= 1e-6
    for (name, buffer), other in zip(method.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    assert method.encoder.model.bn1.num_batches_tracked == len(sizes)


def test_dropout_is_replayed_and_the_generator_goes_on_as_usual():
    views, sizes = images(24), [8, 8, 8]
    results = []
    for cached in (True, False):
        method = simclr("groupnorm1")
        method.heads.append(nn.Dropout(0.5))
        method.heads = nn.ModuleList([nn.Sequential(*method.heads)])
        torch.manual_seed(5)
        z = chunked(method, method.project, Parts(views, sizes), 2) if cached else per_chunk(method, views, sizes)
        method.contrast(z)["loss"].backward()
        assert (z == 0).any()
        results.append(({name: parameter.grad for name, parameter in method.named_parameters()}, torch.rand(3)))
    (gradients, after), (wanted, usual) = results
    assert difference(gradients, wanted) <= 1e-6 and torch.equal(after, usual)


def test_no_more_than_one_chunk_is_held():
    method, views = simclr(), images(64)
    parts = Parts(views, [8] * 8)
    z = chunked(method, method.project, parts, 2)
    assert parts.most <= 2 and len(parts.alive) == 0  # a new one is made before the former goes
    method.contrast(z)["loss"].backward()
    assert parts.most <= 2 and len(parts.asked) == 16


def test_views_come_first_and_images_in_order():
    views = [torch.arange(10.0)[:, None] + 100 * view for view in range(3)]
    module = nn.Linear(1, 1)
    z = chunked(module, lambda views, key: torch.cat(views), Parts(views, [4, 4, 2]), 3)
    assert torch.equal(z, torch.cat(views))


def test_bfloat16_equals_the_reference_too():
    views, sizes = images(16), [8, 8]
    gradients = []
    for cached in (True, False):
        method = simclr("groupnorm1")
        with torch.autocast("cpu", torch.bfloat16):
            z = chunked(method, method.project, Parts(views, sizes), 2) if cached else per_chunk(method, views, sizes)
            loss = method.contrast(z)["loss"]
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in method.named_parameters()})
    assert difference(*gradients) <= 1e-6


def test_buffers_are_put_back_even_after_an_error():
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError), buffers_kept(norm):
        norm(torch.randn(4, 3))
        raise ZeroDivisionError
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


TINY = [
    *("--epochs", "5", "--batch-size", "16", "--contrastive-batch", "80", "--method.projection", "[32, 16]"),
    *("--method.encoder.args", "{channels: [8, 8, 16, 16]}", "--method.optim.lr", "0.1", "--image-size", "12"),
]


def losses(run):
    with open(run / "metrics.csv", newline="") as file:
        return [(row["step"], row["images"], row["loss"], row["lr"]) for row in csv.DictReader(file) if row["loss"]]


def test_the_command_line_trains_in_chunks_and_resumes_bit_for_bit(labelled_folder, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(whole), *TINY]) == 0
    rows = losses(whole)
    assert rows[-1][0] == "10" and rows[-1][1] == str(5 * 152)  # two steps an epoch; 8 images are held out for kNN
    with stopped_after(5):
        cli.main(["pretrain", str(labelled_folder), "--run", str(run), *TINY])
    assert cli.main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert losses(run) == rows
    assert (run / "encoder" / "model.safetensors").read_bytes() == (
        whole / "encoder" / "model.safetensors"
    ).read_bytes()


def test_what_cannot_come_in_chunks_is_refused(labelled_folder, tmp_path, capsys):
    command = ["pretrain", str(labelled_folder), "--run", str(tmp_path / "run"), "--epochs", "1", "--image-size", "16"]
    mae = ["--method", "ssl_kit.methods.mae.MAE", "--batch-size", "8", "--contrastive-batch", "32"]
    for options, message in [
        (mae, "the loss of MAE is not one of projections"),
        (["--batch-size", "32", "--contrastive-batch", "32"], "wanted a smaller batch size"),
        (["--batch-size", "32", "--contrastive-batch", "4096"], "lower --contrastive-batch to at most 152"),
    ]:
        assert cli.main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
