"""What the page's sections of pictures show: words and strips, from what was read of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ssl_kit.evaluation.catalog import ENCODER
from ssl_kit.report import charts
from ssl_kit.report.reading import Run
from ssl_kit.report.reading_pictures import VIEWS
from ssl_kit.report.scores import feature_name

_NEIGHBOURS_SHOWN = 10  # per strip
_LEGEND = 40  # classes with a button above the map, the most frequent ones
_SEES = (  # where run.json does not tell what to look for
    "Each column is one image: the original on top, below it the views the method learns from. Could you tell that "
    "they belong together?"
)
_TITLES = {
    VIEWS: "Views",
    "reconstruction": "Image, what is seen of it, and what is filled in",
    "reconstructions": "Images and their reconstructions",
    "interpolations": "From one image to another",
    "samples": "Samples",
    "traversals": "What single numbers of the code change",
}
_ORDER = {name: place for place, name in enumerate(_TITLES)}
_WIDE = 1.5  # times as wide as high: such a picture gets the whole width of the page


def seen(runs: Sequence[Run]) -> str:
    """What to look for in the pictures of the method: in words for one method, nothing for several."""
    methods, told = {run.method for run in runs}, runs[0].info.get("shows")
    return (told if isinstance(told, str) and told else _SEES) if len(methods) == 1 else ""


def shown_pictures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The pictures with their titles and captions: all of one run, the first one of each of several."""
    several = len(runs) > 1
    shown = []
    for run in runs:
        # what a method shows of itself says more than its input; that is what the first screen of several has room for
        order = lambda one: (several and one.name == VIEWS, _ORDER.get(one.name, len(_ORDER)))
        for picture in sorted(run.pictures, key=order)[: 1 if several else None]:
            title = _TITLES.get(picture.name, picture.name.replace("_", " ").capitalize())
            wide = picture.width > _WIDE * picture.height or len(run.pictures) == 1
            told = f"{run.name}: {title[:1].lower()}{title[1:]}" if several else title
            shown.append({"title": told, "picture": picture, "wide": wide and not several})
    return shown


def strips(value: dict[str, Any]) -> dict[str, Any]:
    """The query strips as the page shows them: the encoder's row first, ten neighbours, right or wrong where known."""
    labels, names = value["labels"], sorted(value["found"], key=lambda name: name != ENCODER)
    queries, right, asked = [], Counter[str](), Counter[str]()
    for position, query in enumerate(value["queries"]):
        rows = []
        for name in names:
            hits = [_hit(value, place, labels[query]) for place in value["found"][name][position][:_NEIGHBOURS_SHOWN]]
            same = sum(hit["mark"] == "right" for hit in hits)
            if labels[query] >= 0:
                right[name] += same
                asked[name] += len(hits)
            told = f", {same} of {len(hits)} right" if labels[query] >= 0 else ""
            rows.append({"name": feature_name(name), "told": told, "hits": hits})
        name = value["classes"][labels[query]] if labels[query] >= 0 else f"query {position + 1}"
        queries.append({"name": name, "image": value["images"][query], "rows": rows})
    sums = [f"{right[name]} of {asked[name]} by {feature_name(name)}" for name in names if asked[name]]
    return {"queries": queries, "told": f"Of the query's class: {', '.join(sums)}." if sums else ""}


def _hit(value: dict[str, Any], place: int, asked: int) -> dict[str, str]:
    label = value["labels"][place]
    mark = "" if asked < 0 else "right" if label == asked else "wrong"
    name = value["classes"][label] if label >= 0 else "unlabelled"
    return {"name": name, "image": value["images"][place], "mark": mark}


def map_context(value: dict[str, Any]) -> dict[str, Any]:
    """The classes that have a button above the map, and what the map is."""
    counts = Counter(label for label in value["labels"] if label >= 0)
    shown = sorted(label for label, _ in counts.most_common(_LEGEND))
    told = value["projection"].rstrip(".") or f"{len(value['labels']):,} images in the plane"
    return {
        "legend": [(label, charts.shape_of(label), value["classes"][label], counts[label]) for label in shown],
        "count": f"{len(value['labels']):,}",
        "told": told + ".",
    }


def duplicate_strips(value: dict[str, Any]) -> dict[str, Any]:
    """Groups of images that show the same picture, and outliers with their distance."""
    show = lambda place, note: {"image": value["images"][place], "name": value["ids"][place], "note": note}
    num_groups, superfluous, num_images = (value[name] for name in ("num_groups", "superfluous", "num_images"))
    told = f"Among {num_images:,} images {num_groups:,} groups show the same picture; {superfluous:,} images could go."
    return {
        "told": told if num_groups else f"No two of {num_images:,} images show the same picture.",
        "groups": [
            [show(place, "keep" if not position else "") for position, place in enumerate(group)]
            for group in value["groups"]
        ],
        "outliers": [show(place, f"{distance:.2f}") for place, distance in value["outliers"]],
    }
