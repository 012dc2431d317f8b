"""An encoder folder loaded by timm alone gives our features: largest absolute difference in float32.

    python benchmarks/timm_parity.py RUN DATA [--with-encoders] [--count 64] [--json FILE]

timm runs in a process in which importing ssl_kit fails; with --with-encoders it may import `ssl_kit.encoders`, which
registers the small-image ResNets.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from record import tell

from ssl_kit.data.loader import ViewLoader
from ssl_kit.data.opening import open_source
from ssl_kit.encoders import Encoder, find_encoder
from ssl_kit.views.recipe import plain

OTHER = """
import sys
{prepare}
import numpy as np, timm, torch
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
config = timm.data.resolve_data_config(model.pretrained_cfg)
mean, std = (torch.tensor(config[key]).reshape(1, -1, 1, 1) for key in ("mean", "std"))
with torch.inference_mode():
    np.save(sys.argv[3], model((torch.from_numpy(np.load(sys.argv[2])) - mean) / std).numpy())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--with-encoders", action="store_true")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = find_encoder(arguments.run)
    encoder = Encoder.load(folder)
    source = open_source(arguments.data, limit=arguments.count)
    images = next(iter(ViewLoader(source, [np.arange(len(source))], (plain(encoder.image_size),))))["views"][0]
    with torch.inference_mode():
        ours = encoder(images).numpy()
    prepare = "import ssl_kit.encoders" if arguments.with_encoders else "sys.modules['ssl_kit'] = None"
    with tempfile.TemporaryDirectory() as place:
        given, got = Path(place) / "images.npy", Path(place) / "features.npy"
        np.save(given, images.numpy())
        code = OTHER.format(prepare=prepare)
        subprocess.run([sys.executable, "-c", code, str(folder.resolve()), str(given), str(got)], check=True)
        difference = float(np.abs(np.load(got) - ours).max())
    row = {
        "id": f"timm/{encoder.name}",
        "what": f"timm{' after import ssl_kit.encoders' if arguments.with_encoders else ' without ssl_kit'}, float32",
        "value": difference,
        "unit": "largest absolute difference",
        "images": len(source),
        "largest_feature": float(np.abs(ours).max()),
    }
    tell([row], arguments.json)


if __name__ == "__main__":
    main()
