"""`ssl-kit search`: images in, the nearest images of an indexed embeddings folder out."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from ssl_kit.core.console import next_command, progress, say, spoken, table, warn
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, read_manifest
from ssl_kit.core.owned import RUN
from ssl_kit.core.reading import Function
from ssl_kit.core.sealed import Entries, read_object
from ssl_kit.core.settings import typed, verb
from ssl_kit.data.listing import escape_path, folder_of_images, unescape
from ssl_kit.embeddings.search import BATCH, Index, Neighbour, has_index, picture
from ssl_kit.embeddings.signing import find_key
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.index import make_index
from ssl_kit.verbs.recipes import read_recipe

_THUMBNAIL = (160, 160)  # pixels
_SHOWN = 20  # queries printed as tables
_DRAWN = 200  # queries on a page of pictures: each takes about 100 kB


class Query(NamedTuple):
    """An image to look for: a file, or an id of the folder itself (then `path` is None). `asked`: by its own name."""

    name: str
    path: Path | None
    asked: bool


Answer: TypeAlias = tuple[Query, np.ndarray | None, list[Neighbour]]  # pixels are None for an id


@dataclass(frozen=True)
class Settings:
    """What to look for, and where.

    Args:
        emb: embeddings folder, or a run: its images are embedded first, to RUN/embeddings, unless they are already.
            Where there is no index yet, one is made if it can be, as `ssl-kit index` does.
        images: image files, folders of them, or ids of the embeddings folder itself (as a search prints them).
        k: images to find for each; at most as many as there are. An image named by its id does not find itself.
        html: file to write the answer to as pictures.
        encoder: run folder or encoder folder, when it is no longer where the embeddings were made.
        reader: module:function of your own that reads the files, behind --allow MODULE: (bytes, id) -> array.
        trust_index: open the index whoever made it; by default one that you did not sign is not used, and the vectors
            answer exactly.

    Examples:
        ssl-kit search EMB cat.jpg -k 12
        ssl-kit search EMB cat.jpg dog.jpg --html neighbours.html
    """

    emb: str
    images: list[str]
    _: KW_ONLY
    # What to read
    encoder: str | None = None
    reader: Function | None = None
    trust_index: bool = False
    # What to find
    k: int = 12
    # Where it goes
    html: str | None = None


@verb(Settings)
def search(settings: Settings) -> Entries:
    """Find the images most like the given ones in an embeddings folder.

    Returns:
        `{"emb", "queries": [{"image", "results": [{"rank", "score", "id"}]}], "skipped", "html"}`; a score is a cosine.
    """
    names = [settings.images] if isinstance(settings.images, str) else list(settings.images)
    if settings.k < 1:
        raise UserError(f"-k {settings.k}: wanted at least 1")
    if not names:
        raise UserError("no image was given: name one or more image files after the embeddings folder")
    if (Path(settings.emb) / RUN).is_file():
        settings = replace(settings, emb=_embeddings_of(Path(settings.emb), settings.reader))
    _make_missing_index(Path(settings.emb))
    index = Index.load(settings.emb, encoder=settings.encoder, trust_index=settings.trust_index)
    asked = _queries(names)
    if any(query.path for query in asked):
        index.encoder.reading = index.encoder.reading.by(settings.reader)
    answers, skipped = _answers(index, asked, settings.k, _DRAWN if settings.html is not None else 0)
    queries = [_record(query, found) for query, _, found in answers]
    if not queries:
        raise UserError(f"none of {len(asked):,} images could be decoded, first {skipped[0]}; give image files")
    _tell(queries, skipped)
    if settings.html is not None:
        _strip(Path(settings.html), index, answers)
    if settings.html is not None:
        next_command(f"open {shlex.quote(settings.html)}", own=False)
    else:
        again = shlex.join(["ssl-kit", "search", settings.emb, *map(str, names)])
        again = typed(again, settings, "k", "encoder", "trust_index")
        next_command(f"{again} --html neighbours.html")
    return {"emb": settings.emb, "queries": queries, "skipped": skipped, "html": settings.html}


def _queries(names: Sequence[str]) -> list[Query]:
    """Files as they are, folders as the images in them, everything else as ids."""
    queries = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = [path / os.fsdecode(unescape(found)) for found in folder_of_images(path).ids]
            queries += [Query(escape_path(file), file, False) for file in inside]
        elif path.exists() or path.is_absolute():
            queries.append(Query(escape_path(path), path, True))
        else:
            queries.append(Query(name, None, True))
    return queries


def _embeddings_of(run: Path, reader: Function | None) -> str:
    """RUN/embeddings, of the run's images by its encoder: made anew where that has been trained on since."""
    folder = run / "embeddings"
    there = (folder / MANIFEST).is_file()
    if there and read_manifest(folder, verify=False)["encoder_sha256"] == read_object(run / RUN).get("encoder_sha256"):
        return str(folder)
    recipe = read_recipe(str(run / "recipe.yaml")) if (run / "recipe.yaml").is_file() else {}
    if "data" not in recipe:  # arrays: there is nothing to embed, which is said where embeddings are opened
        return str(run)
    say(f"{run}: its images are embedded first, to {folder}")
    with spoken(True):  # without the hint at a search
        embed(str(run), recipe["data"], out=str(folder), limit=recipe.get("limit"), reader=reader, overwrite=there)
    return str(folder)


def _make_missing_index(folder: Path) -> None:
    """Makes an index where there is none, if it can be kept; the vectors answer otherwise."""
    if not folder.is_dir() or has_index(folder) or not os.access(folder, os.W_OK):
        return
    find_key()  # one that is refused is to be mended, no reason to go without
    say(f"{folder} has no index yet: making one (`ssl-kit index` has a choice of kinds)")
    try:
        make_index(str(folder))
    except (UserError, OSError) as error:  # no room, another process at it, a user's own file in its place
        warn(str(error))


def _answers(index: Index, asked: Sequence[Query], k: int, drawn: int) -> tuple[list[Answer], list[str]]:
    """Query, its neighbours and the pixels of the first `drawn`, files first; and the bad files of folders.

    All are searched together: without an index, a search goes through all vectors.
    """
    files: list[tuple[Query, np.ndarray | None]] = []
    made: list[np.ndarray] = []
    skipped: list[str] = []
    with progress(len(asked), "search") as bar:
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            seen = list(_decoded(index, batch, skipped))
            if seen:
                made.append(index.encode([pixels for _, pixels in seen]))
            files += [
                (query, pixels if len(files) + place < drawn else None) for place, (query, pixels) in enumerate(seen)
            ]
            bar.advance(bar.task_ids[0], len(batch))
    ids = [query for query in asked if query.path is None]
    near = index.search_vectors(np.concatenate(made), k) if made else []
    near += index.search_ids([query.name for query in ids], k) if ids else []
    shown = [*files, *((query, None) for query in ids)]
    return [(query, pixels, found) for (query, pixels), found in zip(shown, near, strict=True)], skipped


def _decoded(index: Index, batch: Sequence[Query], skipped: list[str]) -> Iterator[tuple[Query, np.ndarray]]:
    """The files among queries with their pixels; bad files of folders go to `skipped`."""
    for query in batch:
        if query.path is None:
            continue
        try:
            yield query, index.pixels([query.path])[0]
        except UserError:
            if query.asked:
                raise
            skipped.append(query.name)


def _record(query: Query, found: Sequence[Neighbour]) -> Entries:
    results = [{"rank": rank, "score": round(one.score, 6), "id": one.id} for rank, one in enumerate(found, 1)]
    return {"image": query.name, "results": results}


def _tell(queries: Sequence[Entries], skipped: Sequence[str]) -> None:
    for query in queries[:_SHOWN]:
        rows = [[one["id"], one["rank"], f"{one['score']:.4f}"] for one in query["results"]]
        table(query["image"], ["id", "rank", "cosine"], rows)
    if len(queries) > _SHOWN:
        say(f"{len(queries) - _SHOWN:,} more of {len(queries):,} queries are not printed: --json gives all")
    if skipped:
        warn(f"{len(skipped):,} images could not be decoded, first {skipped[0]}")


def _strip(path: Path, index: Index, answers: Sequence[Answer]) -> None:
    """The page of queries and what was found."""
    from ssl_kit.report.page import strip_html

    drawn = answers[:_DRAWN]
    thumbnail = lambda name: picture(index.info, name, _THUMBNAIL)
    asked = [(query.name, thumbnail(query.name) if pixels is None else pixels) for query, pixels, _ in drawn]
    shown = [[(one.id, one.score, thumbnail(one.id)) for one in found] for _, _, found in drawn]
    strip_html(path, f"Nearest images in {index.folder.name}", asked, shown)
    more = f" (the first {len(drawn)} of {len(answers):,} queries)" if len(answers) > len(drawn) else ""
    say(f"pictures: {path}{more}")
