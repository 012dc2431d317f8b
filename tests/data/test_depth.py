"""Depth, bands and meaning of samples: files against a reference that knows the raw samples; the range of a set."""

import io

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from ssl_kit.core.errors import UserError
from ssl_kit.core.reading import ANY, GREY, RGB, Reading, read_reading, reading_in, reading_of
from ssl_kit.data.decode import decode, image_size
from ssl_kit.data.limits import BadImageError
from ssl_kit.data.opening import open_source

LUMA = np.array([19595, 38470, 7471])


def noise(*shape, bits=16, seed=0):
    dtype = np.uint8 if bits <= 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(dtype)


def tif(values, **options):
    data = io.BytesIO()
    tifffile.imwrite(data, values, **options)
    return data.getvalue()


def scaled(values, bits):
    """Raw samples of so many bits over the full depth."""
    if bits in (8, 16):
        return values
    return np.rint(values / (2**bits - 1) * 65535).astype(np.uint16)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize(
    "layout", ["strips", "tiles", "planes", "big-endian", "BigTIFF", "lzw", "zlib", "zstd", "predictor"]
)
def test_rgb_tiff_of_any_depth_and_layout(bits, layout):
    values = noise(40, 56, 3, bits=bits)
    options = {
        "strips": {"rowsperstrip": 7},
        "tiles": {"tile": (16, 32)},
        "planes": {"planarconfig": "separate"},
        "big-endian": {"byteorder": ">"},
        "BigTIFF": {"bigtiff": True},
        "predictor": {"compression": "zlib", "predictor": True},
    }.get(layout, {"compression": layout})
    if bits in (10, 12):
        if layout in ("big-endian", "lzw", "zstd", "zlib", "predictor", "tiles"):
            pytest.skip("packed bits are written in plain strips only")
        options["bitspersample"] = bits
    stored = values.transpose(2, 0, 1) if layout == "planes" else values
    data = tif(stored, photometric="rgb", **options)
    wanted = scaled(values, bits)
    assert image_size(data) == (40, 56)
    assert np.array_equal(decode(data).image, wanted)
    grey = ((values.astype(np.int64) @ LUMA + 2**15) >> 16).astype(values.dtype)
    assert np.array_equal(decode(data, GREY).image[:, :, 0], scaled(grey, bits))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_white_is_zero_at_any_depth(dtype):
    values = np.linspace(0, 1, 35).reshape(5, 7)
    values = values.astype(dtype) if dtype is np.float32 else (values * np.iinfo(dtype).max).astype(dtype)
    black, white = (
        decode(tif(values, photometric=kind), GREY).image.astype(int) for kind in ("minisblack", "miniswhite")
    )
    assert np.abs(black + white - (255 if dtype is np.uint8 else 65535)).max() <= 1 and black.std() > 0


def test_palettes_of_tiff():
    colours = noise(3, 256, bits=8).astype(np.uint16)
    index = noise(9, 11, bits=8)
    for table in (colours * 257, colours << 8):
        data = tif(index, photometric="palette", colormap=table)
        assert np.array_equal(decode(data).image, colours.T[index])


def test_opacity_and_other_samples():
    rgb, more = noise(20, 30, 3), noise(20, 30, 1, seed=1)
    four = np.concatenate([rgb, more], axis=2)
    share = more / 65535
    for kind, seen in (("unassalpha", rgb * share), ("assocalpha", rgb)):
        data = tif(four, photometric="rgb", extrasamples=[kind])
        wanted = np.clip(seen + 65535 * (1 - share), 0, 65535)
        assert np.abs(decode(data).image.astype(int) - wanted).max() <= 1
        assert np.array_equal(decode(data, Reading(4)).image, four)  # asked for as bands
    infrared = tif(four, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(decode(infrared).image, rgb) and np.array_equal(decode(infrared, Reading(4)).image, four)


def test_bands_by_number_and_by_name():
    five = noise(16, 24, 5, bits=8)
    for planar in ("contig", "separate"):
        stored = five if planar == "contig" else five.transpose(2, 0, 1)
        data = tif(stored, photometric="minisblack", planarconfig=planar)
        assert np.array_equal(decode(data, Reading(5)).image, five)
        assert np.array_equal(decode(data, Reading(2, ("4", "1"))).image, five[:, :, [3, 0]])  # counted from 1
        with pytest.raises(BadImageError, match="TIFF of 5 bands: --channels 5, not 3"):
            decode(data)
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{n}" role="description">{name}</Item>' for n, name in enumerate("abcde")
    )
    named = tif(
        five,
        photometric="minisblack",
        planarconfig="contig",
        extratags=[(42112, "s", 0, f"<GDALMetadata>{items}</GDALMetadata>", True)],
    )
    assert np.array_equal(decode(named, Reading(2, ("e", "b"))).image, five[:, :, [4, 1]])
    with pytest.raises(BadImageError, match="no band 'nir'; it has a, b, c, d, e"):
        decode(named, Reading(1, ("nir",)))


def test_pages_as_channels_or_the_first_of_them():
    pages = noise(4, 12, 15)
    data = tif(pages, photometric="minisblack")
    assert np.array_equal(decode(data, GREY).image[:, :, 0], pages[0])
    assert np.array_equal(decode(data, Reading(4)).image, pages.transpose(1, 2, 0))
    with pytest.raises(BadImageError, match="4 pages of one band: --channels 4, not 5"):
        decode(data, Reading(5))


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_no_data_is_left_out_and_black(dtype):
    values = (noise(30, 40) % 900).astype(dtype)
    reading = GREY.within({ANY: ((0, 899),)})
    for nodata in (-9999, 5000):
        values[:3] = nodata
        data = tif(values, extratags=[(42113, "s", 0, f"{nodata}", True)])
        got = decode(data, reading).image[:, :, 0]
        assert (got[:3] == 0).all() and len(np.unique(got[3:])) == len(np.unique(values[3:]))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "jpeg2k"])
def test_deep_png_and_jpeg_2000_keep_their_bits(kind, channels):
    values = noise(23, 31, channels) if channels > 1 else noise(23, 31)
    data = getattr(imagecodecs, f"{kind}_encode")(values, **({"level": 0} if kind == "jpeg2k" else {}))
    colours = np.atleast_3d(values)[:, :, : 1 if channels < 3 else 3]
    if channels in (2, 4):
        share = values[:, :, -1:] / 65535
        colours = colours * share + 65535 * (1 - share)
    got = decode(data).image
    assert got.dtype == np.uint16 and image_size(data) == (23, 31)
    assert np.abs(got.astype(int) - np.broadcast_to(colours, (23, 31, 3))).max() <= (0 if channels in (1, 3) else 1)


def test_deep_avif_and_ppm():
    values = noise(24, 32, 3, bits=10)
    avif = imagecodecs.avif_encode(values, bitspersample=10, level=100)
    assert np.array_equal(decode(avif).image, scaled(values, 10))
    raw = values.astype(">u2").tobytes()
    assert np.array_equal(decode(b"P6\n# a comment\n32 24\n1023\n" + raw).image, scaled(values, 10))
    with pytest.raises(BadImageError):
        decode(b"P6\n32 24\n1023\n" + raw[:-2])


def test_arrays_in_files(tmp_path):
    values = noise(20, 28, 6)
    for stored in (values, values.transpose(2, 0, 1)):
        np.save(tmp_path / "a.npy", stored)
        data = (tmp_path / "a.npy").read_bytes()
        assert image_size(data) == (20, 28) and np.array_equal(decode(data, Reading(6)).image, values)
    np.savez_compressed(tmp_path / "b.npz", red=values[:, :, 0], nir=values[:, :, 1])
    data = (tmp_path / "b.npz").read_bytes()
    assert image_size(data) == (20, 28)
    assert np.array_equal(decode(data, Reading(2, ("nir", "red"))).image, values[:, :, 1::-1])
    for wrong in (np.zeros((2, 3, 4, 5)), np.array([[object()]]), np.zeros(3)):
        np.save(tmp_path / "a.npy", wrong, allow_pickle=True)
        with pytest.raises(BadImageError):
            decode((tmp_path / "a.npy").read_bytes())
    np.savez_compressed(tmp_path / "b.npz", a=np.zeros((13_000, 13_000), np.uint8))
    with pytest.raises(BadImageError, match="the limit for such a file"):
        decode((tmp_path / "b.npz").read_bytes(), GREY)


def dicom(values, **tags):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    told = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    told.Rows, told.Columns = values.shape[:2]
    told.SamplesPerPixel, told.PhotometricInterpretation = 1, "MONOCHROME2"
    told.BitsAllocated, told.BitsStored, told.HighBit, told.PixelRepresentation = 16, 12, 11, 0
    told.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(told, name, value)
    data = io.BytesIO()
    told.save_as(data, enforce_file_format=True)
    return data.getvalue()


def test_dicom_slope_window_and_monochrome1():
    values = noise(16, 18, bits=12)
    assert image_size(dicom(values)) == (16, 18)
    assert np.array_equal(decode(dicom(values), GREY).image[:, :, 0], scaled(values, 12))
    mirrored = decode(dicom(values, PhotometricInterpretation="MONOCHROME1"), GREY).image[:, :, 0]
    assert np.array_equal(mirrored, scaled(4095 - values, 12))
    hounsfield = dicom(values, RescaleSlope=2, RescaleIntercept=-1024)
    within = GREY.within({"int32": ((-1024, 2 * 4095 - 1024),)})
    assert np.array_equal(decode(hounsfield, within).image[:, :, 0], scaled(values, 12))
    window = decode(dicom(values, WindowCenter=1000.5, WindowWidth=1001), GREY).image[:, :, 0]
    assert np.abs(window - np.rint(np.clip((values - 500.0) / 1000, 0, 1) * 65535)).max() <= 1
    dark = decode(dicom(values, WindowCenter=1000.5, WindowWidth=1001, PhotometricInterpretation="MONOCHROME1"), GREY)
    assert np.abs(dark.image[:, :, 0].astype(int) + window - 65535).max() <= 1
    with pytest.raises(BadImageError):
        decode(dicom(values)[:-200])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tif(noise(8, 8).astype(np.complex64)), "samples of"),
        (lambda: tif(np.full((8, 8), 7, np.float32)), "floats from 0 to 7, which have no full depth"),
        (lambda: tif(noise(8, 8, 3), photometric="rgb")[:-40], "truncated|beyond the end"),
        (lambda: tif(noise(8, 8, 5, 4), photometric="minisblack", volumetric=True, tile=(16, 16, 16)), "TIFF"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(make, message):
    with pytest.raises(BadImageError, match=message):
        decode(make())


# the range of a set


def camera(count=40, top=4095, seed=0):
    return np.random.default_rng(seed).integers(0, top + 1, (count, 24, 24)).astype(np.uint16)


def test_the_range_of_a_camera_of_12_bits_is_found_and_said(tmp_path, capsys):
    for n, image in enumerate(images := camera()):
        tifffile.imwrite(tmp_path / f"{n:02d}.tif", image)
    source = open_source(tmp_path, reading=GREY, measure=True)
    ((low, high),) = source.reading.ranges["uint16"]
    assert np.allclose((low, high), np.percentile(images, (0.1, 99.9)), atol=1)
    assert "range of uint16: 2 to 4093 (0.1 and 99.9 percentile of 40 images" in capsys.readouterr().out
    assert len(np.unique(np.stack(source.read(slice(None))))) > 4000
    again = open_source(tmp_path, reading=source.reading)  # as an encoder brings it
    assert np.array_equal(np.stack(again.read(slice(None))), np.stack(source.read(slice(None))))
    array = open_source(images, reading=GREY, measure=True)
    assert array.reading == source.reading
    assert np.array_equal(array.stack[0], np.stack(source.read(slice(None))))


def test_full_depth_is_left_alone(capsys):
    deep = camera(top=65535)
    assert open_source(deep, reading=GREY, measure=True).reading.ranges == {}
    assert "range of uint16: 0 to 65535, the full depth" in capsys.readouterr().out
    dark = camera(top=40).astype(np.uint8)
    source = open_source(dark, reading=GREY, measure=True)  # of 8 bits nothing is lost
    assert source.reading.ranges == {} and np.array_equal(source.stack[0][..., 0], dark)
    assert "range" not in capsys.readouterr().out


def test_channels_have_ranges_of_their_own_and_no_data_is_left_out(tmp_path):
    bands = np.stack([camera(20, top) for top in (4095, 1000)], axis=3).astype(np.int16)
    bands[:, :2] = -9999
    for n, image in enumerate(bands):
        options = {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(tmp_path / f"{n}.tif", image, extratags=[(42113, "s", 0, "-9999", True)], **options)
    reading = open_source(tmp_path, reading=Reading(2), measure=True).reading
    (first, second) = reading.ranges["int16"]
    assert 0 <= first[0] < 10 and 4080 < first[1] <= 4095 and 0 <= second[0] < 5 and 990 < second[1] <= 1000


def test_options_and_records():
    assert reading_of(3) == (RGB, True) and reading_of("5", "full") == (Reading(5), False)
    named, measure = reading_of("red, nir", "0,4095")
    assert named == Reading(2, ("red", "nir")).within({ANY: ((0, 4095),)}) and not measure
    assert reading_of(2, "0,1 5,9")[0].ranges[ANY] == ((0, 1), (5, 9))
    for channels, given in (
        (0, "auto"),
        (3, "4095"),
        (3, "9,1"),
        (2, "0,1 0,1 0,1"),
        ("a,a", "auto"),
        (3, "0,nan"),
        (3, "x"),
    ):
        with pytest.raises(UserError, match=r"--channels|--range"):
            reading_of(channels, given)
    reading = Reading(2, ("a", "b")).within({"uint16": ((0, 1), (2, 3))})
    assert reading_in({"channels": 2, **reading.to_json()}) == reading
    for channels, bands, ranges in (
        (2, ["a"], {}),
        (2, "ab", {}),
        (1, [], {"uint64": [[0, 1]]}),
        (1, [], {"any": [[1, 0]]}),
        (1, [3], {}),
    ):
        with pytest.raises(ValueError, match="wanted"):
            read_reading(channels, bands, ranges)


def test_pictures_of_pillow_are_read_as_their_files_are():
    from ssl_kit.data.given import pixels_given

    deep = Image.fromarray(noise(9, 9))
    assert np.array_equal(pixels_given(deep, GREY, "image"), np.asarray(deep)[..., None])
    clear = Image.fromarray(noise(9, 9, 4, bits=8), "RGBA")
    data = io.BytesIO()
    clear.save(data, "PNG")
    assert np.array_equal(pixels_given(clear, RGB, "image"), decode(data.getvalue()).image)
    with pytest.raises(UserError, match="5 bands: --channels 5"):
        pixels_given(noise(9, 9, 5), RGB, "the image")


def test_images_that_use_other_values_than_the_encoder_knows_are_told_of(tmp_path, capsys):
    images = camera()
    known = open_source(images, reading=GREY, measure=True).reading
    same = open_source(images.astype(np.int32), reading=known)  # the same values in another type
    assert np.array_equal(same.stack[0], open_source(images, reading=known).stack[0])
    assert capsys.readouterr().err == ""
    for n, image in enumerate(images):
        tifffile.imwrite(tmp_path / f"{n:02d}.tif", image)
    for data in (images, tmp_path):
        open_source(data, reading=GREY)
        assert "uint16 values from 0 to 4095 fill under a quarter" in capsys.readouterr().err
    pages = [image for image in images * 16]
    open_source(images * 16, reading=known)
    told = capsys.readouterr().err
    open_source(pages, reading=known)  # a list of them
    assert capsys.readouterr().err.partition(":")[2].partition(":")[2] == told.partition(":")[2].partition(":")[2]
    open_source(images * 16, reading=known)
    assert "of the values lie outside the range that the encoder was trained on" in capsys.readouterr().err
    with pytest.raises(UserError, match="next to nothing of its depth"):
        open_source(images.astype(np.int32), reading=GREY)


def test_kinds_of_one_set_keep_their_own_ranges():
    known = GREY.within({"int16": ((0, 900),)})
    assert known.limits("uint16") is None and known.limits("int32") == ((0, 900),) and known.limits("float") is None
    wide = np.random.default_rng(0).integers(-(2**31), 2**31, (10, 8, 8)).astype(np.int32)
    wide[0] = 5  # one without a picture among them is no other kind
    source = open_source(wide, reading=GREY, measure=True)
    assert source.reading.ranges == {"int32": ((-(2**31), 2**31 - 1),)} and (source.stack[0][0] == 32768).all()
    assert np.array_equal(open_source(wide[:3], reading=source.reading).stack[0], source.stack[0][:3])
