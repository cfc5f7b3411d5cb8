"""Configs: one declaration per setting, for the command line, checkpoints and the library."""

import dataclasses

import pytest
import torch

import linear
import main
import utils
from simsiam.runtime.config import ConfigError, default_workers
from simsiam.training import checkpoint
from simsiam.training.recipes import LINEAR_RECIPES, RECIPES, LinearConfig, PretrainConfig, run_of
from simsiam.training.run import Run
from simsiam.views.augment import Augmentation
from tests import helpers

COMMANDS = {"main.py": (main, PretrainConfig), "linear.py": (linear, LinearConfig)}
TINY = "--data_name textures --train_size 64 --width 4 --feature_dim 16 --batch_size 32 --epochs 1"
ROW = {"epoch": 0, "raw_acc@1": 10.0, "test_acc@1": 10.0}


def read(text, command="main.py"):
    """Return the config of a command line, and the settings given on it."""
    return utils.ConfigParser(command, "", COMMANDS[command][1]).read(text.split())


def refused(tmp_path, capsys, text, *more):
    argv = [*TINY.split(), "--name", "a", "--out", tmp_path, *text.split(), *more]
    return helpers.refused(capsys, main, *argv)


# ---- the command line ---------------------------------------------------------------------------

LINES = [
    ("main.py", ""),
    ("main.py", "--recipe fast --epochs 30 --seed 7 --no-pictures --no-probe"),
    ("main.py", "--data_name folder --data_root /a /b --exclude *.gif thumbs --no-exif"),
    (
        "main.py",
        "--data_name webdataset --channels 5 --levels 0 4095.5 --jitter 1 1 0 0 --gray_p 0",
    ),
    ("main.py", "--view_sizes 0.5 24 --mean 0.5 0.5 0.5 --std auto --num_workers 3 --lr 1e-05"),
    (
        "main.py",
        "--arch timm:resnet10t --split_names train test --data_name folder --method simsiam",
    ),
    ("main.py", "--resume results/a_model.pth"),
    ("linear.py", ""),
    (
        "linear.py",
        "--lr 30 10 0.3 --cached --model_path a/b.pth --image_size 64 --mean 0.1 0.2 0.3",
    ),
    ("linear.py", "--finetune --optimizer adamw --encoder_lr 0.01 --mixup 0.2 --no-exif"),
    ("linear.py", "--predict a.jpg b --out_csv c.csv"),
]


@pytest.mark.parametrize(("command", "line"), LINES)
def test_a_config_survives_its_dict_and_its_command_line(command, line):
    config, overrides = read(line, command)
    assert {name: getattr(config, name) for name in overrides} == overrides
    kind = type(config)
    assert kind.from_dict(config.as_dict()) == config
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in config.as_dict().items()}
    assert kind.from_dict(lists) == config
    again = utils.ConfigParser(command, "", kind).read(config.command_line())[0]
    assert again == config


def test_explicit_settings_win_over_the_recipe_and_this_over_the_defaults():
    config, overrides = read("--data_name textures --epochs 3 --lr 0.5")
    assert overrides == {"data_name": "textures", "epochs": 3, "lr": 0.5}
    assert (config.recipe, config.arch, config.batch_size) == ("short", "resnet8", 64)
    assert (config.lr, config.epochs, config.momentum) == (0.5, 3, 0.9)
    assert config.name == "textures_resnet8_512_200_64_3"
    assert read("")[0].name == "2048_200_512_800"
    for recipe, values in RECIPES.items():
        config = read(f"--recipe {recipe}")[0]
        assert config.as_dict() | {"recipe": None, "name": None} == values
    for recipe, values in LINEAR_RECIPES.items():
        *finetune, optimizer = recipe.split()
        config = read(f"--optimizer {optimizer}" + " --finetune" * len(finetune), "linear.py")[0]
        assert {name: getattr(config, name) for name in values} == values
    usual = {"imagenet": "imagenet", "webdataset": "imagenet", "folder": "cifar", "svhn": "cifar"}
    for data_name, recipe in usual.items():
        assert read(f"--data_name {data_name}")[0].recipe == recipe


def test_defaults_are_stated_once():
    assert PretrainConfig().augmentation == Augmentation()
    assert LinearConfig().as_dict().items() >= LINEAR_RECIPES["sgd"].items()


def test_flags_change_their_part_of_the_augmentation_alone():
    values = {
        "crop_scale": (0.3, 0.9),
        "crop_ratio": (1.0, 2.0),
        "jitter": (0.1, 0.2, 0.3, 0.0),
        "jitter_p": 0.1,
        "gray_p": 0.0,
        "blur_p": 0.25,
        "blur_sigma": (1.0, 1.0),
        "hflip_p": 0.0,
        "vflip_p": 0.5,
        "rotate90_p": 1.0,
        "solarize_p": 0.2,
    }
    default = read("--recipe imagenet")[0].augmentation
    assert default == Augmentation(blur_p=0.5)
    assert {field.name for field in dataclasses.fields(Augmentation)} == set(values)
    for field, value in values.items():
        words = value if isinstance(value, tuple) else (value,)
        config, _ = read(f"--recipe imagenet --{field} {' '.join(map(str, words))}")
        assert config.augmentation == dataclasses.replace(default, **{field: value})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_names_each_flag_and_each_recipe_s_default(command, capsys):
    with pytest.raises(SystemExit):
        COMMANDS[command][0].main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(COMMANDS[command][1]):
        assert f"--{field.name} " in text or f"--{field.name}," in text
    if command == "main.py":
        assert "cifar 512, imagenet 512, short 64, fast 128" in text
        assert "None" not in text.partition("optimization:")[2].partition("monitor:")[0]


# ---- invalid values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "values"),
    [
        ("crop_scale", "0.9 0.2"),
        ("crop_scale", "0.2 1.1"),
        ("crop_ratio", "2 1"),
        ("jitter", "0.4 0.4 0.4 0.6"),
        ("jitter", "0.4 0.4 0.4 nan"),
        ("jitter_p", "1.5"),
        ("blur_p", "x"),
        ("blur_sigma", "0 2"),
        ("vflip_p", "nan"),
        ("solarize_p", "inf"),
        ("mean", "0.5 0.5"),
        ("mean", "auto auto"),
        ("mean", "124 116 104"),
        ("std", "0 0.2 0.2"),
        ("method", "byol"),
        ("num_workers", "many"),
        ("checkpoint_minutes", "-1"),
        ("name", "x" * 181),
        ("name", "a/b"),
        ("seed", str(2**32)),
    ],
)
def test_an_invalid_value_is_one_line_that_names_flag_and_value(tmp_path, capsys, flag, values):
    more = [f"--{flag}", *values.split(" ")]
    assert f"--{flag} {values}: " in refused(tmp_path / "out", capsys, "", *more)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "line", "flag"),
    [
        ("main.py", "--crop_scale 0.2", "--crop_scale"),
        ("main.py", "--init_parts all", "--init_parts"),
        ("main.py", "--cuda_graphs", "--cuda_graphs"),
        ("main.py", "--channels 5 --jitter 0.4 0.4 0.4 0", "--jitter"),
        ("main.py", "--channels 5 --gray_p 0.5", "--gray_p"),
        ("main.py", "--channels 5 --mean 0.5 0.5 0.5", "--mean"),
        ("main.py", "--exclude a", "--exclude"),
        ("main.py", "--data_root /", "--data_root"),
        ("linear.py", "--cached --finetune", "--cached"),
        ("linear.py", "--optimizer lars --finetune", "--optimizer"),
        ("linear.py", "--optimizer adamw", "--optimizer"),
        ("linear.py", "--amp fp16 --finetune", "--amp"),
        ("linear.py", "--from_scratch", "--from_scratch"),
        ("linear.py", "--mixup 0.1", "--mixup"),
        ("linear.py", "--evaluate_only --predict a", "--predict"),
        ("linear.py", "--evaluate_only --epochs 3", "--epochs"),
        ("linear.py", "--out_csv a", "--out_csv"),
    ],
)
def test_settings_that_exclude_one_another_are_one_line(tmp_path, capsys, command, line, flag):
    argv = line.split() + ["--data_name", "textures"] * (command == "main.py")
    err = helpers.refused(capsys, COMMANDS[command][0], *argv)
    assert flag in err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": "0.1"}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"batch_size": 64.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"pictures": 1}, "pictures"),
        ({"arch": ["resnet18"]}, "arch"),
        ({"projector_layers": 10**9}, "projector_layers"),
        ({"view_sizes": (0.5, "x")}, "view_sizes"),
        ({"crop_scale": (0.9, 0.1)}, "crop_scale"),
        ({"jitter": None}, "jitter"),
        ({"mean": (0.1, 0.2)}, "mean"),
        ({"nonsense": 1}, "nonsense"),
        ({"epochs": None}, "epochs"),
    ],
)
def test_a_dict_from_anywhere_is_validated(change, named):
    values = read("--recipe fast --mean 0.5 0.5 0.5")[0].as_dict()
    with pytest.raises(ConfigError, match=named):
        PretrainConfig.from_dict(values | change)
    del values["lr"]
    with pytest.raises(ConfigError, match="lr"):
        PretrainConfig.from_dict(values)
    for value in (None, [], "a"):
        with pytest.raises(ConfigError):
            PretrainConfig.from_dict(value)


# ---- values that depend on the machine or on other settings -------------------------------------


def test_workers_are_the_cores_per_rank(monkeypatch):
    cores = lambda number: monkeypatch.setattr(  # noqa: E731
        "os.sched_getaffinity", lambda _: range(number), raising=False
    )
    cores(64)
    assert default_workers() == 16
    cores(7)
    assert read("--num_workers auto")[0].num_workers == 7
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers() == 3
    cores(1)
    assert default_workers() == 1


def test_a_pattern_that_the_shell_left_is_expanded(tmp_path):
    for name in "ba":
        (tmp_path / f"run_{name}").mkdir()
    roots = read(f"--data_name folder --data_root {tmp_path}/run_* {tmp_path}/none")[0].data_root
    assert roots == f"{tmp_path}/run_a:{tmp_path}/run_b:{tmp_path}/none"
    assert read("--data_name webdataset --data_root pipe:cat x")[0].data_root.startswith("pipe:cat")


def test_the_run_at_a_path_has_its_folder_and_name():
    assert run_of("some/where/a_model.pth") == ("some/where", "a")
    assert run_of("a_model.prev.pth") == (".", "a")
    config = read("--resume some/where/a_model.pth")[0]
    assert (config.out, config.name) == ("some/where", "a")
    config = read("--resume some/where/a_model.pth --out b --name c")[0]
    assert (config.out, config.name) == ("b", "c")
    assert read("--model_path x/a_model.pth", "linear.py")[0].out == "x"


# ---- what a run keeps ---------------------------------------------------------------------------


def begin(tmp_path, text=""):
    """Start or resume a run without a step; return its views and its checkpoint."""
    parser = utils.ConfigParser("main.py", "", PretrainConfig)
    argv = [*TINY.split(), "--name", "a", "--out", str(tmp_path), *text.split()]
    with Run("main.py", *parser.read(argv), main.STATISTICS) as run:
        state, _, _ = main.prepare(run, parser)
        if run.checkpoint is None:
            run.start(state, [ROW])
        return state.views, checkpoint.load(tmp_path / "a_model.pth")


def test_a_resumed_run_keeps_its_views_and_refuses_others(tmp_path, capsys):
    flags = "--crop_scale 0.3 0.9 --vflip_p 0.5 --mean 0.5 0.5 0.5"
    first, state = begin(tmp_path, flags)
    assert first.augmentation.crop_scale == (0.3, 0.9)
    assert state["config"].augmentation == first.augmentation
    assert state["encoder"]["mean"] == (0.5, 0.5, 0.5)
    for text in ("", f"{flags} --hflip_p 0.5"):  # the last one is the recipe's
        again, _ = begin(tmp_path, f"{text} --resume")
        assert again.augmentation == first.augmentation
        assert again.mean == first.mean
    for other, before in [
        ("--vflip_p 0", "--vflip_p 0.5"),
        ("--mean auto", "--mean 0.5 0.5 0.5"),
        ("--std 0.2 0.2 0.2", "--std 0.247 0.2435 0.2616"),
    ]:
        assert before in refused(tmp_path, capsys, f"{other} --resume")


def test_mean_and_std_are_measured_once_and_kept(tmp_path, capsys):
    views, state = begin(tmp_path, "--mean auto --std auto")
    pixels = main.load_images(read(TINY)[0]).train_images.double() / 255
    assert len(pixels) == 64
    assert views.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-12)
    std = pixels.transpose(0, 1).flatten(1).std(1, correction=0)
    assert views.std == pytest.approx(std.tolist(), abs=1e-12)
    assert (state["encoder"]["mean"], state["encoder"]["std"]) == (views.mean, views.std)
    for text in ("--resume", "--resume --mean auto"):
        again, _ = begin(tmp_path, text)
        assert (again.mean, again.std) == (views.mean, views.std)
    assert "--mean auto" in refused(tmp_path, capsys, "--resume --mean 0.5 0.5 0.5")


def test_a_checkpoint_with_invalid_settings_is_one_line(tmp_path, capsys):
    begin(tmp_path)
    path = tmp_path / "a_model.pth"
    whole = torch.load(path)
    for change in ({"lr": -1.0}, {"epochs": "many"}, {"nonsense": 1}, {"width": 5}):
        torch.save(whole | {"config": whole["config"] | change}, path)
        assert "a_model.pth" in refused(tmp_path, capsys, "--resume")
    torch.save(whole | {"version": 2}, path)
    assert "version 2" in refused(tmp_path, capsys, "--resume")
