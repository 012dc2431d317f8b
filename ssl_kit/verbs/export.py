"""`ssl-kit export`: an encoder for programs without ssl_kit, checked on real images before it is handed over.

With it goes a README.md: what it is, how it is used, how it was trained, what was measured on it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch

from ssl_kit.core.console import next_command, say, table
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, DamagedError, atomic_folder, read_manifest
from ssl_kit.core.named import check_free, find_encoder, is_free
from ssl_kit.core.owned import check_place
from ssl_kit.core.reading import Reading, eight_bits
from ssl_kit.core.sealed import Entries, read_object
from ssl_kit.core.settings import verb
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import escape_path
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import Source, pixels
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.exporting import IMAGES, PIXELS, run_onnx, stored_values, write_onnx
from ssl_kit.report.head import verdict
from ssl_kit.report.read import read_run
from ssl_kit.views.host import plain_views

FORMAT = "ssl_kit export 1"
ONNX = "model.onnx"
CARD = "README.md"
_CHECKED = 32  # images
_MOST = 1e-3  # largest difference of a feature, as a share of the largest feature
_WITHOUT_DATA = "digits"  # built in, where the training images are gone


@dataclass(frozen=True)
class Settings:
    """What to export, and how.

    Args:
        run: run folder, encoder folder, or photos32, which comes with the package.
        out: folder to write.
        format: timm is config.json and model.safetensors, read by one line of timm; onnx is one file that any runtime
            reads, with any number of images per call.
        preprocess: the ONNX file takes pixels, uint8 (images, height, width, channels) of any size, and resizes them.
        images: to check with, given like DATA; default: those it was trained on, built-in digits where they are gone.
        overwrite: replace an earlier export.

    Examples:
        ssl-kit export runs/photos --out model
        ssl-kit export runs/photos --out model --format onnx --preprocess
    """

    run: str
    _: KW_ONLY
    # What to write
    format: Literal["timm", "onnx"] = "timm"
    preprocess: bool = False
    images: str | None = None
    # Where it goes
    out: str
    overwrite: bool = False


@verb(Settings)
def export(settings: Settings) -> Entries:
    """Write an encoder as a timm folder or an ONNX file with a model card, checked against the original.

    Returns:
        `{"out", "format", "difference", "largest_feature", "images", "dim", "input", "files"}`.

    Raises:
        UserError: the features differ by more than a thousandth of the largest one; nothing is written then.
    """
    if settings.preprocess and settings.format != "onnx":
        raise UserError("--preprocess is for --format onnx: a timm folder states its preprocessing in config.json")
    folder, path = Path(settings.out), find_encoder(settings.run)
    check_place(folder, settings.images, removing=settings.overwrite)
    _may_write(folder, settings.overwrite)
    encoder = Encoder.load(path)
    record = read_object(Path(settings.run) / "run.json") if (Path(settings.run) / "run.json").is_file() else {}
    pixels, checked_on = _images(settings.images, record, encoder)
    entries: Entries = {
        "format": FORMAT,
        "kind": settings.format,
        "input": PIXELS if settings.preprocess else IMAGES,
        "dim": encoder.dim,
        "encoder_sha256": encoder.sha256,
        "preprocessing": encoder.preprocessing(),
    }
    with atomic_folder(folder, entries) as temporary:
        if settings.format == "timm":
            encoder.save(temporary / "files", read_object(path / "encoder.json").get("provenance"))
            for file in (temporary / "files").iterdir():
                file.rename(temporary / file.name)
            (temporary / "files").rmdir()
            features = _by_timm(temporary, encoder, pixels)
        else:
            write_onnx(encoder, temporary / ONNX, from_pixels=settings.preprocess)
            features = _by_onnx(temporary / ONNX, encoder, pixels, settings.preprocess)
        entries["check"] = check = _compared(features, _expected(encoder, pixels), checked_on, settings.format)
        card = card_text(encoder, entries, Path(settings.run) if record else None, folder.name)
        (temporary / CARD).write_text(card, encoding="utf-8")
    files = sorted(file.name for file in folder.iterdir())
    table(
        f"{folder}: {', '.join(files)}",
        ["checked on", "images", "largest difference", "largest feature"],
        [[checked_on, len(pixels), f"{check['difference']:.2e}", f"{check['largest_feature']:.3g}"]],
    )
    next_command(_example(folder, settings.format), own=False)
    return {
        "out": escape_path(folder),
        "format": settings.format,
        "dim": encoder.dim,
        "input": entries["input"],
        **check,
    } | {"files": files}


def _images(asked: str | None, record: Entries, encoder: Encoder) -> tuple[list[np.ndarray], str]:
    """A few images (H_i, W_i, C) to check with, and where they are from."""
    trained = record.get("data")
    root = trained.get("root") if isinstance(trained, dict) else None
    chosen = asked if asked is not None else root if isinstance(root, str) and Path(root).exists() else _WITHOUT_DATA
    if asked is None and chosen == _WITHOUT_DATA and (encoder.channels not in (1, 3) or encoder.reading.bands):
        say("the training images are not there: checked on noise; --images FOLDER names others")
        noise = np.random.default_rng(0).integers(0, 2**16, (_CHECKED, *encoder.image_size, encoder.channels))
        return list(noise.astype(np.uint16 if encoder.reading.ranges else np.uint8)), "noise"
    if asked is None and chosen == _WITHOUT_DATA:
        say("the training images are not there: checked on the built-in digits; --images FOLDER names others")
    source = open_source(chosen, limit=_CHECKED, reading=encoder.reading, in_memory=False, max_bad=1.0)
    images = [image for row in range(len(source)) if (image := _decoded(source, row)) is not None]
    if not encoder.reading.ranges:
        images = [eight_bits(image) for image in images]  # what a file with preprocessing takes
    if not images:
        raise UserError(f"none of the images of {chosen} could be decoded: give others with --images FOLDER")
    return images, chosen


def _decoded(source: Source, row: int) -> np.ndarray | None:
    try:
        return pixels(source, row)
    except BadImageError:
        return None


def _views(encoder: Encoder, images: list[np.ndarray]) -> torch.Tensor:
    """(B, C, h, w) float in [0, 1], as `ssl-kit embed` prepares images."""
    return torch.from_numpy(plain_views(images, encoder.image_size))


def _expected(encoder: Encoder, images: list[np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return encoder(_views(encoder, images)).numpy()


def _by_timm(folder: Path, encoder: Encoder, images: list[np.ndarray]) -> np.ndarray:
    """(B, D): what timm makes of the folder, normalising as its config says."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_data_config(model.pretrained_cfg)
    mean, std = (torch.tensor(config[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        return model((_views(encoder, images) - mean) / std).numpy()


def _by_onnx(path: Path, encoder: Encoder, images: list[np.ndarray], preprocess: bool) -> np.ndarray:
    """(B, D): what ONNX Runtime makes of the file; images of several sizes one by one."""
    if not preprocess:
        return run_onnx(path, _views(encoder, images).numpy())
    return run_onnx(path, *(stored_values(image[None], encoder) for image in images))


def _compared(got: np.ndarray, wanted: np.ndarray, checked_on: str, format: str) -> Entries:
    """The largest difference; a `UserError` when it is more than rounding."""
    difference, largest = float(np.abs(got - wanted).max()), float(np.abs(wanted).max())
    if not difference <= _MOST * largest:
        raise UserError(
            f"the {format} export gives other features: they differ by up to {difference:.3g} (largest feature "
            f"{largest:.3g}) on {len(wanted)} images of {checked_on}; nothing was written"
        )
    return {"images": len(wanted), "difference": difference, "largest_feature": largest}


def _may_write(folder: Path, overwrite: bool) -> None:
    """Refuses to replace anything but an earlier export, and that only when told to."""
    if not overwrite:
        check_free(folder)
    if is_free(folder):
        return
    try:
        ours = read_manifest(folder, verify=False).get("format") == FORMAT
    except (DamagedError, NotADirectoryError):
        ours = False
    if not ours:
        raise UserError(f"{folder} is not an earlier export ({MANIFEST} says so otherwise); it is not overwritten")


def _example(folder: Path, format: str) -> str:
    """A line of Python that reads the export."""
    if format == "timm":
        code = f"import timm; print(timm.create_model({json.dumps(f'local-dir:{folder}')}, pretrained=True))"
    else:
        code = f"import onnxruntime; print(onnxruntime.InferenceSession({json.dumps(str(folder / ONNX))}).get_inputs())"
    return f"python -c {shlex.quote(code)}"


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


def card_text(encoder: Encoder, entries: Entries, run: Path | None, name: str) -> str:
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
        *_read_by(encoder.reading),
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


def _read_by(reading: Reading) -> list[tuple[str, str]]:
    """Which bands and values of stored images are meant, where that is not all of them."""
    ends = lambda pairs: ", ".join(f"{low:g} to {high:g}" for low, high in pairs)
    said = [(f"0 to 1 of {kind}", f"values {ends(pairs)}") for kind, pairs in reading.ranges.items()]
    return [("bands", ", ".join(reading.bands)), *said] if reading.bands else said


def _use(encoder: Encoder, entries: Entries, name: str) -> str:
    if entries["kind"] == "timm":
        own = encoder.name.endswith("_small")  # registered by ssl_kit.encoders, not known to timm alone
        return _TIMM.format(register="import ssl_kit.encoders\n" if own else "", name=name, dim=encoder.dim)
    height, width = encoder.image_size
    kind = "float32, values as stored," if encoder.reading.ranges else "uint8"
    shapes = {
        True: f"`pixels` is {kind} (images, height, width, {encoder.channels}) of any height and width.",
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


def _entries(value: object) -> Entries:
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


def _table(heads: tuple[str, ...], rows: Iterable[Sequence[object]]) -> str:
    cells = lambda row: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
    return "\n".join([cells(heads), "|" + "---|" * len(heads), *map(cells, rows)])
