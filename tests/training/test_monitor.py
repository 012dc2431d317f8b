"""The verdict in words, health on arrays, and curves that survive a restart."""

import csv

import numpy as np
import pytest

from ssl_kit.training.monitor import Curves, feature_health, read_curves, verdict


def curves(tmp_path, **last):
    made = Curves(tmp_path / "metrics.csv")
    made.history = [{"step": 1, "loss": 9.0, "effective_rank": 9.0}, {"step": 2, **last}]
    return made


@pytest.mark.parametrize(
    ("last", "state", "words"),
    [
        ({"loss": 3.0, "effective_rank": 40.0}, "learning", "effective rank 40.0 of 128"),
        ({"loss": 6.2, "effective_rank": 40.0}, "stuck", "model that sees nothing"),
        ({"loss": 3.0, "effective_rank": 1.2}, "collapsed", "1.2 of 128 dimensions"),
    ],
)
def test_verdict(tmp_path, last, state, words):
    told = verdict(curves(tmp_path, **last), dim=128, chance_loss=6.236)
    assert told["state"] == state and words in told["reason"]


def test_nothing_measured_is_no_verdict(tmp_path):
    assert verdict(Curves(tmp_path / "metrics.csv"), 128, 6.2)["state"] == "unknown"


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
