"""The flags of the views: what they make of a recipe, how a run keeps them, what they refuse."""

import pytest
import torch

import main
from simsiam.data.textures import make_textures
from simsiam.training import checkpoint
from simsiam.training.recipes import RECIPES, VIEWS, augmentation_of
from simsiam.training.run import Run
from tests import helpers

TINY = "--data_name textures --train_size 64 --width 4 --feature_dim 16 --batch_size 32 --epochs 1"
ROW = {"epoch": 0, "raw_acc@1": 10.0, "test_acc@1": 10.0}


def flags_of(text):
    return vars(main.make_flags().read(text.split())[0])


def begin(tmp_path, text=""):
    """The views of a run that is begun, or gone on with; no step is done. And its checkpoint."""
    flags = main.make_flags()
    argv = [*TINY.split(), "--name", "a", "--out", str(tmp_path), *text.split()]
    with Run(*flags.read(argv), flags, main.STATISTICS) as run:
        views = main.prepare(run).views
        if run.state is None:
            run.begin([ROW])
        return views, checkpoint.load(tmp_path / "a_model.pth")


def refused(tmp_path, capsys, text):
    argv = [*TINY.split(), "--name", "a", "--out", tmp_path, *text.split()]
    return helpers.refused(capsys, main, *argv)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_flags_the_views_are_the_recipe_s(recipe):
    flags = flags_of(f"--recipe {recipe}")
    assert (augmentation_of(flags), flags["mean"], flags["std"]) == VIEWS[recipe]


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("--crop_scale 0.3 0.9", "crop_scale", (0.3, 0.9)),
        ("--crop_ratio 1 2", "crop_ratio", (1.0, 2.0)),
        ("--jitter 0.1 0.2 0.3 0", "jitter", (0.1, 0.2, 0.3, 0.0)),
        ("--jitter_p 0.1", "jitter_p", 0.1),
        ("--gray_p 0", "gray_p", 0.0),
        ("--blur_p 0.25", "blur_p", 0.25),
        ("--blur_sigma 1 1", "blur_sigma", (1.0, 1.0)),
        ("--hflip_p 0", "flip_p", 0.0),
        ("--vflip_p 0.5", "vflip_p", 0.5),
        ("--rotate90_p 1", "rotate90_p", 1.0),
        ("--solarize_p 0.2", "solarize_p", 0.2),
    ],
)
def test_a_flag_changes_its_part_of_the_recipe_alone(text, field, value):
    found = augmentation_of(flags_of(f"--recipe imagenet {text}"))
    assert vars(found) == vars(VIEWS["imagenet"][0]) | {field: value}


@pytest.mark.parametrize(
    ("flag", "values", "reason"),
    [
        ("--crop_scale", "0.9 0.2", "must rise"),
        ("--crop_scale", "0 1", "from 0.001 to 1, not 0 1"),
        ("--crop_scale", "0.2 1.1", "from 0.001 to 1, not 0.2 1.1"),
        ("--crop_scale", "0.2", "2 numbers"),
        ("--crop_scale", "0.2 0.5 1", "2 numbers"),
        ("--crop_scale", "a b", "not a b"),
        ("--crop_ratio", "2 1", "must rise"),
        ("--crop_ratio", "0 1", "from 0.001"),
        ("--jitter", "0.4 0.4 0.4", "4 numbers"),
        ("--jitter", "0.4 -0.4 0.4 0.1", "from 0 to 10"),
        ("--jitter", "0.4 0.4 0.4 0.6", "hue of at most 0.5"),
        ("--jitter", "0.4 0.4 0.4 nan", "4 numbers"),
        ("--jitter_p", "1.5", "from 0 to 1, not 1.5"),
        ("--gray_p", "-0.1", "from 0 to 1"),
        ("--blur_p", "x", "a number from 0 to 1, not x"),
        ("--blur_sigma", "0 2", "from 0.001"),
        ("--blur_sigma", "2 1", "must rise"),
        ("--hflip_p", "2", "from 0 to 1"),
        ("--vflip_p", "nan", "from 0 to 1"),
        ("--rotate90_p", "90", "from 0 to 1"),
        ("--solarize_p", "inf", "from 0 to 1"),
        ("--mean", "0.5 0.5", "must be auto, or 3 numbers, one a channel"),
        ("--mean", "auto auto", "numbers from 0 to 1, not auto auto, or auto"),
        ("--mean", "124 116 104", "from 0 to 1"),
        ("--std", "0 0.2 0.2", "from 0.001 to 1"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_flag(tmp_path, capsys, flag, values, reason):
    err = refused(tmp_path, capsys, f"{flag} {values}")
    assert f"{flag}: " in err
    assert reason in err
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_keeps_its_views_and_refuses_others(tmp_path, capsys):
    given = "--crop_scale 0.3 0.9 --vflip_p 0.5 --mean 0.5 0.5 0.5"
    first, state = begin(tmp_path, given)
    assert first.augmentation.crop_scale == (0.3, 0.9)
    assert first.augmentation.vflip_p == 0.5
    assert state["augmentation"] == vars(first.augmentation)
    assert state["encoder"]["mean"] == (0.5, 0.5, 0.5)
    for text in ("", given, "--hflip_p 0.5"):  # the last one was the recipe's
        again, _ = begin(tmp_path, f"{text} --resume")
        assert again.augmentation == first.augmentation
        assert again.mean == first.mean
    for other, was in [
        ("--crop_scale 0.2 1", "--crop_scale 0.3 0.9, this command has 0.2 1.0"),
        ("--vflip_p 0", "--vflip_p 0.5, this command has 0.0"),
        ("--solarize_p 0.1", "--solarize_p 0.0, this command has 0.1"),
        ("--mean auto", "--mean 0.5 0.5 0.5, this command has auto"),
        ("--std 0.2 0.2 0.2", "--std 0.247 0.2435 0.2616, this command has 0.2 0.2 0.2"),
    ]:
        assert was in refused(tmp_path, capsys, f"{other} --resume")


def test_a_run_from_before_these_flags_goes_on(tmp_path, capsys):
    """Its checkpoint lacks the flags and the newer fields; begun with views of its own, besides."""
    begun, state = begin(tmp_path)
    newer = ("vflip_p", "rotate90_p", "solarize_p")
    old = {k: v for k, v in state["augmentation"].items() if k not in newer}
    views = (
        "crop_scale crop_ratio jitter jitter_p gray_p blur_p blur_sigma hflip_p mean std".split()
    )
    args = {k: v for k, v in state["args"].items() if k not in (*views, *newer)}
    old |= {"crop_scale": (0.5, 1.0)}
    path = tmp_path / "a_model.pth"
    torch.save(torch.load(path) | {"args": args, "augmentation": old}, path)
    found, _ = begin(tmp_path, "--resume --crop_scale 0.5 1.0 --vflip_p 0")
    assert vars(found.augmentation) == vars(begun.augmentation) | {"crop_scale": (0.5, 1.0)}
    err = refused(tmp_path, capsys, "--resume --crop_scale 0.2 1.0")
    assert "--crop_scale 0.5 1.0, this command has 0.2 1.0" in err


def test_mean_and_std_are_measured_once_and_kept(tmp_path, capsys):
    views, state = begin(tmp_path, "--mean auto --std auto")
    assert "measured on the training images: mean 0." in capsys.readouterr().out
    args = main.make_flags().read(TINY.split())[0]
    pixels = main.images_of(args).train_images.double() / 255
    assert len(pixels) == 64 < len(make_textures(100, 1)[0])
    assert views.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    std = pixels.transpose(0, 1).flatten(1).std(1, correction=0)
    assert views.std == pytest.approx(std.tolist(), abs=1e-12)
    assert (state["encoder"]["mean"], state["encoder"]["std"]) == (views.mean, views.std)
    for text in ("--resume", "--resume --mean auto"):
        again, _ = begin(tmp_path, text)
        assert (again.mean, again.std) == (views.mean, views.std)
        assert "measured on" not in capsys.readouterr().out
    err = refused(tmp_path, capsys, "--resume --mean 0.5 0.5 0.5")
    assert "--mean auto, this command has 0.5 0.5 0.5" in err
