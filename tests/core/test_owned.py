"""Nothing of a user's is ever removed or written over: where results may go, whose files are, what is put back."""

import json
import os
import shutil

import pytest

from ssl_kit.core import owned
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import NotOursError, append_line, atomic_folder, write_csv, write_json
from ssl_kit.core.owned import Former, Record, check_ours, check_output, check_place, our_files, record_of, remove


def everything(folder):
    """Name -> content or target of all that is in a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


@pytest.fixture
def run(tmp_path):
    """A run of ours, as its writers leave it, with things of the user's in it."""
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    with Record(folder, "run.json") as record:
        record.write()
        write_json(folder / "pictures" / "views.png", 1)
        write_csv(folder / "metrics.csv", ["step"], [[1]])
        append_line(folder / "results.jsonl", {})
        for name in ("checkpoints/step-00000001", "checkpoints/best", "features/a"):
            with atomic_folder(folder / name, manifest={}) as temporary:
                (temporary / "state.json").write_text("1")
    for name in ("notes.txt", "pictures/mine.png", "checkpoints/best/mine.txt", "checkpoints/step-mine/a", "x/y/z"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "checkpoints" / "step-of-mine").write_text("mine")
    (folder / "features" / "b").mkdir()
    (folder / "features" / "b" / "state.json").write_text("mine")
    return folder


MINE = [
    *("notes.txt", "pictures/mine.png", "checkpoints/best/mine.txt", "checkpoints/step-mine/a", "x/y/z"),
    *("checkpoints/step-of-mine", "features/b/state.json"),
]
OURS = [
    *("checkpoints/best/manifest.json", "checkpoints/best/state.json"),
    *("checkpoints/step-00000001/manifest.json", "checkpoints/step-00000001/state.json"),
    *("features/a/manifest.json", "features/a/state.json"),
    *("metrics.csv", "pictures/views.png", "results.jsonl", "run.json"),
]


def test_only_what_a_record_or_a_manifest_lists_is_ours(run):
    assert our_files(run) == OURS and set(everything(run)) == {*OURS, *MINE}


def test_a_file_is_listed_before_it_is_written(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    listed = []
    replace = os.replace

    def seen(source, target):
        if os.fspath(target).endswith(".csv"):
            listed.append(json.loads((folder / "run.json").read_text())["files"])
        replace(source, target)

    monkeypatch.setattr(os, "replace", seen)
    with Record(folder, "run.json"):
        write_csv(folder / "metrics.csv", ["step"], [])
    assert listed == [["metrics.csv", "run.json"]]
    write_csv(folder / "other.csv", ["step"], [])  # by nobody who holds the record
    assert json.loads((folder / "run.json").read_text())["files"] == ["metrics.csv", "run.json"]


def test_a_file_of_somebody_else_is_not_written_over(run):
    with Record(run) as record:
        for write in (lambda path: write_json(path, 1), lambda path: append_line(path, 1)):
            with pytest.raises(NotOursError, match="is not ssl_kit's"):
                write(run / "pictures" / "mine.png")
        write_json(run / "pictures" / "views.png", 2)
    assert "pictures/mine.png" not in record.names and (run / "pictures" / "mine.png").read_text() == "mine"


@pytest.mark.parametrize("name", ["../mine", "/etc/passwd", "a/../../mine", "link", "linked/mine", "x", 3])
def test_a_record_that_names_what_it_may_not_is_damaged(run, name):
    (run / "link").symlink_to(run / "notes.txt")
    (run / "linked").symlink_to(run.parent)
    (run.parent / "mine").write_text("mine")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"files": [*record["files"], name]}))
    before = everything(run)
    for use in (our_files, lambda folder: Former(folder).set_aside(), Record):
        with pytest.raises(DamagedError, match="has a record that names"):
            use(run)
    assert everything(run) == before


@pytest.mark.parametrize("path", ["run.json", "checkpoints", "encoder", "metrics.csv", "report.html", "tensorboard"])
def test_a_folder_without_a_record_in_which_results_would_meet_something_is_refused(tmp_path, path):
    (tmp_path / "notes.txt").write_text("mine")
    check_ours(tmp_path)
    (tmp_path / path).write_text("{}")
    with pytest.raises(NotOursError, match=f"holds '{path}' and no record"):
        check_ours(tmp_path)


def test_nothing_is_written_through_a_link_in_a_run(run, tmp_path):
    (run / "encoder").symlink_to(tmp_path)
    with pytest.raises(NotOursError, match="encoder is a link"):
        check_ours(run)


def test_runs_and_results_of_earlier_versions_have_fixed_names(tmp_path):
    run, results = tmp_path / "run", tmp_path / "results"
    for folder in (run, results):
        for name in ("report.html", "results.jsonl", "pictures/views.png", "pictures/mine.png", "mine.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("x")
    (run / "run.json").write_text(json.dumps({"versions": {"ssl_kit": "0.1.0"}}))
    assert record_of(results) is None and our_files(results) == []
    (results / "results.jsonl").write_text('{"evaluation": "knn", "features": "pca", "made_by": {}}\n')
    assert (record_of(run), record_of(results)) == ("run.json", "results.json")
    known = ["pictures/views.png", "report.html", "results.jsonl"]
    assert our_files(run) == [*known, "run.json"] and our_files(results) == known
    (run / "run.json").write_text(json.dumps({"versions": {"torch": "2.14"}}))
    assert record_of(run) is None


def test_a_checkpoint_that_is_removed_leaves_what_others_have_put_into_it(run):
    remove(run / "checkpoints" / "best")
    assert everything(run / "checkpoints" / "best") == {"mine.txt": b"mine"}
    (run / "checkpoints" / "step-00000001" / "manifest.json").write_text("damaged")
    remove(run / "checkpoints" / "step-00000001")
    assert not (run / "checkpoints" / "step-00000001").exists()


@pytest.mark.parametrize("place", ["data", "data/run", "data/a/run", ".", "home", "root", "link", "file", "above"])
@pytest.mark.parametrize("removing", [False, True])
def test_results_do_not_go_where_they_would_meet_images_or_a_home(tmp_path, monkeypatch, place, removing):
    (tmp_path / "home" / "me").mkdir(parents=True)
    (tmp_path / "above" / "data" / "a").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    (tmp_path / "images").symlink_to(tmp_path / "above" / "data")  # links are resolved on both sides
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    monkeypatch.chdir(tmp_path / "work")
    folder = {".": "./", "root": "/", "home": str(tmp_path / "home")}.get(place) or str(tmp_path / place)
    folder = folder.replace(str(tmp_path / "data"), str(tmp_path / "above" / "data"))
    if place == "." and not removing:
        check_place(folder, str(tmp_path / "images"))
        return
    with pytest.raises(UserError) as caught:
        check_place(folder + "/", str(tmp_path / "images"), removing=removing)
    assert ("\n" not in str(caught.value) and "name" in str(caught.value)) or "choose" in str(caught.value)


def test_a_list_of_images_is_not_to_be_inside_and_a_mounted_disk_not_to_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "list.csv").touch()
    with pytest.raises(UserError, match=r"holds .*the images"):
        check_place(tmp_path / "run", str(tmp_path / "run" / "list.csv"))
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "run"))
        check_place(tmp_path / "run")
        with pytest.raises(UserError, match="is a mounted disk"):
            check_place(tmp_path / "run", removing=True)
    if os.path.exists("/proc/self/mountinfo"):
        assert owned.Path("/proc") in owned._mounted(owned.Path("/"))


def test_a_page_or_picture_is_only_written_over_where_it_says_that_we_made_it(tmp_path):
    page, photo = tmp_path / "page.html", tmp_path / "photo.png"
    check_output(page)
    page.write_text('<meta name="generator" content="ssl_kit 0.1">')
    photo.write_bytes(b"\x89PNG mine")
    (tmp_path / "link.html").symlink_to(page)
    check_output(page)
    for path, data in ((photo, None), (tmp_path / "link.html", None), (tmp_path, None), (tmp_path / "x.png", tmp_path)):
        with pytest.raises(UserError, match=r"choose|outside"):
            check_output(path, data)


@pytest.mark.parametrize("began", [False, True])
def test_what_is_replaced_comes_back_whole_and_what_was_to_replace_it_is_gone(run, began):
    before = everything(run)
    former = Former(run)
    former.set_aside()
    assert set(everything(run)) == {*MINE, *(f".former/{name}" for name in (*OURS, "aside.json"))}
    if began:
        with Record(run, "run.json") as record:
            record.names = {"run.json"}
            record.write()
            write_csv(run / "metrics.csv", ["step"], [[2]])
            write_csv(run / "diagnose.csv", ["step"], [[2]])
            with atomic_folder(run / "checkpoints" / "step-00000007", manifest={}) as temporary:
                (temporary / "state.json").write_text("2")
    Former(run).settle(False)
    assert everything(run) == before


def test_what_is_replaced_is_gone_once_the_new_one_stands(run):
    former = Former(run)
    former.set_aside()
    with Record(run, "run.json") as record:
        record.names = {"run.json"}
        record.write()
    former.settle(True)
    assert set(everything(run)) == {*MINE, "run.json"}


@pytest.mark.parametrize("back", [False, True])
def test_a_kill_between_any_two_moves_loses_nothing(run, back, monkeypatch):
    """Every call that changes a folder is once the last one."""
    before, number = everything(run), 0
    while True:
        copy = run.parent / f"copy-{number}"
        shutil.copytree(run, copy, symlinks=True)
        left = [number]
        if back:
            Former(copy).set_aside()
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, killing(getattr(os, name), left))
            try:
                Former(copy).settle(False) if back else Former(copy).set_aside()
                ended = True
            except KeyboardInterrupt:
                ended = False
        Former(copy).settle(False)
        left_over = {name for name in everything(copy) if name.startswith(".former/.aside.json.")}
        assert {name: text for name, text in everything(copy).items() if name not in left_over} == before, number
        Former(copy).set_aside()  # what a killed writer has left is no hindrance
        assert not left_over & set(everything(copy))
        if ended:
            break
        number += 1
    assert number > 10


def killing(call, left):
    def killed(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return call(*arguments, **named)

    return killed
