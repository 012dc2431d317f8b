"""A step in chunks: the same views as in one batch, in both directions, and the same images where some are bad."""

import pytest
import torch
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.module import ImageData
from ssl_kit.data.opening import open_source
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.views.recipe import ViewRecipe

VIEWS = ViewRecipe(blur=0.5).build((12, 12), 3, 2)


def first_batch(loader):
    return next(iter(loader))


@pytest.mark.parametrize("in_memory", [True, False])
def test_chunks_hold_the_views_of_the_whole_step_in_both_directions(labelled_folder, in_memory):
    source = open_source(labelled_folder, in_memory=in_memory)
    plan = TrainingPlan(len(source), 80, 3)
    whole = first_batch(ViewLoader(source, plan.batches, VIEWS, seed=3))
    made = []
    loader = ViewLoader(source, plan.batches, VIEWS, seed=3, chunk=32, threads=2)
    make, loader._make = loader._make, lambda planned, pool: made.append(len(planned.rows)) or make(planned, pool)
    batches = iter(loader)
    batch = next(batches)
    chunks = batch["chunks"]
    assert batch["views"] == [] and torch.equal(batch["key"].index, whole["key"].index)
    assert torch.equal(batch["label"], whole["label"]) and len(chunks) == 3
    forward = [chunks[number] for number in range(3)]
    backward = [chunks[number] for number in reversed(range(3))][::-1]
    for pass_ in (forward, backward):
        assert [len(key.index) for _, key in pass_] == [27, 27, 26]
        assert torch.equal(torch.cat([key.index for _, key in pass_]), whole["key"].index)
        for which in range(2):
            assert torch.equal(torch.cat([views[which] for views, _ in pass_]), whole["views"][which])
    assert len(made) <= 2 * 3 - 1 + 1  # each twice, the last one once, and the first one of the next step
    batches.close()


def damaged(labelled_folder, folder, bad):
    """40 images of which some are cut off."""
    for number in range(40):
        Image.open(labelled_folder / "a" / f"{number:03d}.png").save(folder / f"{number:02d}.png")
    for number in bad:
        path = folder / f"{number:02d}.png"
        path.write_bytes(path.read_bytes()[:90])
    return open_source(folder, in_memory=False, max_bad=0.9)


def test_bad_images_are_replaced_once_and_by_different_ones(labelled_folder, tmp_path):
    source = damaged(labelled_folder, tmp_path, [1, 5, 9, 17, 21])
    loader = ViewLoader(source, TrainingPlan(40, 20, 0).batches, VIEWS, chunk=5)
    batches = iter(loader)
    chunks = next(batches)["chunks"]
    passes = [[chunks[n][1].index.tolist() for n in order] for order in ([0, 1, 2, 3], [3, 2, 1, 0])]
    assert passes[0] == passes[1][::-1]
    rows = [row for chunk in passes[0] for row in chunk]
    assert len(set(rows)) == len(rows) == 20 and not {1, 5, 9, 17, 21} & set(rows)
    assert source.bad.rows
    batches.close()


def test_an_image_that_is_lost_between_the_passes_is_named(labelled_folder, tmp_path):
    source = damaged(labelled_folder, tmp_path, [])
    batches = iter(ViewLoader(source, TrainingPlan(40, 20, 0).batches, VIEWS, chunk=5))
    chunks = next(batches)["chunks"]
    rows = [chunks[number][1].index.tolist() for number in range(4)]
    lost = rows[0][2]
    (tmp_path / f"{lost:02d}.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 images could be read in the forward pass and not again"):
        [chunks[number] for number in (3, 2, 1, 0)]
    batches.close()


@pytest.mark.parametrize("views_on", ["host", "device"])
def test_the_module_finishes_chunks_as_it_finishes_batches(labelled_folder, views_on):
    source = open_source(labelled_folder)
    settings = {"batch_size": 32, "seed": 3, "views_on": views_on, "channels_last": True}
    module = ImageData(source, {0: VIEWS}, **settings, contrastive_batch=80)
    assert module.images_per_step == 80 and module.steps_per_epoch == 2
    plan = TrainingPlan(len(source), 80, 3)
    options = {"seed": 3, "on_device": views_on == "device"}
    whole = first_batch(ViewLoader(source, plan.batches, {0: VIEWS}, **options))
    whole = ImageData(source, {0: VIEWS}, **settings).on_after_batch_transfer(whole, 0)
    batches = iter(ViewLoader(source, plan.batches, {0: VIEWS}, chunk=32, **options))
    batch = module.on_after_batch_transfer(next(batches), 0)
    views, _ = batch["chunks"][0]
    again, _ = batch["chunks"][0]
    assert views[1].is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(views[1], whole["views"][1][:27], atol=1e-6) and torch.equal(views[1], again[1])
    batches.close()
    with pytest.raises(UserError, match="chunks of --batch-size 32"):
        ImageData(source, {0: VIEWS}, **settings, contrastive_batch=32)


def test_growing_views_grow_in_chunks_too(labelled_folder):
    source = open_source(labelled_folder)
    small = ViewRecipe(blur=0.5).build((8, 8), 3, 2)
    batches = iter(ViewLoader(source, TrainingPlan(160, 160, 0).batches, {0: small, 1: VIEWS}, chunk=80))
    assert [next(batches)["chunks"][0][0][0].shape[-1] for _ in range(2)] == [8, 12]
    batches.close()
