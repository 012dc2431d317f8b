"""The one list of evaluations: every entry can be called, is shown, and agrees with what it names."""

import inspect

import pytest

from ssl_kit.evaluation.catalog import EVALUATIONS, JUDGED_BY, ONLY, resolve, row_name
from ssl_kit.evaluation.result import Result
from ssl_kit.evaluation.robustness import CORRUPTIONS
from ssl_kit.methods.mae import MAE
from ssl_kit.methods.method import Method
from ssl_kit.verbs.evaluate import evaluate


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_entry_has_its_function_and_its_words(name):
    entry = EVALUATIONS[name]
    assert entry.name == name and entry.title and entry.note.endswith((".", "?"))
    if entry.function:
        assert list(inspect.signature(resolve(entry.function)).parameters) == ["task", "features"]
        assert name in evaluate.__doc__


def test_what_other_places_name_is_in_the_list():
    assert set(ONLY) == set(EVALUATIONS) - {"finetune", "crops"}  # by a verb of its own, and while training
    assert Method.judged_by == JUDGED_BY and set(MAE.judged_by) <= set(EVALUATIONS)
    assert list(EVALUATIONS["robustness"].metrics) == ["clean", "top1", *CORRUPTIONS]


@pytest.mark.parametrize(
    ("evaluation", "settings", "name"),
    [
        ("knn", {"k": 5, "temperature": 0.1, "chosen": True, "dim": 8}, "kNN, k = chosen"),
        ("knn", {"k": 20, "temperature": 0.07, "chosen": False}, "kNN, k = 20, T = 0.07"),
        ("linear", {"l2": 1.0, "dim": 8, "reduced_by": "pca"}, "linear probe, 8 dims"),
        ("few_shot", {"protocol": "linear probe", "shots": 5}, "linear probe, 5 per class"),
        ("few_shot", {"protocol": "linear probe", "fraction": 0.01}, "linear probe, 1% of the labels"),
        ("health", {"dim": 8}, ""),
    ],
)
def test_results_of_equal_names_differ_in_their_features_only(evaluation, settings, name):
    assert row_name(Result(evaluation, "encoder", {}, settings)) == name
