"""A column `group`: partners are drawn by the key, each image is first once an epoch, groups are held out whole."""

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from stripes import pattern

from ssl_kit import cli
from ssl_kit.data.labels import stratified
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.module import ImageData
from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.data.plan import Partners, TrainingPlan
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs.monitor import hold_out
from ssl_kit.views.recipe import ViewRecipe, plain

GROUPS = ["a", "b", "a", None, "c", "a", "b", None, "d", "d", "a", "c"]


@pytest.fixture
def table(tmp_path):
    """Twelve images of one colour each, 10 times their row, and their groups."""
    for row in range(12):
        Image.fromarray(np.full((8, 8, 3), 10 * row, np.uint8)).save(tmp_path / f"{row:02d}.png")
    paths = [f"{row:02d}.png" for row in range(12)]
    pandas.DataFrame({"path": paths, "group": GROUPS}).to_csv(tmp_path / "list.csv", index=False)
    pandas.DataFrame({"path": paths, "group": GROUPS}).to_parquet(tmp_path / "list.parquet")
    return tmp_path / "list.csv"


def shown(batch):
    """(V, B) rows of the images that each view of a batch shows."""
    return torch.stack([(view.mean((1, 2, 3)) * 25.5).round().long() for view in batch["views"]]).numpy()


@pytest.mark.parametrize("kind", [".csv", ".parquet"])
def test_a_table_tells_groups(table, kind, capsys):
    source = open_source(table.with_suffix(kind), in_memory=False)
    groups = source.groups()
    known = {(GROUPS[row], groups[row]) for row in range(12)}
    assert (
        len(known) == 5 and groups.dtype == np.int64 and all((name is None) == (number < 0) for name, number in known)
    )
    assert source.subset([4, 3]).groups().tolist() == [groups[4], -1]
    assert "4 groups of 10 images, 2 stand alone" in capsys.readouterr().out
    few = [open_source(table.with_suffix(kind), in_memory=keep, limit=6) for keep in (True, False)]
    assert np.array_equal(few[0].groups(), few[1].groups()) and len(few[0]) == 6
    assert open_source(table.parent).groups() is None


def test_partners_are_the_other_members_equally_often_and_a_function_of_the_key():
    groups = np.array([0, 1, 0, -1, 2, 0, 1, -1, 3, 3, 0, 2])
    partners, rows = Partners(groups), np.arange(12)
    drawn = np.stack([partners.draw(5, epoch, rows) for epoch in range(3_000)])
    for row in range(12):
        others = [other for other in range(12) if groups[other] == groups[row] >= 0 and other != row] or [row]
        count = np.bincount(drawn[:, row], minlength=12)
        assert set(np.flatnonzero(count)) == set(others)
        assert np.abs(count[others] - 3_000 / len(others)).max() < 5 * (3_000 / len(others)) ** 0.5
    some = np.array([10, 3, 0])
    assert np.array_equal(partners.draw(5, 7, some), drawn[7, some])
    assert not np.array_equal(partners.draw(6, 7, rows), drawn[7])


@pytest.mark.parametrize("in_memory", [False, True])
def test_views_show_the_image_first_and_its_partner_then(table, in_memory):
    source = open_source(table, in_memory=in_memory)
    plan = TrainingPlan(12, 5, seed=3)
    views = [plain((8, 8))] * 3
    batches = lambda start, stop: [
        batch
        for _, batch in zip(
            range(stop - start),
            ViewLoader(source, lambda: plan.batches(start), views, seed=3, paired=True),
            strict=False,
        )
    ]
    whole = batches(0, 2 * plan.steps_per_epoch)
    partners = Partners(source.groups())
    for epoch in range(2):
        own = whole[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        seen = np.concatenate([shown(batch) for batch in own], axis=1)
        assert sorted(seen[0]) == [*range(12)]
        assert np.array_equal(seen[1], partners.draw(3, epoch, seen[0])) and np.array_equal(seen[1], seen[2])
        assert (seen[1] != seen[0]).sum() == 10
        rows = np.concatenate([batch["key"].group.numpy() for batch in own])
        assert np.array_equal(rows, source.groups()[seen[0]])
    again = batches(4, 6)  # as a resumed run
    assert all(np.array_equal(shown(a), shown(b)) for a, b in zip(again, whole[4:6], strict=True))
    alone = next(iter(ViewLoader(source, [np.arange(12)], views)))
    assert alone["key"].group is None and np.array_equal(shown(alone)[1], shown(alone)[0])


def test_views_are_drawn_by_the_image_in_question_and_made_on_the_device_alike(table):
    source = open_source(table, in_memory=True)
    views = ViewRecipe().build((8, 8), 3, 2)
    plan = TrainingPlan(12, 6, seed=0)
    loader = lambda on_device: ViewLoader(source, plan.batches, views, paired=True, on_device=on_device)
    data = ImageData(source, {0: views}, batch_size=6, seed=0, views_on="device", paired=True)
    for _, host, device in zip(range(3), loader(False), loader(True), strict=False):
        made = data.on_after_batch_transfer(device, 0)
        for one, other in zip(host["views"], made["views"], strict=True):
            assert (one - other).abs().max() < 2e-3


def test_a_partner_that_cannot_be_decoded_is_the_image_itself(table):
    (table.parent / "08.png").write_bytes(b"no image")
    source = open_source(table, in_memory=False, max_bad=0.5)
    batch = next(iter(ViewLoader(source, [np.arange(12)], [plain((8, 8))] * 2, paired=True)))
    first, second = shown(batch)
    assert 8 not in first and second[first == 9] == [9] and len(source.bad.rows) == 1


def test_splits_keep_groups_whole():
    labels = np.random.default_rng(0).integers(0, 3, 900)
    groups = np.where(np.arange(900) < 600, np.arange(900) // 4, -1)
    chosen = stratified(labels, 0.2, groups=groups)
    inside = [set(chosen[groups == group]) for group in range(150)]
    assert all(len(each) == 1 for each in inside) and 0.15 < chosen.mean() < 0.25
    assert 0.15 < chosen[600:].mean() < 0.25
    assert np.array_equal(stratified(labels, 0.2, groups=np.full(900, -1)), stratified(labels, 0.2))


def test_hold_outs_are_of_whole_groups(tmp_path, capsys):
    """Images without a label too: a sibling of a held-out image is not trained on."""
    rows = range(240)
    for row in rows:
        Image.fromarray(pattern(row // 4 % 2, row, 8)).save(tmp_path / f"{row:03d}.png")
    frame = pandas.DataFrame({"path": [f"{row:03d}.png" for row in rows], "group": [row // 4 for row in rows]})
    frame["label"] = [("even", "odd")[row // 4 % 2] if row % 4 else "" for row in rows]
    frame.to_csv(tmp_path / "list.csv", index=False)
    training, gallery, queries = hold_out(open_source(tmp_path / "list.csv"))
    held = set(queries.groups())
    assert len(queries) >= 3 and not held & set(training.groups()) and not held & set(gallery.groups())
    assert len(training) == 240 - 4 * len(held)
    train, test = open_labelled(tmp_path / "list.csv")
    assert not set(train.groups()) & set(test.groups()) and len(train) + len(test) == 180
    frame["split"] = ["test" if row % 7 == 0 else "train" for row in rows]
    frame.to_csv(tmp_path / "split.csv", index=False)
    open_labelled(tmp_path / "split.csv")
    assert "groups lie in train and in test" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ([], "SimCLR sees another image of the group, which is no negative"),
        (["--method", "ssl_kit.methods.byol.BYOL"], "BYOL sees another image of the group"),
        (["--method", "ssl_kit.methods.vae.VAE"], "not used by VAE, which learns from each image alone"),
    ],
)
def test_a_run_says_what_becomes_of_groups(table, method, told, capsys):
    quick = ["--trainer.max-steps=2", "--batch-size=6", "--method.encoder.args", "{channels: [8, 8, 8, 8]}"]
    assert cli.main(["pretrain", str(table), "--run", str(table.parent / "run"), *method, *quick]) == 0
    assert told in capsys.readouterr().out


def test_chunks_know_their_groups(table, monkeypatch):
    """--contrastive-batch: the loss over all chunks is told the groups of all their images."""
    told, contrast = [], SimCLR.contrast
    monkeypatch.setattr(SimCLR, "contrast", lambda self, z, group=None: told.append(group) or contrast(self, z, group))
    quick = ["--trainer.max-steps=2", "--batch-size=4", "--contrastive-batch=12"]
    quick += ["--method.encoder.args", "{channels: [8, 8, 8, 8]}", "--run", str(table.parent / "run")]
    assert cli.main(["pretrain", str(table), *quick]) == 0
    wanted = sorted(open_source(table).groups())
    assert [sorted(group.tolist()) for group in told if group is not None] == [wanted] * 2  # a rehearsal knows none
