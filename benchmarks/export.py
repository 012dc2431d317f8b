"""Exported encoders find the same neighbours: overlap of the 100 nearest images with those of the encoder itself.

    python benchmarks/export.py RUN data/cifar10/test [--count 1000] [--quick] [--json FILE]

The encoder's own features are those of `embed` in float32; the timm folder, the ONNX file and the ONNX file that takes
pixels get the images from disk by their own ways.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ssl_kit.core.named import find_encoder
from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source, pixels
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.embeddings.exact import normalised, search
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.exporting import run_onnx
from ssl_kit.verbs.export import export
from ssl_kit.views.recipe import plain

K = 100


def by_timm(folder: Path, views: torch.Tensor) -> np.ndarray:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    mean, std = (torch.tensor(config[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return torch.cat([model((part - mean) / std) for part in views.split(256)]).numpy()


def exported(run: str, place: Path, source: Source, data: str, encoder: Encoder) -> dict[str, np.ndarray]:
    """What the three exports make of the images, (N, D) each."""
    plan = [np.arange(start, min(start + 256, len(source))) for start in range(0, len(source), 256)]
    views = torch.cat([batch["views"][0].clone() for batch in ViewLoader(source, plan, (plain(encoder.image_size),))])
    export(run, out=str(place / "timm"), images=data)
    export(run, out=str(place / "onnx"), format="onnx", images=data)
    export(run, out=str(place / "pixels"), format="onnx", preprocess=True, images=data)
    images = [pixels(source, row) for row in range(len(source))]
    same_size = len({image.shape for image in images}) == 1
    batches = (
        [np.stack(images[rows[0] : rows[-1] + 1]) for rows in plan] if same_size else [one[None] for one in images]
    )
    return {
        "timm": by_timm(place / "timm", views),
        "onnx": run_onnx(place / "onnx" / "model.onnx", *(part.numpy() for part in views.split(256))),
        "onnx/pixels": run_onnx(place / "pixels" / "model.onnx", *batches),
    }


def nearest(vectors: np.ndarray) -> np.ndarray:
    units = normalised(vectors)
    return search(units, units, K)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder or encoder folder")
    parser.add_argument("data")
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--quick", action="store_true", help="300 images")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    encoder = Encoder.load(find_encoder(arguments.run))
    source = open_source(
        arguments.data, limit=300 if arguments.quick else arguments.count, channels=encoder.channels, in_memory=False
    )
    own = embed(encoder, source, precision="float32").vectors
    truth, rows = nearest(own), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        for name, features in exported(arguments.run, Path(place), source, arguments.data, encoder).items():
            pairs = zip(nearest(features), truth, strict=True)
            overlap = float(np.mean([len(np.intersect1d(one, other)) / len(other) for one, other in pairs]))
            rows.append(
                {
                    "id": f"export/{name}",
                    "what": f"overlap of the {K} nearest of {len(source):,} images, {encoder.name}",
                    "value": round(overlap, 5),
                    "difference": float(np.abs(features - own).max()),
                    "largest_feature": float(np.abs(own).max()),
                }
            )
    for line in rows:
        print(f"{line['id']:<20}{line['value']:.5f}  {line['what']}; largest difference {line['difference']:.1e}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
