"""Pixels of odd files: turned by EXIF, transparent, of floats, a line of pixels, no file at all."""

import os
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

import linear
import main
from simsiam.data.datasets import load_dataset
from simsiam.data.decode import (
    DecodeOptions,
    decode_files,
    ignore_pil_warnings,
    open_image,
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


def same(image, other):
    return np.array_equal(np.asarray(image), np.asarray(other.convert("RGB")))


def corners(path, orientation):
    """An image whose four quarters differ, with an EXIF orientation."""
    quarters = np.array([[0, 80], [160, 240]], np.uint8).repeat(16, 0).repeat(24, 1)
    notes = Image.Exif()
    notes[ExifTags.Base.Orientation] = orientation
    Image.fromarray(quarters).convert("RGB").save(path, exif=notes)
    return path


# ---- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_as_cameras_say(tmp_path, end):
    for orientation in range(1, 9):
        path = corners(tmp_path / f"{orientation}.{end}", orientation)
        found = read_image(path)
        with Image.open(path) as image:
            assert same(found, ImageOps.exif_transpose(image))
            assert end == "tif" or same(read_image(path, AS_STORED), image)
        assert same(to_rgb(found), found)  # not turned twice
    turned = np.asarray(read_image(corners(tmp_path / f"a.{end}", 6)))
    assert turned.shape == (48, 32, 3)
    expected = [[160, 0], [240, 80]]  # a quarter turn to the right
    assert np.abs(turned[8::24, 8::16, 0].astype(int) - expected).max() < 9


def test_damaged_notes_turn_nothing(tmp_path):
    path = corners(tmp_path / "a.jpg", 6)
    content = path.read_bytes()
    place = content.index(b"Exif\0\0")
    path.write_bytes(content[: place + 14] + b"\xff" * 8 + content[place + 22 :])
    with warnings.catch_warnings():
        ignore_pil_warnings()
        assert read_image(path).size == (48, 32)


# ---- transparency -------------------------------------------------------------------------------


def transparent(folder):
    """Red that is hidden, half seen and seen, as five kinds of file have it; their paths."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0], pixels[0, :, 3] = 200, [0, 128, 255]
    pixels = pixels.repeat(9, 0).repeat(9, 1)
    whole = Image.fromarray(pixels, "RGBA")
    whole.save(folder / "rgba.png")
    whole.save(folder / "rgba.webp", lossless=True, exact=True)
    whole.convert("LA").save(folder / "la.png")
    hidden = Image.new("P", (27, 9), 1)
    hidden.putpalette([0, 0, 0, 200, 0, 0])
    hidden.paste(0, (0, 0, 9, 9))
    hidden.save(folder / "p.png", transparency=0)
    hidden.save(folder / "p.gif", transparency=0)
    keyed = Image.new("RGB", (27, 9), (200, 0, 0))
    keyed.paste((1, 2, 3), (0, 0, 9, 9))
    keyed.save(folder / "rgb.png", transparency=(1, 2, 3))
    return sorted(folder.iterdir())


def test_transparent_pixels_show_the_background(tmp_path):
    for path in transparent(tmp_path):
        for name, value in (("white", 255), ("black", 0)):
            found = np.asarray(read_image(path, DecodeOptions(background=name)))[4, 4::9]
            assert found[0].tolist() == [value] * 3, path
            assert found[2, 0] == (60 if "la" in path.name else 200), path
        with Image.open(path) as image:
            assert same(read_image(path, AS_STORED), image)
    white = np.asarray(read_image(tmp_path / "rgba.png"))[4, 4::9].tolist()
    assert white == [[255] * 3, [227, 127, 127], [200, 0, 0]]


# ---- floats -------------------------------------------------------------------------------------


def test_floats_from_0_to_1_are_no_black_image(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "one.tif")
    Image.fromarray(255 * ramp.round(3)).save(tmp_path / "bytes.tif")
    expected = (255 * ramp).round()[..., None]
    assert (np.asarray(read_image(tmp_path / "one.tif")) == expected).all()
    assert np.abs(np.asarray(read_image(tmp_path / "bytes.tif")) - expected).max() <= 1
    for i, strange in enumerate((ramp - 0.5, 1000 * ramp, ramp * np.nan)):
        Image.fromarray(strange).save(tmp_path / f"{i}.tif")
        with pytest.raises(
            ValueError, match=rf"{i}.tif: cannot be read .its floats are from .* to"
        ):
            read_image(tmp_path / f"{i}.tif")


# ---- sizes --------------------------------------------------------------------------------------


def test_a_line_of_pixels_takes_no_memory(tmp_path):
    resource = pytest.importorskip("resource")
    pixels = np.zeros((1, 2_000_000, 3), np.uint8)
    pixels[0, ::2] = 200
    for name, line in (("wide", pixels), ("tall", pixels.transpose(1, 0, 2))):
        Image.fromarray(np.ascontiguousarray(line)).save(tmp_path / f"{name}.png")
        image = read_image(tmp_path / f"{name}.png")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert resize_center_crop(image, 96, 110).shape == (96, 96, 3)
        cutter = CropDataset(ImageFiles([], 96, 0), 2, Augmentation(), seed=0)
        assert cutter.crop(image, [0]).shape == (2, 96, 96, 3)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kB
        assert used < 100_000


def test_the_centre_alone_is_as_the_centre_of_all(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (7, 300, 3), dtype=np.uint8)
    for pixels in (noise, noise.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        whole = resize_center_crop(image, 20, 22).astype(int)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
            assert np.abs(resize_center_crop(image, 20, 22) - whole).max() <= 1


# ---- what is no image ---------------------------------------------------------------------------


def test_what_is_no_file_is_refused_unopened(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")  # to open it would be to wait
    (tmp_path / "list.csv").write_text("path\na.jpg\n")
    for path in (tmp_path / "a.jpg", "/dev/zero", tmp_path):
        with pytest.raises(ValueError, match="cannot be read .not a file."):
            open_image(path)
    with pytest.raises(ValueError, match="a.jpg: cannot be read"):
        load_dataset("folder", tmp_path / "list.csv")


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(ValueError, match=r"a.jpg: cannot be read .EPS"):
        open_image(tmp_path / "a.jpg")


def test_a_bad_image_is_named_with_both_ways_on(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.jpg: cannot be read .*--bad_images skip"):
        decode_files([tmp_path / "images" / "a.jpg"], 8)
    flags = ["--data_name", "folder", "--data_root", tmp_path / "images", "--out", tmp_path / "r"]
    assert "--bad_images skip" in refused(capsys, main, *flags)


# ---- what a run keeps ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of main.py on images that are turned and transparent, as they are stored."""
    root = tmp_path_factory.mktemp("run")
    images = make_textures(200, seed=1)[0].permute(0, 2, 3, 1).numpy()
    notes = Image.Exif()
    notes[ExifTags.Base.Orientation] = 6
    for part, number in (("train", 16), ("test", 8)):
        for i in range(number):
            path = root / "photos" / part / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(images[i])
            image.putalpha(i)
            image.save(path, exif=notes)
    flags = f"--data_name folder --data_root {root}/photos --recipe short --width 4 --epochs 2 "
    flags += f"--feature_dim 16 --batch_size 8 --k 3 --no-pictures --out {root} --name t "
    flags += "--no-exif --background none"
    main.main(flags.split())
    return root, flags


def test_a_run_keeps_to_how_its_images_are_read(run, capsys):
    root, flags = run
    args = torch.load(root / "t_model.pth", weights_only=True)["args"]
    assert (args["exif"], args["background"]) == (False, "none")
    assert "--background none, this command has white" in refused(
        capsys, main, *flags.split(), "--background", "white", "--resume"
    )
    assert "--exif False" in refused(capsys, main, *flags.split(), "--exif", "--resume")
    model = f"{root}/t_model.pth"
    linear.main(f"--model_path {model} --epochs 1 --cached --no-pictures".split())
    path = root / "photos" / "test" / "dog" / "1.png"
    predictor = Predictor(LoadedCheckpoint.open(root / "t_linear_cached_model.pth"))
    score = predictor.predict(str(path))[0]["score"]
    with Image.open(path) as image:
        stored = np.asarray(image.convert("RGB"))
    assert predictor.predict(stored)[0]["score"] == score
    seen = np.asarray(read_image(path))
    assert np.abs(seen.astype(int) - stored).max() > 100  # white, but for one part in 255
    assert predictor.predict(seen)[0]["score"] != score
    flags = "--epochs 1 --cached --no-pictures --exif --background white --name seen"
    linear.main(["--model_path", model, *flags.split()])  # of photos as they are seen
    source = LoadedCheckpoint.open(root / "seen_model.pth")
    assert source.decode == DecodeOptions()
    assert Predictor(source).predict(str(path)) == Predictor(source).predict(seen)
    assert source.state["images_crc"] != LoadedCheckpoint.open(model).state["images_crc"]


def test_a_run_from_before_the_flags_reads_images_as_it_did(run, tmp_path, capsys):
    root, _ = run
    state = torch.load(root / "t_model.pth", weights_only=True)
    for name in ("exif", "background", "split_names"):
        del state["args"][name]
    torch.save(state, tmp_path / "t_model.pth")
    assert LoadedCheckpoint.open(tmp_path / "t_model.pth").reading == AS_STORED
    main.main(f"--resume {tmp_path}/t_model.pth --no-pictures".split())
    assert "the run is finished" in capsys.readouterr().out  # of the same images
    state["args"] |= {"exif": True, "background": "pink"}
    torch.save(state, tmp_path / "t_model.pth")
    with pytest.raises(ValueError, match="t_model.pth: its --exif or --background"):
        LoadedCheckpoint.open(tmp_path / "t_model.pth")
