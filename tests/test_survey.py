"""A look at the training images: what it sees, says and advises."""

from argparse import Namespace
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import main
from simsiam.data import survey
from simsiam.data.loader import Data, ImageFiles
from simsiam.data.survey import Survey
from simsiam.training.recipes import RECIPES
from tests import helpers

USUAL = RECIPES["cifar"]
COLOURFUL = Survey(
    total=20,
    sampled=20,
    sizes=[(60, 40)] * 20,
    modes=Counter(RGB=20),
    image_size=40,
    gray_count=0,
    duplicates=0,
    pixel_std=60.0,
    class_sizes={},
    mean=(0.5, 0.5, 0.4),
)


def data_of(images, labels=(), classes=(), files=()):
    images = torch.as_tensor(images, dtype=torch.uint8)
    labels = torch.tensor(labels or [-1] * len(images))
    return Data(images, labels, None, None, list(classes), train_files=files)


def test_mean_and_std_of_a_few_pixels():
    """Red 0 and 255, green 51 throughout, blue 0, 0, 0 and 255: by hand."""
    images = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    images[1, 0] = 255
    images[:, 1] = 51
    images[1, 2, 0, 1] = 255
    mean, std = survey.measure_channels(images)
    assert mean == pytest.approx((0.5, 0.2, 0.25), abs=1e-12)
    assert std == pytest.approx((0.5, 0.0, (3 / 16) ** 0.5), abs=1e-12)


def test_mean_of_images_in_files(tmp_path):
    for i, level in enumerate((0, 51, 102)):
        Image.new("RGB", (20, 20), (level, 0, 255)).save(tmp_path / f"{i}.png")
    files = ImageFiles([tmp_path / f"{i}.png" for i in range(3)], 8, workers=0)
    assert survey.measure_channels(files)[0] == pytest.approx((0.2, 0.0, 1.0), abs=1e-12)


def test_a_channel_without_contrast_is_refused():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="--std auto: a channel"):
        survey.channel_stats(Namespace(mean=(0.5, 0.5, 0.5), std="auto"), images)
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2)}
    assert survey.channel_stats(Namespace(**given), images) == given
    found = survey.channel_stats(Namespace(mean="auto", std=given["std"]), images)
    assert found == {"mean": (0.0, 0.0, 0.0), "std": given["std"]}


def test_what_a_survey_sees(tmp_path):
    """Five images: black, red, black again, gray, and one whose channels differ by 9."""
    colours = [(0, 0, 0), (255, 0, 0), (0, 0, 0), (90, 90, 90), (90, 90, 99)]
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 4, 4)
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (10, 50)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no image")
    files = [tmp_path / f"{name}.png" for name in "abc"]
    seen = survey.survey_images(data_of(images, [0, 1, 1, 1, -1], ["cat", "dog"], files))
    assert (seen.total, seen.sampled, seen.image_size) == (5, 5, 4)
    assert seen.sizes == [(30, 20), (10, 50)]
    assert seen.modes == {"L": 1, "RGB": 1}
    assert (seen.gray_count, seen.duplicates) == (3, 1)
    assert seen.class_sizes == {"cat": 1, "dog": 3}
    assert seen.mean == pytest.approx((435 / 1275, 180 / 1275, 189 / 1275))
    levels = np.array(colours)
    assert seen.pixel_std == pytest.approx(levels.std(0, ddof=1).mean(), rel=1e-5)


def test_a_survey_looks_at_a_sample(monkeypatch):
    monkeypatch.setattr(survey, "SURVEY_SIZE", 10)
    seen = survey.survey_images(data_of(torch.zeros(99, 3, 2, 2)))
    assert (seen.total, seen.sampled, seen.duplicates) == (99, 10, 9)


def test_what_is_described():
    line = survey.summarize(COLOURFUL)
    assert line == (
        "a look at 20 training images: 60 x 40 pixels (median shorter side 40); 20 RGB; none "
        "grayscale; no exact copies"
    )
    assert survey.summarize(COLOURFUL._replace(class_sizes={"cat": 10, "dog": 10})) == (
        line + "; 10 images of each class"
    )
    seen = COLOURFUL._replace(
        total=5000,
        sampled=1000,
        sizes=[(20, 18), (640, 480), (30, 25)],
        modes=Counter(L=1, RGB=2),
        gray_count=1000,
        duplicates=1,
        class_sizes={"cat": 12, "dog": 4000, "eel": 88},
    )
    assert survey.summarize(seen) == (
        "a look at 1,000 of 5,000 training images: 20 x 18 to 640 x 480 pixels (median shorter "
        "side 25); 2 RGB, 1 L; all grayscale; 1 exact copy; classes of 12 (cat) to 4,000 (dog) "
        "images"
    )


@pytest.mark.parametrize(
    ("change", "flags", "told"),
    [
        ({}, {}, ""),
        ({"gray_count": 19}, {}, ""),
        (
            {"gray_count": 20},
            {},
            "all images are grayscale: colour jitter of saturation and hue does nothing: "
            "--jitter 0.4 0.4 0 0 --gray_p 0, or --channels 1",
        ),
        ({"gray_count": 20}, {"jitter": (0.4, 0.4, 0.0, 0.0), "gray_p": 0.0}, ""),
        (
            {"image_size": 16},  # sqrt(0.2) * 16 = 7.2; sqrt(0.3) * 16 = 8.8
            {},
            "the images are tiny: a crop of 0.2 of 16 x 16 pixels is 7 wide: --crop_scale 0.3 1",
        ),
        ({"image_size": 16}, {"crop_scale": (0.3, 1.0)}, ""),
        (
            {"mean": (0.5, 0.5, 0.9)},
            {},
            "their mean, 0.50 0.50 0.90, is far from --mean: --mean auto --std auto",
        ),
        ({"mean": (0.5, 0.5, 0.9)}, {"mean": "auto"}, ""),
        ({"mean": (0.5,), "gray_count": 20}, {"mean": "auto"}, ""),  # one channel
        (
            {"modes": Counter({"I;16": 20}), "max_value": 15},  # 12 bits: 4095 // 256
            {},
            "the values of 16 bits are below 4,096, so that only 16 of 256 levels are used: "
            "--levels 0 4095",
        ),
        ({"modes": Counter({"I;16": 20}), "max_value": 15}, {"levels": (0, 4095)}, ""),
        ({"max_value": 15}, {}, ""),  # 8 bits
        (
            {"pixel_std": 3.04},
            {},
            "the images hardly differ (by 3.0 of 255 levels): look at --show_views",
        ),
    ],
)
def test_flags_are_advised_where_they_would_suit(change, flags, told):
    assert survey.suggest_flags(COLOURFUL._replace(**change), USUAL | flags) == told


def test_a_folder_s_images_are_surveyed_in_two_lines(tmp_path, capsys):
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, 256, (24, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    flags = f"--data_name folder --data_root {tmp_path} --out {tmp_path / 'out'} --show_views"
    main.main(flags.split())
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("a look at 12 training images: 24 x 24 pixels")
    assert "12 L; all grayscale; no exact copies" in first
    assert "--jitter 0.4 0.4 0 0 --gray_p 0" in second
    assert third.startswith("wrote ")
    main.main([*flags.split(), *"--jitter 0.4 0.4 0 0 --gray_p 0 --name b".split()])
    assert "--jitter" not in capsys.readouterr().out
    assert "--crop_scale: " in helpers.refused(capsys, main, *flags.split(), "--crop_scale", "2")
