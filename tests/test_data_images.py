import io
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mrl.data.images import decode, read_image
from mrl.errors import ConfigError, DataError
from pictures import draw, png, tiff, wide_png

GREY = draw(0)
COLOUR = np.stack([draw(1), draw(2), draw(3)], axis=-1)
WIDE = np.random.default_rng(4).integers(0, 65536, (11, 7, 4)).astype(np.uint16)


def save(path, image, **options):
    image.save(path, **options)
    return path


def same(image, values, maximum):
    """`image` (3, H, W) is exactly values / maximum in float32."""
    wanted = torch.from_numpy(np.ascontiguousarray(values).astype(np.float32)) / maximum
    wanted = wanted.expand(3, -1, -1) if wanted.ndim == 2 else wanted.permute(2, 0, 1)
    return image.dtype == torch.float32 and torch.equal(image, wanted)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "pgm", "webp", "gif"])
def test_read_image__grey_in_every_lossless_format(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(GREY), **options))
    assert same(image, GREY, 255)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_read_image__colour_in_every_lossless_format(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    image = read_image(save(tmp_path / f"a.{suffix}", Image.fromarray(COLOUR), **options))
    assert same(image, COLOUR, 255)


def test_read_image__grey_is_not_copied(tmp_path):
    image = read_image(save(tmp_path / "a.png", Image.fromarray(GREY)))
    assert image.shape == (3, 16, 16)
    assert image.stride(0) == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_read_image__transparency_is_dropped_not_blended(tmp_path, mode):
    alpha = Image.fromarray(draw(9))
    if mode == "RGBA":
        image, wanted = Image.fromarray(COLOUR), COLOUR
    else:
        image, wanted = Image.fromarray(GREY), GREY
    image.putalpha(alpha)
    if mode == "PA":
        image = image.convert("RGB").quantize(256)
        wanted = np.asarray(image.convert("RGB"))
        image.info["transparency"] = bytes(range(200))
    read = read_image(save(tmp_path / "a.png", image))
    if mode == "PA":
        assert same(read, wanted, 255)
    else:
        assert same(read, wanted, 255)
        assert (np.asarray(alpha) < 255).any()


def test_read_image__one_bit_and_four_bits_reach_white(tmp_path):
    bits = Image.fromarray(GREY).convert("1")
    assert same(read_image(save(tmp_path / "a.png", bits)), np.asarray(bits).astype(np.uint8), 1)
    rows = bytes([0, 0x0F, 0, 0xF0])  # two rows of two 4-bit pixels, each after its filter byte
    (tmp_path / "b.png").write_bytes(png(2, 2, 4, 0, rows))
    assert read_image(tmp_path / "b.png")[0].tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "P"])
def test_read_image__other_colour_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(COLOUR).convert(mode)
    path = save(tmp_path / ("a.png" if mode == "P" else "a.tif"), image)
    assert same(read_image(path), np.asarray(image.convert("RGB")), 255)


def test_read_image__16_bit_grey_png_keeps_every_value(tmp_path):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = read_image(save(tmp_path / "a.png", Image.fromarray(values)))
    assert same(image, values, 65535)
    assert len(image[0].unique()) == 65536


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_read_image__16_bit_png_keeps_every_value_in_colour_too(tmp_path, channels):
    (tmp_path / "a.png").write_bytes(wide_png(WIDE[..., :channels]))
    wanted = WIDE[..., 0] if channels < 3 else WIDE[..., :3]
    assert same(read_image(tmp_path / "a.png"), wanted, 65535)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_read_image__16_bit_tiff_keeps_every_value(tmp_path, order, packed, channels):
    (tmp_path / "a.tif").write_bytes(tiff(WIDE[..., :channels], order=order, packed=packed))
    wanted = WIDE[..., 0] if channels == 1 else WIDE[..., :3]
    assert same(read_image(tmp_path / "a.tif"), wanted, 65535)


def test_read_image__16_bit_tiff_where_zero_is_white(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(WIDE[..., 0], extra={262: 0}))
    assert same(read_image(tmp_path / "a.tif"), 65535 - WIDE[..., 0], 65535)
    small = WIDE[..., 0] % 4096
    (tmp_path / "b.tif").write_bytes(tiff(small, extra={262: 0}))
    assert same(read_image(tmp_path / "b.tif", bit_depth=12), 4095 - small, 4095)


def test_read_image__16_bit_colour_that_would_lose_range_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(WIDE, extra={338: 1}))
    with pytest.raises(DataError, match=r"a.tif: is a 16-bit file of a kind .* save it as 16-bit RGB PNG"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("magic", [b"P5", b"P6", b"P2", b"P3"])
def test_read_image__wide_netpbm_is_a_share_of_its_own_maximum(tmp_path, magic):
    values = WIDE[..., : 3 if magic in (b"P6", b"P3") else 1] % 1001
    head = magic + b"\n# a comment\n7 11\n1000\n"
    plain = " ".join(str(v) for v in values.ravel()).encode() + b"\n# end"
    (tmp_path / "a.pnm").write_bytes(head + (plain if magic in (b"P2", b"P3") else values.astype(">u2").tobytes()))
    wanted = values[..., 0] if values.shape[-1] == 1 else values
    assert same(read_image(tmp_path / "a.pnm"), wanted, 1000)


def test_read_image__bit_depth_overrides_the_type(tmp_path):
    values = WIDE[..., 0] % 4096
    path = save(tmp_path / "a.png", Image.fromarray(values))
    assert same(read_image(path, bit_depth=12), values, 4095)
    assert same(read_image(path), values, 65535)


def test_read_image__bit_depth_leaves_files_of_fewer_bits_alone(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(GREY))
    assert same(read_image(path, bit_depth=12), GREY, 255)
    dark = save(tmp_path / "b.png", Image.fromarray(GREY // 16))
    assert same(read_image(dark, bit_depth=4), GREY // 16, 15)


def test_read_image__a_value_above_bit_depth_is_an_error_that_names_the_file(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(np.array([[0, 4096]], np.uint16)))
    with pytest.raises(DataError, match=r"a.png: has a value of 4096, above the 4095 .*bit-depth"):
        read_image(path, bit_depth=12)


@pytest.mark.parametrize("bit_depth", [0, 33, 12.5, "12"])
def test_read_image__a_bit_depth_that_is_none(tmp_path, bit_depth):
    path = save(tmp_path / "a.png", Image.fromarray(GREY))
    with pytest.raises(ConfigError, match="--bit-depth"):
        read_image(path, bit_depth=bit_depth)


def test_read_image__float_tiff(tmp_path):
    inside = (GREY / 255).astype(np.float32)
    assert same(read_image(save(tmp_path / "a.tif", Image.fromarray(inside))), inside, 1)
    outside = save(tmp_path / "b.tif", Image.fromarray(GREY.astype(np.float32)))
    with pytest.raises(DataError, match=r"b.tif: holds floats outside 0 to 1 .*--bit-depth"):
        read_image(outside)
    assert same(read_image(outside, bit_depth=8), GREY, 255)
    for bad in (np.nan, -0.5):
        path = save(tmp_path / "c.tif", Image.fromarray(np.full((2, 2), bad, np.float32)))
        with pytest.raises(DataError, match=r"not finite|negative"):
            read_image(path, bit_depth=8)


def test_read_image__32_bit_integers_need_a_bit_depth(tmp_path):
    values = WIDE[..., 0].astype(np.int32) * 4
    path = save(tmp_path / "a.tif", Image.fromarray(values))
    with pytest.raises(DataError, match=r"32-bit integers .*--bit-depth"):
        read_image(path)
    assert same(read_image(path, bit_depth=18), values, 2**18 - 1)


@pytest.mark.parametrize("kind", ["L", "RGB", "I;16", "RGB;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image__exif_orientation_is_applied(tmp_path, kind, orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    small = Image.fromarray((COLOUR if "RGB" in kind else GREY)[:5])
    wanted = np.asarray(small if orientation == 1 else small.transpose(undo[orientation]))
    if "16" in kind:
        (tmp_path / "a.tif").write_bytes(tiff(np.asarray(small).astype(np.uint16) * 256, extra={274: orientation}))
        assert same(read_image(tmp_path / "a.tif"), wanted.astype(np.uint16) * 256, 65535)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.asarray(small).astype(np.uint16)) if kind == "I;16" else small
    path = save(tmp_path / "a.png", image, exif=exif)
    assert same(read_image(path), wanted, 65535 if kind == "I;16" else 255)


def test_read_image__first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(draw(n)) for n in range(3)]
    path = save(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert same(read_image(path), np.asarray(frames[0]), 255)
    assert decode(path.read_bytes()).frames == 3


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "gif", "webp", "ppm"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_read_image__truncated_files_are_errors(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=rf"a\.{suffix}: .*; replace the file, or take it out\.$"):
        read_image(path)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_read_image__truncated_16_bit_files_are_errors(tmp_path, share):
    for name, data in (
        ("a.png", wide_png(WIDE)),
        ("a.tif", tiff(WIDE[..., 0])),
        ("a.pgm", b"P5 7 11 65535\n" + bytes(154)),
    ):
        (tmp_path / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_read_image__text_named_png_and_an_empty_file(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"a.png: is not an image"):
        read_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b.png: the file is empty"):
        read_image(tmp_path / "b.png")
    for missing in (tmp_path / "c.png", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_image(missing)


def test_read_image__postscript_is_not_opened(tmp_path, monkeypatch):
    """Pillow would start Ghostscript for it."""
    Image.init()
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("was started"))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"a.png: is not an image"):
        read_image(tmp_path / "a.png")


def test_read_image__counts_no_pages(tmp_path, monkeypatch):
    """The time that Pillow takes to count them grows with the square of their number."""
    pages = [Image.fromarray(np.full((4, 4), n, np.uint8)) for n in range(3)]
    path = save(tmp_path / "a.tif", pages[0], save_all=True, append_images=pages[1:])
    assert decode(path.read_bytes()).frames == 3
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.n_frames", property(lambda _: pytest.fail("was counted")))
    assert float(read_image(path).max()) == 0


@pytest.mark.parametrize("side", [12, 20])
def test_read_image__too_many_pixels(tmp_path, monkeypatch, side):
    path = save(tmp_path / "a.png", Image.new("L", (side, side)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"a.png: has .* pixels.* make it smaller"):
        read_image(path)


def test_read_image__refuses_pillow_that_hides_broken_files(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", Image.fromarray(GREY))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES"):
        read_image(path)


def test_read_image__threads_leave_the_warning_filters_as_they_were(tmp_path):
    image = Image.fromarray(COLOUR).quantize(16)
    path = save(tmp_path / "a.png", image, transparency=bytes(range(16)))
    before, wanted, right = list(warnings.filters), read_image(path), []

    def work():
        right.extend(torch.equal(read_image(path), wanted) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    assert right == [True] * 80


def test_decode__never_changes_the_file(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(COLOUR))
    data, stat = path.read_bytes(), path.stat()
    read_image(path)
    assert path.read_bytes() == data
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


def test_decode__jpeg_of_every_kind(tmp_path):
    for mode in ("L", "RGB", "CMYK"):
        buffer = io.BytesIO()
        Image.fromarray(COLOUR).convert(mode).save(buffer, "jpeg", quality=95)
        found = decode(buffer.getvalue())
        assert found.mode == mode
        assert found.maximum == 255
        assert np.abs(found.tensor().mean().item() - COLOUR.mean() / 255) < 0.1
