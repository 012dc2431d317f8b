"""ssl_kit from Python: the same images in every form, the run as an object, and scikit-learn's own checks."""

import csv

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from sklearn.utils.estimator_checks import parametrize_with_checks

import ssl_kit
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import GREY, RGB, Reading
from ssl_kit.data.opening import open_labelled, open_source

SMALL = {
    "class_path": "ssl_kit.methods.vae.VAE",
    "init_args": {"encoder": {"init_args": {"name": "resnet18_small", "args": {"channels": [4, 4, 4, 4]}}}},
}
QUICK = {"method": SMALL, "image_size": 8, "batch_size": 4, "trainer": {"max_steps": 1}}


class Pairs(torch.utils.data.Dataset):
    """A map-style data set of torch, as most are written."""

    classes = ("cat", "dog", "owl")

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return Image.fromarray(self.images[row]), int(self.labels[row])


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (60, 12, 12, 3)).astype(np.uint8), np.arange(60) % 3


@pytest.fixture(scope="module")
def forms(images, tmp_path_factory):
    """The same images and labels in every form that is taken."""
    datasets = pytest.importorskip("datasets")
    pixels, labels = images
    names = np.array(Pairs.classes)[labels]
    root = tmp_path_factory.mktemp("forms")
    for row, image in enumerate(pixels):
        Image.fromarray(image).save(root / f"{row:02d}.png")
    paths = sorted(root.glob("*.png"))
    with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *zip((path.name for path in paths), names, strict=True)])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(Pairs.classes))})
    rows = {"image": [str(path) for path in paths], "label": labels.tolist()}
    return {
        "table": str(root / "list.csv"),
        "arrays": (pixels, names),
        "tensors": (torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), names.tolist()),
        "paths": (paths, names.tolist()),
        "pictures": ([Image.fromarray(image) for image in pixels], names.tolist()),
        "data set of torch": Pairs(*images),
        "data set of Hugging Face": datasets.Dataset.from_dict(rows, features=features),
    }


def test_every_form_is_the_same_source(forms, images):
    for name, form in forms.items():
        source = open_source(form)
        assert np.array_equal(np.stack(source.read(slice(None))), images[0]), name
        assert source.classes == Pairs.classes and np.array_equal(source.labels(), images[1]), name
        assert source.ids()[7].removesuffix(".png").endswith("07"), name
        train, test = open_labelled(form)
        assert len(train) == 48 and np.bincount(test.labels()).tolist() == [4, 4, 4], name


def test_every_form_trains_the_same_encoder(forms, tmp_path):
    made = {}
    for name in ("table", "arrays", "data set of torch", "data set of Hugging Face", "pictures"):
        run = ssl_kit.pretrain(forms[name], run=str(tmp_path / name), epochs=1, verbose=False, **QUICK)
        with open(run.folder / "metrics.csv", encoding="utf-8") as file:
            curves = [(row["step"], row["loss"], row["effective_rank"]) for row in csv.DictReader(file)]
        made[name] = run["encoder_sha256"], curves, np.asarray(run.embed(forms[name])).tobytes()
    assert len({one[0] for one in made.values()}) == 1 and all(one == made["arrays"] for one in made.values())


def test_a_data_set_that_does_not_fit_is_read_when_needed(images, monkeypatch):
    monkeypatch.setattr("ssl_kit.data.given.fits_in_memory", lambda size: (False, "too large"))
    source = open_source(Pairs(*images))
    assert source.stack is None and source.labels().tolist() == images[1].tolist()
    assert np.array_equal(source.read([5])[0], images[0][5])
    few = source.subset([3, 9])
    assert np.array_equal(few.read([1])[0], images[0][9]) and few.ids() == ["03", "09"]


def test_a_list_of_one_name_is_that_name(forms, tmp_path):
    assert open_source(["mnist5k"], reading=GREY).ids() == open_source("mnist5k", reading=GREY).ids()
    assert open_source([forms["table"]]).ids() == open_source(forms["table"]).ids()
    assert len(open_source([forms["paths"][0][3]], least=1)) == 1  # a list of one image


def test_several_folders_are_one_source(tmp_path):
    for folder, count in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        for n in range(count):
            Image.fromarray(np.full((8, 8, 3), n, np.uint8)).save(tmp_path / folder / f"{n}.png")
    source = open_source([tmp_path / "a", str(tmp_path / "b")])
    assert source.ids() == ["a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"] and source.sizes([4]).tolist() == [
        [8, 8]
    ]
    for folder in ("c/a", "c/d"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / folder / "9.png")
    apart = open_source([tmp_path / "a", tmp_path / "c" / "d"], in_memory=False)
    assert apart.ids() == ["a/0.png", "a/1.png", "d/9.png"] and apart.root == tmp_path
    assert apart.read([2])[0] == (tmp_path / "c/d/9.png").read_bytes() and apart.lengths([0, 2]).all()
    with pytest.raises(UserError, match="two of them are called 'a'"):
        open_source([tmp_path / "a", tmp_path / "c" / "a"])


def test_labels_in_every_usual_form(images):
    pixels, numbers = images
    names = np.array(["cat", "dog", "owl"])[numbers]
    rows = np.eye(3)[numbers]
    column = pandas.Series(names, index=range(7, 67))
    forms = [[pixels, names], [list(pixels), list(names)], (pixels, column), (pixels, column.astype("category"))]
    forms += [(pixels, column.to_frame()), (pixels, pandas.get_dummies(column)), (pixels, names[:, None])]
    for given in forms:
        assert open_source(given).classes == ("cat", "dog", "owl") and (open_source(given).labels() == numbers).all()
    forms = [(pixels, rows), (pixels, rows.tolist()), [pixels, torch.from_numpy(rows)], (pixels, list(rows > 0))]
    forms += [(pixels, [torch.tensor(one) for one in numbers]), (pixels, list(numbers)), (pixels, numbers[:, None])]
    for given in forms:
        assert open_source(given).classes == ("0", "1", "2") and (open_source(given).labels() == numbers).all()
    for given in ([pixels[0], pixels[1]], (pixels[0, :, :, 0], pixels[1, :, :, 0])):
        assert len(open_source(given)) == 2 and open_source(given).classes == ()


def test_an_item_that_cannot_be_had_is_named(images, tmp_path):
    class Broken(Pairs):
        def __getitem__(self, row):
            if row == 5:
                raise self.error("no such thing\nat all")
            return super().__getitem__(row)

    for error in (OSError, KeyError, RuntimeError):
        Broken.error = error
        with pytest.raises(UserError, match=rf"Broken, image 5: {error.__name__}: .*no such thing"):
            open_source(Broken(*images))
    pickle = [{"image": one} for one in images[0]]
    with pytest.raises(UserError, match="images, image 0: array of object"):
        open_source(pickle)
    Image.fromarray(images[0][0].astype(np.uint16)[..., 0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(UserError, match="images, image 1: "):
        open_source([Image.new("I;16", (8, 8)), Image.open(tmp_path / "a.png")])


def test_channels_may_stand_first_where_only_they_can_be_channels(images, capsys):
    pixels = images[0]
    first = pixels.transpose(0, 3, 1, 2)
    for given in (first, torch.from_numpy(first.copy()), torch.from_numpy(pixels)):
        assert np.array_equal(np.stack(open_source(given).read(slice(None))), pixels)
    said = capsys.readouterr().out
    assert "shape (60, 3, 12, 12) are read as (N, C, H, W)" in said and said.count("are read as") == 2
    bands = np.arange(4 * 12 * 16 * 7, dtype=np.uint8).reshape(4, 7, 12, 16)
    for given in (bands, bands.transpose(0, 2, 3, 1)):
        assert open_source(given, reading=Reading(7)).sizes([0]).tolist() == [[12, 16]]
    assert open_source(np.zeros((4, 3, 9, 1), np.uint8)).sizes([0]).tolist() == [[3, 9]]  # as numpy has it
    why = r"shape \(4, 7, 12, 16\): array of 16 bands: .* wanted \(N, H, W, C\), or \(N, C, H, W\) of 3 channels"
    with pytest.raises(UserError, match=why):
        open_source(bands)


def test_arrays_of_many_images_in_a_folder_are_told_by_their_shape(tmp_path):
    for n in range(3):
        np.save(tmp_path / f"{n}.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(
        UserError, match=r"saw 3 \.npy of shape \(2, 8, 8, 3\); .* or \.npy of one image each, \(H, W\)"
    ):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (object(), "got object; wanted a folder"),
        ([], "empty"),
        ((np.zeros((4, 8, 8), np.uint8), [1, 2]), "4 images but 2 labels"),
        ((np.zeros((4, 8, 8), np.uint8), np.ones((4, 2))), r"labels of shape \(4, 2\); wanted one per image"),
        (
            (np.zeros((4, 8, 8), np.uint8), pandas.DataFrame({"a": list("abcd"), "b": 1})),
            r"columns \['a', 'b'\]; wanted",
        ),
        (pandas.DataFrame({"path": ["x"], "kind": 1}), r"DataFrame of the columns \['path', 'kind'\]; wanted"),
        (["x.png", "x.png"], "listed more than once"),
        ([np.zeros((8, 8, 5), np.uint8)] * 3, "5 bands: --channels 5"),
        ({"train": np.zeros((4, 8, 8), np.uint8)}, "got the parts 'train'; wanted train and test"),
    ],
)
def test_what_is_no_source(given, message):
    with pytest.raises(UserError, match=message):
        open_labelled(given) if isinstance(given, dict) else open_source(given, reading=RGB)


def test_a_run_is_an_object(images, tmp_path, capsys):
    run = ssl_kit.pretrain(images, recipe="byol", encoder="resnet18_small", run=str(tmp_path / "run"), epochs=1,
                           image_size=16, batch_size=16, trainer={"max_steps": 2}, verbose=False)  # fmt: skip
    assert capsys.readouterr().out == "" and run["method"] == "BYOL" and run.encoder.name == "resnet18_small"
    assert "verdict" in run and repr(run).startswith(f"<Run {tmp_path / 'run'}: finished, ")
    pixels, labels = images
    assert (
        np.asarray(run.embed(pixels[:5])).shape == (5, run.encoder.dim)
        and np.asarray(run.embed(), np.float64).shape[0] == 60
    )
    chw = np.ascontiguousarray(pixels[4].transpose(2, 0, 1))
    for query in (pixels[4], Image.fromarray(pixels[4]), chw, torch.from_numpy(chw), torch.from_numpy(pixels[4])):
        found = run.search(query, k=1)
        assert len(found) == 1 and found[0][0].id == "04" and len(run.embed(query)) == 1
    several = torch.from_numpy(pixels[4:6].transpose(0, 3, 1, 2).astype(np.float32) / 255).requires_grad_()
    assert [one[0].id for one in run.search(several, k=1)] == ["04", "05"] and len(run.embed(several)) == 2
    assert [len(run.search(pixels[:count, :, :, 0])) for count in (5, 9)] == [5, 9]  # of grey ones
    with pytest.raises(UserError, match=r"shape \(3, 12, 3\), which may be one image or several; wanted one as"):
        run.search(pixels[4][:3])
    parts = {"train": (pixels[:40], labels[:40]), "test": (pixels[40:], labels[40:])}
    scores = run.evaluate(parts, only="knn", baselines=False, baseline=None, dims=2, verbose=False)
    assert {one["features"] for one in scores["results"]} == {"encoder"} and scores["results"][0]["evaluation"] == "knn"
    page = run.report
    assert page.path.is_file() and page._repr_html_().startswith("<iframe srcdoc=")
    again = ssl_kit.load_run(run.folder)
    assert dict(again)["encoder_sha256"] == run["encoder_sha256"]
    with pytest.raises(UserError, match="the images it was trained on are not at hand"):
        again.embed(out=tmp_path / "other")
    with pytest.raises(UserError, match="is no run"):
        ssl_kit.load_run(tmp_path)


class Tiny(torch.nn.Module):
    """A network of one's own: it states the length of its features."""

    dim = 24

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(12, 24, 3, 2))

    def forward(self, images):
        return self.layers(images)  # a map: it is averaged


@pytest.mark.parametrize("recipe", ["simclr", "vae", "byol"])
def test_a_network_of_ones_own_is_trained_kept_and_loaded(images, tmp_path, recipe, monkeypatch):
    options = {"epochs": 1, "batch_size": 16, "trainer": {"max_steps": 2}, "verbose": False}
    run = ssl_kit.pretrain(images, recipe=recipe, encoder=Tiny(), run=str(tmp_path / "run"), **options)
    features = np.asarray(run.embed(images[0][:4]))
    assert (
        features.shape == (4, run.encoder.dim) and run.encoder.name == "tiny" and recipe != "simclr"
    ) or run.encoder.dim == 24
    with monkeypatch.context() as patch:
        patch.setattr("timm.is_model", lambda name: False)  # as in another process
        with pytest.raises(UserError, match=r"no timm model is called 'tiny'.*load_run\(RUN, encoder=NETWORK\)"):
            ssl_kit.load_run(run.folder).embed(images[0][:4])
    again = ssl_kit.load_run(run.folder, encoder=Tiny)
    assert np.array_equal(np.asarray(again.embed(images[0][:4])), features)


def test_a_network_of_ones_own_on_the_command_line(images, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Sequential):\n    dim = 6\n\n\n"
        "def make():\n    return Mine(nn.Conv2d(3, 6, 3, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for row, image in enumerate(images[0][:20]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / f"{row:02d}.png")
    place, own = [str(tmp_path / "photos"), "--run", str(tmp_path / "run")], ["--encoder", "mine:make"]
    steps = ["--trainer.max_steps", "1", "--batch-size", "8"]
    assert cli.main(["pretrain", *place, *steps, *own]) == 2
    assert "if you trust mine, add --allow mine" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert cli.main(["pretrain", *place, *steps, *own, "--allow", "mine"]) == 0
    embed = ["embed", str(tmp_path / "run"), str(tmp_path / "photos"), "--out", str(tmp_path / "emb")]
    with monkeypatch.context() as patch:
        patch.setattr("timm.is_model", lambda name: False)  # as in another process
        assert cli.main(embed) == 2
        assert "no timm model is called 'mine'" in capsys.readouterr().err
    assert cli.main([*embed, *own, "--allow", "mine"]) == 0


def test_a_network_states_its_features():
    for wrong, message in (
        (torch.nn.Linear(2, 2), "states no `dim`"),
        (type("ResNet18", (Tiny,), {})(), "timm has a model"),
    ):
        with pytest.raises(UserError, match=message):
            ssl_kit.pretrain(np.zeros((4, 8, 8), np.uint8), encoder=wrong)


def test_kept_features_are_those_of_the_run_and_the_images(images, tmp_path):
    options = {"epochs": 1, "verbose": False, "overwrite": True, **QUICK}
    run = ssl_kit.pretrain(images[0], run=str(tmp_path / "run"), **options)
    first = np.asarray(run.embed())
    assert np.array_equal(np.asarray(run.embed()), first) and first.shape[0] == 60
    again = ssl_kit.pretrain(255 - images[0][:20], run=str(tmp_path / "run"), **{**options, "seed": 1})
    assert np.asarray(again.embed()).shape[0] == 20
    assert again.search(255 - images[0][3], k=1)[0][0].id == "03"
    assert [len(again.embed(images[0][:n], out=tmp_path / "other")) for n in (5, 9)] == [5, 9]
    assert np.asarray(again.embed(images[0][4])).shape[0] == 1  # one image
    assert np.asarray(again.embed(layers=2)).shape == (20, 8)  # asked for otherwise than it is kept
    assert np.asarray(again.embed()).shape == (20, again.encoder.dim)
    with pytest.raises(TypeError, match="layers only with out="):
        again.embed(images[0], layers=2)


def test_the_package_shows_its_verbs_and_prints_no_commands(images, tmp_path, capsys):
    assert {"pretrain", "evaluate", "report", "views", "load_run", "SSLTransformer"} <= set(dir(ssl_kit))
    ssl_kit.views(images[0], out=str(tmp_path / "views.png"), count=2, image_size=8)
    assert (tmp_path / "views.png").is_file() and "next:" not in capsys.readouterr().out
    assert ssl_kit.report.page is not None  # still a package
    with pytest.raises(TypeError, match=r"pretrain\(\) takes no 'epoch'; it takes data, limit, "):
        ssl_kit.pretrain(images[0], epoch=1)
    with pytest.raises(UserError, match="no recipe file or packaged recipe is called 'byoll'"):
        ssl_kit.pretrain(images[0], recipe="byoll")


@parametrize_with_checks([ssl_kit.SSLTransformer("vae", epochs=1, options=QUICK)])
def test_scikit_learns_checks(estimator, check):
    check(estimator)
