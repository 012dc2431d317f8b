from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ssl_kit.report import read as module
from ssl_kit.report.page import render
from ssl_kit.report.read import read_run


def test_a_whole_run_is_read_without_a_problem(make_run):
    run = read_run(make_run())
    assert run.problems == [] and run.name == "run"
    assert run.metrics["step"].tolist() == list(range(1, 101))
    assert np.isnan(run.metrics["effective_rank"][0]) and run.metrics["effective_rank"][9] == 20
    assert [one["features"] for one in run.results[:3]] == ["encoder", "pixels", "random_init"]
    assert run.confusion.counts.sum() == 60 and [one.name for one in run.classes] == ["cat", "dog"]
    assert [line.name for line in run.roc.classes] == ["dog"] and len(run.roc.macro.recalls) == len(run.roc.rates)
    assert len(run.wrong["predicted"]) == 8 and len(run.looks["rows"]) == 7 and run.duplicates["groups"] == [[0, 1]]
    assert (run.skipped, run.num_skipped) == ([("broken.jpg", "0 bytes")], 1)
    assert [picture.name for picture in run.pictures] == ["views"]


def test_a_metrics_file_that_is_being_written_is_read_up_to_there(make_run):
    folder = make_run()
    with open(folder / "metrics.csv", "a") as file:
        file.write("101,2.0")
    metrics = read_run(folder).metrics
    assert metrics["step"][-1] == 101 and np.isnan(metrics["loss"][-1]) and metrics["loss"][-2] == 4.0


@pytest.mark.parametrize(
    ("line", "kept"),
    [("{not json", 0), ("[]", 0), ('{"evaluation": "knn"}', 0), ('{"evaluation": "knn", "metrics": {}}', 1), ("", 0)],
)
def test_a_line_that_is_no_result_is_left_out_and_named(make_run, line, kept):
    folder = make_run()
    (folder / "results.jsonl").write_text(line + "\n")
    run = read_run(folder)
    assert len(run.results) == kept
    assert len(run.problems) == (0 if kept or not line else 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("labels", [9] * 40), ("labels", [0]), ("x", [0.0]), ("x", ["nan"] * 40), ("images", ["javascript:1"] * 40),
     ("images", ["https://a.b/c.png"] * 40), ("images", ['x" onerror="alert(1)'] * 40), ("indices", [1]),
     ("classes", None)],
)  # fmt: skip
def test_a_map_that_does_not_hold_together_is_refused(make_run, key, value):
    folder = make_run()
    told = json.loads((folder / "pictures" / "map.json").read_text()) | {key: value}
    (folder / "pictures" / "map.json").write_text(json.dumps(told))
    run = read_run(folder)
    assert run.map is None and len(run.problems) == 1 and "pictures/map.json" in run.problems[0]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("looks.json", {"rows": []}),
        ("looks.json", {"rows": [{"kind": "image", "images": ["aa"], "notes": []}]}),
        ("looks.json", {"rows": [{"kind": "image", "images": ["<b>"], "notes": [""]}]}),
        ("looks.json", {"rows": [{"kind": "image", "images": ["aa"], "notes": [""], "low": "0"}]}),
        ("looks.json", {"rows": [{"kind": "image", "images": ["aa"], "notes": [""], "rows": -1}]}),
        ("looks.json", {"rows": [{"kind": kind, "images": ["aa"] * place, "notes": [""] * place}
                                 for place, kind in ((1, "image"), (2, "patch"))]}),
        ("looks.json", {"prototypes": [{"name": "a", "image": "aa", "counter": "x y", "counter_name": "b",
                                        "cosines": [1, 0]}]}),
        ("looks.json", {"prototypes": [{"name": "a", "image": "aa", "counter": "aa", "counter_name": "b",
                                        "cosines": [1]}]}),
        ("wrong.json", {"predicted": [5] * 8}),
        ("wrong.json", {"confidences": [1.5] * 8}),
        ("wrong.json", {"confidences": [0.5]}),
        ("duplicates.json", {"groups": [[0, 3]]}),
        ("duplicates.json", {"outliers": [[-1, 0.5]]}),
        ("duplicates.json", {"num_groups": -1}),
        ("duplicates.json", {"ids": ["a"]}),
    ],
)  # fmt: skip
def test_pictures_that_do_not_hold_together_are_refused(make_run, name, change):
    path = make_run() / "pictures" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    run = read_run(path.parent.parent)
    assert getattr(run, path.stem) is None and len(run.problems) == 1 and name in run.problems[0]


def test_looks_of_a_later_version_are_left_out_and_unknown_numbers_are_question_marks(make_run):
    path = make_run() / "pictures" / "looks.json"
    told = json.loads(path.read_text())
    told["rows"][0]["kind"] = "unheard of"
    for row in told["rows"]:
        row.pop("even", None)
    path.write_text(json.dumps(told))
    run = read_run(path.parent.parent)
    page = render("looks.html", looks=run.looks)
    assert page.count('class="card lookrow"') == 6 and run.problems == [] and "would give each ?." in page


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("confusion.csv", "label,a,b\na,1,2\n"),
        ("confusion.csv", "label,a,b\na,1,2\nc,0,1\n"),
        ("confusion.csv", "label,a,b\na,1,2\nb,0,-1\n"),
        ("confusion.csv", "label,a,b\na,1,2\nb,0," + "9" * 40 + "\n"),
        ("confusion.csv", "label,a\na,1e3\n"),
        ("classes.csv", "name,num_images\na,1\n"),
        ("classes.csv", "name,num_images,recall,low,high,precision,mistaken_for\na,1,2,0,1,1,b\n"),
        ("roc.json", json.dumps({"rates": [0, 1], "macro": {"auroc": 1, "recalls": [1]}, "classes": []})),
        ("roc.json", json.dumps({"rates": [1, 0], "macro": {"auroc": 1, "recalls": [1, 1]}, "classes": []})),
        ("roc.json", json.dumps({"rates": [0, 1], "macro": {"auroc": 2, "recalls": [1, 1]}, "classes": []})),
        ("roc.json", json.dumps({"rates": [0, 1], "macro": {"auroc": 1, "recalls": [1, "1"]}, "classes": []})),
    ],
)
def test_details_that_do_not_hold_together_are_refused(make_run, name, content):
    path = make_run() / "details" / name
    path.write_text(content)
    run = read_run(path.parent.parent)
    assert not getattr(run, path.stem) and len(run.problems) == 1 and name in run.problems[0]


def test_a_strip_may_not_refer_to_an_image_that_is_not_there(make_run):
    folder = make_run()
    path = folder / "pictures" / "neighbours.json"
    told = json.loads(path.read_text())
    for change in ({"queries": [10**6] * 12}, {"queries": [-1] * 12}, {"found": {"encoder": [[0]]}}):
        path.write_text(json.dumps(told | change))
        assert read_run(folder).neighbours is None


def test_pictures_are_capped_in_pixels_and_shrunk_in_bytes(make_run, monkeypatch):
    folder = make_run()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (600, 600, 3), dtype=np.uint8)).save(folder / "pictures" / "noise.png")
    Image.new("RGB", (9000, 9000)).save(folder / "pictures" / "huge.png")
    run = read_run(folder)
    assert [picture.name for picture in run.pictures] == ["views", "noise"]
    assert run.pictures[1].uri.startswith("data:image/webp;base64,")
    assert len(run.pictures[1].uri) < (folder / "pictures" / "noise.png").stat().st_size
    assert "huge.png could not be read: 9000 x 9000 pixels" in run.problems[0]
    monkeypatch.setattr(module, "_PICTURE_BYTES", 10)
    assert [picture.name for picture in read_run(folder).pictures] == ["views"]


def test_a_png_that_is_none_is_left_out(make_run):
    folder = make_run()
    (folder / "pictures" / "more.png").write_text("<svg onload=alert(1)>")
    run = read_run(folder)
    assert [picture.name for picture in run.pictures] == ["views"] and "more.png" in run.problems[0]


def test_skipped_files_are_listed_up_to_200_and_all_counted(make_run):
    folder = make_run()
    (folder / "skipped.csv").write_text("path,reason\n" + "".join(f'"a,{i}.jpg",0 bytes\n' for i in range(350)))
    run = read_run(folder)
    assert len(run.skipped) == 200 and run.num_skipped == 350 and run.skipped[1] == ("a,1.jpg", "0 bytes")
