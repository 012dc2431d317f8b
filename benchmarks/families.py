"""Which of timm's models can be trained, kept and exported: of every timm module its smallest, at 64 pixels.

    python benchmarks/families.py [MODULE ...] [--quick] [--more] [--json FILE]

Each is trained for two steps by every method, saved, loaded by us and by timm alone, and exported to ONNX, on noise and
in a process of its own with a limit of time. No weights are fetched. What `ssl-kit pretrain` refuses, it refuses before
it trains, in the words of the table (`rehearse`). With --more the rows that are recorded already are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from inspect import signature
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.house import methods
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.exporting import run_onnx, write_onnx
from ssl_kit.encoders.weights import SENSELESS
from ssl_kit.methods.method import Method
from ssl_kit.verbs.rehearsal import rehearse
from ssl_kit.views.recipe import ViewRecipe

SIDE = 64  # pixels
_MOST = 1e-3  # difference of a feature, as a share of the largest
_SECONDS = 300  # for all that is tried of one model
_LARGEST = 100e6  # parameters: more would take longer than that on a laptop
RECORD = Path(__file__).parent.parent / "docs" / "numbers" / "families.json"
# what messages of refusals say, done: patches that tile 64 pixels, tokens that are normalised before they are pooled
ARGUMENTS: dict[str, dict[str, Any]] = {
    "eva": {"patch_size": 16, "use_fc_norm": False},
    "deepseek_vit": {"patch_size": 16},
    "beit": {"patch_size": 16},
}
QUICK = ("resnet", "mobilenetv3", "vision_transformer", "eva")


def smallest(module: str) -> tuple[str, int]:
    """The name of a timm module's smallest model, and its parameters, counted where tensors have no memory."""
    sizes = {}
    for name in timm.list_models(module=module):
        size = {"img_size": SIDE} if timm.get_pretrained_cfg(name).fixed_input_size else {}
        try:
            with torch.device("meta"):
                sizes[name] = sum(one.numel() for one in timm.create_model(name, num_classes=0, **size).parameters())
        except SENSELESS:  # not at this size: tried only if no other is there
            sizes[name] = 2**62
    name = min(sizes, key=lambda one: (sizes[one], one))
    return name, sizes[name]


def train(kind: type[Method], name: str, args: dict[str, Any]) -> Encoder:
    """Two steps by a method; `UserError` as `pretrain` would refuse the model."""
    encoder = Encoder(name, args, (SIDE, SIDE))
    cropped = encoder.fixed_size and "small_crops" in signature(kind).parameters
    learner = kind(encoder, **({"small_crops": 0} if cropped else {}))
    views = ViewRecipe(preset=learner.preset).build((SIDE, SIDE), 3, learner.num_views)
    rehearse(learner, {0: views}, seed=0)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-4)
    for step in range(2):
        images = [torch.randint(0, 256, (4, 3, *view.size)) / 255 for view in views]
        learner.loss(images, Key(0, step, torch.arange(4)))["loss"].backward()
        optimiser.step()
        optimiser.zero_grad()
    return learner.encoder.eval()


def same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raises `UserError` for other features."""
    difference, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= _MOST * largest:
        raise UserError(f"features differ by {difference:.2g}, the largest is {largest:.2g}")


def keep(encoder: Encoder, way: str, place: Path) -> None:
    """Saves an encoder and holds what comes back to it: `load` by us, `timm` by timm alone, `onnx`."""
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        wanted = encoder(images)
        if wanted.shape != (2, encoder.dim):
            raise UserError(f"features are {tuple(wanted.shape)}, {encoder.dim} was stated")
        folder = encoder.save(place / way)
        if way == "load":
            same(Encoder.load(folder)(images), wanted)
        elif way == "timm":
            same(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(encoder.normalise(images)), wanted)
        else:
            write_onnx(encoder, place / "model.onnx")
            same(torch.from_numpy(run_onnx(place / "model.onnx", images.numpy())), wanted)


def tried(name: str, args: dict[str, Any]) -> dict[str, str]:
    """Of each method, and each way of keeping an encoder: "" or why it does not work, in a few words."""
    torch.manual_seed(0)
    done: dict[str, str] = {}
    encoders: list[Encoder] = []
    for kind in methods():
        done[kind.__name__] = _why(lambda kind=kind: encoders.append(train(kind, name, args)), f"{kind.__name__} with ")
    with tempfile.TemporaryDirectory() as place:
        for way in ("load", "timm", "onnx") if encoders else ():
            done[way] = _why(lambda way=way: keep(encoders[0], way, Path(place)))
    return done


def _why(act: Callable[[], object], leading: str = "") -> str:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torch's exporter
            act()
    except (UserError, *SENSELESS) as error:
        told = " ".join(str(error).split()).removeprefix(leading).partition("; choose another")[0]
        return told if isinstance(error, UserError) else f"{type(error).__name__}: {told}"[:300]
    return ""


def _child(module: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name, size = smallest(module)
    sender.send((name, size))
    sender.send(
        {"everything": f"more than {_LARGEST:,.0f} parameters"}
        if _LARGEST < size < 2**62
        else tried(name, ARGUMENTS.get(module, {}))
    )


def row(module: str) -> dict[str, Any]:
    """One line of the table."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(module, sender), daemon=True)
    child.start()
    sender.close()
    name, size, done = "", 0, {"everything": f"not done after {_SECONDS} seconds"}
    try:
        for _ in range(2):
            if receiver.poll(_SECONDS):
                told = receiver.recv()
                (name, size), done = (told, done) if isinstance(told, tuple) else ((name, size), told)
    except EOFError:
        done = {"everything": "the process ended"}
    child.kill()
    child.join()
    works = [what for what, why in done.items() if not why]
    reasons: dict[str, list[str]] = {}
    for what, why in done.items():
        if why:
            reasons.setdefault(why, []).append(what)
    # that a convolutional network cannot be masked is no news: one line of text says it
    expected = "needs one of timm's VisionTransformers"
    failed = "; ".join(f"{', '.join(what)}: {why}" for why, what in reasons.items() if expected not in why)
    return {
        "id": f"families/{'no' if failed else 'yes'}/{module}",
        "model": name,
        "parameters": size if size < 2**62 else None,
        "works": ", ".join(works),
        "does not": failed.replace("|", "/"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--more", action="store_true", help=f"go on with the rows of {RECORD.name}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(RECORD.read_text())["rows"] if arguments.more else []
    done = {line["id"].split("/")[-1] for line in rows}
    for module in arguments.modules or (QUICK if arguments.quick else timm.list_modules()):
        if module in done:
            continue
        rows.append(row(module))
        print(" · ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
