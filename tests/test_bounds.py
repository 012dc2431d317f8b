"""What files of strangers make a process take: those that are refused, at most 64 MiB more than a small honest one.

Images are in tests/data/test_decode_bounds.py.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from grown import needs_proc, refused
from hostile_parquet import Long, listed, parquet, repeated, schema, varint

from ssl_kit.core.errors import DamagedError, UserError
from ssl_kit.core.files import sha256, write_sealed
from ssl_kit.core.sealed import read_sealed
from ssl_kit.data.manifests import read_table
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import Embeddings, embed
from ssl_kit.embeddings.folder import find_ids, read_rows, read_vectors
from ssl_kit.encoders.encoder import CONFIG, RECORD, Encoder
from ssl_kit.encoders.pretrained import load_pretrained
from ssl_kit.methods.simclr import SimCLR
from ssl_kit.verbs.defaults import fit_to_machine, schedule_views, view_size
from ssl_kit.verbs.pretrain import Settings
from ssl_kit.views.recipe import ViewRecipe

pytestmark = needs_proc


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
    write(path, {"path": ["a" * 10**5] * 1_500}, compression="zstd", use_dictionary=False)


def of_packed_labels(path):
    columns = {"path": words(*range(1_500)), "label": ["a" * 10**5] * 1_500}
    write(path, columns, compression="zstd", use_dictionary=False)


def of_paths_that_share_their_beginning(path):
    columns = {"path": [f"{'a' * 10**5}{row}" for row in range(1_000)]}
    write(path, columns, compression="zstd", use_dictionary=False, column_encoding={"path": "DELTA_BYTE_ARRAY"})


def of_many_numbered_paths(path):
    options = {"compression": "zstd", "use_dictionary": False, "column_encoding": {"path": "DELTA_BYTE_ARRAY"}}
    write(path, {"path": words(*range(600_000))}, **options)


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
    (of_many_numbered_paths, "600,000 rows"),
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
DENSE = {"compression": "zstd", "compression_level": 19, "row_group_size": 50_000}


@pytest.mark.parametrize("options", [{}, DENSE, DELTA, {"use_dictionary": False, "data_page_version": "2.0"}])
def test_honest_lists_are_read_whatever_wrote_them(tmp_path, options):
    rows, path = range(120_000), tmp_path / "list.parquet"
    write(path, {"path": words(*rows), "label": [f"class {row % 1_000}" for row in rows]}, **options)
    ids, names = read_table(path)[:2]
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
    ids = pa.array([f"{row}" + "a" * 2_000_000 for row in range(64)])
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
    ids_of_gigabytes: (all_vectors, one_id),
    labels_of_gigabytes: (all_vectors,),
    ids_that_share_their_beginning: (all_ids,),
    vectors_out_of_a_dictionary: (all_vectors, one_vector),
    a_footer_of_columns: (all_ids, one_vector),
}


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
def test_parts_of_embeddings(tmp_path, make):
    honest, folder = folder_of(tmp_path / "honest"), folder_of(tmp_path / "EMB")
    make(folder)
    for read in PARTS[make]:
        assert "part-00000.parquet" in refused(read, honest, folder)


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
    folder = encoder_folder(tmp_path / "encoder", image_size=[16_384, 16_384])
    assert "wanted 1 to 4,096" in refused(embedded, honest, folder)
    for size in ([5_000, 16], [16, 10**9]):
        with pytest.raises(DamagedError, match="wanted 1 to 4,096"):
            Encoder.load(encoder_folder(tmp_path / "encoder", image_size=size))


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
    "depth": ("vit_tiny_patch16_224", {"depth": 4_000, "embed_dim": 3_072}),
    "positions": ("vit_tiny_patch16_224", {"patch_size": 1, "embed_dim": 49_152, "depth": 1}),
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
    views = schedule_views(ViewRecipe().fitted(learner.preset, size, 3), size, grow, learner)
    settings = Settings("images", epochs=1, batch_size=batch, threads=1, precision="float32", compile="off")
    fit_to_machine(learner, source, views, settings, batch)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((10**6, None, 2), "wanted 1 to 4,096, see --image-size"),
        (((16, 5_000), None, 2), "wanted 1 to 4,096, see --image-size"),
        ((16, {2: 10**5}, 2), "wanted 1 to 4,096, see --image-size"),
        ((4_096, None, 256), "a step of 256 images takes more than"),
        ((16, {2: 4_096}, 256), "a step of 256 images takes more than"),
        ((64, None, 10**8), "300 images are fewer than one step"),
    ],
)
def test_sizes_of_recipes(options, told):
    trained((16, None, 8))
    with pytest.raises(UserError, match=told):
        trained(options)
