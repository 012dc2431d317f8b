"""Our parts in somebody else's loop: what they are given, and that it is what a run of ours would see."""

import numpy as np
import pytest
import torch
from PIL import Image
from stripes import pattern

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import permutation
from ssl_kit.verbs.loops import ViewLoader


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
