"""Decoding of image files: modes, EXIF, transparency, crops, unreadable files, options."""

import os
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms.v2 import functional as T

import linear
import main
from simsiam.data.decode import (
    DecodeOptions,
    decode_files,
    ignore_pil_warnings,
    read_header,
    read_image,
    resize_center_crop,
    to_rgb,
)
from simsiam.data.loader import CropDataset, ImageFiles
from simsiam.data.textures import make_textures
from simsiam.interop.weights import LoadedCheckpoint, Predictor
from simsiam.views.augment import Augmentation
from tests.helpers import refused

AS_STORED = DecodeOptions(exif=False, background="none")


def equal(image, other):
    return np.array_equal(np.asarray(image), np.asarray(other.convert("RGB")))


def save_corners(path, orientation):
    """Save an image whose quarters differ, with an EXIF orientation."""
    quarters = np.array([[0, 80], [160, 240]], np.uint8).repeat(16, 0).repeat(24, 1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(quarters).convert("RGB").save(path, exif=exif)
    return path


# ---- pixels -------------------------------------------------------------------------------------


def test_every_mode_becomes_rgb():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"):
        assert to_rgb(Image.fromarray(gray).convert(mode)).mode == "RGB"
    assert (np.asarray(to_rgb(Image.fromarray(gray))) == gray[..., None]).all()
    for dtype in (np.uint16, np.int32):  # 16 bits: the upper 8 of them, without clipping
        deep = (gray.astype(dtype) << 8) + 255
        assert (np.asarray(to_rgb(Image.fromarray(deep))) == gray[..., None]).all()


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied_once(tmp_path, extension):
    for orientation in range(1, 9):
        path = save_corners(tmp_path / f"{orientation}.{extension}", orientation)
        image = read_image(path)
        with Image.open(path) as stored:
            assert equal(image, ImageOps.exif_transpose(stored))
            assert extension == "tif" or equal(read_image(path, AS_STORED), stored)
        assert equal(to_rgb(image), image)
    rotated = np.asarray(read_image(save_corners(tmp_path / f"a.{extension}", 6)))
    expected = [[160, 0], [240, 80]]  # a quarter turn to the right
    assert np.abs(rotated[8::24, 8::16, 0].astype(int) - expected).max() < 9


def test_damaged_exif_is_ignored(tmp_path):
    path = save_corners(tmp_path / "a.jpg", 6)
    content = path.read_bytes()
    start = content.index(b"Exif\0\0")
    path.write_bytes(content[: start + 14] + b"\xff" * 8 + content[start + 22 :])
    with warnings.catch_warnings():
        ignore_pil_warnings()
        assert read_image(path).size == (48, 32)


def save_transparent(folder):
    """Save pixels that are transparent, half transparent and opaque red, in each kind of file."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, [0, 128, 255]
    rgba = Image.fromarray(pixels.repeat(9, 0).repeat(9, 1), "RGBA")
    rgba.save(folder / "rgba.png")
    rgba.save(folder / "rgba.webp", lossless=True, exact=True)
    rgba.convert("LA").save(folder / "la.png")
    palette = Image.new("P", (27, 9), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.paste(0, (0, 0, 9, 9))
    palette.save(folder / "p.png", transparency=0)
    palette.save(folder / "p.gif", transparency=0)
    keyed = Image.new("RGB", (27, 9), (200, 0, 0))
    keyed.paste((1, 2, 3), (0, 0, 9, 9))
    keyed.save(folder / "rgb.png", transparency=(1, 2, 3))
    return sorted(folder.iterdir())


def test_transparent_pixels_show_the_background(tmp_path):
    for path in save_transparent(tmp_path):
        for name, value in (("white", 255), ("black", 0)):
            pixels = np.asarray(read_image(path, DecodeOptions(background=name)))[4, 4::9]
            assert pixels[0].tolist() == [value] * 3, path
            assert pixels[2, 0] == (60 if "la" in path.name else 200), path
        with Image.open(path) as image:
            assert equal(read_image(path, AS_STORED), image)
    white = np.asarray(read_image(tmp_path / "rgba.png"))[4, 4::9].tolist()
    assert white == [[255] * 3, [227, 127, 127], [200, 0, 0]]


def test_floats_from_0_to_1_and_to_255(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "one.tif")
    Image.fromarray(255 * ramp.round(3)).save(tmp_path / "bytes.tif")
    expected = (255 * ramp).round()[..., None]
    assert (np.asarray(read_image(tmp_path / "one.tif")) == expected).all()
    assert np.abs(np.asarray(read_image(tmp_path / "bytes.tif")) - expected).max() <= 1
    for i, strange in enumerate((ramp - 0.5, 1000 * ramp, ramp * np.nan)):
        Image.fromarray(strange).save(tmp_path / f"{i}.tif")
        with pytest.raises(ValueError, match=f"{i}.tif: .*--levels"):
            read_image(tmp_path / f"{i}.tif")


# ---- the centre crop ----------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (50, 50), (32, 90)])
def test_the_centre_crop_equals_torchvision(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    crop = resize_center_crop(image, 28, 32)  # the longer side becomes even: margins are whole
    reference = T.center_crop(T.resize(image, [32]), [28])
    assert np.abs(crop - np.asarray(reference).astype(int)).max() <= 1


def test_a_line_of_pixels_takes_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    pixels = np.zeros((1, 2_000_000, 3), np.uint8)
    pixels[0, ::2] = 200
    dataset = CropDataset(ImageFiles([], 96, 0), 2, Augmentation(), seed=0)
    for name, line in (("wide", pixels), ("tall", pixels.transpose(1, 0, 2))):
        Image.fromarray(np.ascontiguousarray(line)).save(tmp_path / f"{name}.png")
        image = read_image(tmp_path / f"{name}.png")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert resize_center_crop(image, 96, 110).shape == (96, 96, 3)
        assert dataset.crop(image, [0]).shape == (2, 96, 96, 3)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_the_crop_of_a_line_equals_that_of_the_whole(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (7, 300, 3), dtype=np.uint8)
    for pixels in (noise, noise.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        whole = resize_center_crop(image, 20, 22).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            assert np.abs(resize_center_crop(image, 20, 22) - whole).max() <= 1


# ---- unreadable files ---------------------------------------------------------------------------


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_bytes(b"no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:-30])
    (tmp_path / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    os.mkfifo(tmp_path / "fifo.jpg")  # opening it would wait for its writer
    for name in ("none.png", "text.png", "eps.jpg", "fifo.jpg"):
        with pytest.raises(ValueError, match=name):
            read_header(tmp_path / name)
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            read_header(path)
    assert read_header(tmp_path / "cut.png")[0] == (40, 30)  # reads only the header
    with pytest.raises(ValueError, match="cut.png"):
        read_image(tmp_path / "cut.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert read_image(tmp_path / "large.png").size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with warnings.catch_warnings():
        ignore_pil_warnings()
        with pytest.raises(ValueError, match="large.png: .*40 x 30"):
            read_image(tmp_path / "large.png")


def test_unreadable_files_are_skipped_on_request(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(files):
        Image.new("RGB", (10, 12 + i), (i, 0, 0)).save(path)
    files[2].write_bytes(b"no image")
    with pytest.raises(ValueError, match="2.png: .*--bad_images skip"):
        decode_files(files, 8)
    images, reasons = decode_files(files, 8, bad_images="skip")
    assert images[:, 0, 0, 0].tolist() == [0, 1, 3]
    assert (list(reasons), "2.png" in reasons[2]) == ([2], True)
    with pytest.raises(ValueError, match="2.png"):  # none is left
        decode_files(files[2:3], 8, bad_images="skip")
    images, reasons = decode_files(files[2:3], 8, bad_images="skip", allow_empty=True)
    assert (len(images), list(reasons)) == (0, [0])


def test_pil_warnings_are_ignored_on_request():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_pil_warnings()
        warnings.warn("so many pixels", Image.DecompressionBombWarning, stacklevel=1)
        warnings.warn("Corrupt EXIF data.  Expecting to read 4 bytes", UserWarning, stacklevel=1)
        warnings.warn("another one", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["another one"]


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("exif", [1, "yes"]),
        ("background", ["pink", 3]),
        ("exclude", ["a*", [3]]),
        ("channels", [0, 33, 2.0, True]),
        ("levels", [3, [1, 2, 3], [7, 7], [0, float("nan")], ["a", "b"]]),
    ],
)
def test_invalid_options_are_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^--{name}"):
            DecodeOptions.from_args({name: value})
    assert DecodeOptions.from_args({name: None}) == DecodeOptions()


def test_a_checkpoint_keeps_the_options_of_its_images(tmp_path, capsys):
    images = make_textures(200, seed=1)[0].permute(0, 2, 3, 1).numpy()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for split, number in (("train", 16), ("test", 8)):
        for i in range(number):
            path = tmp_path / "photos" / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(images[i])
            image.putalpha(i)
            image.save(path, exif=exif)
    flags = f"--data_name folder --data_root {tmp_path}/photos --recipe short --width 4 --epochs 1 "
    flags += f"--feature_dim 16 --batch_size 8 --k 3 --no-pictures --out {tmp_path} --name t "
    flags += "--no-exif --background none"
    main.main(flags.split())
    error = refused(capsys, main, *flags.split(), "--background", "white", "--resume")
    assert "--background" in error
    linear.main(f"--model_path {tmp_path}/t_model.pth --epochs 1 --cached --no-pictures".split())
    path = tmp_path / "photos" / "test" / "dog" / "1.png"
    predictor = Predictor(LoadedCheckpoint.open(tmp_path / "t_linear_cached_model.pth"))
    with Image.open(path) as image:
        stored = np.asarray(image.convert("RGB"))
    shown = np.asarray(read_image(path))  # white, but for one part in 255
    assert predictor.predict(str(path)) == predictor.predict(stored) != predictor.predict(shown)
