"""Images that lie in shards: the same training whatever holds them; `pack` killed; hostile and truncated shards.

    python benchmarks/faults/shards.py [--moto PATH] [--only H1,H2] --json shards.json    # goes on where it was stopped
    python benchmarks/faults/shards.py --quick

H1  2,000 images in 10 classes as a folder, packed byte for byte in 3 shards, as one tar of somebody else, as Parquet of
    4 groups of rows, and the packed ones at `s3://` (moto_server on the loopback, which --moto names if it is not on
    the path): ids, labels, the curve of the loss, the trained weights and the vectors are those of the folder, to the
    bit. SimCLR of two epochs; images are read when they are needed, from the shards, in every step.
H2  `pack` killed at random moments, every other time twice, and started again: the bytes of an undisturbed one.
H3  tars and Parquet files that somebody made to do harm, opened and read whole in a child: what is honest in them comes
    out, the rest is refused or skipped by its name, and the process grows by less than 256 MiB; by 1 GiB more where a
    group of rows is read, which may have so many bytes.
H4  a shard that ends early, at a random byte: exactly the images that are not whole in it are missing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import os
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import Rows, fork_warmed, kill_at_random, run_warmed, s3_server, tail
from isolated import isolated
from PIL import Image

import ssl_kit.verbs.pretrain as training
from ssl_kit.core.console import spoken
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.opening import open_source
from ssl_kit.data.sources import pixels
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.verbs.embed import embed
from ssl_kit.verbs.pack import pack

sys.path[:0] = [str(Path(__file__).parents[2] / "tests" / place) for place in ("data", ".")]
crafted, tested = importlib.import_module("hostile_parquet"), importlib.import_module("test_shards")

IMAGES, CLASSES = 2_000, 10
FORMS = ("packed", "foreign.tar", "rows.parquet", "s3")
GROWN, GROUP = 2**28, 2**30  # bytes
CLOCK = ("seconds", "images_per_second", "waiting_share")  # columns of metrics.csv that a clock fills


def photographs(folder: Path, count: int) -> None:
    """JPEG and PNG of several sizes in folders of their classes."""
    for number in range(count):
        draw = np.random.default_rng(number)
        coarse = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        path = folder / f"class {number % CLASSES}" / f"{number:04d}.{'png' if number % 5 == 0 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse.resize((32 + 8 * (number % 3), 40), Image.Resampling.BICUBIC).save(path)


class Forms:
    """The same images in every form, and what came of each; all work is done by children of this process."""

    def __init__(self, place: Path, count: int, moto: str):
        self.place, self.log, self.moto, self.count = place, place / "log.txt", moto, count
        self.options = ""
        photographs(place / "folder", count)
        ids = open_source(str(place / "folder"), in_memory=False).ids()
        self.read = {name: (place / "folder" / name).read_bytes() for name in ids}
        size = sum(map(len, self.read.values())) + 1_100 * count
        pack(str(place / "folder"), str(place / "packed"), keep=True, shard_size=str(size // 3 + 20_000))
        tested.tar(place / "foreign.tar", [(f"./{name}", data) for name, data in self.read.items()])
        images = [{"bytes": data, "path": name} for name, data in self.read.items()]
        table = pa.table({"image": images, "label": [name.partition("/")[0] for name in ids]})
        pq.write_table(table, place / "rows.parquet", row_group_size=-(-count // 4))

    def address(self, form: str) -> str:
        """What the command is given."""
        return f"s3://photos/packed?{self.options}" if form == "s3" else str(self.place / form)

    def train(self, form: str) -> None:
        """A short training, and the vectors of the folder's encoder."""
        training.all_fit = lambda fits: False  # read from where they lie, in every step
        run, name = self.place / f"run-{form}", f"emb-{form}"
        method = {"class_path": "ssl_kit.methods.simclr.SimCLR"}
        method["init_args"] = {"encoder": {"name": "resnet18_small", "args": {"channels": [4, 4, 8, 8]}}}  # type: ignore[assignment]
        training.pretrain(self.address(form), run=str(run), epochs=2, batch_size=100, image_size=32, method=method)
        embed(str(self.place / "run-folder" / "encoder"), self.address(form), out=str(self.place / name))

    def outcome(self, form: str) -> dict[str, Any]:
        """What must be equal."""
        with open(self.place / f"run-{form}" / "metrics.csv", newline="") as file:
            curves = [{key: value for key, value in row.items() if key not in CLOCK} for row in csv.DictReader(file)]
        made = Embeddings.load(self.place / f"emb-{form}")
        weights = (self.place / f"run-{form}" / "encoder" / "model.safetensors").read_bytes()
        source = open_source(self.address(form), in_memory=False)
        order = source.ids(), source.classes, source.labels().tolist()
        return {"order and labels": order, "ids of vectors": made.ids, "vectors": made.vectors.tobytes()} | {
            "curves": curves,
            "weights": weights,
        }

    def same(self, form: str) -> str | None:
        """Trains on a form, and on the folder once; what differs."""
        if not (self.place / "emb-folder").is_dir():
            run_warmed(lambda: self.train("folder"), self.log)
        with self.served() if form == "s3" else spoken(False):
            run_warmed(lambda: self.train(form), self.log)
            found: list[str] = []
            process = fork_warmed(lambda: self.compare(form), self.log)
            process.join()
            if process.exitcode:
                found.append(tail(self.log, 2))
        return "; ".join(found) or None

    def compare(self, form: str) -> None:
        """Ends with 1 where something differs, and says what."""
        wanted, got = self.outcome("folder"), self.outcome(form)
        if wrong := [name for name in wanted if got[name] != wanted[name]]:
            sys.exit(f"{form}: {', '.join(wrong)} differ")

    @contextmanager
    def served(self) -> Iterator[None]:
        """The packed images on an S3 server of this machine."""
        with s3_server(self.moto) as (_, self.options, put):
            put("photos", None)
            for path in (self.place / "packed").glob("*.*"):
                put(f"photos/packed/{path.name}", path.read_bytes())
            yield

    def truncated(self, number: int, generator: random.Random) -> str | None:
        """H4."""
        place = self.place / "truncated"
        shutil.copytree(self.place / "packed", place)
        path = generator.choice(sorted(place.glob("*.tar")))
        end = generator.randrange(1, path.stat().st_size)
        with tarfile.open(path) as file:
            inside = [one for one in file if not one.name.endswith(".cls")]
        lost = {one.name for one in inside if one.offset_data + one.size > end}
        os.truncate(path, end)
        source = open_source(str(place), in_memory=False, max_bad=1.0)
        stored = source.read(slice(None))
        shutil.rmtree(place)
        missing = {name for name, one in zip(source.ids(), stored, strict=True) if isinstance(one, BadImageError)}
        wrong = [n for n, one in zip(source.ids(), stored, strict=True) if n not in missing and one != self.read[n]]
        if missing == lost and not wrong and len(source) == self.count:
            return None
        return f"{path.name} cut at {end:,}: {len(missing):,} missing, {len(lost):,} lost, {len(wrong):,} others"


class Kills:
    """`pack`, killed and started again."""

    def __init__(self, forms: Forms):
        self.data, self.place, self.log = forms.place / "folder", forms.place, forms.log
        run_warmed(self.packing("first"), self.log)
        self.seconds = run_warmed(self.packing("whole"), self.log)
        self.wanted = contents(self.place / "whole")
        assert contents(self.place / "first") == self.wanted, "two undisturbed ones are equal"

    def packing(self, name: str) -> Callable[[], None]:
        """The work of a child: 16 shards or so."""
        return lambda: pack(str(self.data), str(self.place / name), size=24, shard_size="250kB") and None

    def trial(self, number: int, generator: random.Random) -> str | None:
        """H2."""
        folder, told = self.place / "killed", []
        for _ in range(1 + number % 2):
            moment = kill_at_random(self.packing("killed"), self.seconds, generator, self.log)
            while moment is None:
                shutil.rmtree(folder)
                moment = kill_at_random(self.packing("killed"), self.seconds, generator, self.log)
            told.append(f"{moment:.2f} s, {len([*folder.glob('0*.tar')]) if folder.exists() else 0} shards")
        print("killed at", " then ".join(told))
        process = fork_warmed(self.packing("killed"), self.log)
        process.join()
        got = contents(folder) if folder.exists() else {}
        shutil.rmtree(folder, ignore_errors=True)
        if process.exitcode:
            return f"started again, it ended with {process.exitcode}: {tail(self.log, 2)}"
        wrong = sorted(name for name in got.keys() | self.wanted.keys() if got.get(name) != self.wanted.get(name))
        return f"{', '.join(wrong[:5])} of {len(self.wanted)} files differ" if wrong else None


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of all files but the lock, which is empty."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def hostile(place: Path) -> list[Path]:
    """H3: the tars of tests/data/test_shards.py, what is no tar at all, and Parquet files."""
    made = list[Path]()
    for number, (data, _) in enumerate(tested.HOSTILE.values()):
        path = tested.tar(place / f"{number:02d}.tar", tested.GOOD, end=False)
        path.write_bytes(path.read_bytes() + data)
        made.append(path)
    for name, data in {"empty.tar": b"", "page.tar": b"<html>" * 200, "nothing.tar": bytes(2048)}.items():
        (place / name).write_bytes(data)
        made.append(place / name)
    images = [data for _, data in tested.GOOD]
    whole = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": one, "path": f"{n}.png"} for n, one in enumerate(images)]}), whole)
    data, draw = whole.getvalue(), random.Random(0)
    files = {f"cut-{number}.parquet": data[: draw.randrange(4, len(data) - 1)] for number in range(4)}
    for number in range(6):
        at = draw.randrange(4, len(data) - 8)
        files[f"flipped-{number}.parquet"] = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    files["promise.parquet"] = data[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1"
    files["rows.parquet"] = crafted.repeated({"path": b"x" * 99}, 2**26)
    files["columns.parquet"] = crafted.parquet({1: 2, 2: crafted.listed(2**30), 3: crafted.Long(9), 4: []})
    for name, content in files.items():
        (place / name).write_bytes(content)
        made.append(place / name)
    same = pa.DictionaryArray.from_arrays(np.zeros(3_000, np.int32), pa.array([images[0] + bytes(2**20)], pa.binary()))
    tables = {"dictionary": {"image": same}, "names": {"image": [{"bytes": images[0], "path": "x" * 9_000}]}}
    tables |= {"nulls": {"image": pa.array([images[0], None, b"no image"], pa.binary())}, "lists": {"image": [[1]]}}
    tables["labels"] = {"image": images, "label": [[1, 2], [3]]}
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), place / f"{name}.parquet", store_schema=False)
        made.append(place / f"{name}.parquet")
    return made


def hostile_trial(path: Path) -> str | None:
    """One of them."""
    honest = {data for _, data in tested.GOOD}

    def read() -> str:
        source = open_source(str(path), in_memory=False, max_bad=1.0)
        wrong = bad = 0
        for row in range(len(source)):
            try:
                pixels(source, row)
                wrong += source.content(row) not in honest
            except BadImageError:
                bad += 1
        return "wrong images" if wrong else f"{len(source) - bad} read, {bad} bad, {len(source.bad.rows)} skipped"

    outcome = isolated(read, limit=60)
    print(f"{path.name}: {outcome.kind}, {outcome.grown / 2**20:.0f} MiB, {outcome.text[:150]}")
    if outcome.kind not in ("returned", "refused") or outcome.text.startswith("wrong"):
        return f"{path.name}: {outcome.kind} {outcome.text[:80]}"
    if outcome.kind == "refused" and path.name not in outcome.text:
        return f"{path.name}: its name is not said: {outcome.text[:80]}"
    most = GROWN + GROUP * (path.stem == "dictionary")
    return f"{path.name}: grew by {outcome.grown:,} bytes" if outcome.grown > most else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 images, 2 kills, no S3")
    parser.add_argument("--only", default="H1,H2,H3,H4")
    parser.add_argument(
        "--moto", default=shutil.which("moto_server"), help="an S3 server; without one s3:// is left out"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, only = Rows(arguments.json), arguments.only.split(",")
    count = 200 if arguments.quick else IMAGES
    with tempfile.TemporaryDirectory() as folder, spoken(False):
        os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "AWS_EC2_METADATA_DISABLED": "true"}
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        forms = Forms(Path(folder), count, arguments.moto or "")
        chosen = [form for form in FORMS if form != "s3" or (arguments.moto and not arguments.quick)]
        for form in chosen if "H1" in only else ():
            rows.run(
                f"H1/{form}", f"{count:,} images in {form}, as in a folder", 1, lambda *_, form=form: forms.same(form)
            )
        if "H2" in only:
            kills = Kills(forms)
            what = f"pack of {count:,} images, {len(kills.wanted) - 3} shards, killed and started again"
            rows.run("H2", what, 2 if arguments.quick else 20, kills.trial)
        if "H3" in only:
            cases = hostile(Path(folder))
            rows.run("H3", "hostile tars and Parquet files", len(cases), lambda number, _: hostile_trial(cases[number]))
        if "H4" in only:
            rows.run("H4", "a shard truncated at a random byte", 4 if arguments.quick else 20, forms.truncated)


if __name__ == "__main__":
    main()
