"""Health on arrays; curves of a real run: columns, verdicts, restarts."""

import csv

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tiny_runs import Random, Tiny, stopped_after, train

from ssl_kit import cli
from ssl_kit.training import curves as curves_file
from ssl_kit.training.curves import Bar, Curves, feature_health, read_curves
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import Optim
from ssl_kit.training.verdict import BELOW, Verdict


def test_health_of_isotropic_and_of_collapsed_features():
    generator = np.random.default_rng(0)
    healthy = feature_health(generator.standard_normal((4000, 32)).astype(np.float32))
    assert healthy["effective_rank"] == pytest.approx(32, rel=0.01)
    assert healthy["embedding_std"] == pytest.approx(32**-0.5, rel=0.01)
    collapsed = feature_health(np.ones((100, 32), np.float32))
    assert collapsed["effective_rank"] == pytest.approx(1) and collapsed["embedding_std"] == pytest.approx(0, abs=1e-6)


def test_rows_come_back_without_their_empty_cells(tmp_path):
    path = tmp_path / "metrics.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "knn_top1"])
        writer.writeheader()
        writer.writerows([{"step": 1, "loss": 2.5}, {"step": 1, "knn_top1": 0.25}])
    assert read_curves(path) == [{"step": 1, "loss": 2.5}, {"step": 1, "knn_top1": 0.25}]
    assert read_curves(tmp_path / "none.csv") == []


def test_a_row_that_was_cut_off_is_none(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\r\n1,2.5\r\n2,2.25\r\n")
    path.write_bytes(path.read_bytes()[:-4])  # "2,2."
    assert read_curves(path) == [{"step": 1, "loss": 2.5}]


class Talkative(Tiny):
    """Its loss tells more than the loss."""

    def training_step(self, batch, batch_idx):
        told = super().training_step(batch, batch_idx)
        return {**told, "views_mean": batch["views"][0].mean()}


SGD = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0)


def followed(tmp_path, optim=SGD, batches=8, **options):
    tmp_path.mkdir(exist_ok=True)
    curves = Curves(tmp_path / "metrics.csv", interval=4, **options)
    module = Talkative(optim)
    train(module, Loop(curves=curves), batches, accumulate=optim.accumulate)
    curves.module = module
    return curves, read_curves(tmp_path / "metrics.csv")


def test_looks_come_early_at_the_end_and_where_two_hundredths_of_the_training_pay_for_them(tmp_path):
    _, rows = followed(tmp_path, batches=730, measure=lambda module: {"effective_rank": 2.0}, measured=15)
    looks = [row["step"] for row in rows if "effective_rank" in row]
    wanted = [0, 100, 200]
    for step in range(204, 729, 4):
        if 15 * (len(wanted) + 1) / 3 < 0.02 * 8 * step:  # images embedded, at a third of what a trained one costs
            wanted.append(step)
    assert looks == [*wanted, 730] and 5 < len(looks) < 40
    _, rows = followed(
        tmp_path / "asked", batches=730, measure=lambda module: {"effective_rank": 2.0}, measure_every=30
    )
    assert [row["step"] for row in rows if "effective_rank" in row] == [0, 300, 600, 730]


def test_rows_hold_what_the_loss_gives_and_the_range_of_the_views(tmp_path):
    _, rows = followed(tmp_path)
    views = [Random(8)._batch(number)["views"][0] for number in range(8)]
    assert [row["step"] for row in rows] == [4, 8]
    for row, four in zip(rows, (views[:4], views[4:]), strict=True):
        assert row["views_mean"] == pytest.approx(np.mean([view.mean().item() for view in four]), abs=1e-6)
        assert row["views_low"] == pytest.approx(four[-1].min().item(), abs=1e-5)
        assert row["views_high"] == pytest.approx(four[-1].max().item(), abs=1e-5)
        assert row["views_std"] == pytest.approx(four[-1].std().item(), abs=1e-5)


def test_the_loss_of_accumulated_batches_is_their_mean(tmp_path):
    frozen = {"name": "sgd", "lr": 1e-12, "lr_per": None, "warmup_epochs": 0}
    _, whole = followed(tmp_path / "one", Optim(**frozen), 8)
    _, parts = followed(tmp_path / "two", Optim(**frozen, accumulate=2), 8)
    assert parts[0]["loss"] == pytest.approx((whole[0]["loss"] + whole[1]["loss"]) / 2, rel=1e-5)


def test_the_untrained_encoder_is_measured_and_each_measurement_is_judged(tmp_path, capsys):
    judged = []

    def judge(history):
        judged.append([row["step"] for row in history])
        return Verdict("stuck" if history and history[-1]["step"] == 8 else "unknown", "of a test")

    curves, rows = followed(tmp_path, measure=lambda module: {"effective_rank": 2.0}, judge=judge)
    measured = [row for row in rows if "effective_rank" in row]
    assert [row["step"] for row in measured] == [0, 8] and curves.verdict == Verdict("stuck", "of a test")
    assert measured[0]["turned"] == 0 and measured[1]["turned"] > 1e-3
    first, now = Tiny(SGD).encoder[0].weight.norm(), curves.module.encoder[0].weight.norm()
    assert measured[0]["grown"] == 1 and measured[1]["grown"] == pytest.approx((now / first).item(), rel=1e-2)
    assert judged[-1] == [0, 4, 8, 8]
    assert "step 8: stuck - of a test" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["stuck", "collapsed", "learning", BELOW, "unknown"])
def test_only_what_is_wrong_is_a_warning(tmp_path, capsys, state):
    judge = lambda history: Verdict(state if history and history[-1]["step"] else "unknown", "of a test")
    followed(tmp_path, measure=lambda module: {"effective_rank": 2.0}, judge=judge)
    assert ("of a test" in capsys.readouterr().err) == (state in ("stuck", "collapsed"))


def test_curves_continue_what_they_were_told(tmp_path):
    curves, rows = followed(tmp_path)
    resumed = Curves(tmp_path / "metrics.csv", interval=4)
    resumed.load_state_dict(curves.state_dict())
    resumed.recall()
    assert resumed.history == rows and resumed.row == rows[-1]
    assert torch.equal(resumed._start, curves._start)


class Full(pl.Callback):
    """No room for the rows from one step to another: a device that is always full stands in the file's place."""

    def __init__(self, path, first, last):
        self.path, self.steps = path, (first, last)

    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == self.steps[0]:
            self.path.rename(self.path.with_suffix(".kept"))
            self.path.symlink_to("/dev/full")
        if trainer.global_step == self.steps[1]:
            self.path.with_suffix(".kept").rename(self.path)


def test_rows_that_found_no_room_come_with_the_next_one_that_does(tmp_path, capsys):
    path = tmp_path / "metrics.csv"
    curves = Curves(path, interval=4)
    train(Talkative(SGD), Loop(curves=curves), 16, callbacks=[Full(path, 8, 12)])
    assert [row["step"] for row in read_curves(path)] == [4, 8, 12, 16]
    assert capsys.readouterr().err.count("No space left on device") == 1


CLOCK = {"seconds", "images_per_second", "waiting_share"}


def rows_of(run):
    rows = read_curves(run / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def test_a_resumed_run_has_the_rows_of_a_whole_one_with_the_pixels_in_the_first(labelled_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(curves_file, "_MEASURE_STEPS", 10)
    tiny = ["--batch-size", "16", "--epochs", "3", "--method.encoder.args", "{channels: [8, 8, 8, 8]}"]
    tiny += ["--method.projection", "[16]", "--evaluate-every", "1", "--threads", "1"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["pretrain", str(labelled_folder), "--run", str(whole), *tiny]) == 0
    with stopped_after(13):
        cli.main(["pretrain", str(labelled_folder), "--run", str(run), *tiny])
    assert cli.main(["pretrain", "--run", str(run), "--resume"]) == 0
    assert rows_of(run) == rows_of(whole)
    first, *later = [row for row in rows_of(run) if "effective_rank" in row]
    assert first["step"] == 0 and {"knn_pixels", "knn_pca", "crops_pixels"} <= first.keys()
    assert len(later) >= 2 and not any("pixels" in name or "pca" in name for row in later for name in row)
    assert all({"knn_top1", "crops_top1"} <= row.keys() for row in (first, *later))


def test_the_bar_tells_epoch_and_speed_from_the_second_step_on(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(curves_file, "shows_bars", lambda: True)
    monkeypatch.setattr(curves_file.Progress, "update", lambda self, task, **values: shown.append(values))
    curves = Curves(tmp_path / "metrics.csv", interval=4)
    train(Tiny(SGD), Loop(curves=curves, bar=Bar(curves)), 6)
    assert [row["epoch"] for row in shown] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert [row["completed"] for row in shown] == [1, 2, 3, 4, 5, 6] and shown[0]["text"] == ""
    assert all(row["text"].endswith("images/s") and "loss" not in row["text"] for row in shown[1:3])
    assert all(row["text"].startswith("loss ") for row in shown[3:])
