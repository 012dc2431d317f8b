"""JSON of strangers: bounds, finite numbers, and seals that notice any change."""

import json

import pytest

from ssl_kit.core.errors import DamagedError
from ssl_kit.core.files import write_sealed
from ssl_kit.core.sealed import fingerprint, parse_json, read_json, read_object, read_sealed

ENTRIES = {
    "rows": 3,
    "mean": [0.1 + 0.2, 1e-30],
    "names": ["é", "\u2028"],
    "nested": {"b": None, "a": True},
    7: "seven",
}


def test_sealed_entries_come_back_and_any_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, ENTRIES)
    wanted = json.loads(json.dumps(ENTRIES))
    assert read_sealed(path) == wanted
    data, silent = path.read_bytes(), 0
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            silent += read_sealed(path) != wanted
        except DamagedError:
            continue
    assert silent == 0


def test_a_seal_does_not_depend_on_the_order_of_keys_but_on_everything_else():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({1: "x", 10: "y", 2: "z"}) == fingerprint({"1": "x", "2": "z", "10": "y"})
    different = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": [1]}, {"b": 1}, {"a": 1, "b": None}]
    assert len({fingerprint(one) for one in different}) == len(different)


@pytest.mark.parametrize("text", ["[]", "{}", '{"a": 1}', '{"a": 1, "seal": 5}', '{"a": 1, "seal": "0"}'])
def test_what_was_not_sealed_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DamagedError):
        read_sealed(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"files"'])
def test_what_is_no_object_is_refused_where_one_has_to_be(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DamagedError, match="expected a JSON object"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    [
        *("NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "-1e999", "9" * 5_000, "[" * 900 + "]" * 900),
        *("[" * 100_000, "{", '"\\ud800', "[" + "[]," * 110_000 + "[]]", "[" + "1," * 430_000 + "1]", "\xff"),
        "[" * 102 + "]" * 102,
    ],
    ids=lambda text: f"{text[:12]} {len(text)}",
)
def test_json_that_is_none_or_a_bomb_is_refused(tmp_path, text):
    with pytest.raises(DamagedError, match=r"a\.json"):
        parse_json(text.encode("latin-1"), tmp_path / "a.json")


def test_honest_json_of_some_size_is_read(tmp_path):
    many = {
        "files": {f"part-{row:05d}.parquet": "0" * 64 for row in range(20_000)},
        "deep": json.loads("[" * 90 + "]" * 90),
    }
    assert parse_json(json.dumps(many).encode(), tmp_path) == many


def test_what_is_no_file_or_too_large_is_never_opened(tmp_path):
    (tmp_path / "device").symlink_to("/dev/null")  # a pipe would do, but block a reader that opens it
    for name in ("device", "nothing", "."):
        with pytest.raises(DamagedError, match="missing"):
            read_json(tmp_path / name)
    (tmp_path / "large").write_bytes(b" " * 2_000 + b"1")
    assert read_json(tmp_path / "large", 2_001) == 1
    with pytest.raises(DamagedError, match="2,001 bytes"):
        read_json(tmp_path / "large", 2_000)
