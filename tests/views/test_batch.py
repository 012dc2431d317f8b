"""`Views` gives what a run makes of the same image, epoch and number, on any device, whatever batch it comes in."""

import numpy as np
import pytest
import torch

from ssl_kit.core.errors import UserError
from ssl_kit.views.batch import Views
from ssl_kit.views.device import apply_device
from ssl_kit.views.host import apply_host
from ssl_kit.views.recipe import ViewRecipe
from ssl_kit.views.sample import sample


def images(count=6, channels=3, dtype=np.uint8, side=32):
    top = np.iinfo(dtype).max
    made = np.random.default_rng(0).integers(0, top, (count, channels, side, side), dtype=dtype, endpoint=True)
    return torch.from_numpy(made)


def test_they_are_those_of_a_run():
    stored, index = images(), np.array([3, 1, 4, 1, 5, 9])
    made = Views("simclr", seed=7)(stored, index=index, epoch=2)
    views = ViewRecipe().fitted("simclr", (32, 32), 3).build((32, 32), 3, 2)  # as verbs/pretrain.py has them
    for which, (own, view) in enumerate(zip(made, views, strict=True)):
        params = sample(view, 7, 2, index, which, np.full(6, 32), np.full(6, 32))
        wanted = apply_host(stored.permute(0, 2, 3, 1).contiguous().numpy(), params, (32, 32))
        assert np.array_equal(own.numpy(), wanted)


def test_images_are_counted_from_call_to_call_and_one_may_go_on():
    stored, views = images(), Views("simclr")
    whole = Views("simclr")(stored)
    parts = [views(stored[:2]), views(stored[2:])]
    assert all(torch.equal(torch.cat(part), one) for part, one in zip(zip(*parts, strict=True), whole, strict=True))
    assert not torch.equal(views(stored)[0], whole[0]) and views.seen == 12
    views.seen = 0
    assert torch.equal(views(stored)[0], whole[0])


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint16, 3), (np.uint16, 5), (np.uint8, 1)])
def test_deep_images_of_other_channels(dtype, channels):
    made = Views("simclr", count=3, size=(16, 24))(images(4, channels, dtype))
    assert [view.shape for view in made] == [(4, channels, 16, 24)] * 3
    assert all(view.dtype == torch.float32 and view.min() >= 0 and view.max() <= 1 for view in made)


def test_elsewhere_they_are_made_there(monkeypatch):
    """The device's executor is asked with the same numbers; here it runs on a CPU that calls itself otherwise."""
    asked = []

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    def record(stored, params, size):
        asked.append(params)
        return apply_device(torch.Tensor(stored).to(torch.uint8), params, size)

    monkeypatch.setattr("ssl_kit.views.batch.apply_device", record)
    stored = images()
    made = Views("simclr")(stored.as_subclass(Elsewhere))
    here = Views("simclr")(stored)
    assert len(asked) == 2
    assert all((one - other).abs().max() < 1e-3 for one, other in zip(made, here, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    made, here = Views("simclr")(images().cuda()), Views("simclr")(images())
    assert all(one.is_cuda and (one.cpu() - other).abs().max() < 1e-3 for one, other in zip(made, here, strict=True))


@pytest.mark.parametrize("wrong", [images().float(), images()[0]])
def test_anything_else_is_refused(wrong):
    with pytest.raises(UserError, match="wanted uint8 or uint16"):
        Views("simclr")(wrong)
    with pytest.raises(UserError, match="a number for each of 6 images"):
        Views("simclr")(images(), index=torch.arange(5))
