"""kNN against brute force, its invariances, chance level, and honesty of the choice of k and temperature."""

from types import SimpleNamespace

import numpy as np
import pytest

from ssl_kit.evaluation.neighbours import (
    CUSTOMARY,
    KS,
    TEMPERATURES,
    choose_k,
    knn,
    knn_accuracy,
    knn_predict,
    knn_rows,
    normalised,
    search,
    vote,
)
from ssl_kit.evaluation.result import holdout


def clusters(count, dim=16, num_classes=5, spread=0.35, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((num_classes, dim)) / np.sqrt(dim)
    labels = rng.integers(0, num_classes, count)
    return (centres[labels] + spread * rng.standard_normal((count, dim))).astype(np.float32), labels


def as_embeddings(vectors, labels, num_classes=5):
    return SimpleNamespace(
        vectors=vectors, labels=labels, classes=tuple("abcdefghij"[:num_classes]), info={}, groups=None
    )


def brute_force_predict(train, labels, test, k, temperature, num_classes):
    cosines = normalised(test).astype(np.float64) @ normalised(train).astype(np.float64).T
    predictions = []
    for row in cosines:
        nearest = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        votes = np.zeros(num_classes)
        for i in nearest:
            votes[labels[i]] += np.exp(row[i] / temperature)
        predictions.append(int(votes.argmax()))
    return np.array(predictions)


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_weighted_vote_equals_brute_force(k):
    train, labels = clusters(400)
    test, _ = clusters(60, seed=1)
    wanted = brute_force_predict(train, labels, test, k, 0.07, 5)
    assert np.array_equal(knn_predict(train, labels, test, k=k, temperature=0.07), wanted)


def test_weighted_vote_prefers_one_near_neighbour_to_two_farther_ones():
    cosines, labels = np.array([[0.9, 0.85, 0.84]]), np.array([[0, 1, 1]])
    assert vote(cosines, labels, 2, [3], 0.07)[0, 0] == 0  # exp(.9 / .07) = 383518 > 350503
    assert vote(cosines, labels, 2, [3], None)[0, 0] == 1


def test_equal_votes_go_to_the_lowest_class_and_small_temperatures_do_not_overflow():
    assert vote(np.array([[0.5, 0.5]]), np.array([[3, 1]]), 4, [1, 2], None)[:, 0].tolist() == [3, 1]
    assert vote(np.array([[1.0, 0.2]]), np.array([[1, 0]]), 2, [2], 1e-4)[0, 0] == 1


def test_more_neighbours_than_rows_gives_all_rows():
    vectors, labels = clusters(7)
    assert search(vectors, vectors, 50)[1].shape == (7, 7)
    assert knn_predict(vectors, labels, vectors, k=50).shape == (7,)


def test_nearest_neighbour_of_the_training_set_is_itself():
    vectors, labels = clusters(300)
    assert knn_accuracy(vectors, labels, vectors, labels, k=1) == 1.0


def test_random_features_score_chance():
    rng = np.random.default_rng(0)
    train, test = (rng.standard_normal((count, 16)).astype(np.float32) for count in (2_000, 1_000))
    accuracy = knn_accuracy(train, rng.integers(0, 10, 2_000), test, rng.integers(0, 10, 1_000))
    assert abs(accuracy - 0.1) < 3 * np.sqrt(0.09 / 1_000)


def test_renaming_the_classes_renames_the_predictions():
    train, labels = clusters(300)
    test, _ = clusters(80, seed=1)
    renamed = np.array([3, 0, 4, 1, 2])
    assert np.array_equal(renamed[knn_predict(train, labels, test)], knn_predict(train, renamed[labels], test))


def test_rows_are_the_chosen_one_and_the_customary_ones():
    train, test = as_embeddings(*clusters(400)), as_embeddings(*clusters(200, seed=1))
    chosen, *customary = knn_rows(train, test)
    assert chosen.settings["chosen"]
    assert [(row.settings["k"], row.settings["temperature"]) for row in customary] == list(CUSTOMARY)
    again = knn(train, test, k=chosen.settings["k"], temperature=chosen.settings["temperature"])
    assert again.metrics == chosen.metrics
    wanted = (knn_predict(train.vectors, train.labels, test.vectors) == test.labels).mean()
    assert customary[0].metrics["top1"] == pytest.approx(wanted)
    assert customary[0].metrics["top1_low"] < wanted < customary[0].metrics["top1_high"]


def test_shuffled_test_labels_change_no_choice_and_score_chance():
    train, test = as_embeddings(*clusters(600)), as_embeddings(*clusters(1_000, seed=1))
    honest = knn(train, test)
    test.labels = np.random.default_rng(3).integers(0, 5, len(test.labels))
    shuffled = knn(train, test)
    assert shuffled.settings == honest.settings
    assert np.array_equal(shuffled.predictions, honest.predictions)
    assert abs(shuffled.metrics["top1"] - 0.2) < 3 * np.sqrt(0.16 / 1_000)
    assert honest.metrics["top1"] > 0.5


@pytest.mark.parametrize("spread", [0.35, 100.0])  # the second: labels that nothing tells
def test_k_is_chosen_on_images_that_have_no_vote(spread):
    """Every k and temperature against a gallery without the held-out fifth; the best, at the smallest k."""
    vectors, labels = clusters(200, spread=spread)
    vectors = normalised(vectors)
    fitted, held = holdout(labels, 0.2, 0)
    assert not set(fitted) & set(held)
    scores = {}
    for k in sorted({min(k, len(fitted)) for k in KS}):
        for temperature in TEMPERATURES:
            predicted = knn_predict(vectors[fitted], labels[fitted], vectors[held], k=k, temperature=temperature)
            scores[k, temperature] = (predicted == labels[held]).mean()
    k, temperature, accuracy = choose_k(vectors, labels, 5)
    assert accuracy == pytest.approx(max(scores.values())) == pytest.approx(scores[k, temperature])
    assert k == min(one for (one, _), score in scores.items() if score == max(scores.values()))
    assert accuracy < (1.0 if spread < 1 else 0.5)
