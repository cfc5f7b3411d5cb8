"""The online probe: what it learns, what it leaves as it is, what is kept and said of it."""

import itertools

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import main
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import Loader
from simsiam.data.textures import make_textures
from simsiam.models.methods import build_model
from simsiam.runtime.files import read_csv
from simsiam.training import checkpoint
from simsiam.training.meters import TrainMeters
from simsiam.training.probe import Probe
from simsiam.views.augment import NORMALISATION, Views
from tests import helpers

TINY = "--data_name textures --train_size 96 --width 4 --feature_dim 16 --batch_size 32 --k 5 "
TINY += "--no-pictures"
CPU = torch.device("cpu")


def run(out, flags):
    main.main([*TINY.split(), "--out", str(out), *flags.split()])


def state_of(out, name):
    return torch.load(out / f"{name}_model.pth", weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- what it leaves as it is --------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--covariance 0.01",
        "--target mean --num_views 3 --amp bf16",
    ],
)
def test_the_rest_of_a_run_has_the_same_bits_without(tmp_path, flags):
    for name in ("probe", "no-probe"):
        run(tmp_path, f"--epochs 1 --{name} --name {name} {flags}")
    one, other = (state_of(tmp_path, name) for name in ("probe", "no-probe"))
    assert same(one["model"], other["model"])
    momenta = (state["optimizer"]["state"] for state in (one, other))
    for mine, theirs in zip(*(momentum.values() for momentum in momenta), strict=True):
        assert same(mine, theirs)
    drop = ("probe_acc@1", "seconds", "images_per_sec")
    mine, theirs = (
        [{name: row[name] for name in row if name not in drop} for row in state["history"]]
        for state in (one, other)
    )
    assert mine == theirs
    assert one["probe"]["weight"].abs().max() > 0.01  # it did learn
    assert other["probe"] == {}


# ---- what it learns -----------------------------------------------------------------------------


class ByHand:
    """The probe in PyTorch's own parts: BN, Linear, SGD."""

    def __init__(self, features, classes, batch_size, epochs):
        self.bn = nn.BatchNorm1d(features, eps=1e-5 / features, affine=False)
        self.head = nn.Linear(features, classes)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.peak, self.epochs, self.features = 640 / features * batch_size / 256, epochs, features
        self.optimizer = torch.optim.SGD(self.head.parameters(), momentum=0.9)

    def __call__(self, features, labels, progress):
        logits = self.head(self.bn(features / features.norm(dim=1, keepdim=True)))
        self.optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(logits[labels >= 0], labels[labels >= 0])
        if (labels >= 0).any():
            loss.backward()
        else:  # nothing but the momentum
            for parameter in self.head.parameters():
                parameter.grad = torch.zeros_like(parameter)
        cosine = (1 + np.cos(np.pi * progress / self.epochs)) / 2
        self.optimizer.param_groups[0]["lr"] = self.peak * cosine
        self.optimizer.step()

    def accuracy(self, features, labels, bank):
        self.bn.momentum = 1.0  # the running statistics are the bank's
        self.bn(F.normalize(bank))
        logits = self.head(self.bn.eval()(F.normalize(features)))
        return 100 * (logits.argmax(1) == labels).float().mean().item()

    def check(self, state):
        for name, tensor in zip(("weight", "bias"), self.head.parameters(), strict=True):
            torch.testing.assert_close(state[name], tensor.detach(), rtol=1e-4, atol=1e-6)
            momentum = self.optimizer.state[tensor]["momentum_buffer"]
            torch.testing.assert_close(state[f"{name}_momentum"], momentum, rtol=1e-4, atol=1e-6)


def loop(images, labels):
    """A network, its features in each step, a probe, and main.py's loop of two epochs of them."""
    words = f"{TINY} --batch_size 16 --epochs 2 --warmup_epochs 0 --lr 0.1"
    args = main.make_flags().read(words.split())[0]
    torch.manual_seed(0)
    net, seen = build_model(vars(args)), []
    net.register_forward_hook(lambda net, views, found: seen.append(found[2].clone()))
    probe, views = Probe(net.features, 10, args, CPU), Views(32, *NORMALISATION["cifar"])
    optimizer, loader = main.make_optimizer(net, args), Loader(images, 16, 0, labels, views=views)

    def steps():
        rest = (args, torch.autocast("cpu", enabled=False), main.UNSCALED, probe)
        for epoch in range(2):
            yield from main.train(net, optimizer, loader, views, TrainMeters(CPU), epoch, 0, *rest)

    return net, seen, probe, loader, steps()


@pytest.mark.parametrize("unlabelled", [slice(0), slice(0, 48, 3), slice(None)])
def test_two_epochs_of_it_are_pytorch_s(unlabelled):
    """Of two steps each; all labels, some of them, none."""
    images, labels = make_textures(32, seed=1)
    labels[unlabelled] = -1
    net, seen, probe, loader, steps = loop(images, labels)
    by_hand = ByHand(net.features, 10, 16, 2)
    batches = itertools.chain(loader.epoch(0), loader.epoch(1))
    for i, (batch, _) in enumerate(zip(batches, steps, strict=True)):
        by_hand(seen[i], batch.labels, i / 2)
        by_hand.check(probe.state_dict())
    assert i == 3
    assert bool(probe.state_dict()["weight"].any()) == bool((labels >= 0).any())
    (some, bank), labels = torch.rand(2, 50, net.features), torch.arange(50) % 10
    bank += torch.rand(net.features)
    found = probe.accuracy(F.normalize(some), labels, F.normalize(bank))
    assert found == pytest.approx(by_hand.accuracy(some, labels, bank))


def test_a_batch_without_a_label_moves_it_by_its_momentum_alone():
    args = main.make_flags().read(TINY.split())[0]
    by_hand, labels = ByHand(16, 10, 32, args.epochs), torch.arange(32) % 10
    before = torch.get_rng_state()
    probe = Probe(16, 10, args, CPU)
    features = torch.rand(3, 32, 16, generator=torch.Generator().manual_seed(1))
    for i in range(3):
        probe.learn(features[i], labels, 0.0)
        by_hand(features[i], labels, 0.0)
        labels = torch.full_like(labels, -1)
    by_hand.check(probe.state_dict())
    assert probe.state_dict()["weight"].abs().max() > 0.01
    assert torch.equal(torch.get_rng_state(), before)  # nor draws it anything


# ---- what is kept of it -------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--warmup_epochs 1"])
def test_it_goes_on_to_the_same_bits_within_an_epoch(tmp_path, monkeypatch, flags):
    class Stop(Exception):
        pass

    train = main.train

    def stopped(*args):
        for step in train(*args):
            if (args[5], step) == (1, 2):  # the step before it is saved
                raise Stop
            yield step

    flags = f"{flags} --epochs 2 --checkpoint_minutes 0 --name"
    run(tmp_path, f"{flags} whole")
    with monkeypatch.context() as patch:
        patch.setattr(main, "train", stopped)
        with pytest.raises(Stop):
            run(tmp_path, f"{flags} cut")
    cut = state_of(tmp_path, "cut")
    assert (cut["epoch"], cut["step"], cut["args"]["probe"]) == (1, 2, True)
    assert all(part.any() for part in cut["probe"].values())
    run(tmp_path, f"{flags} cut --resume")
    whole, again = (state_of(tmp_path, name) for name in ("whole", "cut"))
    assert same(whole["probe"], again["probe"])
    assert not same(whole["probe"], cut["probe"])
    assert whole["history"][-1]["probe_acc@1"] == again["history"][-1]["probe_acc@1"]


def test_its_column_is_there_where_a_knn_is(tmp_path, capsys):
    """And its last number is that of the head in the checkpoint."""
    run(tmp_path, "--epochs 3 --knn_every 2 --name a")
    out = capsys.readouterr().out
    table = pandas.read_csv(tmp_path / "a_statistics.csv")
    # Before the training the head is zero: there is nothing to measure.
    assert table["probe_acc@1"].isna().tolist() == [True, True, False, False]
    state = state_of(tmp_path, "a")
    net, images = checkpoint.network(state).eval(), load_dataset("textures", "")
    bank = images.subset(96, 0).train_images
    with torch.no_grad():
        bank, features = (
            F.normalize(net.backbone(Views(32, *NORMALISATION["cifar"]).eval_transform(part)))
            for part in (bank, images.test_images)
        )
    x = (features - bank.mean(0)) / (bank.var(0, correction=0) + 1e-5 / net.features).sqrt()
    logits = x @ state["probe"]["weight"].T + state["probe"]["bias"]
    wanted = 100 * (logits.argmax(1) == images.test_labels).float().mean().item()
    assert table["probe_acc@1"].iloc[-1] == pytest.approx(wanted, abs=0.2)  # a tie or two
    last = f"{table['probe_acc@1'].iloc[-1]:.1f} %"
    lines = [line for line in out.splitlines() if "probe" in line]
    assert [line.split(" loss")[0] for line in lines[:2]] == ["epoch 2/3", "epoch 3/3"]
    assert f"% probe {last} (" in lines[1]
    (line,) = lines[2:]
    assert line.startswith("kNN top-1 ")
    assert f"), linear probe {last}, untrained" in line
    run(tmp_path, "--epochs 1 --no-probe --name b")
    assert "probe" not in capsys.readouterr().out
    assert pandas.read_csv(tmp_path / "b_statistics.csv")["probe_acc@1"].isna().all()


# ---- images without labels ----------------------------------------------------------------------


def write(folder, number, seed):
    folder.mkdir(parents=True)
    for i, image in enumerate(make_textures(number, seed)[0].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.mark.parametrize("kind", ["no labels", "nothing to score with"])
def test_without_labels_there_is_none_and_nothing_is_said(tmp_path, capsys, kind):
    root = tmp_path / "images"
    if kind == "no labels":
        write(root, 40, 1)
    else:
        write(root / "train" / "a", 20, 1)
        write(root / "train" / "b", 20, 2)
    flags = f"--data_name folder --data_root {root} --recipe short --width 4 --feature_dim 16 "
    flags += f"--batch_size 16 --epochs 1 --no-pictures --out {tmp_path} --name a"
    line = helpers.refused(capsys, main, *flags.split(), "--probe")
    assert {"no labels": "the training images have no labels"}.get(kind, "to score") in line
    assert line.startswith("main.py: --probe: ")
    assert not list(tmp_path.glob("a_*"))
    main.main(flags.split())
    assert "probe" not in "".join(capsys.readouterr())
    assert "probe_acc@1" not in read_csv(tmp_path / "a_statistics.csv")[-1]
    state = state_of(tmp_path, "a")
    assert (state["args"]["probe"], state["probe"]) == (False, {})
