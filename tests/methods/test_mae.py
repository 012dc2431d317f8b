"""MAE against the authors' way of computing it, closed forms, and what masking promises."""

import math

import pytest
import torch

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.encoders.vit import patchify, sincos_positions, take, tokens, unpatchify
from ssl_kit.methods.mae import MAE, random_masking, reconstruction_loss, used_numbers

SIZE, BATCH = (16, 24), 6
SMALL = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
MEAN = {"class_token": False, "global_pool": "avg", "fc_norm": False}
DECODER = {"decoder_depth": 2, "decoder_width": 16, "decoder_heads": 2}


def build(args=SMALL, channels=3, size=SIZE, seed=0, **settings):
    torch.manual_seed(seed)
    encoder = Encoder("vit_tiny_patch16_224", args, size, channels, (0.4,), (0.2,))
    return MAE(encoder, **DECODER, **settings)


def stir(method):
    """Weights far from their start, so that nothing is hidden by zeros."""
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return method.eval()


def pictures(count=BATCH, channels=3, size=SIZE, seed=1):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


def key(count=BATCH, first=0, epoch=0):
    return Key(0, epoch, torch.arange(first, first + count))


def published(method, images, masking):
    """The authors' `forward`, literally: unshuffle, predict every patch, average the masked ones' errors.

    github.com/facebookresearch/mae, models_mae.py, with this method's weights.
    """
    decoder = method.decoder
    seen = decoder.embed(tokens(method.encoder, images, masking.keep))
    special = method.encoder.model.num_prefix_tokens
    missing = decoder.mask_token.repeat(len(images), masking.order.shape[1] - masking.num_kept, 1)
    x = torch.cat([seen[:, special:], missing], dim=1)
    x = torch.gather(x, 1, masking.restore[:, :, None].repeat(1, 1, x.shape[2]))
    x = torch.cat([seen[:, :special], x], dim=1)
    zero = torch.zeros(special, x.shape[2])
    x = x + torch.cat([zero, sincos_positions(x.shape[2], method.grid)])
    predicted = decoder.predict(decoder.norm(decoder.blocks(x)))[:, special:]
    target = patchify(images, method.patch_size)
    if method.norm_pix_loss:
        mean = target.mean(dim=-1, keepdim=True)
        var = target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((predicted - target) ** 2).mean(dim=-1)
    return predicted, (loss * masking.mask).sum() / masking.mask.sum()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("args", [SMALL, {**SMALL, **MEAN}], ids=["class token", "mean"])
def test_equals_the_authors_way_in_value_and_gradient(args, norm_pix_loss):
    method, images = stir(build(args, norm_pix_loss=norm_pix_loss)), pictures()
    masking = random_masking(key(), method.num_patches, 0.75)
    predicted, wanted = published(method, images, masking)
    torch.testing.assert_close(method.predict(images, masking), take(predicted, masking.removed), atol=1e-5, rtol=1e-5)
    loss = method.loss([images], key())["loss"]
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=1e-6)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(wanted, trained), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (256, 0.75, 64), (49, 0.75, 12)]
)
def test_masks_keep_as_many_as_published(patches, ratio, kept):
    masking = random_masking(key(), patches, ratio)
    assert masking.num_kept == kept and masking.keep.shape == (BATCH, kept)
    assert (masking.mask.sum(dim=1) == patches - kept).all()
    assert torch.equal(masking.order.gather(1, masking.restore), torch.arange(patches).expand(BATCH, -1))
    assert (masking.mask.gather(1, masking.keep) == 0).all() and (masking.mask.gather(1, masking.removed) == 1).all()


def test_masks_are_uniform_and_belong_to_the_image_not_to_the_batch():
    masking = random_masking(key(4_000), 16, 0.75)
    often = masking.mask.float().mean(dim=0)
    assert (often - 0.75).abs().max() < 5 * math.sqrt(0.75 * 0.25 / 4_000)
    part = random_masking(key(10, first=100), 16, 0.75)
    assert torch.equal(part.order, masking.order[100:110])
    assert not torch.equal(random_masking(key(10, first=100, epoch=1), 16, 0.75).order, part.order)


def test_two_processes_equal_one_on_the_joined_batch():
    method, images = stir(build(dims=(2, 8))), pictures()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    whole = torch.autograd.grad(method.loss([images], key())["loss"], trained)
    parts = [
        torch.autograd.grad(method.loss([images[rows]], Key(0, 0, torch.arange(BATCH)[rows]))["loss"], trained)
        for rows in (slice(0, 3), slice(3, 6))
    ]
    scale = max(gradient.abs().max() for gradient in whole)
    for one, first, second in zip(whole, *parts, strict=True):
        assert (one - (first + second) / 2).abs().max() <= 1e-5 * scale


def test_removed_pixels_are_targets_and_nothing_else():
    method, images = stir(build()), pictures()
    masking = random_masking(key(), method.num_patches, 0.75)
    noise = patchify(pictures(seed=2), method.patch_size)
    mask = masking.mask[:, :, None]
    swap = lambda where: unpatchify(torch.where(where, noise, patchify(images, (4, 4))), (4, 4), method.grid)
    hidden, visible = swap(mask == 1), swap(mask == 0)
    assert torch.equal(method.predict(hidden, masking), method.predict(images, masking))
    assert not torch.equal(method.predict(visible, masking), method.predict(images, masking))
    # visible patches are no targets: with the prediction held, the loss has no gradient there
    pixels = images.clone().requires_grad_()
    patches = take(patchify(pixels, method.patch_size), masking.removed)
    reconstruction_loss(method.predict(images, masking).detach(), patches, True).backward()
    gradient = patchify(pixels.grad, method.patch_size)
    assert (gradient[masking.mask == 0] == 0).all() and (gradient[masking.mask == 1] != 0).any(dim=-1).all()


@pytest.mark.parametrize(("values", "chance"), [(48, 0.979167), (192, 0.994792), (768, 0.998698)])
def test_predicting_nothing_sits_at_chance(values, chance):
    patches = torch.rand(4, 5, values, dtype=torch.float64)
    loss = reconstruction_loss(torch.zeros(4, 5, values), patches, norm_pix_loss=True)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(chance, abs=2e-5)
    assert loss.item() == pytest.approx((values - 1) / values, rel=2e-5)
    assert reconstruction_loss(torch.zeros(4, 5, values), patches, False).item() == pytest.approx(
        patches.square().mean().item(), rel=1e-6
    )


def test_an_almost_flat_patch_is_divided_by_its_variance_plus_1e_6():
    patches = 0.5 + 1e-3 * math.sqrt(47 / 48) * torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(24)
    loss = reconstruction_loss(torch.zeros(1, 1, 48), patches[None, None], norm_pix_loss=True)  # variance 1e-6
    assert loss.item() == pytest.approx(47 / 48 / 2, rel=1e-9)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_gradcheck(norm_pix_loss):
    generator = torch.Generator().manual_seed(0)
    predicted, patches = torch.rand(2, 2, 3, 12, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *both: reconstruction_loss(*both, norm_pix_loss), (predicted, patches))


def test_chance_is_stated_where_it_is_known():
    assert build().chance_loss(8) == 47 / 48 and build(channels=1).chance_loss(8) == 15 / 16
    assert build(norm_pix_loss=False).chance_loss(8) is None


def test_flat_patches_and_low_precision_stay_finite():
    method = build()
    images = torch.full((BATCH, 3, *SIZE), 0.5)
    loss = method.loss([images], key())["loss"]
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.requires_grad)
    target = torch.rand(2, 3, 12)
    low = reconstruction_loss(torch.zeros(2, 3, 12, dtype=torch.bfloat16), target.bfloat16(), True)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(11 / 12, abs=1e-3)


def test_positions_are_fixed_and_a_loaded_encoder_keeps_its_weights(tmp_path):
    method = build()
    positions = method.encoder.model.pos_embed
    assert not positions.requires_grad and torch.equal(positions[0, 1:], sincos_positions(24, (4, 6)))
    assert (positions[0, 0] == 0).all()
    stir(method).encoder.save(tmp_path / "encoder")
    with torch.no_grad():
        positions.add_(1)
    method.encoder.save(tmp_path / "encoder")
    loaded = Encoder.load(tmp_path / "encoder")
    again = MAE(loaded, **DECODER)
    assert not again.encoder.model.pos_embed.requires_grad
    for name, weight in method.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], weight), name


def test_starts_as_the_authors_code_does():
    method = build({**SMALL, "embed_dim": 96})
    model = method.encoder.model
    for weight in (model.blocks[0].attn.qkv.weight, model.patch_embed.proj.weight.flatten(1)):
        bound = math.sqrt(6 / sum(weight.shape))  # Glorot, uniform
        assert bound * 0.98 < weight.abs().max() <= bound
    assert method.decoder.mask_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.5)
    assert (model.blocks[0].mlp.fc1.bias == 0).all() and (method.decoder.predict.bias == 0).all()


@pytest.mark.parametrize("args", [SMALL, {**SMALL, **MEAN}], ids=["class token", "mean"])
def test_embeds_whole_images_by_timms_pooling(args):
    method, images = stir(build(args)), pictures()
    whole = tokens(method.encoder, images)
    assert torch.equal(method.embed(images), whole[:, 0] if args is SMALL else whole.mean(dim=1))


def test_grey_images_that_are_not_square():
    method = build({**SMALL, **MEAN}, channels=1, size=(8, 32))
    loss = method.loss([pictures(4, 1, (8, 32))], key(4))["loss"]
    loss.backward()
    assert torch.isfinite(loss) and method.grid == (2, 8) and method.values == 16


def test_nested_dropout_draws_every_length_from_the_key():
    dims = (2, 5, 8)
    used = used_numbers(key(6_000), torch.tensor(dims), 8)
    lengths = used.sum(dim=1)
    assert torch.equal(used, torch.arange(8) < lengths[:, None])  # prefixes, nothing else
    shares = torch.tensor([(lengths == dim).float().mean() for dim in dims])
    assert (shares - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 6_000) and sum(shares) == pytest.approx(1)
    assert torch.equal(used_numbers(key(7, first=50), torch.tensor(dims), 8), used[50:57])


@pytest.mark.parametrize("args", [SMALL, {**SMALL, **MEAN}], ids=["class token", "mean"])
def test_a_code_is_the_encoders_classifier_and_reaches_the_decoder_by_its_prefix(args):
    method, images = stir(build(args, dims=(2, 8))), pictures()
    assert method.embed(images).shape == (BATCH, 8) and method.encoder.dim == 8
    masking = random_masking(key(), method.num_patches, 0.75)
    two = used_numbers(key(), torch.tensor([2]), 8)
    wanted, cut = method.predict(images, masking), method.predict(images, masking, two)
    assert not torch.equal(cut, wanted)
    head = method.encoder.model.head
    with torch.no_grad():
        head.weight[2:] += 1
    assert torch.equal(method.predict(images, masking, two), cut)  # numbers behind the prefix are not seen
    assert not torch.equal(method.predict(images, masking), wanted)
    method.train()
    method.loss([images], key())["loss"].backward()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)
    assert (head.weight.grad != 0).all()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_picture_pastes_predictions_only_where_patches_were_removed(norm_pix_loss):
    method, images = stir(build(norm_pix_loss=norm_pix_loss)), pictures()
    picture = method.pictures([images], key())["reconstruction"]
    assert picture.grid.shape == (BATCH, 3, 3, *SIZE) and len(picture.columns) == 3
    original, seen, filled = (patchify(picture.grid[:, column], method.patch_size) for column in range(3))
    masking = random_masking(key(), method.num_patches, 0.75)
    patches = patchify(images, method.patch_size)
    assert torch.equal(original, patches)
    assert torch.equal(seen[masking.mask == 0], patches[masking.mask == 0])
    assert torch.equal(filled[masking.mask == 0], patches[masking.mask == 0])
    assert (seen[masking.mask == 1] == 0.5).all()
    predicted = published(method, images, masking)[0]
    if norm_pix_loss:
        predicted = predicted * (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt() + patches.mean(dim=-1, keepdim=True)
    wanted = predicted.clamp(0, 1)[masking.mask == 1]
    torch.testing.assert_close(filled[masking.mask == 1], wanted, atol=1e-5, rtol=1e-5)
    assert ("taken from the original" in picture.caption) == norm_pix_loss


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        (SMALL, {"mask_ratio": 0.99}, "of 24 patches keeps 0; wanted at least one"),
        (SMALL, {"mask_ratio": 0.0}, "mask_ratio 0"),
        (SMALL, {"dims": ()}, "at least 1"),
        (SMALL, {"dims": (0, 4)}, "at least 1"),
        ({**SMALL, "class_token": False, "global_pool": "avg"}, {}, "fc_norm: false"),
        ({**SMALL, "num_classes": 5}, {}, "leave num_classes out"),
        ({**SMALL, "pos_embed": "none"}, {}, "no position embedding"),
    ],
)
def test_settings_that_train_nothing_are_refused(args, settings, message):
    with pytest.raises(UserError, match=message):
        build(args, **settings)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_encoders_that_turn_their_tokens_are_trained(name):
    """Rotary positions, without learned ones or beside them: every weight gets a gradient, and features come out."""
    torch.manual_seed(0)
    method = MAE(Encoder(name, SMALL, SIZE), **DECODER)
    method.loss([pictures()], key())["loss"].backward()
    without = {name for name, one in method.named_parameters() if one.requires_grad and one.grad is None}
    assert not without
    assert method.encoder(pictures()).shape == (BATCH, 24)
    positions = method.encoder.model.pos_embed
    assert positions is None or not positions.requires_grad


def test_a_rotary_encoder_with_a_norm_after_its_tokens_is_refused():
    with pytest.raises(UserError, match="add use_fc_norm: false"):
        MAE(Encoder("eva02_tiny_patch14_224", SMALL, SIZE))


def test_a_decoder_whose_heads_do_not_fit_is_refused():
    with pytest.raises(UserError, match="decoder_width 16 is not a multiple of decoder_heads 3"):
        MAE(Encoder("vit_tiny_patch16_224", SMALL, SIZE), decoder_width=16, decoder_heads=3)


@pytest.mark.parametrize(("size", "patch"), [((32, 32), 4), ((96, 96), 8), ((48, 96), 8), ((224, 224), 16)])
def test_the_default_encoder_fits_the_images(size, patch):
    name, args = MAE.default_encoder(size)
    method = MAE(Encoder(name, args, size))
    assert method.patch_size == (patch, patch)
    millions = sum(parameter.numel() for parameter in method.encoder.parameters()) / 1e6
    assert 2 < millions < 3 if max(size) < 224 else 21 < millions < 23
