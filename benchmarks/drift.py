"""Does `ssl-kit drift` see corrupted images, and nothing where nothing has changed?

    python benchmarks/drift.py ENCODER DATA [--images 2000] [--draws 20] [--json FILE]

Two halves of the same images, drawn anew each time, must have p > 0.05 in 19 of 20 draws. One half against the other
corrupted at strength 3 (`ssl_kit.evaluation.robustness`) must have p < 0.01, for each of the eight corruptions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import tell
from ssl_kit.core.random import permutation
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source, pixels
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.evaluation.drift import shift
from ssl_kit.evaluation.robustness import CORRUPTIONS, corrupt
from ssl_kit.views.host import plain_views

STRENGTH, LEVEL, USUAL, BATCH = 3, 0.01, 0.05, 256


def features(encoder: Encoder, images: torch.Tensor) -> np.ndarray:
    """(N, D) of images (N, C, h, w) in [0, 1]."""
    with torch.inference_mode():
        return torch.cat([encoder(part) for part in images.split(BATCH)]).numpy()


def views(encoder: Encoder, source: Source) -> torch.Tensor:
    """(N, C, h, w) in [0, 1], as `embed` shows them to the encoder."""
    return torch.from_numpy(plain_views([pixels(source, row) for row in range(len(source))], encoder.image_size))


def measured(encoder: Encoder, images: torch.Tensor, draws: int) -> list[dict[str, Any]]:
    """A row for the equal halves, and one per corruption."""
    count = len(images)
    clean, rows = (
        features(encoder, images),
        [np.sort(permutation(seed, 0, count, 1)[: count // 2]) for seed in range(draws)],
    )
    found = [shift(clean[half], np.delete(clean, half, axis=0), seed=seed).p for seed, half in enumerate(rows)]
    spread = f"{min(found):.3f}..{max(found):.3f}"
    made: list[dict[str, Any]] = [
        {"id": "drift/equal halves", "tried": draws, "survived": sum(p > USUAL for p in found), "p": spread}
    ]
    half, rest = rows[0], np.setdiff1d(np.arange(count), rows[0])
    for name in CORRUPTIONS:
        one = shift(clean[half], features(encoder, corrupt(images[rest], name, STRENGTH, index=rest)))
        found_by = {"mmd": round(one.mmd, 5), "auroc": round(one.auroc, 3), "seen": one.p < LEVEL}
        made.append({"id": f"drift/{name}", "p": round(one.p, 4), **found_by})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    encoder = Encoder.load(arguments.encoder)
    source = open_source(arguments.data, limit=arguments.images, reading=encoder.reading)
    tell(measured(encoder, views(encoder, source), arguments.draws), arguments.json)


if __name__ == "__main__":
    main()
