"""Images read as they are meant: files against their raw samples, the range of deep ones, every form from Python.

    python benchmarks/samples.py [--quick] [--only files range forms] [--json FILE]

files   2,000 TIFF, PNG and JPEG 2000 files over depth, photometric, planes, extra samples, nodata, byte order, layout
        and compression: equal to the reference below, which knows the raw samples and what was asked for (to the bit,
        or within 2/255 where the file is lossy), or refused with a reason. OpenCV is a third voice.
range   textures that differ in the low 8 of 16 bits only: kNN with --range full and by default, and the features that a
        folder, its embeddings and a search give; a set of 5 channels through SimCLR, MAE and VAE, and exported.
forms   2,000 images as folder, table, array, data set of torch and of Hugging Face: encoder, loss curve and vectors.
"""

from __future__ import annotations

import argparse
import csv
import io
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

import ssl_kit
from benchmarks.record import tell
from ssl_kit.core.reading import ANY, Reading
from ssl_kit.data.decode import decode
from ssl_kit.data.limits import BadImageError

LUMA = (19595, 38470, 7471)
LOSSY = 2 / 255


def reference(values: np.ndarray, spec: dict[str, Any], channels: int, ends: tuple[float, float] | None) -> Any:
    """(H, W, channels) uint8 or uint16 of raw samples (H, W, S), or None where a reader has to refuse."""
    bits, extra, bands = spec["bits"], spec["extra"], values.shape[2]
    opaque = extra in ("unassalpha", "assocalpha")
    plain = values[:, :, : bands - opaque] if opaque else values
    if spec["photometric"] == "palette":
        plain, bits = spec["colours"][values[:, :, 0]], 8
    picture = 3 if spec["photometric"] in ("rgb", "palette") else 1 if plain.shape[2] == 1 else 0
    alpha = values[:, :, -1:] if opaque else None
    if channels in (1, 3) and (picture or plain.shape[2] in (1, 3)):
        plain = plain[:, :, : picture or plain.shape[2]]
    elif channels == values.shape[2] and spec["photometric"] != "palette":
        plain, alpha = values, None
    elif channels != plain.shape[2]:
        return None
    missing = np.zeros(plain.shape[:2], bool)
    if spec["nodata"] is not None:
        missing = (plain == spec["nodata"]).any(2)
    plain = plain.astype(np.float64)
    if spec["photometric"] == "miniswhite":
        plain = 1 - plain if bits == 0 else -1 - plain if spec["signed"] else 2**bits - 1 - plain
    if channels == 1 and plain.shape[2] == 3:
        weighted = plain @ np.array(LUMA, float)
        plain = (weighted / 2**16 if bits == 0 else np.floor((weighted + 2**15) / 2**16))[:, :, None]
    if ends is not None:
        low, high = ends
    elif bits == 0:
        seen = plain[~missing]
        low, high = 0.0, 1.0
        if seen.size and (seen.min() < 0 or seen.max() > 1):
            return None
    else:
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if spec["signed"] else (0, 2**bits - 1)
    deep = ends is not None or bits == 0 or bits > 8 or spec["signed"]
    top = 65535 if deep else 255
    made = np.rint(np.clip((plain - low) / (high - low), 0, 1) * top)
    if alpha is not None:
        share = alpha / (1.0 if bits == 0 else 2.0**bits - 1)
        made = np.rint(np.clip((made if extra == "assocalpha" else made * share) + top * (1 - share), 0, top))
    made[missing] = 0
    return np.broadcast_to(made, (*made.shape[:2], channels)).astype(np.uint16 if deep else np.uint8)


def tiff(rng: np.random.Generator) -> tuple[bytes, np.ndarray, dict[str, Any]]:
    """A TIFF, its raw samples and what it is."""
    values, spec = drawn(rng)
    values, options = packing(rng, values, spec)
    lossy, count, nodata = options.get("compression") == "jpeg", values.shape[2], spec["nodata"]
    planar = "separate" if count > 1 and not lossy and rng.integers(2) else "contig"
    stored = values.transpose(2, 0, 1) if planar == "separate" else values if count > 1 else values[:, :, 0]
    options |= {"planarconfig": planar} if count > 1 else {}
    colours = rng.integers(0, 256, (256, 3)).astype(np.uint8)
    if spec["photometric"] == "palette":
        options["colormap"] = (
            (colours.T.astype(np.uint16) * 257) if rng.integers(2) else colours.T.astype(np.uint16) << 8
        )
        options.pop("predictor", None)
    if spec["extra"]:
        options["extrasamples"] = [spec["extra"]]
    if nodata is not None:
        options["extratags"] = [(42113, "s", 0, f"{nodata:g}", True)]
    data = io.BytesIO()
    tifffile.imwrite(data, stored, photometric=spec["photometric"], **options)
    return data.getvalue(), values, spec | {"colours": colours, "lossy": lossy, "format": "TIFF", "options": options}


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, Any]]:
    """Raw samples (H, W, S) and what they are."""
    pick = lambda *words: words[rng.integers(len(words))]
    kind = pick("rgb", "rgb", "grey", "grey", "white", "palette", "bands")
    bits, signed = pick(
        (8, False), (16, False), (16, False), (12, False), (10, False), (16, True), (0, False), (1, False)
    )
    if kind == "palette" or (bits == 1 and kind != "grey"):
        bits, signed = 8, False
    if bits == 0 and kind == "white":
        bits = 16
    clear = kind in ("rgb", "grey") and bits in (8, 16) and not signed
    extra = pick(None, None, None, "unassalpha", "assocalpha", "unspecified") if clear else None
    count = {"rgb": 3, "bands": int(rng.integers(2, 8))}.get(kind, 1) + (extra is not None)
    shape = (int(rng.integers(17, 60)), int(rng.integers(17, 60)), count)
    if bits == 0:
        values = rng.random(shape).astype(np.float32) * pick(1, 1, 900)
    else:
        low = -(2 ** (bits - 1)) if signed else 0
        dtype = np.int16 if signed else np.uint8 if bits <= 8 else np.uint16
        values = rng.integers(low, low + 2**bits, shape).astype(dtype)
    blank = kind in ("grey", "bands") and not extra and bits != 1
    nodata = pick(None, None, -9999.0 if signed or bits == 0 else 7.0) if blank else None
    if nodata is not None:
        values[:3] = nodata
    photometric = {"rgb": "rgb", "white": "miniswhite", "palette": "palette"}.get(kind, "minisblack")
    return values, {"bits": bits, "signed": signed, "photometric": photometric, "extra": extra, "nodata": nodata}


def packing(rng: np.random.Generator, values: np.ndarray, spec: dict[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
    """How samples are packed, as tifffile takes it; the samples, others where the packing would blur them."""
    pick = lambda *words: words[rng.integers(len(words))]
    bits, shape = spec["bits"], values.shape
    options: dict[str, Any] = {"byteorder": pick("<", ">"), "bigtiff": bool(rng.integers(2))}
    packed = bits in (1, 10, 12)
    lossy = False
    if packed:
        options |= {"bitspersample": bits, "byteorder": "<"}
    else:
        compression = pick(None, "lzw", "zlib", "zstd", "packbits", "lzma")
        options |= {"compression": compression} if compression else {}
        if compression in ("lzw", "zlib", "zstd") and rng.integers(2):
            options["predictor"] = True
        if spec["photometric"] == "rgb" and spec["extra"] is None and bits == 8 and rng.integers(4) == 0:
            options, lossy = {"compression": "jpeg", "compressionargs": {"level": 100}, "subsampling": (1, 1)}, True
            y, x = np.mgrid[: shape[0], : shape[1]]
            values = np.stack([y + x, y + x + 3, y + x + 6], axis=2).astype(np.uint8)
    if not packed and rng.integers(3) == 0:
        options["tile"] = (16, 32)
    elif not lossy:
        options["rowsperstrip"] = int(rng.integers(3, 40))
    return values, options


def other(rng: np.random.Generator) -> tuple[bytes, np.ndarray, dict[str, Any]]:
    """A PNG or JPEG 2000 of 8 or 16 bits, grey or RGB, with or without opacity."""
    name, bits, count = ("png", "jpeg2k")[rng.integers(2)], (8, 16)[rng.integers(2)], int(rng.integers(1, 5))
    shape = (int(rng.integers(17, 60)), int(rng.integers(17, 60)), count)
    values = rng.integers(0, 2**bits, shape).astype(np.uint8 if bits == 8 else np.uint16)
    lossy = name == "jpeg2k" and bool(rng.integers(2))
    if lossy:
        y, x = np.mgrid[: shape[0], : shape[1]]
        values = np.stack([y + x + 20 * band for band in range(count)], axis=2).astype(values.dtype)
        values = values if bits == 8 else values * 257
    options = {"level": 100 if lossy else 0} if name == "jpeg2k" else {}
    data = getattr(imagecodecs, f"{name}_encode")(values if count > 1 else values[:, :, 0], **options)
    extra = "unassalpha" if count in (2, 4) else None
    spec = {"bits": bits, "signed": False, "photometric": "rgb" if count > 2 else "minisblack", "extra": extra}
    return data, values, spec | {"nodata": None, "colours": None, "lossy": lossy, "format": name, "options": options}


def files(quick: bool) -> list[dict[str, Any]]:
    """Acceptance: no silent difference."""
    rng = np.random.default_rng(0)
    told, differences, voices = Counter[str](), [], Counter[str]()
    for number in range(200 if quick else 2_000):
        data, values, spec = (tiff if rng.random() < 0.7 else other)(rng)
        channels = int(rng.choice([1, 3, values.shape[2], values.shape[2], 2]))
        ends = None if rng.integers(2) else (float(values.min()), float(values.max()) + 1)
        reading = Reading(channels) if ends is None else Reading(channels).within({ANY: (ends,)})
        wanted = reference(values, spec, channels, ends)
        if spec["format"] != "TIFF" and (channels not in (1, 3)) and spec["bits"] == 8:
            wanted = None  # what Pillow reads has 1 or 3 channels
        try:
            got = decode(data, reading).image
        except BadImageError as error:
            told["refused, as it must be" if wanted is None else "refused, though readable"] += 1
            if wanted is not None:
                differences.append((number, spec, channels, ends, str(error)))
            continue
        if wanted is None:
            told["read, though it must be refused"] += 1
            differences.append((number, spec, channels, ends, "read"))
            continue
        top = np.iinfo(wanted.dtype).max
        alpha = spec["extra"] in ("unassalpha", "assocalpha")
        stretched = 1 if ends is None else (2 ** spec["bits"] - 1) / (ends[1] - ends[0])  # a codec's loss with it
        most = (
            LOSSY * max(1, stretched)
            if spec["lossy"]
            else 1.01 / 255
            if alpha and top == 255
            else 1.01 / top
            if alpha
            else 0
        )
        apart = float(np.abs(got.astype(float) - wanted).max()) / top if got.shape == wanted.shape else 1.0
        if got.dtype != wanted.dtype or apart > most:
            told["read otherwise"] += 1
            differences.append((number, spec, channels, ends, f"{got.dtype} {apart:.4f}"))
        else:
            told["equal"] += 1
        voices[_opencv(data, values, spec)] += 1
    for number, spec, *rest in differences[:20]:
        print(number, {key: value for key, value in spec.items() if key != "colours"}, *rest)
    total = sum(told.values())
    rows = [{"id": "I1", "what": "files against their raw samples", "tried": total, **told}]
    for words, count in voices.most_common():
        print(f"OpenCV {words}: {count}")
    found = Counter(words.partition(":")[0] for words in voices.elements())
    return [*rows, {"id": "I1v", "what": "OpenCV on the raw samples of what we have read rightly", **found}]


def _opencv(data: bytes, values: np.ndarray, spec: dict[str, Any]) -> str:
    """What OpenCV says of the raw samples."""
    import cv2

    seen = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    kind = f"{spec['format']} of {values.shape[2]} samples, {spec['bits'] or 'float'} bits, {spec['photometric']}"
    if seen is None:
        return "does not read"
    seen = np.atleast_3d(seen)
    if seen.shape[2] in (3, 4):
        seen = seen[:, :, [2, 1, 0, 3][: seen.shape[2]]]
    raw = spec["colours"][values[:, :, 0]] if spec["photometric"] == "palette" else values
    if spec["photometric"] == "miniswhite" and spec["bits"]:
        raw = (-1 - values) if spec["signed"] else (2 ** spec["bits"] - 1 - values)
    if seen.shape == raw.shape and seen.dtype == raw.dtype:
        most = 6 * (257 if seen.dtype == np.uint16 else 1) if spec["lossy"] else 0
        if np.abs(seen.astype(float) - raw).max() <= most:
            return "agrees"
    return f"reads otherwise: {kind}"


def textures(folder: Path, each: int) -> None:
    """Four textures in the low 8 of 16 bits; the high ones say nothing."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32]
    for label, (pace, turned) in enumerate([(0.35, 0), (0.9, 0), (0.35, 1), (0.9, 1)]):
        (folder / f"texture {label}").mkdir(parents=True)
        for number in range(each):
            wave = np.sin(pace * (y if turned else x) + rng.random() * 6.28) * 80 + rng.normal(0, 12, (32, 32))
            tifffile.imwrite(
                folder / f"texture {label}" / f"{number:04d}.tif", (128 + wave).clip(0, 255).astype(np.uint16)
            )


def curve(run: ssl_kit.Run) -> list[dict[str, str]]:
    """The rows of its metrics."""
    return list(csv.DictReader((run.folder / "metrics.csv").read_text().splitlines()))


def knn(run: ssl_kit.Run, folder: Path) -> float:
    """Top-1 of the encoder on held-out textures."""
    scores = run.evaluate(str(folder), only="knn", baselines="none", verbose=False)["results"]
    return next(one["metrics"]["top1"] for one in scores if one["settings"].get("chosen"))


def ranges(quick: bool) -> list[dict[str, Any]]:
    """Acceptance: depth and channels all the way."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        textures(root / "deep", 60 if quick else 250)
        options: dict[str, Any] = {"verbose": False, "epochs": 2 if quick else 8, "batch_size": 64}
        runs = {}
        for given in ("full", "auto"):
            runs[given] = ssl_kit.pretrain(str(root / "deep"), run=str(root / given), range=given, **options)
            rows.append(
                {
                    "id": "I2",
                    "what": f"textures in the low 8 of 16 bits, --range {given}: kNN top-1",
                    "ours": knn(runs[given], root / "deep"),
                    "chance": 0.25,
                }
            )
        run, file = runs["auto"], root / "deep" / "texture 1" / "0003.tif"
        kept = np.asarray(run.embed(str(root / "deep"), out=root / "emb"))
        ids = run.embed(str(root / "deep"), out=root / "emb").ids
        row = ids.index("texture 1/0003.tif")
        found = ssl_kit.Index.load(root / "emb", encoder=str(run.folder)).search([file, tifffile.imread(file)], k=1)
        alone = np.asarray(run.embed([file]))[0]
        ssl_kit.export(str(run.folder), out=str(root / "onnx"), format="onnx", preprocess=True, verbose=False)
        card = (root / "onnx" / "README.md").read_text()
        rows.append(
            {
                "id": "I2",
                "what": "its range: found itself by search in two ways; difference of embed; on the card of export",
                "ours": sum(one[0].id == ids[row] for one in found),
                "of": 2,
                "difference": float(np.abs(alone - kept[row]).max()),
                "card": "0 to 1 of uint16" in card,
            }
        )
        bands = np.random.default_rng(1).integers(0, 4096, (200, 32, 32, 5)).astype(np.uint16)
        for name in ("simclr", "mae", "vae"):
            made = ssl_kit.pretrain(
                bands,
                recipe=name,
                channels=5,
                run=str(root / name),
                trainer={"max_steps": 6},
                batch_size=32,
                verbose=False,
            )
            wrote = ssl_kit.export(str(made.folder), out=str(root / f"{name} onnx"), format="onnx", verbose=False)
            rows.append(
                {
                    "id": "I2",
                    "what": f"5 channels, {name}: loss after 6 steps, difference of the ONNX file",
                    "ours": [float(one["loss"]) for one in curve(made) if one["loss"]][-1],
                    "difference": wrote["difference"],
                }
            )
    return rows


class Pairs:
    """A map-style data set."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[row]), int(self.labels[row])


def forms(quick: bool) -> list[dict[str, Any]]:
    """Acceptance: the same images in every form."""
    import datasets

    rng, count = np.random.default_rng(0), 200 if quick else 2_000
    images, labels = (
        rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8),
        np.sort(rng.integers(0, 5, count)),
    )  # in the order of a folder of classes
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / "all" / f"{label}" / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        paths = sorted((root / "all").glob("*/*.png"))
        table = [("path", "label"), *((f"all/{path.parent.name}/{path.name}", path.parent.name) for path in paths)]
        with open(root / "list.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(table)
        pictures = datasets.Dataset.from_dict(
            {"image": [str(path) for path in paths], "label": labels.tolist()}
        ).cast_column("image", datasets.Image())
        kinds = {
            "folder": str(root / "all"),
            "table": str(root / "list.csv"),
            "array": (images, labels),
            "data set of torch": Pairs(images, labels),
            "data set of Hugging Face": pictures,
        }
        made = {}
        for name, form in kinds.items():
            run = ssl_kit.pretrain(form, run=str(root / name), epochs=1, batch_size=50, seed=3, verbose=False)
            losses = tuple(one["loss"] for one in curve(run))
            made[name] = (run["encoder_sha256"], losses, np.asarray(run.embed(form)).tobytes())
    apart = {
        name: len(set(ways)) - 1
        for name, ways in zip(("encoders", "curves", "vectors"), zip(*made.values(), strict=True), strict=True)
    }
    return [{"id": "I3", "what": f"{count:,} images as {', '.join(made)}: what differs", **apart}]


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=("files", "range", "forms"), default=("files", "range", "forms"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    parts = {"files": files, "range": ranges, "forms": forms}
    tell([row for name in given.only for row in parts[name](given.quick)], given.json)


if __name__ == "__main__":
    main()
