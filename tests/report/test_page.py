from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fabricated import HOSTILE, Page, record, scores, write_results

from ssl_kit.core.errors import UserError
from ssl_kit.core.locking import lock
from ssl_kit.methods.method import Method
from ssl_kit.report.page import confusion_grid, write_report
from ssl_kit.report.pictures import draw_duplicates, draw_grid, draw_wrong
from ssl_kit.report.read import Confusion, read_run
from ssl_kit.verbs.report import report

SECTIONS = ["verdict", "sees", "curves", "scores", "looks", "neighbours", "map", "made"]
CHARTS = 8  # loss, rank, learning rate (the kNN column is empty); few labels and dimensions twice; ROC


def page_of(*runs, out=None) -> Page:
    target = out or runs[0] / "report.html"
    write_report(runs, target)
    return Page(target.read_text(encoding="utf-8"))


def test_a_full_run_has_every_section_in_order_and_none_is_empty(make_run):
    page = page_of(make_run())
    found = [attributes["id"] for attributes in page.all("section")]
    assert found == SECTIONS
    # "No score yet." and its kin stand only where something is missing
    assert "yet." not in page.words and "Not measured here" not in page.words
    for words in ("With few labels", "How many dimensions are needed", "On corrupted images", "What is taken for what",
                  "Recall of each class", "ROC", "Most confidently wrong", "Attention of the class token",
                  "Typical images", "Duplicates and outliers", "Views"):  # fmt: skip
        assert words in page.words, words
    assert "kNN 0.710 [0.700, 0.720], 0.330 above raw pixels, 0.350 above the same network untrained and " in page.words
    assert len(page.html) < 3_000_000  # bokeh's core is 1.3 MB of it


def test_charts_have_a_place_a_title_and_words(make_run):
    page = page_of(make_run())
    charts = [one for one in page.all("figure") if "aria-describedby" in one]
    assert len(charts) == CHARTS
    assert all({one["aria-labelledby"], one["aria-describedby"]} <= page.ids for one in charts)
    assert "4.990 at first, 4.000 at last" in page.words
    assert len([one for one in page.all("div") if "data-root-id" in one]) == CHARTS + 1  # and the map


def test_nothing_is_fetched_and_the_policy_forbids_it(make_run):
    page = page_of(make_run())
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("data:", "#")) or not value, value
        assert "url(" not in (attributes.get("style") or "")
    assert not re.search(r"url\(\s*['\"]?(?!data:)", re.search(r"<style>(.*?)</style>", page.html, re.S).group(1))
    policy = next(one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy and "unsafe-eval" not in policy
    nonce = re.search(r"'nonce-([^']+)'", policy).group(1)
    assert [one["nonce"] for one in page.all("script")] == [nonce] * 3  # bokeh, the charts, the page


def test_text_of_files_stays_text(make_run):
    run = make_run(classes=(HOSTILE, '"><img src=x onerror=alert(1)>'), info={"name": HOSTILE, "device": HOSTILE})
    (run / "skipped.csv").write_text(f"path,reason\n{HOSTILE}.jpg,{HOSTILE}\n")
    (run / "recipe.yaml").write_text(f"note: {HOSTILE}</pre></details>\n")
    write_results(run, [record(HOSTILE, HOSTILE, 0.5), *scores()])
    page = page_of(run)
    assert len(page.all("script")) == 3
    assert not any("alert(1)" in script and HOSTILE in script for script in page.scripts)
    assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in page.tags)
    assert page.text.count(HOSTILE) >= 6


def test_names_that_utf8_cannot_hold_do_not_stop_the_page(make_run):
    page = page_of(make_run(classes=("caf\udce9", "dog"), info={"name": "caf\udce9"}))
    assert "caf? 20" in page.words  # the class button of the map, with its count


def test_before_the_first_step_only_pictures_are_there_and_no_chart_code(tmp_path, make_run):
    run = make_run()
    for name in ("metrics.csv", "results.jsonl", "skipped.csv", "recipe.yaml"):
        (run / name).unlink()
    for path in [*run.glob("details/*"), *run.glob("pictures/*.json")]:
        path.unlink()
    (run / "run.json").write_text(json.dumps({"status": "starting"}))
    with lock(run):
        page = page_of(run)
    assert [attributes["id"] for attributes in page.all("section")] == SECTIONS
    assert "Starting, unknown so far" in page.words and "no score yet: evaluate" in page.words
    assert f"ssl-kit evaluate {run} LABELLED" in page.words
    assert len(page.all("script")) == 1 and len(page.html) < 200_000
    assert [one["alt"] for one in page.all("img")] == [
        "Views: 4 images, one per column: the original on top, then 2 views of it."
    ]
    assert f"ssl-kit evaluate {run} LABELLED --only few_shot,curve,robustness,details,looks" in page.words


@pytest.mark.parametrize("kept", ["run.json", "metrics.csv", "results.jsonl", "recipe.yaml", "skipped.csv"])
def test_any_single_file_is_enough(make_run, kept):
    run = make_run()
    for file in [*run.glob("pictures/*"), *run.glob("details/*"), *run.glob("*.*")]:
        if file.name != kept:
            file.unlink()
    page = page_of(run)
    # a folder with the scores of somebody's encoder has no training to speak of
    untrained = {"sees", "curves"} if kept in ("results.jsonl", "skipped.csv") else set()
    assert [one["id"] for one in page.all("section")] == [name for name in SECTIONS if name not in untrained]
    assert {one["href"].removeprefix("#") for one in page.all("a")} <= page.ids


@pytest.mark.parametrize(
    "name",
    ["run.json", "results.jsonl", "details/confusion.csv", "details/classes.csv", "details/roc.json"]
    + [f"pictures/{name}" for name in ("neighbours.json", "views.png", "looks.json", "wrong.json", "duplicates.json")],
)
def test_a_damaged_file_costs_its_section_only_and_is_named(make_run, name):
    run = make_run()
    data = (run / name).read_bytes()
    (run / name).write_bytes(data[: len(data) // 2])
    page = page_of(run)
    assert [one["id"] for one in page.all("section")] == SECTIONS
    assert name in page.words


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"shows": "What is <b>hidden</b>?"}, "What is <b>hidden</b>?"),
        ({"shows": 3}, Method.shows),
        ({}, Method.shows),
    ],
)
def test_the_words_above_the_pictures_are_those_of_the_method(make_run, told, words):
    run = make_run(info=told)
    grid = np.zeros((2, 3, 1, 8, 8))
    for name in ("traversals", "another_look", "reconstructions", "samples"):
        draw_grid(run / "pictures" / f"{name}.png", grid, (), f"What {name} show: <b>, in pixels.")
    page = page_of(run)
    assert words in page.words
    figures = page.html.split('<section id="sees"')[1].split("</section>")[0].split("<figure")[1:]
    titles = [re.search(r"<h3>(.*?)</h3>", one).group(1) for one in figures]
    assert titles == ["Views", "Images and their reconstructions", "Samples", "What single numbers of the code change",
                      "Another look"]  # fmt: skip
    assert [re.search(r"<figcaption>(.*?)</figcaption>", one).group(1) for one in figures[1:]] == [
        f"What {name} show: &lt;b&gt;, in pixels."
        for name in ("reconstructions", "samples", "traversals", "another_look")
    ]
    alts = [one["alt"] for one in page.all("img")]
    assert "Images and their reconstructions: What reconstructions show: <b>, in pixels." in alts


def test_several_runs_share_charts_and_tables(make_run, tmp_path):
    first, second = make_run("good"), make_run("flat")
    write_results(second, [record("knn", "encoder", 0.30, k=5, chosen=True, dim=64), *scores()[1:]])
    page = page_of(first, second, out=tmp_path / "both.html")
    assert "2 runs side by side" in page.words
    assert all(row in page.words for row in ("good: encoder", "flat: encoder", "raw pixels", "same network, untrained"))
    assert page.words.count("raw pixels 3,072 dimensions") == 1  # the same baseline stands there once
    assert "good 4.990 at first, 4.000 at last; flat 4.990 at first, 4.000 at last" in page.words
    assert {"neighbours", "map"} & page.ids == set()
    assert {one["href"].removeprefix("#") for one in page.all("a")} <= page.ids
    assert not (first / "report.html").exists()


CROPS = {
    "images": 512,
    "of": "held-out images",
    "top1": {"encoder": [0.34, 0.3, 0.38], "random_init": [0.1, 0.07, 0.13]},
}


def without_labels(make_run, name="run", **info):
    """A run as pretraining without labels leaves it."""
    data = {"root": "/data/my pets", "images": 500, "classes": 0, "image": "/data/my pets/1.jpg"}
    run = make_run(name, classes=(), info={"data": data, "crops": CROPS} | info)
    draw_duplicates(run / "pictures", [], [("c.jpg", 0.7)], lambda name: np.zeros((8, 8, 3), np.uint8), num_images=500,
                    num_groups=0, superfluous=0)  # fmt: skip
    return run


def test_without_labels_nothing_is_empty_and_nothing_asks_for_labels(make_run):
    page = page_of(without_labels(make_run))
    assert [one["id"] for one in page.all("section")] == [name for name in SECTIONS if name != "looks"]
    assert {one["href"].removeprefix("#") for one in page.all("a")} <= page.ids
    assert " yet" not in page.words  # as boxes say in which something is missing
    assert "LABELLED" not in page.html and "ssl-kit evaluate" not in page.html and "No score" not in page.words
    assert "Near-duplicates: none found. No two of 500 images show the same picture." in page.words
    assert "Crop to crop, on 512 held-out images" in page.words and "0.340 [0.300, 0.380]" in page.words
    assert (
        "Crop to crop, top-1, on 512 held-out images, from 0 to 0.4, with 95 % intervals" in page.words
    )  # in the head
    assert "ssl-kit search" in page.words and "'/data/my pets/1.jpg' --html neighbours.html" in page.words


def test_runs_without_labels_stand_side_by_side_in_one_table(make_run, tmp_path):
    better = {**CROPS, "top1": {**CROPS["top1"], "encoder": [0.5, 0.45, 0.55]}}
    runs = without_labels(make_run, "one"), without_labels(make_run, "other", crops=better)
    page = page_of(*runs, out=tmp_path / "both.html")
    (table,) = [part for part in page.html.split('<div class="card">') if "Crop to crop, on 512" in part]
    rows = re.findall(r'<th scope="row">([^<]*)', table.split("</table>")[0])
    assert rows == ["other: encoder", "one: encoder", "same network, untrained"]


@pytest.mark.parametrize(("status", "again"), [("starting", True), ("running", True), ("finished", False),
                                               ("interrupted", False), ("failed", False)])  # fmt: skip
def test_a_page_looks_again_while_its_run_goes_on(make_run, status, again):
    run = make_run(info={"status": status})
    with lock(run):
        (body,) = page_of(run).all("body")
    assert (body.get("data-reload") == "15") == again == bool(body)
    page = page_of(run)  # nobody is at it now
    assert page.all("body") == [{}] and ("broken off at step 100" in page.words) == again


def test_what_was_measured_once_is_no_curve_but_a_value(make_run):
    run = make_run()
    (run / "metrics.csv").write_text("step,epoch,loss,effective_rank\n1,0.1,4.5,\n2,0.2,4.25,12.34\n")
    page = page_of(run)
    assert "title-curve-loss" in page.ids and "title-curve-effective_rank" not in page.ids
    assert "Effective rank while training 12.3 measured once so far" in page.words


def test_a_probe_without_mistakes_says_none_found(make_run):
    run = make_run()
    draw_wrong(run / "pictures", [], *np.zeros((3, 0), int), np.zeros(0), ("cat", "dog"))
    assert "None found: the probe is right about every test image." in page_of(run).words


@pytest.mark.parametrize(
    ("name", "shown"),
    [("cat", "cat"), ("a very long name", "a very long name"), ("Pembroke Welsh corgi", "Pembroke Welsh…"),
     ("n02113023_Pembroke_corgi", "n02113023…"), ("incomprehensibilities", "incomprehensibilities"),
     ("incomprehensibilities of life", "incomprehensibilities…")],
)  # fmt: skip
def test_names_are_shortened_at_the_ends_of_words(make_run, name, shown):
    page = page_of(make_run(classes=(name, "dog")))
    matrix = page.html.split('class="matrix')[1].split("</table>")[0]
    assert re.findall(r'<th scope="(?:row|col)" title="([^"]*)">(?:<span>)?([^<]*)', matrix)[0] == (name, shown)


def test_every_image_says_what_it_shows_and_headings_go_down_by_one(make_run):
    page = page_of(make_run())
    assert all(one.get("alt") for one in page.all("img"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


def test_right_and_wrong_are_said_in_words_too(make_run):
    run = make_run()
    value = read_run(run).neighbours
    right = sum(
        value["labels"][place] == value["labels"][query]
        for rows in value["found"].values()
        for query, row in zip(value["queries"], rows, strict=True)
        for place in row
    )
    page = page_of(run)
    rows = re.findall(r"<h4><b>(.*?)</b>", page.html)
    assert rows == ["this encoder", "raw pixels"] * 12
    alts = [one["alt"] for one in page.all("img")]
    assert sum(alt.endswith(", right") for alt in alts) == right
    assert sum(alt.endswith(", wrong") for alt in alts) == 12 * 2 * 5 - right


def test_scores_of_an_earlier_encoder_are_called_so(make_run):
    assert "earlier encoder" not in page_of(make_run("same")).words
    assert "earlier encoder" in page_of(make_run("other", info={"encoder_sha256": "cd" * 32})).words


def test_the_verb_writes_beside_the_run_and_returns_the_record(make_run, capsys):
    run = make_run()
    told = report([str(run)])
    assert told["report"] == str(run / "report.html") and told["bytes"] == (run / "report.html").stat().st_size
    facts = "kNN 0.710 [0.700, 0.720], 0.330 above raw pixels, 0.350 above the same network untrained and "
    (one,) = told["runs"]
    assert one["scores"].startswith(facts)
    assert one["next"].startswith(f"ssl-kit search {run}") and one["status"] == "finished"
    told = {"name": "run", "state": "learning", "verdict": "learning - rank 50", "scores": one["scores"]}
    assert one == told | {"status": one["status"], "next": one["next"]}
    assert json.dumps(told)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["run: learning - rank 50", f"run: {one['scores']}"] and said[-1].startswith("next: ")


def test_the_verb_writes_several_runs_where_it_stands_but_not_over_a_page_of_others(make_run, tmp_path, monkeypatch):
    runs = [str(make_run(name)) for name in ("one", "other")]
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert report(runs)["report"] == "compare.html" and "2 runs side by side" in Path("compare.html").read_text()
    Path("compare.html").write_text("mine")
    with pytest.raises(UserError, match="was not made by ssl_kit"):
        report(runs)


def test_the_verb_says_what_is_wrong(make_run, tmp_path):
    run = str(make_run())
    (tmp_path / "empty").mkdir()
    for runs, out, words in [
        ([], None, "give one or more"),
        ([str(tmp_path / "nowhere")], None, "is not a folder"),
        ([str(tmp_path / "empty")], None, "holds no run"),
        ([run], str(tmp_path), "is a folder"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            report(runs, out=out)
        assert "\n" not in str(caught.value)


def test_confusions_are_shares_of_their_row_and_named_by_count():
    grid = confusion_grid(Confusion(["a", "b", "c"], np.array([[8, 2, 0], [0, 300, 1], [0, 0, 0]])))
    assert [[cell["text"] for cell in row["cells"]] for row in grid["rows"]] == [
        ["80", "20", ""], ["", "100", "<1"], ["", "", ""],
    ]  # fmt: skip
    assert grid["rows"][0]["cells"][1]["told"] == "2 of 10" and grid["rows"][1]["cells"][1]["right"]
    assert (grid["right"], grid["total"], grid["others"]) == (308, 311, 0)
    assert grid["pairs"] == [("a", "b", 2, 10), ("b", "c", 1, 301)]


def test_of_many_classes_the_worst_are_shown_and_the_rest_is_a_column():
    size = 50
    counts = np.diag(np.full(size, 100))
    counts[3, 3], counts[3, 45], counts[7, 7], counts[7, 3] = 40, 60, 70, 30
    counts[20] = 0  # a class without images is not among the worst
    grid = confusion_grid(Confusion([f"class {row}" for row in range(size)], counts))
    assert len(grid["names"]) == 40 and grid["others"] == 10 and "class 20" not in grid["names"]
    assert {"class 3", "class 7"} <= set(grid["names"]) and "class 45" not in grid["names"]
    row = next(row for row in grid["rows"] if row["name"] == "class 3")
    assert len(row["cells"]) == 41 and row["cells"][-1]["text"] == "60" and row["cells"][-1]["told"] == "60 of 100"


def test_recalls_begin_with_the_lowest_of_40_classes_that_have_images(make_run):
    run = make_run()
    rows = [f"class {place},10,{place / 100},0,1,nan,other" for place in reversed(range(90))] + ["none,0,nan,0,1,nan,"]
    head = "name,num_images,recall,low,high,precision,mistaken_for"
    (run / "details" / "classes.csv").write_text("\n".join([head, *rows]) + "\n")
    page = page_of(run)
    assert "The 40 lowest of 90; all are in details/classes.csv." in page.words
    table = page.html.split("recalls")[-1].split("<tbody>")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">class (\d+)', table) == [str(place) for place in range(40)]
    assert "none" not in table and "never predicted" in table
