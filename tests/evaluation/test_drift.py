"""Two tests of whether sets of features differ: against plain formulas, on equal sets, and on shifted ones."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics import roc_auc_score

from ssl_kit.evaluation import drift
from ssl_kit.evaluation.drift import classifier_test, mmd_test, shift, unfamiliarity


def drawn(seed, count, mean=0.0, spread=1.0, dim=8):
    made = np.random.default_rng(seed).normal(0, 1, (count, dim)) * spread
    return (made + mean * np.eye(dim)[0]).astype(np.float32)


def test_mmd_is_the_plain_formula():
    old, new = drawn(0, 30), drawn(1, 23, mean=0.5)
    scale = np.median(pdist(np.concatenate([old, new]).astype(float), "sqeuclidean"))
    kernel = lambda one, two: np.exp(-cdist(one.astype(float), two.astype(float), "sqeuclidean") / (2 * scale))
    apart = lambda rows: (kernel(rows, rows).sum() - len(rows)) / (len(rows) * (len(rows) - 1))
    wanted = apart(old) + apart(new) - 2 * kernel(old, new).mean()
    assert mmd_test(old, new, permutations=9)[0] == pytest.approx(wanted, abs=2e-3)  # the lower of two middle distances


def test_auroc_is_that_of_held_out_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(drift, "rankdata", lambda scores: seen.append(scores) or np.argsort(np.argsort(scores)) + 1.0)
    found = classifier_test(drawn(0, 41), drawn(1, 60, mean=1.0), permutations=9)[0]
    truth = np.repeat([0, 1], [20, 30])  # the smaller halves
    assert len(seen[0]) == len(truth) and found == pytest.approx(roc_auc_score(truth, seen[0]))


def test_equal_sets_are_called_so_and_shifted_ones_are_not():
    equal = [shift(drawn(2 * seed, 70), drawn(2 * seed + 1, 50), permutations=99, seed=seed).p for seed in range(100)]
    assert sum(p <= 0.05 for p in equal) <= 8 and sum(p <= 0.5 for p in equal) > 20  # of 100; neither lax nor shy
    assert shift(drawn(0, 150), drawn(1, 100, mean=1.0), permutations=299).p < 0.01
    wider = drawn(1, 300) * np.where(np.arange(300) % 2, 1, 5)[:, None] + 3 * np.eye(8, dtype=np.float32)[0]
    assert shift(drawn(0, 300) + 3 * np.eye(8, dtype=np.float32)[0], wider, permutations=299).p < 0.01


def test_no_p_value_is_zero_and_the_seed_decides():
    old, new = drawn(0, 60), drawn(1, 60, mean=3.0)
    found = shift(old, new, permutations=19, seed=1)
    assert found.mmd_p == found.auroc_p == 0.05 and found.p == 0.1
    assert found == shift(old, new, permutations=19, seed=1)


def test_an_image_of_another_kind_is_unfamiliar():
    old = drawn(0, 200, mean=5.0)
    new = np.concatenate([drawn(1, 50, mean=5.0), drawn(2, 1, mean=-5.0)])
    far, share = unfamiliarity(old, new)
    assert far.argmax() == 50 and share[50] == 0 and 0.3 < share[:50].mean() < 0.7
