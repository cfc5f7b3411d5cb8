"""The survey of the training images: channel statistics, what it counts, the flags it suggests."""

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


def make_data(images, labels=(), classes=(), files=()):
    images = torch.as_tensor(images, dtype=torch.uint8)
    labels = torch.tensor(labels or [-1] * len(images))
    return Data(images, labels, None, None, list(classes), train_files=files)


def test_mean_and_std_of_a_few_pixels(tmp_path):
    """Red 0 and 255, green 51 throughout, blue 0, 0, 0 and 255: by hand."""
    images = torch.zeros(2, 3, 1, 2, dtype=torch.uint8)
    images[1, 0] = 255
    images[:, 1] = 51
    images[1, 2, 0, 1] = 255
    mean, std = survey.measure_channels(images)
    assert mean == pytest.approx((0.5, 0.2, 0.25), abs=1e-12)
    assert std == pytest.approx((0.5, 0.0, (3 / 16) ** 0.5), abs=1e-12)
    for i, level in enumerate((0, 51, 102)):
        Image.new("RGB", (20, 20), (level, 0, 255)).save(tmp_path / f"{i}.png")
    files = ImageFiles([tmp_path / f"{i}.png" for i in range(3)], 8, workers=0)
    assert survey.measure_channels(files)[0] == pytest.approx((0.2, 0.0, 1.0), abs=1e-12)


def test_only_auto_is_measured_and_a_constant_channel_is_an_error():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="--std auto"):
        survey.channel_stats(Namespace(mean=(0.5, 0.5, 0.5), std="auto"), images)
    flags = {"mean": (0.1, 0.2, 0.3), "std": (0.2, 0.2, 0.2)}
    assert survey.channel_stats(Namespace(**flags), images) == flags
    stats = survey.channel_stats(Namespace(mean="auto", std=flags["std"]), images)
    assert stats == {"mean": (0.0, 0.0, 0.0), "std": flags["std"]}


def test_properties_of_a_few_images(tmp_path, monkeypatch):
    """Black, red, black again, gray, and one whose channels differ by 9."""
    colours = [(0, 0, 0), (255, 0, 0), (0, 0, 0), (90, 90, 90), (90, 90, 99)]
    images = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].repeat(1, 1, 4, 4)
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (10, 50)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no image")
    files = [tmp_path / f"{name}.png" for name in "abc"]
    result = survey.survey_images(make_data(images, [0, 1, 1, 1, -1], ["cat", "dog"], files))
    assert (result.total, result.sampled, result.image_size, result.max_value) == (5, 5, 4, 255)
    assert result.sizes == [(30, 20), (10, 50)]
    assert result.modes == {"L": 1, "RGB": 1}
    assert (result.gray_count, result.duplicates) == (3, 1)
    assert result.class_sizes == {"cat": 1, "dog": 3}
    assert result.mean == pytest.approx((435 / 1275, 180 / 1275, 189 / 1275))
    assert result.pixel_std == pytest.approx(np.array(colours).std(0, ddof=1).mean(), rel=1e-5)
    monkeypatch.setattr(survey, "SURVEY_SIZE", 10)
    result = survey.survey_images(make_data(torch.zeros(99, 3, 2, 2)))
    assert (result.total, result.sampled, result.duplicates) == (99, 10, 9)


def test_the_summary_has_what_was_counted():
    line = survey.summarize(
        COLOURFUL._replace(
            total=5000,
            sampled=1000,
            sizes=[(20, 18), (640, 480), (30, 25)],
            modes=Counter(L=1, RGB=2),
            gray_count=1000,
            duplicates=3,
            class_sizes={"cat": 12, "dog": 4000, "eel": 88},
        )
    )
    parts = "1,000 of 5,000|20 x 18 to 640 x 480|side 25|2 RGB, 1 L|all gray|3 exact|12 (cat)|4,000"
    assert all(part in line for part in parts.split("|")), line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("change", "flags", "suggested"),
    [
        ({}, {}, ""),
        ({"gray_count": 19}, {}, ""),
        ({"gray_count": 20}, {}, "--jitter 0.4 0.4 0 0 --gray_p 0, or --channels 1"),
        ({"gray_count": 20}, {"jitter": (0.4, 0.4, 0.0, 0.0), "gray_p": 0.0}, ""),
        ({"image_size": 16}, {}, "--crop_scale 0.3 1"),  # sqrt(0.2) x 16 = 7.2, sqrt(0.3) 8.8
        ({"image_size": 16}, {"crop_scale": (0.3, 1.0)}, ""),
        ({"mean": (0.5, 0.5, 0.9)}, {}, "--mean auto --std auto"),
        ({"mean": (0.5, 0.5, 0.9)}, {"mean": "auto"}, ""),
        ({"mean": (0.5,), "gray_count": 20}, {"mean": "auto"}, ""),  # one channel
        ({"modes": Counter({"I;16": 20}), "max_value": 15}, {}, "--levels 0 4095"),  # 12 bits
        ({"modes": Counter({"I;16": 20}), "max_value": 15}, {"levels": (0, 4095)}, ""),
        ({"max_value": 15}, {}, ""),  # 8 bits
        ({"pixel_std": 3.04}, {}, "--show_views"),
    ],
)
def test_flags_are_suggested_where_they_help(change, flags, suggested):
    line = survey.suggest_flags(COLOURFUL._replace(**change), RECIPES["cifar"] | flags)
    assert suggested in line
    assert bool(suggested) == bool(line)


def test_a_command_prints_summary_and_suggestions(tmp_path, capsys):
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, 256, (24, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    flags = f"--data_name folder --data_root {tmp_path} --out {tmp_path / 'out'} --show_views"
    main.main(flags.split())
    summary, suggestions, _ = capsys.readouterr().out.splitlines()
    assert "24 x 24" in summary
    assert "--jitter 0.4 0.4 0 0 --gray_p 0" in suggestions
    main.main([*flags.split(), *"--jitter 0.4 0.4 0 0 --gray_p 0 --name b".split()])
    assert "--jitter" not in capsys.readouterr().out
    assert "--crop_scale" in helpers.refused(capsys, main, *flags.split(), "--crop_scale", "2")
