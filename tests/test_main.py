"""main.py: what a run writes, how it is resumed, what it prints and refuses."""

import itertools
import socket
import sys
import time
import types

import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import main
import utils
from simsiam.data.datasets import load_dataset
from simsiam.data.decode import DecodeOptions
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam, cross_entropy
from simsiam.runtime.files import RunError
from simsiam.training import checkpoint
from simsiam.training.optim import make_optimizer
from simsiam.training.recipes import PretrainConfig
from simsiam.training.run import Run
from simsiam.views.augment import NORMALISATION, Batch, Views
from tests import crash, helpers

TINY = "--data_name textures --train_size 200 --width 4 --feature_dim 16 --batch_size 32"


def tiny(tmp_path, flags):
    return [*TINY.split(), "--no-pictures", "--out", str(tmp_path), *flags.split()]


def run(tmp_path, flags):
    main.main(tiny(tmp_path, flags))


def config_of(flags):
    """Return the config of a command line of main.py."""
    return utils.ConfigParser("main.py", "", PretrainConfig).read(flags.split())[0]


def refused(capsys, *argv):
    err = helpers.refused(capsys, main, *argv)
    assert err.startswith("main.py: ")
    return err


def checkpoint_of(tmp_path, name):
    return torch.load(tmp_path / f"{name}_model.pth", weights_only=True)


# ---- a run, and how it is resumed ---------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Flags of the textures as files: 200, and 40 test images instead of 1,000."""
    root = helpers.texture_folder(tmp_path_factory.mktemp("folder"))
    return f"--data_name folder --data_root {root} --recipe short"


def test_a_run_writes_what_the_readme_says(folder, tmp_path, capsys):
    run(tmp_path, f"{folder} --epochs 3 --knn_every 2 --name a --pictures")
    out = capsys.readouterr().out
    assert "raw pixels" in out
    assert "warning" not in out  # a healthy run
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a_confusion.png",
        "a_curves.png",
        "a_embedding.png",
        "a_model.pth",
        "a_neighbours.png",
        "a_statistics.csv",
        "results.csv",
    ]
    table = pandas.read_csv(tmp_path / "a_statistics.csv")
    assert " ".join(table.columns) == (
        "epoch lr train_loss std rank alignment collapse test_acc@1 test_acc@5 probe_acc@1 "
        "images_per_sec seconds"
    )
    assert table["epoch"].tolist() == [0, 1, 2, 3]
    assert table["test_acc@1"].isna().tolist() == [False, True, False, False]
    assert table["train_loss"].isna().tolist() == [True, False, False, False]
    assert table["train_loss"].iloc[1:].between(-1, 1).all()
    assert table["std"].iloc[1:].between(0.5, 1.1).all()
    assert table["rank"].dropna().between(1, 16).all()
    result = pandas.read_csv(tmp_path / "results.csv").iloc[0]
    assert result["protocol"] == "KNN"
    assert result["top1"] == table["test_acc@1"].iloc[-1]
    assert result["best_top1"] == table["test_acc@1"].iloc[1:].max()
    state = checkpoint_of(tmp_path, "a")
    expected = {"arch": "resnet8", "width": 4, "seed": 0, "device": "cpu", "run": "a", "epochs": 3}
    expected |= {name: state["config"][name] for name in ("lr", "batch_size")}
    assert {name: result[name] for name in expected} == expected
    net = SimSiam("resnet8", feature_dim=16, width=4)
    assert round(result["params_m"] * 1e6) == sum(p.numel() for p in net.parameters())
    assert " ".join(sorted(state)) == (
        "classes command config encoder environment epoch extra history images_checksum meters "
        "model optimizer probe scaler seconds step version"
    )
    assert PretrainConfig.from_dict(state["config"]).as_dict() == state["config"]
    assert (state["command"], state["classes"]) == ("main.py", sorted(TEXTURE_CLASSES))
    mean, std = NORMALISATION["cifar"]
    encoder = {"arch": "resnet8", "stem": "cifar", "width": 4, "image_size": 32}
    assert state["encoder"] == encoder | {"mean": mean, "std": std}
    net.load_state_dict(state["model"])


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 5 --fix_pred_lr",
        "--target mean --num_views 3 --covariance 0.04",
        "--recipe fast",  # whose views grow from the first epoch to the second
        "--optimizer muon --lr 0.08 --no-bn_decay",
        "--amp fp16 --train_size 96 --knn_every 2",
    ],
)
def test_a_run_cut_within_an_epoch_ends_at_the_same_bits(folder, tmp_path, capsys, flags):
    """Weights, momenta, probe, loss scale and statistics are those of an uncut run."""
    run(tmp_path, f"{folder} {flags} --epochs 2 --name whole")
    cut = f"{folder} {flags} --epochs 2 --name cut --checkpoint_minutes 0"
    helpers.interrupt(main, tiny(tmp_path, cut), 1, 2)
    before = checkpoint_of(tmp_path, "cut")
    assert (before["epoch"], before["step"]) == (1, 2)
    torch.manual_seed(123)
    capsys.readouterr()
    main.main(["--resume", f"{tmp_path}/cut_model.pth", "--no-pictures"])
    assert "epoch 1 of 2 and step 2" in capsys.readouterr().out
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []
    whole, cut = (checkpoint_of(tmp_path, name) for name in ("whole", "cut"))
    assert whole["scaler"] == cut["scaler"]
    assert bool(whole["scaler"]) == ("fp16" in flags)
    assert not helpers.same_bits(before["probe"], cut["probe"])


def test_views_grow_over_a_run(tmp_path, capsys, monkeypatch):
    sizes, forward = [], SimSiam.forward

    def watched(net, views):
        sizes.append(views[0].shape[-1])
        return forward(net, views)

    monkeypatch.setattr(SimSiam, "forward", watched)
    run(tmp_path, "--epochs 4 --view_sizes 16 24 32 --warmup_epochs 3 --knn_every 4 --name a")
    # Epochs 0 to 3 have the sizes 0 * 3 // 4 = 0, 1 * 3 // 4 = 0, 2 * 3 // 4 = 1, 3 * 3 // 4 = 2.
    assert sizes == [16] * 2 * 6 + [24] * 6 + [32] * 6
    for flag, value in (("--view_sizes", "16"), ("--epochs", "8")):  # even in the warm-up
        assert flag in refused(capsys, "--resume", tmp_path / "a_model.pth", flag, value)
    assert config_of("--recipe fast").view_sizes == (0.5, 0.625, 0.75)
    assert config_of("--recipe fast --epochs 2").view_sizes == (0.625, 0.75)
    assert config_of("--recipe fast --view_sizes 16").view_sizes == (16,)
    assert config_of("--recipe short").view_sizes is None
    images = types.SimpleNamespace(train_images=torch.empty(1, 3, 64, 64))
    for size, sizes in ((32, [16, 16, 20, 20, 24]), (64, [32, 32, 40, 40, 48])):
        config = config_of("--recipe fast --epochs 5" + " --image_size 32" * (size == 32))
        views = main.make_views(config, main.encoder_config(config, images), 2)
        assert [views.size_in(epoch) for epoch in range(5)] == sizes
    for wrong in ("0.05", "7", "20.5", "2000"):
        assert "--view_sizes" in refused(capsys, "--view_sizes", wrong)
    more_than_epochs = "--epochs 2 --view_sizes 8 16 32".split()
    assert "--view_sizes" in refused(capsys, *TINY.split(), *more_than_epochs)
    files = f"--data_name imagenet --data_root {tmp_path} --view_sizes 16 32".split()
    assert "--view_sizes" in refused(capsys, *files)


def test_larger_views_to_come_count_in_the_announced_duration(tmp_path, capsys, monkeypatch):
    """The clock advances by 36 minutes whenever it is read."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 2160).__next__)
    for sizes, is_long in (("8 8", False), ("8 32", True)):  # the second epoch: 16 times the pixels
        run(tmp_path, f"--epochs 2 --view_sizes {sizes} --knn_every 2 --name {is_long}")
        assert ("the run takes" in capsys.readouterr().out) == is_long


def test_seeds_differ_and_repeat():
    a, b, c = (
        main.initial_network(config_of(f"{TINY} --seed {seed}")).state_dict() for seed in "112"
    )
    assert helpers.same_bits(a, b)
    assert not torch.equal(a["backbone.conv1.weight"], c["backbone.conv1.weight"])


def test_an_existing_run_is_refused_and_overwritten_on_demand(tmp_path, capsys):
    run(tmp_path, "--epochs 1 --name a")
    before = (tmp_path / "a_model.pth").read_bytes()
    err = refused(capsys, *TINY.split(), "--epochs", 1, "--name", "a", "--out", tmp_path)
    assert "--resume" in err
    assert "--overwrite" in err
    assert (tmp_path / "a_model.pth").read_bytes() == before
    run(tmp_path, "--epochs 1 --name a --seed 3 --overwrite")
    assert (tmp_path / "a_model.pth").read_bytes() != before
    assert len(pandas.read_csv(tmp_path / "results.csv")) == 1


def test_seconds_are_of_an_epoch_s_own_steps(tmp_path, monkeypatch):
    """An epoch counts the seconds of its steps, across restarts, and none before training."""
    now = [0.0]
    eigvalsh = torch.linalg.eigvalsh

    def slow(gram):  # a part of each kNN
        now[0] += 1000
        return eigvalsh(gram)

    monkeypatch.setattr(torch.linalg, "eigvalsh", slow)
    argv = f"{TINY} --no-pictures --epochs 3 --knn_every 3 --checkpoint_minutes 0 --name a".split()
    parser = utils.ConfigParser("main.py", "", PretrainConfig)

    def train(*flags, stop=None):
        def on_step(*step):
            now[0] += 1
            if step == stop:
                raise helpers.Interrupted

        config, overrides = parser.read([*argv, "--out", str(tmp_path), *flags])
        clock = lambda: now[0]  # noqa: E731
        with Run("main.py", config, overrides, main.STATISTICS, clock) as entered:
            state, monitor, result = main.prepare(entered, parser)
            if entered.checkpoint:
                entered.resume(state)
            main.pretrain(entered, state, monitor, result, on_step)

    with pytest.raises(helpers.Interrupted):
        train(stop=(1, 3))  # with the third of six steps saved
    now[0] = 1e6
    train("--resume")
    table = pandas.read_csv(tmp_path / "a_statistics.csv")[1:]
    assert table["seconds"].tolist() == [6, 6, 1006]  # a kNN is its epoch's
    assert table["images_per_sec"].tolist() == [32, 32, 32]  # and not of the steps
    assert pandas.read_csv(tmp_path / "results.csv")["seconds"].tolist() == [1018]


def test_compile_trains_the_same_network(tmp_path):
    run(tmp_path, "--epochs 1 --name eager")
    run(tmp_path, "--epochs 1 --name compiled --compile --cuda_graphs")
    eager, compiled = (checkpoint_of(tmp_path, name)["model"] for name in ("eager", "compiled"))
    torch.testing.assert_close(compiled, eager, atol=1e-2, rtol=1e-2)


# ---- the optimizer ------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [True, False])
def test_fix_pred_lr_keeps_the_predictors_lr(fixed):
    flags = "--train_size 64 --width 4 --feature_dim 16 --batch_size 32 --epochs 2 --lr 1 "
    flags += "--warmup_epochs 0"
    state, config = helpers.new_state(f"{flags} --{'' if fixed else 'no-'}fix_pred_lr")
    assert list(main.train(state, 1, config)) == [0, 1]
    net, predictor = state.optimizer.param_groups
    assert net["lr"] == pytest.approx(32 / 256 * (1 - 0.5**0.5) / 2)  # cos(3/4 pi)
    assert predictor["lr"] == (32 / 256 if fixed else net["lr"])
    assert len(predictor["params"]) == len(list(state.net.predictor.parameters()))


def test_bn_and_biases_have_no_decay_on_request():
    net = SimSiam("resnet8", feature_dim=16, width=4)
    plain = make_optimizer(net, config_of("--recipe short"))
    assert [group["weight_decay"] for group in plain.param_groups] == [5e-4] * 2
    config = config_of("--recipe short --no-bn_decay --lr 0.5 --batch_size 256")
    optimizer = make_optimizer(net, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len([*net.parameters()])
    fixed = {id(p) for g in optimizer.param_groups if g["fix_lr"] for p in g["params"]}
    assert fixed == {id(p) for p in net.predictor.parameters()}
    for parameter in net.parameters():  # no gradient: what a step changes is the decay alone
        parameter.grad = torch.zeros_like(parameter)
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer.step()
    for name, value in net.named_parameters():
        factor = 1 if value.dim() < 2 else 1 - 0.5 * 5e-4
        torch.testing.assert_close(value, factor * before[name], rtol=1e-6, atol=0)


def test_muon_orthogonalises_matrices_and_moves_the_rest_as_nadamw():
    """The first step moves all singular values of a matrix alike, and all numbers of a vector."""
    torch.manual_seed(0)
    net = SimSiam("resnet8", feature_dim=16, width=4)
    flags = "--optimizer muon --lr 0.5 --batch_size 64 --weight_decay 0.2 --no-bn_decay"
    optimizer, lr = make_optimizer(net, config_of(f"--recipe short {flags}")), 0.5 * 64 / 256
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, value in net.named_parameters():
        if value.dim() < 2:  # a step of lr by the gradient's sign, and Nesterov's 0.9 of the next
            steps = (before[name] - value) / value.grad.sign()
            expected = torch.full_like(steps, 1.9 * lr / 4)
            torch.testing.assert_close(steps, expected, rtol=1e-4, atol=0)
            continue
        step = (before[name] * (1 - lr * 0.2) - value).flatten(1)
        rows, columns = step.shape
        # Jordan's iteration takes each singular value to about 0.7 to 1.2.
        values = torch.linalg.svdvals(step) / (lr * max(1, rows / columns) ** 0.5)
        assert values.min() > 0.3, name
        assert values.max() < 1.3, name
        assert (step * value.grad.flatten(1)).sum() > 0, name


# ---- images in files ----------------------------------------------------------------------------


def test_unlabelled_folder_and_the_imagenet_recipe(tmp_path, capsys):
    images, _ = make_textures(24, seed=3)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).resize((40, 48)).save(tmp_path / f"{i}.png")
    main.main(
        f"--data_name folder --data_root {tmp_path} --recipe imagenet --arch resnet18 --stem cifar "
        f"--image_size 16 --feature_dim 16 --batch_size 8 --epochs 1 --out {tmp_path}/r".split()
    )
    out = capsys.readouterr().out
    assert "no kNN" in out
    path = tmp_path / "r" / "folder_resnet18_16_200_8_1_model.pth"
    table = pandas.read_csv(path.with_name("folder_resnet18_16_200_8_1_statistics.csv"))
    assert table["test_acc@1"].isna().all()
    encoder = LoadedCheckpoint.open(path)
    without_pictures = DecodeOptions(exclude=("r",))  # that the run has drawn
    images = load_dataset("folder", tmp_path, 16, decode=without_pictures).train_images
    config = config_of("--recipe imagenet")
    views = Views(16, config.mean, config.std, config.augmentation, number=1)
    with torch.no_grad():  # two views of each image
        one, other = (
            F.normalize(encoder.net.backbone(views(Batch.alone(images, epoch))[0]), dim=1)
            for epoch in range(2)
        )
    start, end = table["alignment"]
    assert end == pytest.approx((one - other).square().sum(1).mean().item(), rel=1e-3)
    assert f"alignment {end:.3f}, untrained encoder {start:.3f}: a score without labels" in out
    assert table["rank"].notna().all()
    assert not (tmp_path / "r" / "results.csv").exists()
    state = torch.load(path)
    assert state["config"]["blur_p"] == 0.5
    assert state["config"]["fix_pred_lr"] is True
    assert state["encoder"]["mean"] == NORMALISATION["imagenet"][0]
    assert "projector.7.running_mean" in state["model"]  # three layers


def test_imagenet_from_files(tmp_path, capsys, monkeypatch):
    """A run that is cut and resumed with other workers has the same bits.

    Steps and kNNs open files, and pictures only those of the images that they show.
    """
    root = helpers.image_files(tmp_path / "images", 120)  # and 61 test images
    opened, usual = [], Image.open

    def counting(path, *args):
        opened.append(str(path))
        return usual(path, *args)

    monkeypatch.setattr(Image, "open", counting)
    flags = f"--data_name imagenet --data_root {root} --arch resnet8 --stem cifar --image_size 32 "
    flags += f"--feature_dim 16 --batch_size 32 --bank_size 60 --k 5 --epochs 2 --out {tmp_path}"
    flags = [*flags.split(), "--num_workers", "0"]
    main.main([*flags, "--name", "whole", "--pictures"])
    text = "imagenet: 120 training images, 61 test images, 10 classes, 32 pixels"
    assert text in capsys.readouterr().out
    results = pandas.read_csv(tmp_path / "results.csv")
    assert results["protocol"].tolist() == ["KNN, bank of 60"]
    # Two epochs of three steps; the bank and the test images for the untrained encoder, for the
    # raw pixels, and after each epoch; eight queries and their neighbours.
    pictures = 8 + 8 * 8
    assert len(opened) == 2 * 3 * 32 + 4 * (60 + 61) + pictures
    opened.clear()
    main.main([*flags, "--name", "whole", "--pictures", "--resume"])  # finished: draws again
    assert len(opened) == 60 + 61 + pictures
    cut = [*flags, "--name", "cut", "--checkpoint_minutes", "0", "--no-pictures"]
    helpers.interrupt(main, cut, 1, 2)
    main.main([*cut, "--resume", "--num_workers", "1"])
    assert "and step 2 of 3" in capsys.readouterr().out
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []


def test_an_unreadable_image_late_in_a_run_is_one_line(tmp_path, capsys, monkeypatch):
    for i in range(20):
        path = tmp_path / "images" / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    path.write_bytes(b"no image")
    flags = f"--data_name imagenet --data_root {tmp_path}/images --arch resnet8 --stem cifar "
    flags += "--image_size 8 --feature_dim 16 --batch_size 4 --epochs 1 --no-pictures "
    flags += f"--out {tmp_path}/r"
    monkeypatch.setattr(sys, "argv", ["main.py", *flags.split()])
    with pytest.raises(SystemExit) as stop:
        utils.run_command(main.main)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith(f"main.py: {path}: ")
    assert err.endswith("--bad_images skip\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "r").exists()
    main.main([*flags.split(), "--bad_images", "skip"])
    assert "19 training images" in capsys.readouterr().out


# ---- a collapse, and the ablations --------------------------------------------------------------


def test_a_collapse_is_said_once_and_ends_a_run_on_request(tmp_path, capsys):
    """A run that stopped at its collapse can be resumed, and ends at the same bits."""
    flags = "--epochs 1 --train_size 1000 --stop_grad off --bn hidden --lr 2"  # 31 steps
    run(tmp_path, f"{flags} --name whole")
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("warning: "))
    for part in ("std of z is 0.", "epoch 1, step 25", "--stop_grad off", "--bn hidden"):
        assert part in line
    assert "--batch_size" not in line
    with pytest.raises(RunError, match="--no-stop_on_collapse"):
        run(tmp_path, f"{flags} --name cut --stop_on_collapse")
    state = checkpoint_of(tmp_path, "cut")
    assert (state["epoch"], state["step"]) == (0, 25)  # at once, not at the epoch's end
    assert state["extra"] == {"collapse": 25}
    with pytest.raises(RunError, match="--no-stop_on_collapse"):
        run(tmp_path, f"{flags} --name cut --resume")
    assert checkpoint_of(tmp_path, "cut")["step"] == 25
    capsys.readouterr()
    run(tmp_path, f"{flags} --name cut --resume --no-stop_on_collapse")
    assert "warning" not in capsys.readouterr().out  # it was said
    assert crash.differences(tmp_path / "whole", tmp_path / "cut") == []
    table = pandas.read_csv(tmp_path / "cut_statistics.csv")
    assert table["collapse"].dropna().tolist() == [25]
    assert table["std"].iloc[-1] < 0.5


def test_ablations_are_kept_in_the_checkpoint(tmp_path):
    flags = "--stop_grad off --predictor fixed --bn all --similarity cross_entropy"
    run(tmp_path, f"--epochs 1 --name a {flags} --loss asymmetric_2x")
    state = checkpoint.load(tmp_path / "a_model.pth")
    net = checkpoint.network(state)
    assert net.stop_grad is False
    assert net.criterion is cross_entropy
    assert net.num_views == 4
    assert not any(p.requires_grad for p in net.predictor.parameters())
    torch.manual_seed(0)  # the predictor is as it started
    initial = build_model(vars(state["config"])).predictor.state_dict()
    for name, value in net.predictor.state_dict().items():
        assert torch.equal(value, initial[name]) == ("weight" in name or "bias" in name), name


# ---- bad input ----------------------------------------------------------------------------------


def test_no_network(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    err = refused(capsys, "--data_root", tmp_path / "d", "--out", tmp_path)
    assert "--data_name textures" in err
    assert str(tmp_path / "d") in err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--data_name imagnet", "--data_name imagnet"),
        ("--arch vgg16", "--arch vgg16"),
        ("--stem imagenet", "--stem"),
        ("--recipe none", "--recipe none"),
        ("--show_views --resume", "--show_views"),
        ("--batch_size 5000", "--batch_size 5000"),
        ("--batch_size 1", "--batch_size"),
        ("--epochs x", "--epochs"),
        ("--temperature nan", "--temperature"),
        ("--lr inf", "--lr"),
        ("--width 0", "--width"),
        ("--arch resnet18 --width 32", "--width 32"),
        ("--train_size 1000000", "--train_size 1000000"),
        ("--bank_size 1000000", "--bank_size 1000000"),
        ("--warmup_epochs 900 --epochs 800", "--warmup_epochs 900"),
        ("--device cuda:99", "--device cuda:99"),
        ("--amp fp8", "--amp"),
        ("--resume --overwrite", "--overwrite"),
        ("--resume=", "--resume"),
        ("--nonsense 1", "--nonsense"),
        ("--profile", "--profile"),
        ("--data_name folder --data_root /does/not/exist", "/does/not/exist"),
        ("--out /dev/null/x", "/dev/null"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, named):
    err = refused(capsys, "--data_name", "textures", "--out", tmp_path, *flags.split())
    assert named in err
    assert not list(tmp_path.iterdir())
