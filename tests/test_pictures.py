"""What eval.py takes for a picture: known pixels in every format, and no file that fails half-way."""
import struct
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from eval_pictures import SUFFIXES, frechet, list_pictures, read_picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import eval as ev


def grey16(value):
    return Image.fromarray(np.full((4, 6), value, np.uint16))


def palette():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    return image


def tiff(bits, photometric, content):
    """A TIFF of 6 x 4 grey pixels, none of which Pillow itself can write."""
    tags = [(256, 6), (257, 4), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, 4),
            (279, len(content))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return (struct.pack("<4sIH", b"II*\0", 8, len(tags)) + entries + bytes(4)).ljust(122, b"\0") + content


def save(image, **options):
    return lambda path: image.save(path, **options)


def write(content):
    return lambda path: path.write_bytes(content)


def write_with_opencv(value, *channels):
    return lambda path: cv2.imwrite(str(path), np.full((4, 6, *channels), value, np.uint16))


WHITE, RED = (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(("name", "make", "pixel"), [
    ("16.png", save(grey16(0x8000)), (128,) * 3), ("16.tif", save(grey16(0x8000)), (128,) * 3),
    ("16_white.png", save(grey16(0xFFFF)), WHITE), ("16_dark.png", save(grey16(0x0101)), (1, 1, 1)),
    ("16_transparent.png", save(grey16(5), transparency=5), WHITE),
    ("16_opaque.png", save(grey16(0x8000), transparency=5), (128,) * 3),
    ("12.tif", write(tiff(12, 1, b"\xff" * 36)), WHITE),
    ("16_white_is_zero.tif", write(tiff(16, 0, bytes(48))), WHITE),
    ("8_white_is_zero.tif", write(tiff(8, 0, bytes(24))), WHITE),
    ("rgb16.png", write_with_opencv(0x8000, 3), (128,) * 3),
    ("rgb16.tiff", write_with_opencv(0x8000, 3), (128,) * 3),
    ("1.png", save(Image.new("1", (6, 4), 1)), WHITE), ("L.PNG", save(Image.new("L", (6, 4), 7)), (7, 7, 7)),
    ("1.bmp", save(Image.new("1", (6, 4), 0)), (0, 0, 0)),
    ("LA.png", save(Image.new("LA", (6, 4), (0, 0))), WHITE),
    ("L_transparent.png", save(Image.new("L", (6, 4), 7), transparency=7), WHITE),
    ("RGB_transparent.png", save(Image.new("RGB", (6, 4), RED), transparency=RED), WHITE),
    ("RGBA.png", save(Image.new("RGBA", (6, 4), (0, 0, 0, 0))), WHITE),
    ("RGBA_half.png", save(Image.new("RGBA", (6, 4), (255, 0, 0, 128))), (255, 127, 127)),
    ("RGBA.webp", save(Image.new("RGBA", (6, 4), (0, 0, 0, 0)), lossless=True), WHITE),
    ("P.png", save(palette()), (0, 255, 0)), ("P_transparent.png", save(palette(), transparency=1), WHITE),
    ("P_some.png", save(palette(), transparency=b"\xff\x80"), (127, 255, 127)),
    ("P.gif", save(palette()), (0, 255, 0)), ("P_transparent.gif", save(palette(), transparency=1), WHITE),
    ("CMYK.tif", save(Image.new("CMYK", (6, 4), (0, 255, 255, 0))), RED),
    ("CMYK.jpg", save(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), quality=100), RED),
    ("YCbCr.jpeg", save(Image.new("YCbCr", (6, 4), (255, 128, 128))), WHITE),
    ("a_png_by_another_name.jpg", save(Image.new("RGB", (6, 4), RED), format="PNG"), RED)])
def test_a_picture_has_the_colours_that_a_viewer_shows(tmp_path, name, make, pixel):
    make(tmp_path / name)
    [path] = list_pictures(tmp_path)
    image = read_picture(path)
    assert image.mode == "RGB" and image.size == (6, 4)
    assert (np.asarray(image) == pixel).all(), np.asarray(image)[0, 0]


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize(("orientation", "corner"), [
    (1, "lt"), (2, "rt"), (3, "rb"), (4, "lb"), (5, "lt"), (6, "rt"), (7, "rb"), (8, "lb")])
def test_a_picture_stands_upright(tmp_path, ending, orientation, corner):
    """The EXIF standard's table: in which corner viewers show the stored picture's upper left pixels."""
    exif, pixels = Image.Exif(), np.zeros((16, 32, 3), np.uint8)
    exif[274], pixels[:8, :8] = orientation, 255
    options = dict(lossless=True) if ending == "webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", exif=exif, **options)
    image = np.asarray(read_picture(tmp_path / f"a.{ending}"))
    assert image.shape == ((32, 16, 3) if orientation > 4 else (16, 32, 3))
    seen = image[2 if corner[1] == "t" else -3, 2 if corner[0] == "l" else -3]
    assert seen.min() > 250 and (image > 128).mean() == pytest.approx(64 / 512)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif", "avif"])
def test_of_several_frames_the_first_is_taken(tmp_path, ending):
    first, second = Image.new("RGB", (6, 4), RED), Image.new("RGB", (6, 4), (0, 0, 255))
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second])
    assert abs(np.asarray(read_picture(tmp_path / f"a.{ending}"), int) - RED).max() < 4


def cut(image, ending, share=0.5):
    def make(path):
        image.save(path)
        path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    return make


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def bomb(path):
    Image.new("1", (14_000, 14_000)).save(path)  # 196 million pixels in 24 kB


def long_text(path):
    text = PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    NOISE.save(path, pnginfo=text)


@pytest.mark.parametrize(("name", "make"), [
    *((f"cut.{e}", cut(NOISE, e)) for e in ("png", "jpg", "webp", "gif", "tif", "bmp", "avif")),
    ("almost_whole.jpg", cut(NOISE, "jpg", 0.95)), ("empty.jpg", write(b"")), ("text.png", write(b"a page")),
    ("page.JPG", write(b"<html>404</html>")), ("large.png", bomb), ("text_bomb.png", long_text),
    ("float.tif", save(Image.new("F", (6, 4), 0.5))), ("32.tif", save(Image.new("I", (6, 4), 70_000))),
    ("gone.png", lambda path: path.symlink_to("nowhere"))])
@pytest.mark.parametrize("flag", ["--init-images", "--reference"])
def test_one_bad_picture_is_named_before_anything_is_loaded(tmp_path, capsys, name, make, flag):
    NOISE.save(tmp_path / "a.png")
    NOISE.save(tmp_path / "z.png")
    make(tmp_path / name)
    with pytest.raises(SystemExit) as stop:
        ev.evaluate(ev.parse_args(["--model", "no/such/model", flag, str(tmp_path)]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and f"picture {tmp_path / name}:" in said, said


def test_what_is_no_picture_is_left_out_and_named(tmp_path, capsys):
    for name in ("b.JPG", "a.png", "._a.png", ".hidden.png", "notes.txt", "raw.CR2", "phone.heic"):
        (NOISE.save if name in ("b.JPG", "a.png") else (lambda p: p.write_bytes(b"x")))(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    assert [p.name for p in list_pictures(str(tmp_path))] == ["a.png", "b.JPG"]
    assert capsys.readouterr().out == f"{tmp_path}: not among the pictures: notes.txt, phone.heic, raw.CR2\n"
    for folder in (tmp_path / "folder.png", tmp_path / "nowhere", tmp_path / "notes.txt"):
        with pytest.raises(SystemExit) as stop:
            list_pictures(str(folder))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and str(folder) in said and SUFFIXES[0] in said


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (65, 64)])
def test_any_shape_of_picture_starts_image_to_image(tmp_path, size):
    """And it is read as above: 0x8000 of 16 bits is a middle grey."""
    Image.fromarray(np.full(size[::-1], 0x8000, np.uint16)).save(tmp_path / "a.png")
    row = ev.Row("a house", "a house", False, 1, 3.0, 64, 32)
    job = ev.Job("p", 0, 0, row, list_pictures(str(tmp_path))[0])
    [image] = ev.call_of(None, [job], ev.Args())["image"]
    assert image.size == (64, 32) and (np.asarray(image) == 128).all()


def test_reference_pictures_are_read_the_same_way(tmp_path, monkeypatch):
    """The Inception network is an optional package: its place is taken by what keeps the pixels."""
    seen = []

    class Distance:
        def to(self, device):
            return self

        def update(self, pixels, real):
            seen.append((pixels, real))

        def compute(self):
            return torch.tensor(1.5)

    fid = SimpleNamespace(FrechetInceptionDistance=Distance)
    monkeypatch.setitem(ev.sys.modules, "torchmetrics.image.fid", fid)
    grey16(0x8000).save(tmp_path / "a.png")
    found = frechet([tmp_path / "a.png"], [ROOT / "tests/tiny/sheet.jpg"], "cpu")
    assert found == dict(value=1.5, n=1, n_reference=1) and [real for _, real in seen] == [True, False]
    assert seen[0][0].shape == (1, 3, 4, 6) and seen[0][0].dtype == torch.uint8 and (seen[0][0] == 128).all()
