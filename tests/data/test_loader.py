"""Batches are pure functions of (seed, epoch, rows): order, threads, memory or files, resuming."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.data.plan import TrainingPlan
from ssl_kit.views.batch import made_on_device
from ssl_kit.views.recipe import ViewRecipe, plain

VIEWS = ViewRecipe(blur=0.5).build((12, 12), 3, 2)


@pytest.mark.parametrize(("count", "batch", "world"), [(100, 7, 1), (10, 10, 1), (1003, 64, 3), (5, 2, 2)])
def test_an_epoch_shows_every_image_once_in_steps_of_nearly_one_size(count, batch, world):
    plans = [TrainingPlan(count, batch, 0, rank, world) for rank in range(world)]
    steps = plans[0].steps_per_epoch
    epochs = [list(itertools.islice(plan.batches(), 2 * steps)) for plan in plans]
    for epoch in range(2):
        shown = [planned for plan in epochs for planned in plan[epoch * steps : (epoch + 1) * steps]]
        assert {planned.epoch for planned in shown} == {epoch}
        assert np.array_equal(np.sort(np.concatenate([planned.rows for planned in shown])), np.arange(count))
        sizes = [sum(len(plan[epoch * steps + step].rows) for plan in epochs) for step in range(steps)]
        assert max(sizes) - min(sizes) <= 1 and max(sizes) <= batch * world
    first, second = (np.concatenate([p.rows for p in epochs[0][e * steps : (e + 1) * steps]]) for e in range(2))
    assert count < 20 or not np.array_equal(first, second)
    for step in range(2 * steps):  # which every process knows of all
        wanted = [len(plan[step].rows) for plan in epochs]
        assert all(plan.images_of_each(step) == wanted for plan in plans)
    for plan, planned in zip(plans, epochs, strict=True):
        assert plan.sizes == {len(one.rows) for one in planned} and max(plan.sizes) - min(plan.sizes) <= 1


@pytest.mark.parametrize("start", [1, 14, 15, 31])
def test_a_plan_continues_at_any_step(start):
    plan = TrainingPlan(100, 7, 3)
    whole = list(itertools.islice(plan.batches(), 40))
    resumed = list(itertools.islice(plan.batches(start), 40 - start))
    for one, other in zip(whole[start:], resumed, strict=True):
        assert one.epoch == other.epoch and np.array_equal(one.rows, other.rows)


def test_too_few_images_for_a_step_say_what_to_do():
    with pytest.raises(UserError, match=r"9 images are fewer than one step of 10 .* lower --batch-size to at most 9"):
        TrainingPlan(9, 10, 0)


def batches(source, threads, **settings):
    plan = np.array_split(np.arange(len(source)), 5)
    return list(ViewLoader(source, plan, VIEWS, seed=5, epoch=2, threads=threads, **settings))


def same(one, other):
    return all(
        torch.equal(a["key"].index, b["key"].index)
        and torch.equal(a["label"], b["label"])
        and all(torch.equal(x, y) for x, y in zip(a["views"], b["views"], strict=True))
        for a, b in zip(one, other, strict=True)
    )


def test_batches_do_not_depend_on_threads_or_on_where_the_images_are(labelled_folder):
    in_memory = open_source(labelled_folder, in_memory=True)
    on_disk = open_source(labelled_folder, in_memory=False)
    wanted = batches(in_memory, 1)
    assert wanted[0]["views"][0].shape == (32, 3, 12, 12) and len(wanted[0]["views"]) == 2
    assert not torch.equal(wanted[0]["views"][0], wanted[0]["views"][1])
    assert same(wanted, batches(in_memory, 3)) and same(wanted, batches(on_disk, 3))


def test_a_row_does_not_depend_on_its_batch(labelled_folder):
    source = open_source(labelled_folder)
    whole = next(iter(ViewLoader(source, [np.arange(40)], VIEWS, seed=1)))
    alone = next(iter(ViewLoader(source, [np.array([17])], VIEWS, seed=1)))
    assert torch.equal(alone["views"][1][0], whole["views"][1][17])


def test_an_image_has_the_same_views_on_any_process_and_in_any_order(labelled_folder):
    source = open_source(labelled_folder)

    def views_of_an_epoch(batch, world):
        made = {}
        for rank in range(world):
            plan = TrainingPlan(len(source), batch, world, rank, world)  # another seed: another order
            for step in itertools.islice(ViewLoader(source, plan.batches, VIEWS, seed=5), plan.steps_per_epoch):
                made |= dict(zip(step["key"].index.tolist(), torch.stack(step["views"], dim=1), strict=True))
        return made

    one, three = views_of_an_epoch(48, 1), views_of_an_epoch(20, 3)
    assert one.keys() == three.keys() == set(range(len(source)))
    assert all(torch.equal(views, three[number]) for number, views in one.items())


def test_a_bad_file_is_dropped_or_replaced_by_the_next_good_one(labelled_folder, tmp_path):
    for number in range(10):
        image = Image.open(labelled_folder / "a" / f"{number:03d}.png")
        image.save(tmp_path / f"{number}.png")
    for name in ("2.png", "5.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:90])
    source = open_source(tmp_path, in_memory=False, max_bad=0.5)
    plan = [np.array([0, 2, 1]), np.array([5, 4]), np.array([6, 7])]
    dropped = list(ViewLoader(source, plan, (plain((8, 8)),), bad="drop"))
    assert [batch["key"].index.tolist() for batch in dropped] == [[0, 1], [4], [6, 7]]
    replaced = list(ViewLoader(source, plan, (plain((8, 8)),), bad="replace"))
    assert [batch["key"].index.tolist() for batch in replaced] == [[0, 4, 1], [6, 4], [6, 7]]
    assert torch.equal(replaced[1]["views"][0][0], replaced[2]["views"][0][0])
    assert sorted(name for name, _ in source.bad.rows) == ["2.png", "5.png"]
    strict = open_source(tmp_path, in_memory=False, max_bad=0.1)
    with pytest.raises(UserError, match=r"2 of 10 images could not be decoded"):
        list(ViewLoader(strict, plan, (plain((8, 8)),)))


def test_what_stands_in_for_bad_images_does_not_depend_on_processes_or_chunks(labelled_folder, tmp_path):
    for number in range(30):
        data = (labelled_folder / "a" / f"{number:03d}.png").read_bytes()
        (tmp_path / f"{number:02d}.png").write_bytes(data[:90] if number % 4 == 1 else data)

    def rows(count, chunk=None):
        steps = []
        for rank in range(count):
            source = open_source(tmp_path, in_memory=False, max_bad=0.5)
            plan = TrainingPlan(30, 12 // count, 3, rank, count)
            loader = ViewLoader(source, plan.batches, (plain((8, 8)),), chunk=chunk)
            for step, batch in enumerate(itertools.islice(loader, 6)):
                parts = [batch["chunks"][n][1].index for n in range(len(batch["chunks"]))] if chunk else None
                steps += [[]] if rank == 0 else []
                steps[step] += (torch.cat(parts) if parts else batch["key"].index).tolist()
        return steps

    alone = rows(1)
    assert all(len(set(step)) == len(step) == 10 and not any(row % 4 == 1 for row in step) for step in alone)
    assert rows(2) == rows(3) == rows(1, chunk=4) == rows(2, chunk=3) == alone


def test_no_process_is_left_without_an_image():
    with pytest.raises(
        UserError, match=r"5 images in 2 steps leave some of 4 processes without any; raise --batch-size"
    ):
        TrainingPlan(5, 1, 0, world_size=4)


@pytest.mark.parametrize("kind", ["of one size", "of several sizes", "files", "deep"])
def test_views_on_the_device_see_the_same_images(labelled_folder, tmp_path, kind):
    images = [np.array(Image.open(path)) for path in sorted(labelled_folder.rglob("*.png"))[:20]]
    if kind == "deep":  # only the lowest 12 of 16 bits: rounded to 8 on the way they would have 16 greys
        images = [image.astype(np.uint16) * 16 for image in images]
    if kind in ("of several sizes", "deep"):
        images[3] = images[3][:13]
    source = open_source(labelled_folder, in_memory=False) if kind == "files" else open_source(images)
    views = ViewRecipe(blur=0.5, turn=0.5, erase=0.5).build((12, 12), 3, 2)
    host = next(iter(ViewLoader(source, [np.arange(20)], views, seed=1)))
    batch = next(iter(ViewLoader(source, [np.arange(20)], views, seed=1, on_device=True)))
    assert batch["views"][0].dtype == (torch.uint16 if kind == "deep" else torch.uint8)
    assert batch["cropped"] == (kind != "of one size") and len(batch["views"]) == (2 if batch["cropped"] else 1)
    made = made_on_device(batch["views"], batch["params"], views, cropped=batch["cropped"])
    for one, other in zip(made, host["views"], strict=True):
        difference = (one - other).abs()
        assert difference.max() <= (4 / 255 if batch["cropped"] else 1e-5) and difference.mean() <= 0.5 / 255


def test_a_device_that_has_the_pixels_is_told_rows(labelled_folder):
    source = open_source(labelled_folder).subset(np.arange(5, 60))
    rows, options = np.array([3, 1, 50]), {"seed": 1, "on_device": True}
    sent, named = (next(iter(ViewLoader(source, [rows], VIEWS, stored=s, **options))) for s in (False, True))
    assert named["views"][0].tolist() == [8, 6, 55]
    for deep in (False, True):
        store = torch.from_numpy(source.stack[0].astype(np.uint16) * 257 if deep else source.stack[0])
        made = made_on_device(named["views"], named["params"], VIEWS, store=store)
        for one, other in zip(made, made_on_device(sent["views"], sent["params"], VIEWS), strict=True):
            assert (one - other).abs().max() < 1e-6


def test_crops_of_bad_files_are_replaced_with_what_is_left_to_do(labelled_folder, tmp_path):
    for number, path in enumerate(sorted(labelled_folder.rglob("*.png"))[:12]):
        (tmp_path / f"{number:02d}.png").write_bytes(b"" if number == 4 else path.read_bytes())
    source = open_source(tmp_path, in_memory=False, max_bad=0.5)
    plan = [np.arange(6), np.arange(6, 12)]
    options = {"seed": 1, "bad": "replace"}
    host, there = (next(iter(ViewLoader(source, plan, VIEWS, on_device=on, **options))) for on in (False, True))
    assert host["key"].index.tolist() == there["key"].index.tolist() == [0, 1, 2, 3, 10, 5]
    made = made_on_device(there["views"], there["params"], VIEWS, cropped=True)
    assert all((one - other).abs().max() <= 4 / 255 for one, other in zip(made, host["views"], strict=True))


def test_stopping_early_ends_the_threads(labelled_folder):
    import threading

    source = open_source(labelled_folder)
    before = threading.active_count()
    iterator = iter(ViewLoader(source, [np.arange(4)] * 50, VIEWS, threads=1))
    next(iterator)
    iterator.close()
    assert threading.active_count() <= before + 1  # the kernel's own pool stays


def test_a_schedule_changes_the_views_from_an_epoch_on(labelled_folder):
    source = open_source(labelled_folder)
    small = ViewRecipe(blur=0.5).build((8, 8), 3, 2)
    plan = TrainingPlan(len(source), 80, 0)
    batches = itertools.islice(ViewLoader(source, plan.batches, {0: small, 2: VIEWS}, seed=5), 6)
    assert [batch["views"][0].shape[-1] for batch in batches] == [8, 8, 8, 8, 12, 12]


@pytest.mark.parametrize("in_memory", [True, False])
def test_memory_is_used_again_only_when_nobody_holds_it(labelled_folder, in_memory):
    source = open_source(labelled_folder, in_memory=in_memory)
    plan = [np.arange(16)] * 12
    addresses, held, copies = set(), [], []
    for number, batch in enumerate(ViewLoader(source, plan, VIEWS, threads=2)):
        addresses.add(batch["views"][0].data_ptr())
        if number % 3 == 0:  # a slice of a batch that is kept must stay as it is
            held.append(batch["views"][0][3:5])
            copies.append(held[-1].clone())
        del batch
    assert all(torch.equal(one, copy) for one, copy in zip(held, copies, strict=True))
    assert len(held) < len(addresses) < len(plan)


def test_views_of_files_do_not_depend_on_which_are_cut_together(labelled_folder, monkeypatch):
    source = open_source(labelled_folder, in_memory=False)
    together = batches(source, threads=2)
    monkeypatch.setattr("ssl_kit.data.loader._TOGETHER", 1)
    assert same(together, batches(source, threads=2))
