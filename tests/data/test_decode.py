"""The fast road against the careful one, and both against Pillow's crop and antialiased bicubic."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from mlc.data import decode
from mlc.data.decode import decoded
from shards.image import BadImage

PHOTOS = [Image.fromarray(photo) for photo in load_sample_images().images]  # 640 x 427
SIZES = [(640, 427), (333, 251), (257, 400), (64, 65), (1, 90), (90, 1), (1, 1), (3000, 40)]


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    planes = 127 + 100 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], -1)
    return Image.fromarray(planes.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} | options if kind == "JPEG" else options))
    return buffer.getvalue()


def whole(size: tuple[int, int]) -> decode.Box:
    return (0.0, 0.0, float(size[0]), float(size[1]))


def inner(size: tuple[int, int]) -> decode.Box:
    """A box well inside, and not empty, of whole pixels as training draws them."""
    left, upper = int(0.2 * size[0]), int(0.1 * size[1])
    return (left, upper, left + max(1, int(0.7 * size[0])), upper + max(1, int(0.6 * size[1])))


def by_pillow(data: bytes, size: int, choose, filter=Image.Resampling.BICUBIC) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return np.asarray(image.crop(choose(image.size)).resize((size, size), filter))


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


@pytest.fixture
def careful(monkeypatch):
    """`decoded` without its fast road."""

    def through_pillow(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_plain_jpeg", lambda data: None)
            return decoded(*args, **kwargs)

    return through_pillow


@pytest.fixture
def decoded_sizes(monkeypatch) -> list[tuple[int, int]]:
    """(height, width) of everything that libjpeg-turbo decodes."""
    seen, decoder = [], decode.simplejpeg.decode_jpeg

    def recording(*args, **kwargs):
        pixels = decoder(*args, **kwargs)
        seen.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", recording)
    return seen


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 60}], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_both_roads_see_the_same(size, options, careful):
    for image in (smooth(*size), PHOTOS[0].resize(size)):
        for data in (encoded(image, **options), encoded(image.convert("L"), **options)):
            for choose in (whole, inner):
                fast, slow = decoded(data, 48, choose), careful(data, 48, choose)
                assert fast.shape == slow.shape == (48, 48, 3) and fast.dtype == slow.dtype == np.uint8
                assert distance(fast, slow).mean() < 0.1 and distance(fast, slow).max() <= 4


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 100})])
def test_formats_differ_only_by_their_loss(kind, options):
    for photo in PHOTOS:
        seen = decoded(encoded(photo, kind, **options), 160, inner)
        assert distance(seen, decoded(encoded(photo, "PNG"), 160, inner)).mean() < (1.5 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize("size", [40, 100, 224, 400, 512])
def test_photos_stay_close_to_pillows_bicubic(size):
    """As close as a few times what Pillow's own bilinear differs by; smooth pictures within a few grey levels."""
    calm = encoded(smooth(640, 427))
    assert distance(decoded(calm, size, inner), by_pillow(calm, size, inner)).max() <= 4
    for photo in PHOTOS:
        for data in (encoded(photo), encoded(photo, "PNG")):
            for choose in (whole, inner):
                expected = by_pillow(data, size, choose)
                other = distance(by_pillow(data, size, choose, Image.Resampling.BILINEAR), expected).mean()
                assert distance(decoded(data, size, choose), expected).mean() < 3 * other
                assert distance(decoded(data, size, choose, antialias=True), expected).mean() < 2 * other


@pytest.mark.parametrize("box", [(0, 0, 640, 427), (10, 20, 530, 420), (5, 5, 205, 405), (3, 0, 4, 427)])
def test_antialiasing_is_pillows(box):
    expected = np.asarray(PHOTOS[1].crop(box).resize((96, 96), Image.Resampling.BICUBIC))
    for data in (encoded(PHOTOS[1], "PNG"), encoded(PHOTOS[1], "WEBP", lossless=True)):
        assert distance(decoded(data, 96, lambda _: box, antialias=True), expected).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation, careful):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = PHOTOS[0].crop((0, 0, 500, 300))
    data = encoded(photo, exif=exif)
    for choose, size in ((inner, 128), (whole, 32)):  # 32: decoded at a quarter
        expected = by_pillow(data, size, choose)
        assert distance(decoded(data, size, choose, antialias=True), expected).mean() < 3
        assert distance(careful(data, size, choose, antialias=True), expected).mean() < 3


def test_broken_exif_is_no_reason_to_refuse_a_picture():
    data = encoded(PHOTOS[0])
    for junk in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"http://ns.adobe.com/xap/1.0/\0<x"):
        odd = data[:2] + b"\xff\xe1" + (len(junk) + 2).to_bytes(2, "big") + junk + data[2:]
        assert np.array_equal(decoded(odd, 64, whole), decoded(data, 64, whole))


@pytest.mark.parametrize("fraction, size", [(1, 200), (2, 100), (4, 64), (8, 32)])
def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(fraction, size, decoded_sizes):
    data = encoded(smooth(601, 303))
    small = decoded(data, size, whole)
    assert decoded_sizes == [(-(-303 // fraction), -(-601 // fraction))]
    assert distance(small, by_pillow(data, size, whole)).mean() < 1
    decoded(data, size, whole, antialias=True)
    assert decoded_sizes[1] == (-(-303 // max(1, fraction // 2)), -(-601 // max(1, fraction // 2)))


def test_the_box_is_chosen_once_even_where_the_fast_road_ends():
    """A JPEG that libjpeg-turbo complains about and Pillow reads: a second draw would change the crop."""
    data, calls = encoded(PHOTOS[0]), []
    middle = len(data) // 2
    odd = data[:middle] + b"\xaa" * 40 + data[middle + 40 :]

    def choose(size):
        calls.append(size)
        return inner(size)

    with pytest.raises(ValueError):
        decode.simplejpeg.decode_jpeg(odd, "RGB")
    assert distance(decoded(odd, 64, choose, antialias=True), by_pillow(odd, 64, inner)).mean() < 2
    assert calls == [(640, 427)]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4"])
@pytest.mark.parametrize("top, bottom", [(0, 100), (16, 96), (37, 180), (150, 281), (200, 283), (160, 170)])
def test_with_restart_markers_only_the_rows_of_the_box_are_decoded(top, bottom, subsampling, mode, decoded_sizes):
    photo = PHOTOS[0].crop((0, 100, 333, 383)).convert(mode)
    box, options = (20, top, 300, bottom), {"subsampling": subsampling} if mode == "RGB" else {}
    part = decoded(encoded(photo, restart_marker_rows=1, **options), 90, lambda _: box)
    full = decoded(encoded(photo, **options), 90, lambda _: box)
    assert decoded_sizes[0][0] <= min(bottom - top + 30, 283) and decoded_sizes[1] == (283, 333)
    assert (
        distance(part, full).max() <= 20
    )  # the colour of the first and the last row is not mixed with its neighbour's
    assert distance(part, full).mean() < 0.5


@pytest.mark.parametrize(
    "options",
    [{"progressive": True, "restart_marker_rows": 1}, {"restart_marker_rows": 3}, {"restart_marker_blocks": 5}],
    ids=str,
)
def test_other_restart_markers_are_decoded_whole(options, decoded_sizes):
    data = encoded(PHOTOS[0], **options)
    box = (20, 100, 300, 200)
    assert np.array_equal(decoded(data, 90, lambda _: box), decoded(encoded(PHOTOS[0]), 90, lambda _: box))
    assert decoded_sizes == [(427, 640)] * 2


def test_a_lost_restart_marker_does_not_move_the_rows(decoded_sizes):
    data, photo = encoded(PHOTOS[0], restart_marker_rows=1), encoded(PHOTOS[0])
    lost = data.index(b"\xff\xd3")
    decoded(data[:lost] + data[lost + 2 :], 90, lambda _: (20, 300, 300, 400))
    assert decoded_sizes in ([], [(427, 640)])
    with_tail = decoded(data + b"\xff\xd0 something after the end", 90, lambda _: (20, 300, 300, 400))
    assert distance(with_tail, decoded(photo, 90, lambda _: (20, 300, 300, 400))).mean() < 0.05


def test_a_shrunk_part_lies_where_it_should(decoded_sizes):
    box = (0, 213, 640, 427)
    part, full = (
        decoded(encoded(smooth(640, 427), **options), 53, lambda _: box) for options in ({"restart_marker_rows": 1}, {})
    )
    assert decoded_sizes == [(55, 160), (107, 160)] and distance(part, full).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damage_is_said(kind):
    data = encoded(PHOTOS[0], kind)
    for broken in (data[: len(data) // 2], data[:30], b"", b"\xff\xd8\xff"):
        with pytest.raises(BadImage):
            decoded(broken, 64, whole)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_decompression_bomb_is_refused(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 640 * 427 - 1)
    with pytest.raises(BadImage, match="decompression bombs"):
        decoded(encoded(PHOTOS[0], kind), 64, whole)


def test_cmyk_and_a_second_picture_in_the_file():
    inks = encoded(PHOTOS[0].convert("CMYK"))
    assert distance(decoded(inks, 64, inner, antialias=True), by_pillow(inks, 64, inner)).mean() < 2
    both = encoded(PHOTOS[0], "MPO", save_all=True, append_images=[PHOTOS[1]])
    assert distance(decoded(both, 64, inner, antialias=True), by_pillow(both, 64, inner)).mean() < 2


def test_opencv_runs_in_one_thread():
    assert cv2.getNumThreads() == 1
