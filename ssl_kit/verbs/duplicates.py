"""`ssl-kit duplicates`: groups of images that show the same picture, outliers, and leaks between two folders."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from ssl_kit.core.console import next_command, progress, say, table, warn
from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import read_json, write_csv
from ssl_kit.core.locking import lock
from ssl_kit.core.machine import available_cores
from ssl_kit.core.owned import check_output, record_in
from ssl_kit.core.random import permutation
from ssl_kit.core.reading import reading_in
from ssl_kit.core.sealed import Entries
from ssl_kit.core.settings import typed, verb
from ssl_kit.data.decode import decode
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.listing import unescape
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.exact import normalised, solver
from ssl_kit.embeddings.folder import check_comparable
from ssl_kit.embeddings.index import finder
from ssl_kit.embeddings.search import encoded, load_encoder, picture, read_file
from ssl_kit.evaluation.alignment import correlations, distances, edits, thumbnail
from ssl_kit.evaluation.duplicates import Around, Limits, apart, groups, isolation, limits, pairs_above

K = 32  # neighbours of each image that are looked at; larger groups are found link by link
_BLOCK = 4_096  # queries searched, or pairs compared, between two steps of the progress bar
_DEVICE_BLOCK = 65_536  # queries searched by an accelerator, to which each search brings the gallery anew
_PLANTED = 300  # images that are copied to find the limits
_ENCODED = 64  # planted copies that are encoded together
_SAME = 1 - 1e-4  # cosine of equal pictures; bfloat16 and the order of a batch move it by less
_SHOWN, _PIXELS = 200, (160, 160)  # groups and leaks on the page of pictures, and pixels of each
_IN_REPORT, _OF_GROUP = 12, 6  # groups and outliers in the run's report, images of a group there
_KINDS = ("file", "pixels", "near", "features")
_STREAM_SAMPLE = 100_012  # of core/random.py


class Pair(NamedTuple):
    """Two images that show the same picture: a row of each embeddings folder, and the cosine of their features.

    `kind`: "file" equal bytes, "pixels" equal pixels, "near" the same picture, "features" as far as features tell.
    """

    one: int
    two: int
    cosine: float
    kind: str


class _Look(NamedTuple):
    """What is kept of an image: hashes of its file and of its pixels, and a thumbnail (S, S, C) uint8."""

    file: bytes
    pixels: bytes
    thumbnail: np.ndarray


_Looks: TypeAlias = dict[int, _Look]  # of the images of an embeddings folder that can be read, by row


@dataclass(frozen=True)
class Settings:
    """Where to look for the same pictures.

    Args:
        emb: embeddings folder.
        other: another one of the same encoder: only pairs between the two are looked for, such as test images in train.
        threshold: cosine from which on images are compared, in [-1, 1]; default: found by planting copies (JPEG,
            crop, brightness) of the images themselves, which needs the images and the encoder.
        outliers: how many of the images farthest from their neighbours are listed.
        csv: file to write one line per image of a group to, or per leak.
        html: file to write groups and outliers to as pictures.
        encoder: run folder or encoder folder, when it is no longer where the embeddings were made.

    Examples:
        ssl-kit duplicates EMB --html duplicates.html --csv duplicates.csv
        ssl-kit duplicates TRAIN TEST
    """

    emb: str
    other: str | None = None
    _: KW_ONLY
    # What to read
    encoder: str | None = None
    # What to find
    threshold: float | None = None
    outliers: int = 20
    # Where it goes
    csv: str | None = None
    html: str | None = None


@verb(Settings)
def duplicates(settings: Settings) -> Entries:
    """Find groups of images that show the same picture, and outliers; or leaks between two embeddings folders.

    A few groups and outliers are left in the run that made the encoder, for its report.
    """
    for name in filter(None, (settings.csv, settings.html)):
        check_output(name)
    a = Embeddings.load(settings.emb)
    b = Embeddings.load(settings.other) if settings.other is not None else a
    check_comparable(a, b, settings.emb, settings.other)
    if len(a) < 2:
        raise UserError(f"{settings.emb} holds {len(a)} vectors; at least 2 are wanted")
    cosines, rows, recall = _neighbours(a, b)
    limit, planted = _limits(Path(settings.emb), a, settings.threshold, settings.encoder)
    found, chance = _same_pictures(a, b, cosines, rows, limit)
    limited = planted | {"cosine": limit.cosine, "correlation": limit.correlation, "by_chance": chance}
    record = {"emb": settings.emb, "other": settings.other, "limits": limited, "neighbours_found": round(recall, 4)}
    record |= (
        _grouped(a, found, isolation(cosines, rows), settings.outliers)
        if settings.other is None
        else _leaks(a, b, found)
    )
    record["pairs"] = {kind: [pair.kind for pair in found].count(kind) for kind in _KINDS}
    _tell(record)
    if settings.csv is not None:
        _write_csv(Path(settings.csv), record)
        say(f"table: {settings.csv}")
    if settings.html is not None:
        _draw(Path(settings.html), a, b, record)
        say(f"pictures: {settings.html}")
    if settings.other is None and (run := _run_of(a)) is not None:
        try:
            with lock(run), record_in(run):
                _draw_for_report(run, a, record)
            say(f"for the report of {run}: ssl-kit report {shlex.quote(str(run))}")
        except UserError as error:  # in use, or not to be written to
            warn(f"not in the report of {run}: {error}")
    again = shlex.join(["ssl-kit", "duplicates", *filter(None, (settings.emb, settings.other))])
    again = f"{typed(again, settings, 'threshold', 'outliers', 'encoder')} --html duplicates.html --csv duplicates.csv"
    next_command(f"open {shlex.quote(settings.html)}" if settings.html else again, own=not settings.html)
    return record | {"csv": settings.csv, "html": settings.html}


def _neighbours(a: Embeddings, b: Embeddings) -> tuple[np.ndarray, np.ndarray, float]:
    """(N, K) cosines and rows in `b` of each image of `a`, best first; and the share of them that is found."""
    gallery = normalised(b.vectors)
    queries = gallery if a is b else normalised(a.vectors)
    made, device = [], solver()
    block = _BLOCK if device == "cpu" else _DEVICE_BLOCK
    find, recall = finder(gallery, len(queries), device)
    with progress(len(queries), "neighbours") as bar:
        for start in range(0, len(queries), block):
            made.append(find(queries[start : start + block], K))
            bar.advance(bar.task_ids[0], len(made[-1][0]))
    return np.concatenate([scores for scores, _ in made]), np.concatenate([rows for _, rows in made]), recall


def _limits(folder: Path, a: Embeddings, threshold: float | None, encoder: str | None) -> tuple[Limits, Entries]:
    """The limits and how they were found: from planted copies of a sample of the images."""
    sample = np.sort(permutation(0, 0, len(a), _STREAM_SAMPLE)[:_PLANTED])
    originals = {int(row): picture(a.info, a.ids[row], None) for row in sample}
    readable = {row: image for row, image in originals.items() if image is not None}
    if len(readable) < len(sample) / 2:
        say(f"{folder}: the images are not where they were embedded from: features alone decide")
        return Limits(_SAME if threshold is None else threshold, None), {"planted": 0, "by": "features"}
    copies = [(row, kind, made) for row, image in readable.items() for kind, made in edits(image, row).items()]
    rows = np.array([row for row, _, _ in copies])
    thumbnails = (
        np.stack([thumbnail(readable[row]) for row in rows]),
        np.stack([thumbnail(made) for _, _, made in copies]),
    )
    correlated = correlations(*thumbnails)
    recompressed = np.array([kind == "jpeg" for _, kind, _ in copies])
    if threshold is not None:
        cosines = np.full(len(copies), threshold)
    else:
        loaded = load_encoder(folder, a.info, encoder)
        parts = [copies[start : start + _ENCODED] for start in range(0, len(copies), _ENCODED)]
        made = np.concatenate([encoded(loaded, a.info, [image for _, _, image in part]) for part in parts])
        cosines = (normalised(made) * normalised(a.vectors[rows])).sum(axis=1)
    limit = limits(cosines, correlated, distances(*(part[recompressed] for part in thumbnails))[:, 1])
    both = float(((cosines >= limit.cosine) & (correlated >= limit.correlation)).mean())
    return limit, {"planted": len(copies), "planted_found": round(both, 4), "by": "pictures"}


def _same_pictures(
    a: Embeddings, b: Embeddings, cosines: np.ndarray, rows: np.ndarray, limit: Limits
) -> tuple[list[Pair], float]:
    """The pairs that are copies, of unreadable images by equal features; how many of `a` may have one by chance."""
    pairs = pairs_above(cosines, rows, min(limit.cosine, _SAME), within=a is b)
    units = normalised(a.vectors), normalised(b.vectors)
    scores = np.einsum("md,md->m", units[0][pairs[:, 0]], units[1][pairs[:, 1]])
    looks = _look(a, pairs if a is b else pairs[:, 0], {})
    seen = looks, looks if a is b else _look(b, pairs[:, 1], {})
    kinds = [_kind(seen[0].get(one), seen[1].get(two)) for one, two in pairs.tolist()]
    chance = 0.0
    if limit.correlation is not None:
        unsure = np.flatnonzero([kind == "near" for kind in kinds])
        alike = unsure[_compared(correlations, pairs[unsure], seen)[:, 0] >= limit.correlation]
        near, chance = _apart(a, b, rows, pairs[alike], seen, limit) if len(alike) else (np.zeros(0, bool), 0.0)
        for place in np.setdiff1d(unsure, alike[near]):
            kinds[place] = ""
    enough = limit.cosine if limit.correlation is None else _SAME
    found = [
        Pair(one, two, score, kind)
        for (one, two), score, kind in zip(pairs.tolist(), scores.tolist(), kinds, strict=True)
        if kind and (kind != "features" or score >= enough)
    ]
    return found, chance


def _kind(first: _Look | None, second: _Look | None) -> str:
    """In what way two images may be the same; "near" for readable ones of different pixels."""
    if first is None or second is None:
        return "features"
    if first.pixels == second.pixels:
        return "file" if first.file == second.file else "pixels"
    return "near"


def _apart(
    a: Embeddings, b: Embeddings, rows: np.ndarray, pairs: np.ndarray, seen: tuple[_Looks, _Looks], limit: Limits
) -> tuple[np.ndarray, float]:
    """Which of `pairs` (M, 2) are copies, (M,) bool, and how many images of `a` may have one by chance."""
    asked = np.unique(pairs if a is b else pairs[:, 0])
    around = back = Around(asked, rows[asked])
    if a is not b:
        asked = np.unique(pairs[:, 1])
        find, _ = finder(normalised(a.vectors), len(asked), solver())
        back = Around(asked, find(normalised(b.vectors[asked]), K)[1])
        _look(b, around.neighbours, seen[1])
    _look(a, back.neighbours, seen[0])
    return apart(pairs, around, back, lambda wanted: _compared(distances, wanted, seen), limit.sure, within=a is b)


def _compared(measure: Callable[..., np.ndarray], pairs: np.ndarray, seen: tuple[_Looks, _Looks]) -> np.ndarray:
    """(M, values) of `measure` for the thumbnails of pairs (M, 2); NaN where an image could not be read."""
    ready = np.flatnonzero([one in seen[0] and two in seen[1] for one, two in pairs.tolist()])
    compared = np.full((len(pairs), 2), np.nan, dtype=np.float32)

    def measured(start: int) -> np.ndarray:
        places = pairs[ready[start : start + _BLOCK]]
        one, two = (np.stack([seen[side][row].thumbnail for row in places[:, side].tolist()]) for side in (0, 1))
        return measure(one, two).reshape(len(places), -1)

    starts = range(0, len(ready), _BLOCK)
    with ThreadPoolExecutor(available_cores(), "compare") as pool, progress(len(ready), "correlating") as bar:
        for start, values in zip(starts, pool.map(measured, starts), strict=True):
            compared[ready[start : start + _BLOCK], : values.shape[1]] = values
            bar.advance(bar.task_ids[0], len(values))
    return compared


def _look(embeddings: Embeddings, rows: np.ndarray, found: _Looks) -> _Looks:
    """`found`, with the images of `rows` (any shape) that can be read and are not in it yet."""
    wanted = [row for row in np.unique(rows).tolist() if row not in found]
    with ThreadPoolExecutor(available_cores(), "decode") as pool, progress(len(wanted), "comparing") as bar:
        for row, look in zip(wanted, pool.map(lambda row: _look_at(embeddings, row), wanted), strict=True):
            if look is not None:
                found[row] = look
            bar.advance(bar.task_ids[0], 1)
    return found


def _look_at(embeddings: Embeddings, row: int) -> _Look | None:
    data = read_file(embeddings.info, embeddings.ids[row])
    try:
        image = None if data is None else decode(data, reading_in(embeddings.info.get("preprocessing"))).image
    except BadImageError:
        image = None
    if data is None or image is None:
        return None
    pixels = hashlib.sha256(str(image.shape).encode() + image.tobytes()).digest()
    return _Look(hashlib.sha256(data).digest(), pixels, thumbnail(image))


def _grouped(a: Embeddings, found: list[Pair], far: np.ndarray, outliers: int) -> Entries:
    """The groups as records, of each the first image the one to keep; and the images with the largest `far` (N,)."""
    sets = groups(np.array([pair[:2] for pair in found], np.int64).reshape(-1, 2), len(a))
    best: dict[int, tuple[float, str]] = {}
    for pair in found:
        for row in pair[:2]:
            best[row] = max(best.get(row, (-2.0, "")), pair[2:])
    listed = [
        [{"id": a.ids[row], "cosine": round(best[row][0], 4), "kind": best[row][1]} for row in members.tolist()]
        for members in sets
    ]
    order = np.lexsort((np.arange(len(far)), -far))[:outliers]
    return {
        "images": len(a),
        "groups": listed,
        "superfluous": sum(len(members) - 1 for members in sets),
        "outliers": [{"id": a.ids[row], "distance": round(float(far[row]), 4)} for row in order],
    }


def _leaks(a: Embeddings, b: Embeddings, found: list[Pair]) -> Entries:
    listed = [
        {"id": a.ids[one], "other": b.ids[two], "cosine": round(score, 4), "kind": kind}
        for one, two, score, kind in found
    ]
    touched = [len({pair[side] for pair in found}) for side in (0, 1)]
    sizes = {"images": len(a), "other_images": len(b), "leaked": touched[0], "other_leaked": touched[1]}
    return {**sizes, "leaks": listed}


def _tell(record: Entries) -> None:
    limit = record["limits"]
    if limit["by"] == "pictures":
        say(
            f"compared: pairs with a cosine of at least {limit['cosine']:.3f} whose thumbnails correlate by "
            f"{limit['correlation']:.3f} or more ({limit['planted_found']:.1%} of {limit['planted']:,} planted copies)"
        )
        say(
            "the same: equal pixels, or both nearer to each other than anything that only looks alike; "
            f"by chance about {limit['by_chance']:.0f} of {record['images']:,} images look so"
        )
    else:
        say(f"the same: a cosine of at least {limit['cosine']:.4f}")
    kinds = record["pairs"].values()
    head = ["", "same file", "same pixels", "near", "by features"]
    if record["other"] is None:
        could_go = f"{record['superfluous']:,} of {record['images']:,} images could go"
        table(f"{record['emb']}: {len(record['groups']):,} groups, {could_go}", head, [["pairs", *kinds]])
        rows = [[one["id"], f"{one['distance']:.3f}"] for one in record["outliers"][:5]]
        if rows:
            table("farthest from their neighbours", ["id", "1 - mean cosine"], rows)
    else:
        title = f"{record['leaked']:,} of {record['images']:,} images of {record['emb']} are in {record['other']}"
        table(title, head, [["pairs", *kinds]])


def _write_csv(path: Path, record: Entries) -> None:
    """One line per image of a group and per outlier, or per leak."""
    if record["other"] is not None:
        columns = ("id", "other", "cosine", "kind")
        write_csv(path, columns, ([one[name] for name in columns] for one in record["leaks"]))
        return
    members = [
        (number, one["id"], one["cosine"], one["kind"], "yes" if place == 0 else "no")
        for number, group in enumerate(record["groups"])
        for place, one in enumerate(group)
    ]
    far = [("", one["id"], round(1 - one["distance"], 4), "outlier", "") for one in record["outliers"]]
    write_csv(path, ("group", "id", "cosine", "kind", "keep"), [*members, *far])


def _draw(path: Path, a: Embeddings, b: Embeddings, record: Entries) -> None:
    """A strip per group or leak, then one of the outliers."""
    from ssl_kit.report.page import strip_html

    show = lambda part, name: picture(part.info, name, _PIXELS)
    if record["other"] is not None:
        strips = [(one["id"], [(one["other"], one["cosine"])]) for one in record["leaks"][:_SHOWN]]
    else:
        alike = ([(one["id"], one["cosine"]) for one in members] for members in record["groups"][:_SHOWN])
        strips = [(members[0][0], members[1:]) for members in alike]
    asked = [(first, show(a, first)) for first, _ in strips]
    shown = [[(name, score, show(b, name)) for name, score in rest] for _, rest in strips]
    far = record.get("outliers", [])
    if far:
        asked.append(("farthest from their neighbours", show(a, far[0]["id"])))
        shown.append([(one["id"], 1 - one["distance"], show(a, one["id"])) for one in far])
    what = "Leaks" if record["other"] is not None else "Duplicates"
    strip_html(path, f"{what} in {Path(record['emb']).name}", asked, shown, note="Scores are cosine similarities.")


def _run_of(a: Embeddings) -> Path | None:
    """The run whose encoder made the embeddings, where it is still there and its encoder is still the same."""
    named = a.info.get("encoder")
    if not isinstance(named, str):
        return None
    encoder = Path(os.fsdecode(unescape(named)))
    run = encoder if (encoder / "run.json").is_file() else encoder.parent
    try:
        info = read_json(run / "run.json")
    except DamagedError:
        return None
    same = isinstance(info, dict) and info.get("encoder_sha256") == a.info["encoder_sha256"]
    return run if same else None


def _draw_for_report(run: Path, a: Embeddings, record: Entries) -> None:
    """The largest groups and the farthest outliers, as RUN/pictures/duplicates.json."""
    from ssl_kit.report.pictures import draw_duplicates

    groups = sorted(record["groups"], key=len, reverse=True)[:_IN_REPORT]
    draw_duplicates(
        run / "pictures",
        [[one["id"] for one in members[:_OF_GROUP]] for members in groups],
        [(one["id"], one["distance"]) for one in record["outliers"][:_IN_REPORT]],
        lambda name: picture(a.info, name, _PIXELS),
        num_images=record["images"],
        num_groups=len(record["groups"]),
        superfluous=record["superfluous"],
    )
