import os
import socket
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from qsd.data import BadImage, load_image
from tests.helpers import sample
from tests.helpers.files import only_opens

GREY16 = np.array([[0, 255, 256, 1000, 32768, 65535]], np.uint16)
GREY16_AS_8 = [0, 0, 1, 3, 128, 255]  # divided by 256; Pillow's own conversion gives 0, 255, 255, 255, 255, 255


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(str(path))
    assert isinstance(image, Image.Image), image
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(path):
    pixels = load(path)
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    Image.fromarray(GREY16).save(tmp_path / f"a.{suffix}")
    assert grey(tmp_path / f"a.{suffix}") == GREY16_AS_8


def test_16_bit_big_endian_tiff(tmp_path):
    # written by hand, since Pillow writes little endian: 6x1 pixels at offset 8, then the directory
    entries = [(256, 3, 1, 6), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 3, 1, 8)]
    entries += [(277, 3, 1, 1), (278, 3, 1, 1), (279, 3, 1, 12)]
    pixels = GREY16.astype(">u2").tobytes()
    directory = len(entries).to_bytes(2, "big")
    for tag, kind, count, value in entries:
        directory += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + count.to_bytes(4, "big")
        directory += value.to_bytes(2, "big") + bytes(2)
    content = b"MM\x00\x2a" + (8 + len(pixels)).to_bytes(4, "big") + pixels + directory + bytes(4)
    (tmp_path / "a.tif").write_bytes(content)
    assert grey(tmp_path / "a.tif") == GREY16_AS_8


@pytest.mark.parametrize("values", [GREY16, GREY16 // 257])
def test_16_bit_pgm_which_pillow_opens_as_32_bit(tmp_path, values):
    # the second is dark, no value above 255: it stays dark
    (tmp_path / "a.pgm").write_bytes(b"P5\n6 1\n65535\n" + values.astype(">u2").tobytes())
    assert grey(tmp_path / "a.pgm") == (values // 256)[0].tolist()


def test_32_bit_tiff_by_range(tmp_path):
    Image.fromarray(GREY16.astype(np.int32)).save(tmp_path / "sixteen.tif")
    Image.fromarray(np.array([[0, 7, 255]], np.int32)).save(tmp_path / "eight.tif")
    assert grey(tmp_path / "sixteen.tif") == GREY16_AS_8
    assert grey(tmp_path / "eight.tif") == [0, 7, 255]


def test_float_tiff_by_range(tmp_path):
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "unit.tif")
    Image.fromarray(np.array([[0, 100.4, 255]], np.float32)).save(tmp_path / "byte.tif")
    assert grey(tmp_path / "unit.tif") == [0, 128, 255]
    assert grey(tmp_path / "byte.tif") == [0, 100, 255]


@pytest.mark.parametrize("values", [[-5, 3], [0, 70000], [0.0, 256.5], [-0.1, 1.0], [np.nan, 1.0]])
def test_values_out_of_every_range_are_refused(tmp_path, values):
    dtype = np.int32 if isinstance(values[0], int) else np.float32
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "a.tif")
    bad = load_image(str(tmp_path / "a.tif"))
    assert isinstance(bad, BadImage)
    assert "grey values from" in bad.reason


def test_grey_with_and_without_alpha(tmp_path):
    pixels = np.array([[10, 200]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "l.png")
    alpha = Image.fromarray(np.array([[0, 128]], np.uint8))
    Image.merge("LA", [Image.fromarray(pixels), alpha]).save(tmp_path / "la.png")
    Image.fromarray(pixels).save(tmp_path / "trns.png", transparency=10)
    for name in ("l", "la", "trns"):
        assert grey(tmp_path / f"{name}.png") == [10, 200]


def test_alpha_is_dropped_not_composited(tmp_path):
    Image.new("RGBA", (1, 1), (10, 200, 30, 0)).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png").tolist() == [[[10, 200, 30]]]


@pytest.mark.parametrize("transparency", [None, 1, bytes([0, 128, 255])])
def test_palette(tmp_path, transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90] + [0] * 759)
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert load(tmp_path / "a.png").tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_two_levels(tmp_path):
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "a.png")
    assert grey(tmp_path / "a.png") == [0, 255]


def test_cmyk(tmp_path):
    # no ink is white; full cyan leaves green and blue
    image = Image.new("CMYK", (16, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 0), (8, 0, 16, 8))
    image.save(tmp_path / "a.jpg", quality=100)
    pixels = load(tmp_path / "a.jpg").astype(int)
    assert np.abs(pixels[4, 2] - [255, 255, 255]).max() <= 3
    assert np.abs(pixels[4, 13] - [0, 255, 255]).max() <= 3


def test_16_bit_colour_keeps_the_high_byte(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\x00" + np.array([1000, 32768, 65535], ">u2").tobytes()
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert load(tmp_path / "a.png").tolist() == [[[3, 128, 255]]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load(tmp_path / "a.gif")[0, 0].tolist() == [250, 0, 0]


def test_broken_files_are_values_with_a_one_line_reason(tmp_path, truncated):
    truncated(tmp_path / "truncated.jpg")
    (tmp_path / "text.jpg").write_text("not an image\n" * 9)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    for name in ("truncated.jpg", "text.jpg", "empty.png", "folder.png", "missing.png"):
        bad = load_image(str(tmp_path / name))
        assert isinstance(bad, BadImage)
        assert bad.path == str(tmp_path / name)
        assert bad.reason
        assert "\n" not in bad.reason
    assert "truncated" in load_image(str(tmp_path / "truncated.jpg")).reason


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "decompression bomb" in load_image(str(tmp_path / "a.png")).reason


@pytest.mark.filterwarnings("ignore:.*:UserWarning:PIL", "ignore:.*:PIL.Image.DecompressionBombWarning")
def test_random_damage_never_raises(tmp_path):
    random = np.random.RandomState(0)
    noise = Image.fromarray(random.randint(0, 255, (16, 16, 3)).astype(np.uint8))
    path = tmp_path / "damaged"
    outcomes = set()
    for suffix in ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"):
        noise.save(path, suffix)
        intact = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(intact[: random.randint(1, len(intact) + 1)])
            for position in random.randint(0, len(damaged), 5):
                damaged[position] = random.randint(256)
            path.write_bytes(damaged)
            loaded = load_image(str(path))
            outcomes.add(next(kind for kind in (BadImage, Image.Image) if isinstance(loaded, kind)))
    assert outcomes == {BadImage, Image.Image}


ODD = {
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(mark) (w) file closefile\nshowpage\n",
    "compressed.dds": b"DDS " + (124).to_bytes(4, "little") + bytes(120),
    "game.blp": b"BLP2" + bytes(200),
    "scene.avif": b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1miaf" + bytes(200),
    "metafile.wmf": b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(80),
    "icon.icns": b"icns" + bytes(100),
    "film.mpg": b"\x00\x00\x01\xb3" + bytes(100),
    "layers.psd": b"8BPS\x00\x01" + bytes(100),
    "empty.jpg": b"",
}


@pytest.mark.parametrize("name", ODD)
def test_formats_outside_the_short_list_and_broken_files_are_values(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(ODD[name])
    monkeypatch.setenv("PATH", str(tmp_path))  # where a mark would be made of any program that is started
    with only_opens(tmp_path / name):
        bad = load_image(str(tmp_path / name))
    assert isinstance(bad, BadImage)
    assert bad.reason
    assert "\n" not in bad.reason


def test_an_intact_postscript_file_is_no_image(tmp_path):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with only_opens(tmp_path / "a.jpg"):
        assert isinstance(load_image(str(tmp_path / "a.jpg")), BadImage)


@pytest.mark.timeout(20)
def test_pipes_devices_and_sockets_do_not_hang(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        for name in ("pipe.jpg", "zero.png", "socket.jpg", "loop.png"):
            assert isinstance(load_image(name), BadImage), name


def _photograph(path, orientation, file_format="JPEG"):
    """Grey levels that rise from left to right and, half as much, from top to bottom, stored turned."""
    x, y = np.meshgrid(np.linspace(0, 160, 24), np.linspace(0, 80, 16))
    image = Image.fromarray((x + y).astype(np.uint8))
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse of what the tag asks for, as Pillow numbers it
    turned = image if orientation == 1 else image.transpose(Image.Transpose(stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned.save(path, file_format, exif=exif, **({"quality": 100} if file_format == "JPEG" else {}))
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_photographs_stand_upright_unless_told_otherwise(tmp_path, orientation, file_format):
    expected = _photograph(tmp_path / "a.jpg", orientation, file_format)
    pixels = np.asarray(load_image(str(tmp_path / "a.jpg"))).astype(int)[..., 0]
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 4
    with Image.open(tmp_path / "a.jpg") as stored:
        raw = np.asarray(stored.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(str(tmp_path / "a.jpg"), "ignore")), raw)


def test_upright_is_the_rule_of_openmmlab(tmp_path):
    mmcv = pytest.importorskip("mmcv")
    _photograph(tmp_path / "a.jpg", 6)
    ours = np.asarray(load_image(str(tmp_path / "a.jpg"))).astype(int)
    theirs = mmcv.imread(str(tmp_path / "a.jpg"), channel_order="rgb").astype(int)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 3  # two decoders


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00junk", b"Exif\x00\x00" + bytes(30)]
)
def test_damaged_exif_data_do_no_harm(tmp_path, exif):
    Image.new("RGB", (6, 4), (9, 99, 199)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(str(tmp_path / "a.jpg")).size == (6, 4)


def test_an_orientation_that_does_not_exist_is_passed_over(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(str(tmp_path / "a.jpg")).size == (6, 4)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=sample(25, 500), deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bytes_give_an_image_or_a_reason(tmp_path_factory, data):
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF"]))
    path = tmp_path_factory.getbasetemp() / f"flipped.{kind}"
    noise = np.random.RandomState(0).randint(0, 255, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path, kind)
    content = bytearray(path.read_bytes())
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    for _ in range(data.draw(st.integers(0, 5)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    found = load_image(str(path))
    assert isinstance(found, Image.Image) or "\n" not in found.reason
