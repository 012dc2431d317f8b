"""What files of strangers make a process take: those that are refused, at most 64 MiB more than a small honest one.

Each case runs in a process of its own that has read a small honest file of the kind before. Its peak is reset then, so
that what is measured is what the file made it grow.
"""

import io
import json
import multiprocessing
import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile_parquet import Long, listed, parquet, repeated, schema, varint
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.core.files import sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.data.decode import BadImageError, decode, image_size
from ssl_kit.data.headers import bytes_per_pixel
from ssl_kit.data.sources import open_source
from ssl_kit.data.tables import read_table
from ssl_kit.embeddings import Embeddings, embed
from ssl_kit.encoders.encoder import CONFIG, RECORD, Encoder
from ssl_kit.encoders.pretrained import load_pretrained
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.parts import find_ids, read_rows, read_vectors
from ssl_kit.verbs.fitting import fit_to_machine, view_schedule, view_size
from ssl_kit.views.recipe import ViewRecipe

MIB = 2**20
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["ssl_kit.embeddings", "test_bounds"])
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc"
)


def memory(name):
    """A line of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def measured(pipe, call, honest, path):
    """In the child: reads an honest file, then the other one; what takes 6 GiB ends there, and takes no more."""
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + 6 * 2**30,) * 2)
    call(honest)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it has now
    before, began = memory("VmRSS"), time.process_time()
    try:
        told = "returned", str(call(path))[:100]
    except (UserError, BadImageError) as error:
        told = "refused", str(error)
    except BaseException as error:
        told = "crashed", repr(error)
    pipe.send((*told, memory("VmHWM") - before, time.process_time() - began))


def grown(call, honest, path):
    """(what a call ended with, in words, bytes that it grew at its peak)."""
    ours, theirs = PROCESSES.Pipe()
    child = PROCESSES.Process(target=measured, args=(theirs, call, honest, path))
    child.start()
    theirs.close()
    kind, text, size, seconds = ours.recv() if ours.poll(120) else ("hung", "", 0, 120)
    child.kill()
    child.join()
    print(f"{call.__name__}: {kind}, {size / MIB:.0f} MiB, {seconds:.1f} s: {text}")
    return kind, text, size


def refused(call, honest, path):
    """The line that a call is refused with, in at most 64 MiB."""
    kind, text, size = grown(call, honest, path)
    assert kind == "refused" and size <= 64 * MIB and "\n" not in text, (kind, text[:300], size / MIB)
    return text


# --- lists of images


def words(*rows):
    return [f"{row:08d}.png" for row in rows]


def write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)


def of_one_path(path):
    path.write_bytes(repeated({"path": b"a.png"}, 10**8, padding=2_300_000))


def of_one_path_and_justified(path):
    path.write_bytes(repeated({"path": b"a.png"}, 9 * 10**6, padding=2_300_000))


def of_one_long_path(path):
    path.write_bytes(repeated({"path": b"a" * 10**6}, 10**5))


def of_long_labels(path):
    write(path, {"path": words(*range(1_000)), "label": pa.DictionaryArray.from_arrays([0] * 1_000, ["a" * 10**6])})


def of_packed_paths(path):
    write(path, {"path": ["a" * 10**5] * 5_000}, compression="zstd", use_dictionary=False)


def of_packed_labels(path):
    columns = {"path": words(*range(5_000)), "label": ["a" * 10**5] * 5_000}
    write(path, columns, compression="zstd", use_dictionary=False)


def of_paths_that_share_their_beginning(path):
    columns = {"path": [f"{'a' * 10**5}{row}" for row in range(3_000)]}
    write(path, columns, compression="zstd", use_dictionary=False, column_encoding={"path": "DELTA_BYTE_ARRAY"})


def of_many_numbered_paths(path):
    options = {"compression": "zstd", "use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
    write(path, {"path": words(*range(10**6))}, **options)


def of_a_footer_that_promises_columns(path):
    path.write_bytes(parquet({1: 2, 2: schema("path"), 3: Long(1), 4: [{1: listed(10**6), 2: Long(1), 3: Long(1)}]}))


def of_a_footer_that_promises_a_schema(path):
    path.write_bytes(parquet({1: 2, 2: listed(10**6), 3: Long(1), 4: []}))


def of_a_footer_of_nothing(path):
    path.write_bytes(parquet({1: 2, 2: schema("path"), 3: Long(0), 4: [], 5: listed(10**6, bytes(10**6))}))


def of_many_columns(path):
    path.write_bytes(parquet({1: 2, 2: schema("path", *map(str, range(10**5))), 3: Long(0), 4: []}))


def of_one_page_for_all(path):
    path.write_bytes(repeated({"path": b"a.png"}, 10**5, groups=1_000))


def of_nested_paths(path):
    write(path, {"path": [[{"a": "x" * 100}] * 1_000] * 300}, compression="zstd")


TABLES = [
    (of_one_path, "100,000,000 rows"),
    (of_one_path_and_justified, "rows 1 and 2 have the path 'a.png'"),
    (of_one_long_path, "more than 4,096 characters"),
    (of_long_labels, "more than 4,096 characters"),
    (of_packed_paths, "wanted a list of images"),
    (of_packed_labels, "wanted a list of images"),
    (of_paths_that_share_their_beginning, "more than 4,096 characters"),
    (of_many_numbered_paths, "1,000,000 rows"),
    (of_a_footer_that_promises_columns, "cannot be read as Parquet"),
    (of_a_footer_that_promises_a_schema, "cannot be read as Parquet"),
    (of_a_footer_of_nothing, "cannot be read as Parquet"),
    (of_many_columns, "cannot be read as Parquet"),
    (of_one_page_for_all, "cannot be read as Parquet"),
    (of_nested_paths, "holds 'list"),
]


@pytest.mark.parametrize(("make", "told"), TABLES, ids=lambda value: getattr(value, "__name__", ""))
def test_parquet_lists(tmp_path, make, told):
    write(tmp_path / "honest.parquet", {"path": words(1, 2), "label": ["a", "b"]})
    make(tmp_path / "list.parquet")
    assert told in refused(read_table, tmp_path / "honest.parquet", tmp_path / "list.parquet")


def rows_of_two_bytes(path):
    path.write_text("path,label\n" + ",\n" * 3_000_000)


def one_path_for_ever(path):
    path.write_text("path\n" + "a\n" * 3_000_000)


def one_line(path):
    with open(path, "wb") as file:
        file.write(b"path\n")
        file.truncate(300_000_000)


def one_row_of_many_lines(path):
    path.write_text("path\n" + '"' + 'a\n","' * 5_000_000)


def a_header_of_columns(path):
    path.write_text("path," + "label," * 5_000_000)


LISTS = [
    (rows_of_two_bytes, "an empty 'path'"),
    (one_path_for_ever, "rows 1 and 2 have the path 'a'"),
    (one_line, "a row of more than 1,048,576 characters"),
    (one_row_of_many_lines, "a row of more than 1,048,576 characters"),
    (a_header_of_columns, "a row of more than 1,048,576 characters"),
]


@pytest.mark.parametrize(("make", "told"), LISTS, ids=lambda value: getattr(value, "__name__", ""))
def test_csv_lists(tmp_path, make, told):
    (tmp_path / "honest.csv").write_text("path,label\na.png,a\nb.png,b\n")
    make(tmp_path / "list.csv")
    assert told in refused(read_table, tmp_path / "honest.csv", tmp_path / "list.csv")


DELTA = {"use_dictionary": ["label"], "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
DENSE = {"compression": "zstd", "compression_level": 19, "row_group_size": 100_000}


@pytest.mark.parametrize("options", [{}, DENSE, DELTA, {"use_dictionary": False, "data_page_version": "2.0"}])
def test_honest_lists_are_read_whatever_wrote_them(tmp_path, options):
    rows, path = range(300_000), tmp_path / "list.parquet"
    write(path, {"path": words(*rows), "label": [f"class {row % 1_000}" for row in rows]}, **options)
    ids, names = read_table(path)
    assert ids == words(*rows) and names[-1] == "class 999" and len(set(map(id, names))) == 1_000


# --- parts of embeddings


def folder_of(place, rows=64, dims=4):
    vectors = np.ones((rows, dims), np.float32)
    labels, ids = np.zeros(rows, np.int64), [f"{row}.png" for row in range(rows)]
    return Embeddings(vectors, labels, ("a",), ids, {}).save(place)


def rewrite(folder, manifest=None, **columns):
    """The folder as a stranger would rewrite it: all hashes are right. Options of the writer begin with `_`."""
    options = {name[1:]: columns.pop(name) for name in [*columns] if name.startswith("_")}
    part = folder / "part-00000.parquet"
    table = pq.read_table(part) if columns.keys() < {"id", "label", "embedding"} else pa.table(columns)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, part, **options)
    resealed(folder, manifest)


def resealed(folder, manifest=None):
    entries = read_sealed(folder / "manifest.json") | (manifest or {})
    entries["files"] = {name: sha256(folder / name) for name in entries["files"]}
    write_sealed(folder / "manifest.json", entries)


def ids_of_gigabytes(folder):
    ids = pa.array([f"{row}" + "a" * 3_000_000 for row in range(64)])
    rewrite(folder, id=ids, _compression="zstd", _use_dictionary=False)
    part = folder / "part-00000.parquet"  # its footer lies about it
    said = varint(pq.read_metadata(part).row_group(0).total_byte_size << 1)
    part.write_bytes(part.read_bytes().replace(said, varint(2 << 7 * (len(said) - 1))))
    resealed(folder)


def labels_of_gigabytes(folder):
    rewrite(folder, label=pa.DictionaryArray.from_arrays([0] * 64, ["a" * 3_000_000]).cast(pa.string()))


def ids_that_share_their_beginning(folder):
    ids = pa.array([f"{'a' * 3_000_000}{row}" for row in range(64)])
    options = {"_use_dictionary": False, "_column_encoding": {"id": "DELTA_BYTE_ARRAY"}, "_compression": "zstd"}
    rewrite(folder, id=ids, **options)


def vectors_out_of_a_dictionary(folder):
    rows, dims = 65_536, 512
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(rows * dims, np.float32)), dims)
    ids = pa.array([str(row) for row in range(rows)])
    rewrite(folder, {"dims": dims, "rows": 1}, id=ids, label=pa.array([None] * rows, pa.string()), embedding=vectors)


def a_footer_of_columns(folder):
    of_a_footer_that_promises_columns(folder / "part-00000.parquet")
    resealed(folder)


def all_vectors(folder):
    return sum(map(len, read_vectors(folder, read_sealed(folder / "manifest.json"))))


def all_ids(folder):
    return len(find_ids(folder, read_sealed(folder / "manifest.json"), ["63.png", "nothing"]))


def one_id(folder):
    return read_rows(folder, read_sealed(folder / "manifest.json"), np.array([0]), "id")


def one_vector(folder):
    return read_rows(folder, read_sealed(folder / "manifest.json"), np.array([0]), "embedding")


PARTS = {
    ids_of_gigabytes: (all_vectors, all_ids, one_id),
    labels_of_gigabytes: (all_vectors,),
    ids_that_share_their_beginning: (all_vectors, all_ids, one_id),
    vectors_out_of_a_dictionary: (all_vectors, one_vector),
    a_footer_of_columns: (all_ids, one_id, one_vector),
}


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
def test_parts_of_embeddings(tmp_path, make):
    honest, folder = folder_of(tmp_path / "honest"), folder_of(tmp_path / "EMB")
    make(folder)
    for read in PARTS[make]:
        assert "part-00000.parquet" in refused(read, honest, folder)


# --- images


def flat(mode, side, kind, **options):
    """An image of one colour in a file."""
    data = io.BytesIO()
    Image.new(mode, (side, side)).save(data, kind, **options)
    return data.getvalue()


def resized(data, mark, offset, form, *sides):
    """A file whose size was overwritten at `offset` behind a mark."""
    place, size = data.index(mark) + offset, struct.pack(form, *sides)
    return data[:place] + size + data[place + len(size) :]


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(side, depth, colour, *chunks):
    """A PNG of pixels that are 0."""
    bits = depth * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + side * bits // 8)) for _ in range(side)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(tags, data):
    """A TIFF of one strip or tile, whose place is tag 273 or 324: {number: value}."""
    start = 8 + 2 + 12 * len(tags) + 4
    place = {number: start if number in (273, 324) else value for number, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in sorted(place.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def tiff_of_one_tile():
    data = zlib.compress(bytes(200_000_000), 1)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 20_000, 323: 10_000, 324: 0, 325: len(data)}
    return tiff(tags, data)


def tiles_of_one_pixel():
    small = flat("RGB", 64, "JPEG2000", no_jp2=True)
    sides = struct.unpack(">8I", small[8:40])
    return resized(small, b"\xff\x4f\xff\x51", 8, ">8I", 250, 250, *sides[2:4], 1, 1, *sides[6:])


PALETTE = chunk(b"PLTE", bytes(768)), chunk(b"tRNS", bytes(256))
IMAGES = {
    "a palette with transparency": lambda: png(10_500, 8, 3, *PALETTE),
    "black and white": lambda: png(10_500, 1, 0),
    "16 bits": lambda: png(9_500, 16, 0),
    "colours": lambda: png(8_000, 8, 6),
    "TIFF, floats": lambda: flat("F", 7_800, "TIFF", compression="tiff_adobe_deflate"),
    "TIFF, fax": lambda: flat("1", 13_000, "TIFF", compression="group4"),
    "TIFF, turned": lambda: flat("L", 9_500, "TIFF", compression="tiff_lzw", tiffinfo={274: 6}),
    "TIFF of one tile": tiff_of_one_tile,
    "GIF": lambda: flat("P", 10_500, "GIF", transparency=0),
    "WebP": lambda: resized(flat("RGB", 64, "WEBP", lossless=True), b"VP8L", 9, "<I", 9_999 | 9_999 << 14),
    "AVIF": lambda: resized(flat("RGB", 64, "AVIF"), b"ispe", 8, ">II", 9_000, 9_000),
    "JPEG 2000": lambda: resized(flat("RGB", 64, "JPEG2000"), b"ihdr", 4, ">II", 9_000, 9_000),
    "JPEG 2000 of tiles": tiles_of_one_pixel,
    "JPEG": lambda: resized(flat("RGB", 64, "JPEG"), b"\xff\xc0", 5, ">HH", 8_000, 8_000),
    "progressive JPEG": lambda: (
        resized(flat("RGB", 64, "JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 9_000, 9_000) + bytes(10**6)
    ),
    "PPM": lambda: b"P6 9000 9000 255\n" + bytes(1_000),
    "BMP": lambda: resized(flat("RGB", 64, "BMP"), b"BM", 18, "<ii", 9_000, 9_000),
}


def seen(path):
    """What both functions of the decoder refuse."""
    data, sized = path.read_bytes(), False
    try:
        image_size(data)
        sized = True
        decode(data)
    except BadImageError:
        assert not sized, "image_size takes it"
        return decode(data)
    raise AssertionError("both take it")


def seen_small(path):
    for kind in ("PNG", "TIFF", "JPEG", "WEBP", "AVIF", "JPEG2000", "GIF", "PPM", "BMP"):
        decode(flat("RGB", 16, kind))
    return None if path is None else seen(path)


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path, name):
    (tmp_path / "image").write_bytes(IMAGES[name]())
    told = refused(seen_small, None, tmp_path / "image")
    assert "the limit for such a file is" in told or "cannot hold" in told


def texts_of_64_megabytes():
    text = ("x" * 240_000 + "\U0001f600").encode()  # 4 bytes for each character then
    packed = zlib.compress(text)
    return png(16, 8, 0, *[chunk(b"iTXt", b"%d\0\1\0\0\0" % key + packed) for key in range(250)])


def test_texts_of_a_png_are_not_unpacked(tmp_path):
    (tmp_path / "image").write_bytes(texts_of_64_megabytes())
    kind, text, size = grown(decoded, None, tmp_path / "image")
    assert kind == "returned" and size <= 8 * MIB, (text, size / MIB)


def decoded(path):
    return decode(flat("RGB", 16, "PNG") if path is None else path.read_bytes()).image.shape


HONEST = {
    "PNG, RGBA": lambda side: flat("RGBA", side, "PNG"),
    "PNG, palette": lambda side: flat("P", side, "PNG", transparency=0),
    "PNG, 16 bits": lambda side: flat("I;16", side, "PNG"),
    "TIFF, fax": lambda side: flat("1", side, "TIFF", compression="group4"),
    "TIFF, floats in one strip": lambda side: flat("F", side, "TIFF", compression="tiff_lzw", tiffinfo={278: side}),
    "TIFF, turned": lambda side: flat("RGB", side, "TIFF", compression="tiff_lzw", tiffinfo={274: 6}),
    "TIFF, inks": lambda side: flat("CMYK", side, "TIFF", compression="tiff_lzw"),
    "GIF": lambda side: flat("P", side, "GIF", transparency=0),
    "WebP": lambda side: flat("RGBA", side, "WEBP", lossless=True, method=0),
    "AVIF": lambda side: flat("RGB", side, "AVIF", speed=10, subsampling="4:4:4"),
    "JPEG 2000": lambda side: flat("RGB", side, "JPEG2000"),
    "JPEG, inks": lambda side: flat("CMYK", side, "JPEG", progressive=True),
}


def both(path):
    return seen_small(None) if path is None else decode(path.read_bytes()).image.shape


@pytest.mark.parametrize("name", HONEST)
def test_no_image_takes_more_than_its_header_tells(tmp_path, name):
    side = 2_400
    (tmp_path / "image").write_bytes(data := HONEST[name](side))
    with Image.open(io.BytesIO(data)) as image:
        told = bytes_per_pixel(image) * side**2
    kind, text, size = grown(both, None, tmp_path / "image")
    assert kind == "returned" and size <= told + 20 * MIB, (text, size / side**2)


def test_honest_images_of_few_bytes_are_taken():
    page = io.BytesIO()
    Image.new("1", (4_960, 7_016)).save(page, "TIFF", compression="group4")  # A4 at 600 dpi
    assert image_size(page.getvalue()) == (7_016, 4_960) and len(page.getvalue()) < 40_000
    assert image_size(png(4_900, 8, 2)) == (4_900, 4_900)  # a screenshot of 24 MP
    photo = resized(flat("RGB", 64, "JPEG", progressive=True), b"\xff\xc2", 5, ">HH", 8_700, 11_600)
    assert image_size(photo + bytes(10**7)) == (8_700, 11_600)  # 100 MP in 10 MB


# --- encoders and recipes


NETWORK = ("resnet18_small", {"channels": [4, 4, 8, 8]}, (16, 16))
WINDOWS = {"embed_dim": 8, "depths": [2, 1], "num_heads": [1, 1], "window_size": 4, "patch_size": 2}


def encoder_folder(folder, network=NETWORK, config=None, **preprocessing):
    """A folder as a stranger would write it: all hashes are right."""
    Encoder(*network).save(folder)
    text = json.loads((folder / CONFIG).read_text())
    text["pretrained_cfg"] |= config or {}
    (folder / CONFIG).write_text(json.dumps(text))
    entries = read_sealed(folder / RECORD) | {"config_sha256": sha256(folder / CONFIG)}
    entries["preprocessing"] |= preprocessing
    write_sealed(folder / RECORD, entries)
    return folder


def embedded(folder):
    """9 images through an encoder."""
    source = open_source(np.zeros((9, 8, 8, 3), np.uint8))
    return embed(Encoder.load(folder), source, precision="float32").vectors.shape


def compared(folder):
    return load_pretrained(str(folder)).dim


def test_an_encoder_states_a_size_that_something_is_made_for(tmp_path):
    honest = encoder_folder(tmp_path / "honest")
    for size in ([16_384, 16_384], [5_000, 16], [16, 10**9]):
        folder = encoder_folder(tmp_path / "encoder", image_size=size)
        assert "wanted 1 to 4,096" in refused(embedded, honest, folder)


def test_a_size_must_not_make_a_network_that_its_weights_do_not_fill(tmp_path):
    """Swin keeps masks for every window of its image, which are no weights."""
    network = ("swin_tiny_patch4_window7_224", WINDOWS, (32, 32))
    honest = encoder_folder(tmp_path / "honest", network)
    folder = encoder_folder(tmp_path / "encoder", network, image_size=[4_096, 4_096])
    assert "larger than" in refused(embedded, honest, folder)


def test_a_timm_folder_is_of_a_size_that_something_is_made_for(tmp_path):
    honest = encoder_folder(tmp_path / "honest")
    folder = encoder_folder(tmp_path / "encoder", config={"input_size": [3, 16_384, 16_384]})
    for place in (honest, folder):
        (place / RECORD).unlink()  # a timm folder from elsewhere
    assert "wanted 1 to 4,096" in refused(compared, honest, folder)


RECIPES = {
    "widths": ("resnet18_small", {"channels": [16_384] * 4}),
    "more widths": ("resnet18_small", {"channels": [65_536] * 4}),
    "depth": ("vit_tiny_patch16_224", {"depth": 4_000, "embed_dim": 3_072}),
    "positions": ("vit_tiny_patch16_224", {"patch_size": 1, "embed_dim": 49_152, "depth": 1}),
    "hidden layers": ("vit_tiny_patch16_224", {"embed_dim": 12_288, "mlp_ratio": 65_536}),
    "outputs": ("resnet18_small", {"num_classes": 65_536, "channels": [4, 4, 8, 65_536]}),
    "parts": ("vit_tiny_patch16_224", {"depth": 60_000, "embed_dim": 3}),
}


def built(recipe):
    name, args = recipe
    return Encoder(name, args, (224, 224)).dim


@pytest.mark.parametrize("name", RECIPES)
def test_networks_of_recipes(name):
    told = refused(built, NETWORK[:2], RECIPES[name])
    assert "with these encoder.args has more than" in told


def trained(options):
    """What `pretrain` does with its sizes before the first step."""
    size, grow, batch = options
    source = open_source(np.zeros((300, 8, 8, 3), np.uint8))
    size = view_size(size, source)
    learner = SimCLR(Encoder("resnet18_small", {"channels": [64, 4, 8, 8]}, size), projection=(16, 8))
    kinds = view_schedule(ViewRecipe().fitted(learner.preset, size, 3), size, grow, learner)
    settings = {"epochs": 1, "minutes": None, "contrastive_batch": None, "batch_size": batch, "seed": 0, "threads": 1}
    settings |= {"precision": "float32", "views_on": "host", "tf32": "auto", "compile": "off", "diagnose": False}
    fit_to_machine(learner, source, kinds, settings, batch)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((10**6, None, 2), "wanted 1 to 4,096, see --image_size"),
        (((16, 5_000), None, 2), "wanted 1 to 4,096, see --image_size"),
        ((16, {2: 10**5}, 2), "wanted 1 to 4,096, see --image_size"),
        ((4_096, None, 256), "a step of 256 images takes more than"),
        ((16, {2: 4_096}, 256), "a step of 256 images takes more than"),
        ((64, None, 10**8), "300 images are fewer than one step"),
    ],
)
def test_sizes_of_recipes(options, told):
    assert told in refused(trained, (16, None, 8), options)
