"""LoRA: the function of the paper, only adapters and classifier learn, and merging changes no output."""

import sys

import pytest
import timm
import torch

from ssl_kit.core.errors import UserError
from ssl_kit.encoders import Encoder
from ssl_kit.evaluation.finetune import FineTune, add_lora, merge_lora
from ssl_kit.training.optim import Optim

RANK = 2
VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return Encoder("vit_tiny_patch16_224", VIT, (16, 16)).eval()


def images(count=6):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def taught(encoder):
    """Three steps of AdamW with adapters on."""
    learner = FineTune(encoder, 4, Optim(), lora=RANK).train()
    optimiser, _ = Optim(name="adamw", lr=0.05, lr_per=None, layer_decay=0.5).build(
        learner, images_per_step=6, steps_per_epoch=3, total_steps=3
    )
    for _ in range(3):
        optimiser.zero_grad()
        learner.training_step({"views": [images()], "label": torch.arange(6) % 4}, 0).backward()
        optimiser.step()
    encoder.eval()


def test_an_adapted_layer_is_w_plus_b_a(vit):
    pytest.importorskip("peft")
    vit.set_code(4)
    layer = vit.model.blocks[1].attn.qkv
    weight, bias, x = layer.weight.detach().clone(), layer.bias.detach().clone(), torch.rand(5, 24)
    before = vit(images())
    add_lora(vit, RANK)
    assert torch.equal(vit(images()), before)  # B is zero
    adapted = vit.model.blocks[1].attn.qkv
    a, b = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    assert a.shape == (RANK, 24) and b.shape == (72, RANK)
    torch.nn.init.normal_(b)
    assert torch.allclose(adapted(x), x @ (weight + b @ a).T + bias, atol=1e-5)


def test_only_adapters_and_classifier_learn(vit):
    pytest.importorskip("peft")
    before = {name: value.clone() for name, value in vit.model.state_dict().items()}
    taught(vit)
    merge_lora(vit)
    after = vit.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    adapted = {f"blocks.{block}.attn.{part}.weight" for block in range(2) for part in ("qkv", "proj")}
    assert changed == adapted and set(after) - set(before) == {"head.weight", "head.bias"}
    assert after["head.bias"].abs().min() > 0  # began at zero
    for name in adapted:
        assert torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4) == RANK


def test_the_merged_folder_gives_the_logits_of_the_adapted_model(vit, tmp_path):
    pytest.importorskip("peft")
    names = [name for name, _ in vit.model.named_parameters()]
    taught(vit)
    adapted = vit(images()).detach()
    for name, parameter in vit.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith("head."))
    merge_lora(vit)
    assert [name for name, _ in vit.model.named_parameters()] == [*names, "head.weight", "head.bias"]
    assert all(parameter.requires_grad for parameter in vit.parameters())
    vit.save(tmp_path / "merged")
    loaded = Encoder.load(tmp_path / "merged")
    assert (loaded(images()) - adapted).abs().max() <= 1e-5
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    assert (by_timm(loaded.normalise(images())) - adapted).abs().max() <= 1e-5


def test_what_has_no_attention_or_no_peft_is_told(vit, monkeypatch):
    with pytest.raises(UserError, match=r"--lora adapts .* resnet18_small has none: leave --lora out"):
        FineTune(Encoder("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16)), 4, Optim(), lora=RANK)
    with pytest.raises(UserError, match="beit_base_patch16_224 has none"):
        add_lora(Encoder("beit_base_patch16_224", VIT, (16, 16)), RANK)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora needs the package peft: pip install 'ssl-kit\[lora\]'"):
        add_lora(vit, RANK)
