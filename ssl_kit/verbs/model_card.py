"""The README.md of an exported encoder: what it is, how it is used, how it was trained, what was measured on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.exporting import PIXELS
from ssl_kit.report.reading import read_run
from ssl_kit.report.verdict import verdict

_SCORES = ("top1", "balanced_accuracy", "map_at_r", "recall_at_1")  # the first that a result has is its score

_TIMM = """```python
import timm, torch
{register}model = timm.create_model("local-dir:{name}", pretrained=True).eval()
config = timm.data.resolve_data_config(model.pretrained_cfg)
features = model(timm.data.create_transform(**config)(image).unsqueeze(0))  # (1, {dim})
```"""

_ONNX = """```python
import onnxruntime
session = onnxruntime.InferenceSession("{name}/model.onnx")
features = session.run(None, {{"{input}": {input}}})[0]  # (images, {dim})
```

{shape}"""


def card_text(encoder: Encoder, entries: dict[str, Any], run: Path | None, name: str) -> str:
    """The card as Markdown.

    Args:
        encoder: that is exported.
        entries: of the export's manifest, `check` among them.
        run: folder of the run that trained it; None for a bare encoder folder.
        name: of the export's folder.
    """
    check, (height, width) = entries["check"], encoder.image_size
    facts = [
        ("architecture", f"{encoder.name} (timm), {sum(one.numel() for one in encoder.parameters()):,} parameters"),
        ("features", f"{encoder.dim} numbers per image; compare by cosine"),
        ("images", f"{height} x {width} pixels, {encoder.channels} channels; {encoder.preprocessing()['resize']}"),
        ("weights", f"sha256 {entries['encoder_sha256']}"),
        (
            "checked",
            f"{check['images']} images: largest difference to the original features {check['difference']:.2g}"
            f" (largest feature {check['largest_feature']:.3g})",
        ),
    ]
    parts = [f"# {name}", "An image encoder trained without labels, exported by ssl_kit.", _table(("", ""), facts)]
    parts += ["## Use", _use(encoder, entries, name)]
    if run is not None:
        parts += _training(run) + _measured(run, entries["encoder_sha256"])
    return "\n\n".join(parts) + "\n"


def _use(encoder: Encoder, entries: dict[str, Any], name: str) -> str:
    if entries["kind"] == "timm":
        own = encoder.name.endswith("_small")  # registered by ssl_kit.encoders, not known to timm alone
        return _TIMM.format(register="import ssl_kit.encoders\n" if own else "", name=name, dim=encoder.dim)
    height, width = encoder.image_size
    shapes = {
        True: f"`pixels` is uint8 (images, height, width, {encoder.channels}) of any height and width.",
        False: f"`images` is float32 (images, {encoder.channels}, {height}, {width}) in [0, 1]; the file normalises.",
    }
    shape = shapes[entries["input"] == PIXELS]
    return _ONNX.format(name=name, input=entries["input"], dim=encoder.dim, shape=shape)


def _training(run: Path) -> list[str]:
    read = read_run(run)
    info = read.info
    data, versions = (_entries(info.get(name)) for name in ("data", "versions"))
    facts = [
        ("method", info.get("method")),
        ("images", f"{data.get('images'):,} of {data.get('root')}" if isinstance(data.get("images"), int) else None),
        ("epochs", info.get("epochs")),
        ("seed", info.get("seed")),
        ("command", f"`{info['command']}`" if "command" in info else None),
        ("verdict", verdict(read).line if "verdict" in info else None),
        ("versions", ", ".join(f"{key} {versions[key]}" for key in ("ssl_kit", "torch", "timm") if key in versions)),
    ]
    known = [(key, value) for key, value in facts if value not in (None, "")]
    return ["## Training", _table(("", ""), known)] if known else []


def _entries(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _measured(run: Path, encoder_sha256: str | None) -> list[str]:
    """Scores of this encoder and of its baselines, from the run's results.jsonl; nothing where there are none."""
    rows = []
    for result in read_run(run).results:
        metrics = result["metrics"]
        score = next((name for name in _SCORES if name in metrics), None)
        if score is None or result.get("made_by", {}).get("encoder_sha256") not in (encoder_sha256, None):
            continue
        low, high = metrics.get(f"{score}_low"), metrics.get(f"{score}_high")
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        test = result.get("made_by", {}).get("test") or ""
        rows.append((f"{result['evaluation']}, {score}", result["features"], f"{metrics[score]:.3f}{interval}", test))
    if not rows:
        return []
    heads = ("evaluation", "features", "score, 95 % interval", "test images")
    return ["## Measured", "Fractions in [0, 1]; baselines stand beside the encoder.", _table(heads, rows)]


def _table(heads: tuple[str, ...], rows: list[Any]) -> str:
    cells = lambda row: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    return "\n".join([cells(heads), "|" + "---|" * len(heads), *map(cells, rows)])
