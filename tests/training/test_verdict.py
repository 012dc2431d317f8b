"""The verdict in words on made-up curves; sketches of weights keep lengths and angles."""

import math

import pytest
import torch

from ssl_kit.training.verdict import angle, sketch, verdict

CHANCE = math.log(511)
START = {"step": 0, "effective_rank": 12.0, "embedding_std": 0.03, "knn_top1": 0.2, "images_std": 0.25, "turned": 0.0}
LOGGED = {"step": 200, "loss": 3.0, "views_low": 0.0, "views_high": 1.0, "views_std": 0.24}
NOW = {"step": 200, "effective_rank": 40.0, "embedding_std": 0.06, "knn_top1": 0.3, "images_std": 0.25, "turned": 0.5}


def judged(logged=None, now=None, start=None, **options):
    rows = [{**START, **(start or {})}, {**LOGGED, **(logged or {})}, {**NOW, **(now or {})}]
    return verdict(rows, **{"dim": 128, "chance_loss": CHANCE, "contrastive": True} | options)


def test_a_healthy_run_is_learning():
    told = judged()
    assert told.state == "learning"
    assert (
        told.reason
        == "effective rank 40.0 of 128, loss 3.000 against 6.236 at chance, kNN 0.300 against 0.200 at the start"
    )


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({"logged": {"loss": 6.2}}, "stuck", "where a model that sees nothing sits (6.236)"),
        ({"now": {"effective_rank": 1.2}}, "collapsed", "the features span 1.2 of 128 dimensions"),
        ({"now": {"embedding_std": 1e-4}}, "collapsed", "nearly the same features"),
        ({"now": {"turned": 1e-9}}, "stuck", "weights are where they were"),
        ({"now": {"grown": 60.0}}, "stuck", "have grown 60-fold"),
        ({"now": {"effective_rank": 2.9}}, "collapsed", "the features span 2.9 of 128 dimensions, 12.0 at the start"),
        ({"now": {"effective_rank": 9.0}}, "collapsed", "9.0 of 128 dimensions, fewer than the 12.0 at the start"),
        ({"now": {"knn_top1": 0.15}}, "stuck", "kNN, 0.150, is below that at the start (0.200)"),
        (
            {"now": {"effective_rank": 11.0, "knn_top1": 0.21}},
            "stuck",
            "neither directions (11.0, 12.0 at the start) nor kNN",
        ),
        ({"logged": {"views_high": 255.0}}, "stuck", "the views hold values from 0 to 255; wanted [0, 1]"),
        ({"logged": {"views_low": -2.1}}, "stuck", "the views hold values from -2.1 to 1"),
        ({"logged": {"views_std": 0.001}}, "stuck", "contrast is 0.001, that of the images 0.25"),
        ({"logged": {"active_units": 0.0}}, "collapsed", "no number of the code depends on the image"),
        ({"logged": {"explained_variance": 0.001}}, "stuck", "explains 0.1% of the images' variance"),
    ],
)
def test_what_is_wrong_is_named(change, state, words):
    told = judged(**change)
    assert told.state == state and words in told.reason


@pytest.mark.parametrize(
    "now", [{"effective_rank": 11.0}, {"knn_top1": 0.21}, {"effective_rank": 13.0, "knn_top1": 0.19}]
)
def test_one_gain_of_the_two_is_enough(now):
    assert judged(now=now).state == "learning"


def test_how_much_of_knn_is_chance_depends_on_the_images_held_out():
    # two standard errors at 0.2 are 0.018 of 2,000 images and 0.056 of 200
    assert judged(now={"knn_top1": 0.175}, held_out=2_000).state == "stuck"
    assert judged(now={"knn_top1": 0.175}, held_out=200).state == "learning"
    assert judged(now={"knn_top1": 0.14}, held_out=200).state == "stuck"


def test_a_method_that_compares_nothing_may_lose_directions_but_not_nearly_all():
    assert judged(now={"effective_rank": 5.0, "knn_top1": 0.15}, contrastive=False).state == "learning"
    assert judged(now={"effective_rank": 2.9}, contrastive=False).state == "collapsed"
    assert judged(now={"effective_rank": 2.9, "step": 20}, contrastive=False).state == "unknown"


def test_the_first_steps_tell_only_what_is_certain():
    early = judged(logged={"loss": 6.2}, now={"step": 99})
    assert early.state == "unknown" and early.reason.startswith("99 steps are too few to tell; so far the loss, 6.200")
    assert judged(logged={"loss": 6.2}, now={"step": 100}).state == "stuck"
    assert judged(now={"step": 6, "effective_rank": 1.2}).state == "collapsed"
    assert judged(now={"step": 6}, logged={"views_high": 255.0}).state == "stuck"
    assert judged(now={"step": 6}).state == "learning"


def test_what_is_not_known_is_not_held_against_a_run():
    assert judged(now={"knn_top1": 0.1}, contrastive=False).state == "learning"
    assert judged(now={"effective_rank": 9.0}, contrastive=False).state == "learning"
    assert judged(now={"knn_top1": 0.19}).state == "learning"  # less than the noise
    assert judged(logged={"loss": 100.0}, chance_loss=None).state == "learning"
    assert verdict([LOGGED, {"step": 200, "effective_rank": 40.0}], dim=128).state == "learning"
    assert verdict([START], dim=128).state == verdict([LOGGED], dim=128).state == "unknown"


def test_a_chance_level_below_zero_is_one_too():
    """Densities may exceed 1: the VAE's losses in nats can be negative."""
    assert judged(logged={"loss": -1.0}, chance_loss=-1.0).state == "stuck"
    assert judged(logged={"loss": -1.2}, chance_loss=-1.0).state == "learning"


def test_an_encoder_that_began_with_few_directions_has_not_collapsed():
    few = {"effective_rank": 2.0}
    assert judged(start=few, now=few).state == "learning"
    assert judged(now=few).state == "collapsed"


def test_the_newest_rows_decide():
    bad = {**NOW, "effective_rank": 1.0}
    assert verdict([START, LOGGED, bad, LOGGED, NOW], dim=128).state == "learning"
    assert verdict([START, LOGGED, NOW, LOGGED, bad], dim=128).state == "collapsed"
    last = {"step": 210, "loss": 3.0}  # written when training ends: without a batch there is no range
    assert judged(logged={"views_high": 255.0}).state == "stuck"
    assert verdict([START, {**LOGGED, "views_high": 255.0}, last, NOW], dim=128).state == "stuck"


def test_sketches_keep_lengths_and_angles():
    generator = torch.Generator().manual_seed(0)
    first, second = ([torch.randn(300, 100, generator=generator), torch.randn(7)] for _ in range(2))
    one, other = sketch(first), sketch(second)
    assert one.norm().item() == pytest.approx(first[0].norm().item(), rel=0.1)
    assert angle(one, other) == pytest.approx(math.pi / 2, abs=0.1)
    mixed = sketch([math.cos(0.3) * first[0] + math.sin(0.3) * second[0]])
    assert angle(one, mixed) == pytest.approx(0.3, rel=0.15)


def test_the_smallest_turn_is_seen_and_shrinking_is_none():
    weight = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = weight.clone()
    turned[0, 0] += 1e-9
    assert angle(sketch([weight]), sketch([weight])) == 0
    assert 1e-13 < angle(sketch([weight]), sketch([turned])) < 1e-9
    assert angle(sketch([weight]), sketch([0.5 * weight])) < 1e-12
