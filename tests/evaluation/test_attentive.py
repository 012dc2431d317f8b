"""The attentive probe finds what a mean hides, is the linear probe of the mean without attention, and repeats."""

import numpy as np
import pytest
import torch
from pretended import accelerator

from ssl_kit.core.errors import UserError
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.encoders import Encoder
from ssl_kit.evaluation.attentive import AttentivePooling, Tokens, attentive_probe
from ssl_kit.evaluation.linear import linear_probe

pretended = pytest.fixture(accelerator)
WIDTH, TOKENS, CLASSES = 16, 9, 4


def embeddings(vectors, labels):
    names = [f"{row}" for row in range(len(labels))]
    return Embeddings(vectors.astype(np.float32), labels, tuple("abcd"), names)


def hidden(count, seed):
    """One of nine tokens carries the class, marked by a direction of its own; the rest is loud noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    tokens = generator.standard_normal((count, TOKENS, WIDTH))
    tokens[:, :, 0] = 0
    where = generator.integers(0, TOKENS, count)
    signs = (
        2.0 * generator.integers(0, 2, (count, 1, 1)) - 1
    )  # of the others' class directions: their mean says nothing
    tokens[:, :, 1 : 1 + CLASSES] = signs * np.abs(tokens[:, :, 1 : 1 + CLASSES])
    tokens[np.arange(count), where] = 0
    tokens[np.arange(count), where, 0] = 6
    tokens[np.arange(count), where, 1 + labels] = 3
    return embeddings(tokens.reshape(count, -1), labels)


def test_it_finds_the_token_that_tells():
    train, test = hidden(2_000, 0), hidden(400, 1)
    result = attentive_probe(train, test, width=WIDTH, lr=[1e-3, 3e-2], queries=4)
    assert result.metrics["top1"] > 0.9 and result.settings["lr"] == 3e-2
    means = [embeddings(part.vectors.reshape(-1, TOKENS, WIDTH).mean(1), part.labels) for part in (train, test)]
    assert linear_probe(*means).metrics["top1"] < result.metrics["top1"] - 0.1


@pytest.mark.parametrize("room", [0, 2**40])
def test_tokens_go_to_an_accelerator_once_or_batch_by_batch(room, monkeypatch, pretended):
    train, test = hidden(400, 0), hidden(100, 1)
    here = attentive_probe(train, test, width=WIDTH, lr=1e-3, epochs=2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (room, 2**40))
    there = attentive_probe(train, test, width=WIDTH, lr=1e-3, epochs=2, device="cuda")
    times = pretended.sent[torch.float32] // (400 * TOKENS * WIDTH)
    assert times == (2 if room == 0 else 1 + 2)  # of the pretence: batches of what is there already are counted, too
    assert np.array_equal(here.predictions, there.predictions)


def test_labels_of_noise_give_chance():
    generator = np.random.default_rng(0)
    parts = [
        embeddings(generator.standard_normal((800, TOKENS * WIDTH)), generator.integers(0, 4, 800)) for _ in range(2)
    ]
    top1 = attentive_probe(*parts, width=WIDTH, epochs=3).metrics["top1"]
    assert abs(top1 - 0.25) < 3 * (0.25 * 0.75 / 800) ** 0.5


def test_the_choice_never_sees_the_test_labels():
    train, test = hidden(400, 0), hidden(100, 1)
    shuffled = embeddings(test.vectors, np.roll(test.labels, 1))
    one, other = (attentive_probe(train, part, width=WIDTH, epochs=2) for part in (test, shuffled))
    assert one.settings == other.settings and np.array_equal(one.predictions, other.predictions)


def test_queries_of_zeros_pool_the_mean():
    pooling = AttentivePooling(WIDTH, CLASSES, 4)
    torch.nn.init.zeros_(pooling.queries)
    tokens = torch.randn(3, TOKENS, WIDTH)
    assert torch.allclose(pooling.attention(tokens), torch.full((3, 4, TOKENS), 1 / TOKENS))
    shuffled = tokens[:, torch.randperm(TOKENS)]
    torch.nn.init.normal_(pooling.classifier.weight)
    assert torch.allclose(pooling(tokens), pooling(shuffled), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args", "tokens"),
    [
        ("resnet18_small", {"channels": [8, 8, 16, 16]}, 4),
        ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}, 17),
    ],
)
def test_tokens_are_the_last_layer(name, args, tokens):
    encoder = Encoder(name, args, (16, 16)).eval()
    module = Tokens(encoder)
    images = torch.rand(2, 3, 16, 16)
    made = module(images)
    assert made.shape == (2, module.dim) and module.dim == tokens * module.width
    if name.startswith("resnet"):
        assert torch.allclose(made.view(2, tokens, -1).mean(1), encoder(images), atol=1e-5)
    else:
        assert torch.allclose(made.view(2, tokens, -1)[:, 0], encoder(images), atol=1e-5)


def test_what_does_not_fit_is_said():
    part = hidden(40, 0)
    with pytest.raises(UserError, match="no whole tokens of width 10"):
        attentive_probe(part, part, width=10)
    with pytest.raises(UserError, match="3 queries do not divide tokens of width 16"):
        attentive_probe(part, part, width=WIDTH, queries=3)
