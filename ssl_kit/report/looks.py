"""The words of "what the encoder looks at": what each kind of picture in looks.json shows, and in which units.

The file of a run says which kinds there are and fills in numbers; the sentences are here, so that no file speaks for
itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """A row of pictures; numbers of the file are filled into `caption`, `scale` names its colours."""

    title: str
    caption: str
    scale: str = ""  # "heat": dark to bright; "signed": blue, grey, orange


KINDS: dict[str, Kind] = {
    "image": Kind("Test images", "As the encoder sees them; below each its class."),
    "neighbour": Kind(
        "Nearest training image",
        "By the cosine of this encoder's features, in [-1, 1]; below each its class and the cosine.",
    ),
    "attention": Kind(
        "Attention of the class token",
        "Last block, mean over the heads: the share of the class token's attention that a patch gets. Attention that "
        "knows nothing would give each {even:.4f}.",
        "heat",
    ),
    "patch": Kind(
        "Cosine to the framed patch",
        "How alike the last block's features of each patch are to those of the framed one: a cosine, 1 in the frame.",
        "heat",
    ),
    "colours": Kind(
        "Features as colours",
        "The first three principal components of the features at {rows} x {columns} positions, as red, green and blue: "
        "equal colours, equal features, in all of these images. Colours have no unit and no meaning of their own.",
    ),
    "similarity": Kind(
        "What makes it similar to its neighbour",
        "Grad-CAM of the cosine to the image in the second row, at {rows} x {columns} positions, interpolated. The "
        "unit is the cosine: where features are pooled by their mean, the mean of a map is the cosine. What speaks "
        "against the similarity is drawn as 0.",
        "heat",
    ),
    "gradients": Kind(
        "Pixels behind the similarity",
        "Integrated gradients of the cosine to the image in the second row, from an image of the mean colour, summed "
        "over channels; orange raises the cosine, blue lowers it. They sum to its gain, up to {miss:.4f} here.",
        "signed",
    ),
}


def look_rows(looks: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows as the page shows them, with titles, captions, scales and alternative texts."""
    names: list[str] = next((row["notes"] for row in looks["rows"] if row["kind"] == "image"), [])
    rows = []
    for row in looks["rows"]:
        kind, numbers = KINDS[row["kind"]], row["numbers"]
        caption = kind.caption.format_map(_Known(numbers))
        names = names or [f"image {position + 1}" for position in range(len(row["images"]))]
        pictures = [
            {"image": image, "note": note, "alt": f"{kind.title}, image {position + 1}: {note or names[position]}"}
            for position, (image, note) in enumerate(zip(row["images"], row["notes"], strict=True))
        ]
        scale = (f"{numbers['low']:.3g}", f"{numbers['high']:.3g}") if {"low", "high"} <= numbers.keys() else None
        rows.append({"kind": kind, "caption": caption, "pictures": pictures, "scale": scale, "name": row["kind"]})
    return rows


class _Known(dict[str, Any]):
    """Numbers that a file left out are written as a question mark."""

    def __missing__(self, name: str) -> _Unknown:
        return _Unknown()


class _Unknown:
    def __format__(self, how: str) -> str:
        return "?"
