"""The online probe: parity with PyTorch's modules, an untouched encoder."""

from argparse import Namespace

import numpy as np
import pandas
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import main
import simsiam
from simsiam.data.textures import make_textures
from simsiam.runtime.files import read_csv
from simsiam.training.probe import Probe
from tests import helpers

TINY = "--data_name textures --train_size 96 --width 4 --feature_dim 16 --batch_size 32 --k 5 "
TINY += "--no-pictures"
CPU = torch.device("cpu")


def run(out, flags):
    main.main([*TINY.split(), "--out", str(out), *flags.split()])


def load(out, name):
    return torch.load(out / f"{name}_model.pth", weights_only=True)


# ---- training -----------------------------------------------------------------------------------


class Reference:
    """The probe by PyTorch's BatchNorm1d, Linear, CrossEntropyLoss and SGD."""

    def __init__(self, features, classes, batch_size, epochs):
        self.bn = nn.BatchNorm1d(features, eps=1e-5 / features, affine=False)
        self.head = nn.Linear(features, classes)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.peak, self.epochs = 640 / features * batch_size / 256, epochs
        self.optimizer = torch.optim.SGD(self.head.parameters(), momentum=0.9)

    def learn(self, features, labels, progress):
        logits = self.head(self.bn(F.normalize(features)))
        loss = nn.CrossEntropyLoss()(logits[labels >= 0], labels[labels >= 0])
        self.optimizer.zero_grad()
        (loss if (labels >= 0).any() else 0 * logits.sum()).backward()
        cosine = (1 + np.cos(np.pi * progress / self.epochs)) / 2
        self.optimizer.param_groups[0]["lr"] = self.peak * cosine
        self.optimizer.step()

    def accuracy(self, features, labels, bank):
        self.bn.momentum = 1.0  # running statistics of the last batch alone, which is the bank
        self.bn(F.normalize(bank))
        logits = self.head(self.bn.eval()(F.normalize(features)))
        return 100 * (logits.argmax(1) == labels).float().mean().item()

    def state_dict(self):
        momentum = [self.optimizer.state[p]["momentum_buffer"] for p in self.head.parameters()]
        names = ("weight_momentum", "bias_momentum")
        return self.head.state_dict() | dict(zip(names, momentum, strict=True))


@pytest.mark.parametrize("unlabelled", [slice(0), slice(0, 16, 3), slice(None)])
def test_the_probe_learns_as_pytorch_s_modules_do(unlabelled):
    """With labels for all images, for some, and from the second batch on for none."""
    generator = torch.Generator().manual_seed(0)
    config = Namespace(batch_size=16, epochs=2, warmup_epochs=0)
    reference, rng_state = Reference(12, 10, 16, 2), torch.get_rng_state()
    probe, labels = Probe(12, 10, config, CPU), torch.arange(16) % 10
    for step in range(4):
        features = torch.rand(16, 12, generator=generator)
        for one in (probe, reference):
            one.learn(features, labels, step / 2)
        torch.testing.assert_close(probe.state_dict(), reference.state_dict())
        labels[unlabelled] = -1
    assert torch.equal(torch.get_rng_state(), rng_state)  # the run's random numbers stay the same
    assert probe.weight.abs().max() > 0.1
    features, bank = torch.rand(2, 50, 12, generator=generator)
    bank[:, 0] += 1
    labels = torch.arange(50) % 10
    accuracy = probe.accuracy(F.normalize(features), labels, F.normalize(bank))
    assert accuracy == pytest.approx(reference.accuracy(features, labels, bank))


def test_a_state_that_does_not_fit_is_refused():
    config = Namespace(batch_size=16, epochs=2, warmup_epochs=0)
    probe = Probe(12, 10, config, CPU)
    probe.learn(torch.rand(16, 12), torch.arange(16) % 10, 0.0)
    state = {name: tensor.clone() for name, tensor in probe.state_dict().items()}
    for bad in (
        {},
        state | {"more": torch.zeros(1)},
        state | {"weight": state["weight"][:, 1:]},
        state | {"bias": state["bias"].double()},
        state | {"bias_momentum": torch.full((10,), torch.nan)},
    ):
        with pytest.raises(ValueError, match="probe"):
            probe.load_state_dict(bad)
        assert helpers.same_bits(probe.state_dict(), state)


# ---- in a run -----------------------------------------------------------------------------------


def test_the_encoder_has_the_same_bits_without_a_probe(tmp_path, capsys):
    for name in ("probe", "no-probe"):
        capsys.readouterr()
        run(tmp_path, f"--epochs 1 --{name} --name {name} --target mean --num_views 3 --amp bf16")
    assert "probe " not in capsys.readouterr().out
    a, b = (load(tmp_path, name) for name in ("probe", "no-probe"))
    assert helpers.same_bits(a["model"], b["model"])
    momenta = (state["optimizer"]["state"].values() for state in (a, b))
    assert all(helpers.same_bits(*pair) for pair in zip(*momenta, strict=True))
    for row in (*a["history"], *b["history"]):
        for name in ("probe_acc@1", "seconds", "images_per_sec"):
            row.pop(name, None)
    assert a["history"] == b["history"]
    assert a["probe"]["weight"].abs().max() > 0.01
    assert b["probe"] == {}


def test_the_statistics_have_the_accuracy_of_the_checkpoint_s_probe(tmp_path, capsys, monkeypatch):
    learn, progresses = Probe.learn, []

    def record(probe, features, labels, progress):
        progresses.append(progress)
        learn(probe, features, labels, progress)

    monkeypatch.setattr(Probe, "learn", record)
    run(tmp_path, "--epochs 3 --knn_every 2 --name a")
    assert progresses == pytest.approx([i / 3 for i in range(9)])
    column = pandas.read_csv(tmp_path / "a_statistics.csv")["probe_acc@1"]
    assert column.isna().tolist() == [True, True, False, False]  # not of the untrained head
    last = column.iloc[-1]
    assert f"probe {last:.1f} %" in capsys.readouterr().out
    encoder, head = simsiam.open_encoder(tmp_path / "a_model.pth"), load(tmp_path, "a")["probe"]
    images = simsiam.load_dataset("textures", "")
    bank = F.normalize(encoder(images.subset(96, 0).train_images))
    features = F.normalize(encoder(images.test_images))
    x = (features - bank.mean(0)) / (bank.var(0, correction=0) + 1e-5 / bank.shape[1]).sqrt()
    predicted = (x @ head["weight"].T + head["bias"]).argmax(1)
    top1 = 100 * (predicted == images.test_labels).float().mean().item()
    assert last == pytest.approx(top1, abs=0.2)  # but for a tie or two


@pytest.mark.parametrize("folders", [["."], ["train/a", "train/b"]])
def test_without_labels_or_test_images_there_is_no_probe(tmp_path, capsys, folders):
    for i, image in enumerate(make_textures(40, 0)[0].permute(0, 2, 3, 1).numpy()):
        path = tmp_path / "images" / folders[i % len(folders)] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    flags = f"--data_name folder --data_root {tmp_path / 'images'} --recipe short --width 4 "
    flags += f"--feature_dim 16 --batch_size 16 --epochs 1 --no-pictures --out {tmp_path} --name a"
    assert "--probe: " in helpers.refused(capsys, main, *flags.split(), "--probe")
    assert not list(tmp_path.glob("a_*"))
    main.main(flags.split())
    assert "probe" not in "".join(capsys.readouterr())
    assert "probe_acc@1" not in read_csv(tmp_path / "a_statistics.csv")[-1]
    assert load(tmp_path, "a")["probe"] == {}
