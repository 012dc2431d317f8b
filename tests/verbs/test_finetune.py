"""Fine-tuning: the best epoch is kept, the classifier is a timm folder, shares of labels follow the seed."""

import json
import shutil
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import ssl_kit
from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.core.locking import lock
from ssl_kit.data.opening import open_labelled, open_source
from ssl_kit.encoders import Encoder
from ssl_kit.evaluation.finetune import BestEpoch, FineTune
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO, newest
from ssl_kit.training.optim import Optim
from ssl_kit.verbs.finetune import _share, finetune

SMALL = "resnet18_small"
NET = {"channels": [8, 8, 16, 16]}
QUICK = {"epochs": 8, "batch_size": 16, "lr": 0.1, "warmup_epochs": 0.5, "threads": 1}
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200), "grey": (110, 110, 110)}


@pytest.fixture(scope="module", autouse=True)
def short_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssl_kit.verbs.finetune._FEWEST_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Class folders of 40 noisy 16-px images of one colour each."""
    folder, generator = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(40):
            image = np.clip(generator.normal(colour, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def tuned(coloured, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    Encoder("resnet18_small", NET, (16, 16)).save(folder / "encoder")
    record = finetune(
        str(folder / "encoder"), str(coloured), out=str(folder / "out"), **QUICK | {"epochs": 2 * QUICK["epochs"]}
    )
    return folder, record


def test_it_learns_and_stands_beside_the_network_from_scratch(tuned):
    folder, record = tuned
    assert [one["features"] for one in record["results"]] == ["encoder", "random_init"]
    ours, scratch = (one["metrics"]["top1"] for one in record["results"])
    assert ours > 0.8 and scratch > 0.8  # four colours: chance is 0.25
    assert record["results"][0]["metrics"]["above_best_baseline"] == pytest.approx(ours - scratch)
    lines = [json.loads(line) for line in (folder / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["evaluation"] for line in lines] == ["finetune", "finetune"]
    assert (folder / "out" / "report.html").is_file()


def test_the_network_trained_on_the_labels_stands_beside_a_run_and_is_made_once(coloured, tmp_path, capsys):
    method = {"class_path": "ssl_kit.methods.simclr.SimCLR", "init_args": {"encoder": {"name": SMALL, "args": NET}}}
    how = {"method": method, "epochs": 10, "batch_size": 32, "image_size": 16, "threads": 1}
    run = ssl_kit.pretrain(str(coloured), run=str(tmp_path / "run"), **how)
    given = {"only": "knn", "baselines": "pixels,scratch"}
    rows = run.evaluate(str(coloured), **given)["results"]
    scores = {row["features"]: row["metrics"] for row in rows if row["settings"]["chosen"]}
    assert set(scores) == {"encoder", "pixels", "scratch"} and scores["scratch"]["top1"] > 0.6
    told = capsys.readouterr().out
    assert "scratch: the same network is trained on the labels, 26 epochs of 116 images" in told  # 152 x 10 x 2 / 116
    made, config = Encoder.load(tmp_path / "run" / "scratch"), Encoder.load(tmp_path / "run" / "encoder")
    assert made.dim == config.dim and made.args == config.args and made.sha256 != config.sha256
    assert "the same network trained on the labels" in (tmp_path / "run" / "report.html").read_text()
    run.evaluate(str(coloured), **given)
    assert "is trained on the labels" not in capsys.readouterr().out
    with lock(tmp_path / "run"), pytest.raises(UserError, match="in use"):  # before it is trained
        run.evaluate(str(coloured), seed=1, **given)
    assert "best of" not in capsys.readouterr().out
    with pytest.raises(UserError, match="is of no run"):
        ssl_kit.evaluate(str(shutil.copytree(tmp_path / "run" / "encoder", tmp_path / "alone")), str(coloured), **given)


def test_auroc_is_that_of_the_kept_classifier_on_test(tuned, coloured):
    folder, record = tuned
    encoder, test = Encoder.load(folder / "out" / "finetuned"), open_labelled(str(coloured))[1]
    images = torch.stack([torch.from_numpy(test.read([row])[0]).permute(2, 0, 1) / 255 for row in range(len(test))])
    with torch.inference_mode():
        probabilities = encoder(images).softmax(dim=1)
    wanted = roc_auc_score(test.labels(), probabilities, multi_class="ovr")
    metrics = record["results"][0]["metrics"]
    assert metrics["auroc"] == pytest.approx(wanted, abs=5e-3)  # embedded in bfloat16 where that is fast
    assert metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"]


def test_the_classifier_is_a_timm_folder_with_the_scores_of_its_best_epoch(tuned, labelled_folder):
    folder, record = tuned
    loaded = timm.create_model(f"local-dir:{folder / 'out' / 'finetuned'}", pretrained=True).eval()
    assert loaded.num_classes == 4
    scores = record["results"][0]["settings"]["held_out_top1"]
    assert len(scores) == 2 * QUICK["epochs"]
    encoder = Encoder.load(folder / "out" / "finetuned")
    images = torch.rand(2, 3, 16, 16)
    assert torch.allclose(encoder(images), loaded(encoder.normalise(images)), atol=1e-5)


def test_a_folder_that_another_process_fine_tunes_in_is_left_alone(tuned, coloured, tmp_path):
    """Refused at once, before the other's states are taken for old ones and removed."""
    begun = tmp_path / "out" / "finetuning" / "settings.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    with lock(tmp_path / "out"), pytest.raises(UserError, match="in use by another"):
        finetune(str(tuned[0] / "encoder"), str(coloured), out=str(tmp_path / "out"), **QUICK | {"epochs": 1})
    assert begun.read_text() == "{}" and [path.name for path in begun.parent.iterdir()] == ["settings.json"]


def test_a_share_keeps_every_class_and_follows_the_seed(labelled_folder):
    source = open_source(labelled_folder)
    tenth = _share(source, 0.1, 0)
    assert np.bincount(tenth.labels()).tolist() == [4, 4, 4, 4]
    assert tenth.ids() == _share(source, 0.1, 0).ids() and tenth.ids() != _share(source, 0.1, 1).ids()
    assert np.bincount(_share(source, 0.001, 0).labels()).tolist() == [2, 2, 2, 2]


class _Trainer:
    def __init__(self, step, max_steps=100):
        self.global_step, self.max_steps, self.should_stop = step, max_steps, False
        self.datamodule = type("Data", (), {"steps_per_epoch": 10})


def test_the_best_epoch_is_put_back_and_patience_stops(labelled_folder, monkeypatch):
    encoder = Encoder("resnet18_small", NET, (16, 16))
    learner = FineTune(encoder, 4, Optim(name="adamw", lr=1e-3))
    scores = iter([0.5, 0.8, 0.7, 0.8])
    counted = lambda *_: (np.arange(1000) < 1000 * next(scores), np.ones(1000, bool))
    monkeypatch.setattr("ssl_kit.evaluation.finetune.predict", counted)
    best = BestEpoch(open_source(labelled_folder), patience=2)
    for look in range(4):
        torch.nn.init.constant_(encoder.model.get_classifier().bias, look)
        trainer = _Trainer(10 * (look + 1))
        best.on_train_batch_end(trainer, learner, None, None, 0)
        assert trainer.should_stop == (look == 3)
    best.restore(encoder)
    assert (
        best.scores == [0.5, 0.8, 0.7, 0.8] and encoder.model.get_classifier().bias.mean() == 1
    )  # the first of equals
    best.on_train_batch_end(_Trainer(15), learner, None, None, 0)  # inside an epoch: no look
    assert len(best.scores) == 4


def mixing_learner(**options):
    """A learner whose logits tell images apart, and a list that gets what its encoder sees."""
    torch.manual_seed(0)
    learner, seen = FineTune(Encoder("resnet18_small", NET, (16, 16)), 4, Optim(), **options), []
    torch.nn.init.normal_(learner.encoder.model.get_classifier().weight)
    learner.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    return learner, seen


def shared(mixed, images):
    """The share of `images` in `mixed`, of which the rest is the batch rolled by one, and which kind it is."""
    partner = images.roll(1, 0)
    own = (mixed == images).all(dim=1)  # (B, h, w)
    if (own | (mixed == partner).all(dim=1)).all():
        assert torch.equal(own, own[:1].expand_as(own)), "one box for the batch"
        return "cutmix", own.float().mean().item()
    share = ((mixed - partner) / (images - partner)).median().item()
    assert torch.allclose(mixed, share * images + (1 - share) * partner, atol=1e-5)
    return "mixup", share


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_mixes_images_and_labels_by_the_same_share(kind):
    learner, seen = mixing_learner(smoothing=0.1, **{kind: 1.0})
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    loss = learner.training_step({"views": [images], "label": labels}, 0)
    found, share = shared(seen[0], images)
    assert found == kind and 0.05 < share < 0.95
    one_hot = torch.eye(4)[labels]
    wanted = 0.9 * (share * one_hot + (1 - share) * one_hot.roll(1, 0)) + 0.1 / 4
    logarithms = torch.log_softmax(learner.encoder(seen[0]), dim=1)
    assert loss.item() == pytest.approx(-(wanted * logarithms).sum(dim=1).mean().item(), rel=1e-5)


def test_one_of_both_is_drawn_per_batch_and_none_without():
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 4
    learner, seen = mixing_learner(mixup=0.8, cutmix=1.0)
    for _ in range(16):
        learner.training_step({"views": [images], "label": labels}, 0)
    assert {shared(mixed, images)[0] for mixed in seen if not torch.equal(mixed, images)} == {"mixup", "cutmix"}
    learner, seen = mixing_learner()
    learner.training_step({"views": [images], "label": labels}, 0)
    assert torch.equal(seen[0], images)


def test_mistakes_are_one_line(tuned, labelled_folder, capsys):
    folder, _ = tuned
    with pytest.raises(UserError, match=r"--fraction 2\.0: wanted a number in \(0, 1\]"):
        finetune(str(folder / "encoder"), str(labelled_folder), fraction=2.0)
    assert cli.main(["finetune", str(folder / "encoder"), str(labelled_folder), "--epochs", "0"]) == 2
    assert "--epochs 0" in capsys.readouterr().err
    lora = ["finetune", str(folder / "encoder"), str(labelled_folder), "--lora", "4", "--out", str(folder / "lora")]
    assert cli.main(lora) == 2
    assert "resnet18_small has none" in capsys.readouterr().err and not (folder / "lora").exists()


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    args = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return Encoder("vit_tiny_patch16_224", args, (16, 16)).save(tmp_path_factory.mktemp("vit") / "encoder")


class Killed(Exception):
    pass


def stopped(monkeypatch, name, step, *arguments, killed=False, **options):
    """`finetune`, told to stop after `step` steps of the network `name`, as by SIGTERM; or killed there."""
    end = Checkpoints.after_step

    def stop(self, trainer, healthy):
        if self.folder.name == name and trainer.global_step == step:
            if killed:
                raise Killed
            self.signals.received = signal.SIGTERM
        end(self, trainer, healthy)

    with monkeypatch.context() as patch, pytest.raises(Killed if killed else SystemExit):
        patch.setattr(Checkpoints, "after_step", stop)
        finetune(*arguments, **options)


def trained(out, name="encoder"):
    """Weights in the newest checkpoint of a network, without what keeps time."""
    return SafeCheckpointIO().load_checkpoint(newest(out / "finetuning" / name))["state_dict"]


def test_lora_is_merged_and_from_scratch_is_trained_in_full(vit, coloured, tmp_path):
    pytest.importorskip("peft")
    record = finetune(str(vit), str(coloured), out=str(tmp_path), lora=2, **QUICK | {"epochs": 2})
    assert [one["settings"]["lora"] for one in record["results"]] == [2, 2]
    before, after = (load_file(folder / "model.safetensors") for folder in (vit, tmp_path / "finetuned"))
    changed = {name.split(".", 2)[-1] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"attn.qkv.weight", "attn.proj.weight"} and set(after) - set(before) == {
        "head.weight",
        "head.bias",
    }
    fresh, scratch = Encoder.load(vit).fresh(0).state_dict(), trained(tmp_path, "random_init")
    assert not any(torch.equal(value, scratch[f"encoder.{name}"]) for name, value in fresh.items())
    assert not any("lora" in name for name in scratch)


def test_each_option_of_the_loss_reaches_the_training(vit, coloured, tmp_path):
    def head(**options):
        finetune(str(vit), str(coloured), out=str(tmp_path), scratch=False, **QUICK | {"epochs": 1, **options})
        return trained(tmp_path)["encoder.model.head.weight"]

    plain = head(smoothing=0.0)
    for option in ("smoothing", "mixup", "cutmix"):
        assert not torch.equal(head(**{"smoothing": 0.0, option: 0.5}), plain), option
    assert torch.equal(head(smoothing=0.0), plain)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_stopped_training_goes_on_as_if_it_had_not(vit, coloured, tmp_path, monkeypatch, capsys, lora):
    if lora:
        pytest.importorskip("peft")
    options = QUICK | {"epochs": 3, "lora": lora, "mixup": 0.8, "cutmix": 1.0, "precision": "float32"}
    whole = finetune(str(vit), str(coloured), out=str(tmp_path / "whole"), **options)
    out = tmp_path / "parts"
    stopped(monkeypatch, "encoder", 10, str(vit), str(coloured), out=str(out), **options)
    stopped(monkeypatch, "random_init", 4, str(vit), str(coloured), out=str(out), resume=True, **options)
    assert "resumed at step 10" in capsys.readouterr().out
    parts = finetune(str(vit), str(coloured), out=str(out), resume=True, **options)
    assert "resumed at step 4" in capsys.readouterr().out
    for ours, other in zip(parts["results"], whole["results"], strict=True):
        assert ours["metrics"] == other["metrics"]
        assert ours["settings"]["held_out_top1"] == other["settings"]["held_out_top1"]
    one, two = (load_file(folder / "finetuned" / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    for name in ("encoder", "random_init"):
        one, two = trained(tmp_path / "whole", name), trained(out, name)
        assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_resuming_asks_for_the_same_settings_and_starting_anew_forgets(vit, coloured, tmp_path, monkeypatch):
    options = QUICK | {"epochs": 2, "scratch": False, "out": str(tmp_path)}
    finetune(str(vit), str(coloured), **options)
    assert newest(tmp_path / "finetuning" / "encoder").name == "step-00000016"
    with pytest.raises(UserError, match=r"--resume: lr was 0\.1 and is 0\.2 now: give the same again"):
        finetune(str(vit), str(coloured), **options | {"lr": 0.2}, resume=True)
    stopped(monkeypatch, "encoder", 3, str(vit), str(coloured), killed=True, **options | {"lr": 0.2})
    assert newest(tmp_path / "finetuning" / "encoder") is None  # the other training's is gone


def test_a_training_killed_while_it_records_its_results_has_each_of_them_once(vit, coloured, tmp_path):
    options = QUICK | {"epochs": 1, "out": str(tmp_path)}
    path = tmp_path / "results.jsonl"
    finetune(str(vit), str(coloured), **options)
    first = path.read_text()
    finetune(str(vit), str(coloured), **options, resume=True)
    assert path.read_text() == first
    path.write_bytes(first.encode()[:-20] + "é".encode()[:1])  # in the middle of the second line, and of a character
    finetune(str(vit), str(coloured), **options, resume=True)
    whole, _, again = path.read_text(errors="replace").splitlines()
    assert whole == first.splitlines()[0]
    assert json.loads(again)["metrics"] == json.loads(first.splitlines()[1])["metrics"]
    finetune(str(vit), str(coloured), **options)  # another training
    assert len(path.read_bytes().splitlines()) == 5


def test_layers_learn_at_decaying_rates_unless_from_scratch(vit, tuned, coloured, tmp_path, capsys):
    assert tuned[1]["results"][0]["settings"]["layer_decay"] == 1  # a CNN, unless something else is asked for
    record = finetune(str(vit), str(coloured), out=str(tmp_path / "usual"), **QUICK | {"epochs": 1, "scratch": False})
    assert record["results"][0]["settings"]["layer_decay"] == 0.75
    capsys.readouterr()
    finetune(str(vit), str(coloured), out=str(tmp_path), layer_decay=0.5, **QUICK | {"epochs": 1})
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("optimiser:")]
    peak = 0.1 * 16 / 256
    assert f"lowest layer at {peak * 0.5**3:.4g}" in told[0]  # two blocks and the classifier are above it
    assert len(told) == 2 and "lowest layer" not in told[1]
    rates = {}
    optimiser = SafeCheckpointIO().load_checkpoint(newest(tmp_path / "finetuning" / "encoder"))["optimizer_states"][0]
    for group in optimiser["param_groups"]:
        rates[group["initial_lr"]] = rates.get(group["initial_lr"], 0) + len(group["params"])
    assert sorted(rates) == pytest.approx([peak / 8, peak / 4, peak / 2, peak])


def test_patience_ends_a_training_and_a_resumed_one(vit, coloured, tmp_path, monkeypatch):
    options = QUICK | {"lr": 1e-9, "patience": 2, "out": str(tmp_path)}  # nothing gets better after the first look
    stopped(monkeypatch, "random_init", 2, str(vit), str(coloured), **options)
    record = finetune(str(vit), str(coloured), **options, resume=True)
    assert [len(one["settings"]["held_out_top1"]) for one in record["results"]] == [3, 3]  # of 8


def test_epochs_that_are_left_open_make_enough_steps_and_typed_ones_are_kept(
    tuned, coloured, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("ssl_kit.verbs.finetune._FEWEST_STEPS", 20)
    monkeypatch.setattr("ssl_kit.verbs.finetune._EPOCHS", 1)
    encoder, said = str(tuned[0] / "encoder"), "epochs: 3, for 8 steps of 1 epochs are fewer than the 20 that a fine-"
    for epochs, wanted in ((None, 3), (1, 1)):
        record = finetune(encoder, str(coloured), **QUICK | {"epochs": epochs, "scratch": False, "out": str(tmp_path)})
        assert (said in capsys.readouterr().out) == (epochs is None)
        assert record["results"][0]["settings"]["epochs"] == wanted
        assert len(record["results"][0]["settings"]["held_out_top1"]) == wanted
        assert record["results"][0]["settings"]["warmup_epochs"] == wanted * QUICK["warmup_epochs"]
