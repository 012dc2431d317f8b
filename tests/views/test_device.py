"""The device executor agrees with the host executor, which is held to torchvision."""

import numpy as np
import pytest
import torch
from views_oracle import LEVEL, identity, photo

from ssl_kit.core.errors import UserError
from ssl_kit.views import sample as col
from ssl_kit.views.device import apply_device
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import View
from ssl_kit.views.sample import sample


def policy(size: tuple[int, int], channels: int) -> View:
    turn = 0.5 if size[0] == size[1] else 0.0
    colour = {"saturation": 0.8, "hue": 0.2, "gray": 0.2} if channels == 3 else {}
    colour |= {"bands": channels, "drop": 0.5} if channels > 3 else {}
    rest = {"flip_x": 0.5, "flip_y": 0.5, "blur": 0.5, "solarize": 0.3, "erase": 0.3, "turn": turn}
    return View(size, crop=1, jitter=0.9, brightness=0.8, contrast=0.8, **rest, **colour)


def both(images: np.ndarray, params: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    stored = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    return apply_host(images, params, size), apply_device(stored, params, size).numpy()


@pytest.mark.parametrize(
    ("count", "stored", "size", "channels"),
    [
        (257, (32, 32), (32, 32), 3),
        (12, (120, 90), (96, 96), 3),
        (6, (224, 224), (224, 224), 3),
        (6, (333, 250), (224, 224), 3),
        (17, (37, 53), (29, 41), 3),
        (17, (37, 53), (43, 43), 1),
        (9, (64, 64), (32, 32), 4),
        (1, (50, 50), (32, 32), 3),
        (5, (1, 7), (9, 9), 3),
    ],
)
def test_host_and_device_agree_on_the_whole_policy(
    count: int, stored: tuple[int, int], size: tuple[int, int], channels: int
) -> None:
    images = np.stack([photo(*stored, channels, seed=n) for n in range(count)])
    sizes = np.full(count, stored[0]), np.full(count, stored[1])
    host, device = both(images, sample(policy(size, channels), 5, 2, np.arange(count), 1, *sizes), size)
    difference = np.abs(host - device)
    assert difference.max() <= 0.1 * LEVEL
    assert difference.mean() <= 0.01 * LEVEL


def test_16_bits_are_the_same_picture_on_both() -> None:
    images = np.stack([photo(40, 50, channels=5, seed=n) for n in range(12)])
    deep = images.astype(np.uint16) * 257
    params = sample(policy((24, 24), 5), 1, 0, np.arange(12), 0, np.full(12, 40), np.full(12, 50))
    host, device = both(deep, params, (24, 24))
    assert np.abs(host - device).max() <= 0.1 * LEVEL
    assert np.abs(host - apply_host(images, params, (24, 24))).max() < 1e-6
    mixed = [deep[n] if n % 3 else images[n] for n in range(12)]  # one call, two depths
    assert np.array_equal(apply_host(mixed, params, (24, 24), threads=2)[1::3], host[1::3])


def test_channels_change_apart_and_one_is_dropped() -> None:
    images = np.stack([photo(16, 16, channels=4, seed=n) for n in range(400)])
    view = View((16, 16), jitter=1.0, brightness=0.5, bands=4, drop=0.5)
    params = sample(view, 0, 0, np.arange(400), 0, np.full(400, 16), np.full(400, 16))
    made = apply_host(images, params, (16, 16))
    stored = images.transpose(0, 3, 1, 2) / 255
    dropped = params[:, col.DROPPED].astype(int)
    assert 150 < (dropped >= 0).sum() < 250 and set(dropped) == {-1, 0, 1, 2, 3}
    for n, channel in enumerate(dropped.tolist()):
        for c in range(4):
            expected = 0 * stored[n, c] if c == channel else np.clip(stored[n, c] * params[n, 23 + 2 * c], 0, 1)
            assert np.abs(made[n, c] - expected).max() < 1e-5
    factors = params[:, [23, 25, 27, 29]]
    assert factors.min() >= 0.5 and factors.max() <= 1.5 and np.abs(np.corrcoef(factors.T) - np.eye(4)).max() < 0.2


def test_fractional_boxes_agree() -> None:
    rng = np.random.default_rng(0)
    images = np.stack([photo(40, 50, seed=n) for n in range(20)])
    params = identity(20, 40, 50)
    params[:, col.HEIGHT], params[:, col.WIDTH] = rng.uniform(0.2, 40, 20), rng.uniform(0.2, 50, 20)
    params[:, col.TOP] = rng.uniform(0, 40 - params[:, col.HEIGHT])
    params[:, col.LEFT] = rng.uniform(0, 50 - params[:, col.WIDTH])
    host, device = both(images, params, (17, 23))
    assert np.abs(host - device).max() <= 0.1 * LEVEL


def test_one_image_is_the_same_in_a_batch_of_another_size() -> None:
    images = torch.from_numpy(np.stack([photo(30, 30, seed=n) for n in range(8)]).transpose(0, 3, 1, 2).copy())
    params = sample(policy((24, 24), 3), 0, 0, np.arange(8), 0, np.full(8, 30), np.full(8, 30))
    together = apply_device(images, torch.from_numpy(params), (24, 24))
    alone = torch.cat([apply_device(images[n : n + 1], params[n : n + 1], (24, 24)) for n in range(8)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_one_graph_serves_all_batches() -> None:
    """No graph break and no compilation between batches whose images want different operations."""
    seen = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(apply_device, backend=count, fullgraph=True)
    images = torch.from_numpy(np.stack([photo(12, 12, seed=n) for n in range(4)]).transpose(0, 3, 1, 2).copy())
    for epoch in range(5):
        params = sample(policy((8, 8), 3), 0, epoch, np.arange(4), 0, np.full(4, 12), np.full(4, 12))
        got = compiled(images, torch.from_numpy(params), (8, 8))
        assert torch.allclose(got, apply_device(images, params, (8, 8)), atol=1e-6)
    assert len(seen) == 1


def test_what_does_not_fit_is_refused_by_name() -> None:
    images = torch.zeros(2, 1, 6, 6, dtype=torch.uint8)
    params = identity(2, 6, 6)
    with pytest.raises(UserError, match=r"float32 .2, 1, 6, 6.; wanted uint8"):
        apply_device(images.float(), params, (4, 4))
    with pytest.raises(UserError, match=r"wanted .2, 22."):
        apply_device(images, params[:1], (4, 4))
    params[1, col.HUE] = 0.1
    with pytest.raises(UserError, match="hue need 3 channels"):
        apply_device(images, params, (4, 4))
