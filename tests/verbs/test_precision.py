"""A precision, a device or a step that would become another, or nothing, is refused before anything is touched."""

import pytest

from ssl_kit import cli
from ssl_kit.core.errors import UserError
from ssl_kit.encoders import Encoder
from ssl_kit.verbs.finetune import finetune

SMALL = ["--method.encoder.name=resnet18_small", "--method.encoder.args={channels: [8, 8, 8, 8]}"]


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        (["--precision=float16"], "bfloat16"),
        (["--trainer.precision=32-true", "--precision=bfloat16"], "--precision"),
        (["--trainer.precision=16-mixed"], "--precision"),
        (["--trainer.accelerator=gpu"], "CUDA_VISIBLE_DEVICES"),
        (["--batch_size=1"], "one image"),
        (["-c", "vae", "--image_size=8", "--batch_size=1"], "more than 1 value per channel"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_pretraining_refuses_it_and_the_folder_stays_empty(
    options, instead, labelled_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    run = ["--run", str(tmp_path / "run"), "--trainer.max_steps=2", "--threads=1", *SMALL]
    assert cli.main(["pretrain", str(labelled_folder), "--image_size=16", *run, *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and instead in said[0]
    assert not [path.name for path in (tmp_path / "run").glob("*") if not path.name.startswith(".")]


def test_fine_tuning_refuses_float16_on_a_cpu_and_keeps_the_states_of_a_training(
    labelled_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Encoder("resnet18_small", {"channels": [8, 8, 8, 8]}, (16, 16)).save(tmp_path / "encoder")
    begun = tmp_path / "out" / "finetuning" / "settings.json"
    begun.parent.mkdir(parents=True)
    begun.write_text("{}")
    with pytest.raises(UserError, match="precision float16"):
        finetune(str(tmp_path / "encoder"), str(labelled_folder), out=str(tmp_path / "out"), precision="float16")
    assert begun.read_text() == "{}"
