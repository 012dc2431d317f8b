"""The verb: every score beside its baselines, features reused only when they fit, one line for a user's mistake."""

import json
import shutil

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.embeddings import embed
from ssl_kit.evaluation import features
from ssl_kit.evaluation.result import Result
from ssl_kit.verbs.evaluate import evaluate


@pytest.fixture(scope="module")
def evaluated(images, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return evaluate(str(encoder), str(images), out=str(out), dims=(2,)), out


def found(record, **wanted):
    """The one record with these entries, looked for in its settings too."""
    return [one for one in record["results"] if all({**one["settings"], **one}.get(k) == v for k, v in wanted.items())]


def test_every_score_stands_beside_every_baseline(evaluated):
    record, _ = evaluated
    for evaluation, rows in (("knn", 3), ("linear", 1)):
        for name in ("encoder", "random_init"):
            full = [one for one in found(record, evaluation=evaluation, features=name) if one["settings"]["dim"] == 8]
            assert len(full) == rows
        assert len(found(record, evaluation=evaluation, features="pixels", dim=768)) == rows
        assert len(found(record, evaluation=evaluation, features="pca", dim=8)) == rows
    for name in ("encoder", "random_init", "pca"):
        assert len(found(record, evaluation="knn", features=name, dim=2, reduced_by="pca")) == 2
    assert {one["features"] for one in found(record, evaluation="health")} == {"encoder", "random_init"}


def test_colours_are_found_and_the_gap_to_the_best_baseline_is_the_difference(evaluated):
    record, _ = evaluated
    assert found(record, evaluation="linear", features="pixels")[0]["metrics"]["top1"] > 0.9
    ours = found(record, evaluation="linear", features="encoder")[0]
    others = [one for one in found(record, evaluation="linear") if one["features"] != "encoder"]
    best = max(one["metrics"]["top1"] for one in others)
    assert ours["metrics"]["above_best_baseline"] == pytest.approx(ours["metrics"]["top1"] - best)
    low, high = (ours["metrics"][f"above_best_baseline_{end}"] for end in ("low", "high"))
    assert low <= ours["metrics"]["above_best_baseline"] <= high


def test_records_pictures_and_report_are_on_disk(evaluated):
    record, out = evaluated
    lines = [Result.from_json(json.loads(line)) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line.to_json() for line in lines] == json.loads(json.dumps(record["results"]))
    assert {path.name for path in (out / "pictures").iterdir()} == {"map.json", "neighbours.json"}
    neighbours = json.loads((out / "pictures" / "neighbours.json").read_text())
    assert set(neighbours["found"]) == {"encoder", "pixels"}
    assert len(neighbours["queries"]) == 12
    assert "<html" in (out / "report.html").read_text()


def test_features_are_made_once_and_again_when_an_image_changes(evaluated, images, encoder, tmp_path, monkeypatch):
    _, out = evaluated
    made = []
    monkeypatch.setattr(features, "embed", lambda *args, **kwargs: made.append(args) or embed(*args, **kwargs))
    evaluate(str(encoder), str(images), out=str(out), only="knn", baselines="random_init")
    assert made == []
    changed = shutil.copytree(images, tmp_path / "images")
    (changed / "test" / "red" / "00.png").write_bytes((images / "test" / "blue" / "00.png").read_bytes())
    evaluate(str(encoder), str(changed), out=str(out), only="knn", baselines="none")
    assert len(made) == 1  # test; train is as it was


def test_damaged_features_are_made_again(evaluated, images, encoder, tmp_path, capsys):
    _, out = evaluated
    shutil.copytree(out / "features", tmp_path / "features")
    part = next((tmp_path / "features").rglob("part-00000.parquet"))
    part.write_bytes(part.read_bytes()[:-8])
    again = evaluate(str(encoder), str(images), out=str(tmp_path), only="knn", baselines=("random_init",))
    assert "embedding again" in capsys.readouterr().err
    assert len(again["results"]) == 6


def test_results_lie_beside_an_encoder_outside_a_run_and_inside_its_run(images, encoder, tmp_path):
    alone = shutil.copytree(encoder, tmp_path / "mine")
    assert evaluate(str(alone), str(images), only="health", baselines="none")["out"] == str(
        tmp_path / "mine-evaluation"
    )
    shutil.copytree(encoder, tmp_path / "run" / "encoder")
    (tmp_path / "run" / "run.json").write_text("{}")
    result = evaluate(str(tmp_path / "run"), str(images), only=("health",), baselines="none", limit=40)
    assert result["out"] == str(tmp_path / "run")


def test_mistakes_are_one_line(images, encoder, tmp_path):
    with pytest.raises(UserError, match="--only lienar: wanted some of knn, linear, health"):
        evaluate(str(encoder), str(images), only="knn,lienar")
    with pytest.raises(UserError, match="--dims eight"):
        evaluate(str(encoder), str(images), dims="eight")
    with pytest.raises(UserError, match="at least 1"):
        evaluate(str(encoder), str(images), dims=(0,))
    with pytest.raises(UserError, match="wanted at least two classes"):
        evaluate(str(encoder), str(images / "train" / "red"), out=str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        evaluate(str(tmp_path / "nothing"), str(images))
