"""k-means of whitened patches: the formula in a loop, what it tells apart, and its place in a table."""

import numpy as np
import pytest
import torch

from ssl_kit.data.opening import open_source
from ssl_kit.evaluation import patches
from ssl_kit.evaluation.neighbours import knn_accuracy
from ssl_kit.evaluation.patches import Patches
from ssl_kit.verbs.evaluate import evaluate


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(patches, "_CENTRES", 24)
    monkeypatch.setattr(patches, "_EACH", 20)


def textures(count, seed):
    """Stripes of two directions at random places and colours, (count, 32, 32, 3), and which is which."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    wave = np.sin((np.arange(32)[None] + rng.uniform(0, 6, (count, 1))) * 1.5) * 60
    images = np.where(labels[:, None, None] == 0, wave[:, :, None] + np.zeros((1, 1, 32)), wave[:, None, :])
    images = images[..., None] + rng.uniform(80, 170, (count, 1, 1, 3)) + rng.normal(0, 8, (count, 32, 32, 3))
    return images.clip(0, 255).astype(np.uint8), labels


def test_features_are_the_formula_in_a_loop():
    images, _ = textures(30, 0)
    made = Patches.of(open_source(images))
    shown = torch.from_numpy(images[:2]).permute(0, 3, 1, 2) / 255
    mean, whiten, centres = (values.double().numpy() for values in (made.mean, made.whiten, made.centres))
    wanted = np.zeros((2, len(centres), 2, 2))
    for row, image in enumerate(shown.double().numpy()):
        for y in range(0, 27, 2):
            for x in range(0, 27, 2):
                patch = image[:, y : y + 6, x : x + 6].ravel()
                patch = (patch - patch.mean()) / np.sqrt(patch.var() + 10 / 255**2)
                distances = np.linalg.norm((patch - mean) @ whiten - centres, axis=1)
                wanted[row, :, y // 2 // 7, x // 2 // 7] += np.maximum(0, distances.mean() - distances) / 49
    np.testing.assert_allclose(made(shown).numpy(), wanted.reshape(2, -1), rtol=2e-4, atol=2e-5)
    assert made.dim == 96 and made(shown).shape == (2, 96)


def test_whitened_patches_have_no_correlations_left_and_centres_are_of_clusters():
    images, _ = textures(60, 0)
    made = Patches.of(open_source(images))
    again = Patches.of(open_source(images))
    assert torch.equal(made.centres, again.centres)
    shown = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    rows = (patches._normalised(shown).flatten(0, 1) - made.mean) @ made.whiten
    variances = torch.linalg.eigvalsh(rows.T.double().cov())
    assert variances.max() < 1.2
    nearest = torch.cdist(rows, made.centres).argmin(dim=1)
    spread = (rows - made.centres[nearest]).square().sum() / (rows - rows.mean(dim=0)).square().sum()
    assert spread < 0.95 and len(nearest.unique()) > 12


def test_directions_at_random_places_are_told_apart():
    (seen, labels), (asked, wanted) = textures(120, 0), textures(60, 1)
    made = Patches.of(open_source(seen))
    train, test = (made(torch.from_numpy(one).permute(0, 3, 1, 2) / 255).numpy() for one in (seen, asked))
    assert knn_accuracy(train, labels, test, wanted, k=5) > 0.95


def test_patches_stand_in_the_table_where_they_are_asked_for(images, encoder, tmp_path, capsys):
    record = evaluate(str(encoder), str(images), out=str(tmp_path), only="knn", baselines="pixels,patches")
    assert {one["features"] for one in record["results"]} == {"encoder", "pixels", "patches"}
    assert "patches" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "patches" in page
