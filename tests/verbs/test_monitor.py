"""What is measured while a run goes on: scores beside those of raw pixels, in any number of processes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from stripes import pattern

from ssl_kit.data.opening import open_source
from ssl_kit.encoders import Encoder
from ssl_kit.methods.mae import MAE
from ssl_kit.methods.method import Method
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.methods.vae import VAE
from ssl_kit.training.distributed import rank
from ssl_kit.training.joining import joined
from ssl_kit.training.optim import Optim
from ssl_kit.training.verdict import BELOW
from ssl_kit.verbs.monitor import Crops, Measure, hold_out, judge_of
from ssl_kit.views.recipe import plain

SIZE = (16, 16)


class Bare(Method):
    """An encoder that nothing trains, at some step."""

    num_views = 2

    def __init__(self, step=0, size=SIZE):
        torch.manual_seed(0)
        super().__init__(Encoder("resnet18_small", {"channels": [8, 8, 8, 16]}, size), Optim(lr=0.1))
        self._trainer = SimpleNamespace(global_step=step)

    def loss(self, views, key):
        return {}


@pytest.fixture(scope="module")
def images():
    """(800, 16, 16, 3) uint8 in four classes, and their labels."""
    return np.stack([pattern(row % 4, row) for row in range(800)]), np.array(["abcd"[row % 4] for row in range(800)])


def voted(gallery, labels, queries, asked):
    """kNN top-1 by scikit-learn: 20 neighbours by cosine vote with exp(cos / 0.07)."""
    weigh = lambda distances: np.exp((1 - distances) / 0.07)
    voters = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weigh).fit(gallery, labels)
    return (voters.predict(queries) == asked).mean()


def test_knn_of_raw_pixels_and_of_their_pca_is_that_of_independent_code(images):
    training, gallery, queries = hold_out(open_source(images))
    scores = Measure(training, gallery, queries, plain(SIZE))(Bare())
    voters, asked = (np.stack(part.read(slice(None))).reshape(len(part), -1) / 255 for part in (gallery, queries))
    mean = voters.mean(axis=0)
    pixels = voters - mean, gallery.labels(), asked - mean, queries.labels()
    assert scores["knn_pixels"] == pytest.approx(voted(*pixels), abs=1.5 / len(asked))
    pca = PCA(16, svd_solver="full").fit(voters)
    reduced = pca.transform(voters), gallery.labels(), pca.transform(asked), queries.labels()
    assert scores["knn_pca"] == pytest.approx(voted(*reduced), abs=1.5 / len(asked))
    assert 0.3 < scores["knn_pixels"] != scores["knn_pca"]  # there is something to tell apart


def test_the_first_look_is_at_what_was_kept_and_the_next_at_what_was_learnt(images):
    wanted = Measure(*hold_out(open_source(images)), plain(SIZE))(Bare())
    measure, method = Measure(*hold_out(open_source(images)), plain(SIZE)), Bare(step=1)
    measure.keep(method.encoder)
    with torch.no_grad():
        for weights in method.encoder.parameters():
            weights.add_(torch.randn_like(weights), alpha=0.1)
    assert measure(method) == wanted and "knn_pixels" in wanted
    learnt = measure(method)
    assert learnt["effective_rank"] != wanted["effective_rank"] and "knn_pixels" not in learnt


def test_crops_are_the_left_and_the_right_of_an_image(images):
    """Of wide images, whose crops need no resizing."""
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (700, 8, 12, 3), dtype=np.uint8)
    wide[:300, :, 4:] = wide[:300, :, :8] // 2 + 60  # of these the two crops are alike
    measure = Measure(open_source(wide), None, None, plain((8, 8)))
    assert measure.cropped == 512 and measure.held_out == 0
    scores = measure(Bare(size=(8, 8)))
    rows = np.linspace(0, 699, 512).astype(int)
    left, right = (wide[rows][:, :, part].reshape(512, -1) / 255 for part in (slice(8), slice(4, 12)))
    left, right = left - left.mean(axis=0), right - right.mean(axis=0)
    cosines = left @ right.T / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)
    assert scores["crops_pixels"] == pytest.approx((cosines.argmax(axis=1) == np.arange(512)).mean(), abs=1e-9)
    assert 0.4 < scores["crops_pixels"] < 0.6 and "knn_top1" not in scores


def test_the_untrained_encoder_is_looked_at_with_batch_norms_that_have_seen_the_images(images):
    """Otherwise a step that moves nothing but their statistics looks as if something was learnt."""
    method = Bare()
    first = Measure(*hold_out(open_source(images)), plain(SIZE))(method)
    for _ in range(100):  # the statistics of training: weights stay
        method.encoder.train()(torch.from_numpy(images[0][:256]).permute(0, 3, 1, 2) / 255)
    after = Measure(*hold_out(open_source(images)), plain(SIZE))(method)
    assert after["crops_top1"] == pytest.approx(first["crops_top1"], abs=0.02)
    assert after["effective_rank"] == pytest.approx(first["effective_rank"], rel=0.05)


def test_pixels_are_measured_once_and_the_encoder_at_each_look(images):
    measure = Measure(*hold_out(open_source(images)), plain(SIZE))
    first, later = measure(Bare()), measure(Bare(step=1))
    beside = {"knn_pixels", "knn_pca", "crops_pixels", "crops_pca"}
    assert first.keys() - later.keys() == beside and {"knn_top1", "crops_top1"} <= later.keys()
    assert {name: first[name] for name in later} == later  # the encoder is the same
    assert all(isinstance(value, float) for value in first.values())


def test_of_many_images_without_labels_some_are_held_out_and_their_crops_are_compared():
    rng = np.random.default_rng(0)
    many = rng.integers(0, 256, (10_240, 8, 8, 3), dtype=np.uint8)
    training, gallery, held = hold_out(source := open_source(many))
    assert (len(training), gallery, len(held)) == (9_728, None, 512)
    assert set(training.ids()) | set(held.ids()) == set(source.ids()) and not set(training.ids()) & set(held.ids())
    measure = Measure(training, gallery, held, plain((8, 8)))
    assert measure.crops_of == "held-out images" and (measure.cropped, measure.held_out) == (512, 0)
    assert measure.scores[0].share.source.ids() == held.ids()
    assert hold_out(few := open_source(many[:10_239])) == (few, None, None)
    assert Measure(few, None, None, plain((8, 8))).crops_of == "training images"


def test_pca_of_crops_at_all_dimensions_is_the_pixels_themselves():
    """A rotation changes no cosine; of few dimensions it is another score."""
    rng = np.random.default_rng(0)
    sides = rng.normal(size=(200, 1, 12)) + rng.normal(size=(200, 2, 12))
    sides -= sides.mean(axis=0)
    crops = Crops(open_source(np.zeros((2, 8, 8, 3), np.uint8)))
    found = crops.of_pixels([sides.reshape(200, 24).astype(np.float32)], 12)
    assert 0.1 < found["crops_pca"] == found["crops_pixels"]
    assert crops.of_pixels([sides.reshape(200, 24).astype(np.float32)], 2)["crops_pca"] < found["crops_pca"]


def test_images_that_are_all_alike_have_scores_of_nothing(images):
    grey = np.full((800, 16, 16, 3), 128, np.uint8)
    scores = Measure(*hold_out(open_source((grey, images[1]))), plain(SIZE))(Bare())
    assert all(np.isfinite(value) for value in scores.values())
    assert scores["crops_top1"] == scores["crops_pixels"] == 0 and scores["knn_pixels"] == scores["knn_pca"] == 0.25


def test_large_images_are_compared_at_32_pixels(images):
    large = np.repeat(np.repeat(images[0][:40], 6, axis=1), 6, axis=2)
    small = Measure(open_source(images[0][:40]), None, None, plain(SIZE))(Bare())["crops_pixels"]
    measure = Measure(open_source(large), None, None, plain((96, 96)))
    asked = []
    measure.scores[0].embedded, ask = lambda *told: asked.append(told) or ask(*told), measure.scores[0].embedded
    assert measure(Bare(size=(96, 96)))["crops_pixels"] == pytest.approx(small, abs=0.1)
    assert [view.size for _, view in asked] == [(96, 96), (32, 32)]


@pytest.mark.parametrize(("kind", "state"), [(SimCLR, BELOW), (VAE, BELOW), (MAE, "learning")])
def test_the_run_is_judged_by_what_was_measured_and_by_what_fits_the_method(images, kind, state):
    encoder = Encoder("resnet18_small", {"channels": [8, 8, 8, 16]}, SIZE)
    vit = Encoder("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}, SIZE)
    learner = MAE(vit, decoder_width=16, decoder_heads=1) if kind is MAE else kind(encoder)
    measure = Measure(*hold_out(open_source(images)), plain(SIZE))
    judge = judge_of(learner, measure, SimpleNamespace(entries={"chance_loss": 5.0}))
    start = {"step": 0, "epoch": 0, "effective_rank": 4.0, "knn_top1": 0.3, "crops_top1": 0.05}
    start |= {"knn_pixels": 0.9, "crops_pixels": 0.1}
    now = {"step": 200, "epoch": 4.0, "effective_rank": 9.0, "knn_top1": 0.65, "crops_top1": 0.2}
    told = judge([start, {"step": 200, "loss": 2.0}, now])
    assert told.state == state and f"of {learner.encoder.dim}, loss 2.000 against 5.000 at chance" in told.reason
    level = now | {"effective_rank": 4.5, "knn_top1": 0.3, "crops_top1": 0.05}
    assert judge([start, {"step": 200, "loss": 4.9}, level]).state == "stuck"
    learner.chance_margin = 0.01  # of a method's own
    assert judge([start, {"step": 200, "loss": 4.9}, level]).state == "unknown"
    assert measure.held_out == 40 and judge([start, {"step": 200, "loss": 2.0}, now | {"knn_top1": 0.58}]).state == (
        "unknown" if kind is not MAE else "learning"  # 0.58 of 40 is not surely above 0.3
    )


def folder_of(root, images, labels=None):
    for row, image in enumerate(images):
        place = root / (labels[row] if labels is not None else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{row:03d}.png")
    return root


def scored(folder, answers):
    """The scores of this many processes, two files being broken."""
    with joined():
        source = open_source(folder, in_memory=False, max_bad=0.5)
        scores = Measure(*hold_out(source), plain(SIZE))(Bare())
        (answers / f"{rank()}.json").write_text(json.dumps(scores))


@pytest.mark.parametrize("with_labels", [True, False])
def test_several_processes_give_the_scores_of_one_also_with_broken_files(images, tmp_path, with_labels):
    root = folder_of(tmp_path / "images", images[0][:560], images[1] if with_labels else None)
    for name in sorted(root.rglob("*.png"))[3:300:200]:
        name.write_bytes(name.read_bytes()[:90])
    found = []
    for count in (1, 2):
        answers = tmp_path / str(count)
        answers.mkdir()
        assert ranks.ended(ranks.start(count, answers, scored, str(root), answers)) == [0] * count
        found += [json.loads((answers / f"{number}.json").read_text()) for number in range(count)]
    assert found[0] == found[1] == found[2]
    assert ("knn_pca" in found[0]) == with_labels and "crops_pixels" in found[0]
