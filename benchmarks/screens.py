"""What a reader sees first: pictures of pages, as docs/pictures has them.

    python benchmarks/screens.py report_simclr=runs/a/report.html report_vae=runs/b/report.html [--out docs/pictures]
    python benchmarks/screens.py verdicts=runs/good/report.html,runs/bad/report.html --height 700    # side by side

Needs Chromium (Debian: apt install chromium). Pages are opened at --width by --height pixels, scaled to --shown pixels
in width and kept as WebP.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000")


def screen(page: Path, width: int, height: int) -> Image.Image:
    """The first screen of a page, when its charts are drawn."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("no Chromium is installed (Debian: apt install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "screen.png"
        told = (f"--window-size={width},{height}", f"--screenshot={path}", f"--user-data-dir={folder}/profile")
        subprocess.run([browser, *FLAGS, *told, page.resolve().as_uri()], check=True, capture_output=True)
        with Image.open(path) as image:
            return image.convert("RGB")


def beside(images: list[Image.Image], gap: int) -> Image.Image:
    """Images of one size in a row."""
    width, height = images[0].size
    joined = Image.new("RGB", (len(images) * (width + gap) - gap, height), "white")
    for number, image in enumerate(images):
        joined.paste(image, (number * (width + gap), 0))
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", metavar="NAME=PAGE[,PAGE...]")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=1400)
    parser.add_argument("--shown", type=int, default=1000, help="width of the picture that is kept")
    arguments = parser.parse_args()
    for given in arguments.pages:
        name, _, pages = given.partition("=")
        screens = [screen(Path(page), arguments.width, arguments.height) for page in pages.split(",")]
        picture = beside(screens, gap=24)
        size = (arguments.shown, round(picture.height * arguments.shown / picture.width))
        path = arguments.out / f"{name}.webp"
        picture.resize(size, Image.Resampling.LANCZOS).save(path, quality=85, method=6)
        print(f"{path}: {size[0]} x {size[1]}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
