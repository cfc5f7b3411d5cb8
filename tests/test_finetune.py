"""linear.py --finetune: a plain loop as reference, where it starts, mixup."""

import pandas
import pytest
import torch
import torch.nn.functional as F
from timm.optim import Muon
from torchvision.transforms.v2 import MixUp

import main
from simsiam.data.datasets import load_dataset
from simsiam.data.loader import Loader
from simsiam.data.textures import make_textures
from simsiam.models import backbones
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from simsiam.training.heads import AUGMENTATION, FinetunedEncoder
from simsiam.training.state import load_optimizer
from simsiam.views.augment import Batch, Views
from tests.helpers import run_linear

TINY = "--epochs 2 --batch_size 40 --no-pictures --checkpoint_minutes 0"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint of main.py on 400 textures."""
    out = tmp_path_factory.mktemp("results")
    flags = "--data_name textures --train_size 400 --width 4 --feature_dim 16 --epochs 1"
    main.main(f"{flags} --no-pictures --out {out} --name pre".split())
    return out / "pre_model.pth"


def weights(out, name):
    return torch.load(out / f"{name}_model.pth")["model"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_twenty_steps_equal_a_plain_loop(pretrained, tmp_path, optimizer):
    """PyTorch's optimizer with two parameter groups, cosine schedule, BN in train mode."""
    lrs = {"sgd": (1.0, 0.3), "adamw": (0.05, 0.02)}[optimizer]
    flags = f"{TINY} --finetune --optimizer {optimizer} --lr {lrs[0]} --encoder_lr {lrs[1]}"
    flags += " --label_smoothing 0.1 --weight_decay 0.01 --name a"
    run_linear(pretrained, tmp_path, *flags.split())

    state = torch.load(pretrained)
    net = SimSiam("resnet8", feature_dim=16, width=4)
    net.load_state_dict(state["model"])
    torch.manual_seed(0)
    net = Classifier(net.backbone, 16, 10)
    parts = zip((net.fc, net.backbone), lrs, strict=True)
    groups = [{"params": part.parameters(), "lr": lr * 40 / 256} for part, lr in parts]
    if optimizer == "sgd":
        plain = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
    else:
        plain = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(plain, 20)
    encoder = state["encoder"]
    views = Views(32, encoder["mean"], encoder["std"], AUGMENTATION, 1, 0)
    data = load_dataset("textures", "").subset(400, 0)
    loader = Loader(data.train_images, 40, 0, data.train_labels)
    net.train()
    losses = []
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            (x,) = views(batch)
            loss = F.cross_entropy(net(x), batch.labels, label_smoothing=0.1)
            plain.zero_grad()
            loss.backward()
            plain.step()
            schedule.step()
            losses.append(loss.item())
    table = pandas.read_csv(tmp_path / "a_statistics.csv")
    expected = torch.tensor(losses).view(2, 10).mean(1).tolist()  # per epoch of ten steps
    assert table["train_loss"].tolist() == pytest.approx(expected, abs=2e-5)
    assert expected[1] < expected[0]
    tuned = weights(tmp_path, "a")
    for key, value in net.state_dict().items():
        torch.testing.assert_close(tuned[key], value, atol=1e-6, rtol=1e-5)


def test_training_starts_at_the_checkpoint_or_from_scratch(pretrained, tmp_path):
    """With an lr of nearly 0, the initial weights are the final ones."""
    flags = (*TINY.split(), "--finetune", "--lr", 1e-12, "--weight_decay", 0)
    run_linear(pretrained, tmp_path, *flags)
    run_linear(pretrained, tmp_path, *flags, "--from_scratch")
    tuned, scratch = weights(tmp_path, "pre_finetune"), weights(tmp_path, "pre_scratch")
    before = torch.load(pretrained)["model"]
    torch.manual_seed(0)
    random = backbones.build_backbone("resnet8", width=4)[0].state_dict()
    for key, value in random.items():
        name = f"backbone.{key}"
        if "running" in name or "num_batches" in name:  # BN in train mode
            assert not torch.equal(tuned[name], before[name])
            continue
        torch.testing.assert_close(tuned[name], before[name], atol=1e-9, rtol=0)
        torch.testing.assert_close(scratch[name], value, atol=1e-9, rtol=0)
    table = pandas.read_csv(tmp_path / "results.csv")
    assert table["protocol"].tolist() == ["Fine-tuned", "From scratch"]


def test_a_finetuned_network_can_be_evaluated(pretrained, tmp_path, capsys):
    run_linear(pretrained, tmp_path, *"--finetune --epochs 2 --label_fraction 0.5".split())
    path = tmp_path / "pre_finetune_0.5_model.pth"
    for end in ("confusion", "curves"):
        assert (tmp_path / f"pre_finetune_0.5_{end}.png").exists()
    top1 = pandas.read_csv(tmp_path / "pre_finetune_0.5_statistics.csv")["test_acc@1"].iloc[-1]
    capsys.readouterr()
    run_linear(path, tmp_path, "--evaluate_only", "--no-pictures")
    assert f"top-1 {top1:.2f} %" in capsys.readouterr().out


def test_mixup_is_that_of_torchvision_and_a_function_of_the_step():
    images, labels = make_textures(8, seed=1)
    backbone, _ = backbones.build_backbone("resnet8", width=4)
    views = Views(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), AUGMENTATION, 1)
    off = torch.autocast("cpu", enabled=False)
    encoder = FinetunedEncoder(backbone, views, off, False, 10, 0.5)
    batch = Batch(0, 3, images, labels, 8, slice(0, 8))
    state = torch.random.get_rng_state()
    features, targets = encoder.augmented_features(batch)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(map(torch.equal, encoder.augmented_features(batch), (features, targets)))
    assert not torch.equal(targets, encoder.augmented_features(batch._replace(step=4))[1])
    torch.manual_seed(encoder.mixup_seed(batch))
    x, expected = MixUp(alpha=0.5, num_classes=10)(views(batch)[0], labels)
    assert torch.equal(targets, expected)
    torch.testing.assert_close(features, backbone(x))
    assert ((targets > 0).sum(1) == 2).any()  # mixed, and not with itself


def muon(parameters):
    return Muon(parameters, lr=0.1, nesterov=True)


@pytest.mark.parametrize("make", [torch.optim.AdamW, muon])
def test_an_invalid_optimizer_state_is_refused(make):
    net = torch.nn.Linear(5, 4)
    optimizer = make(net.parameters())
    net(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    load_optimizer(optimizer, saved)
    for i, entries in saved["state"].items():
        wrong = [{k: v for k, v in entries.items() if k != missing} for missing in entries]
        wrong += [entries | {"more": torch.ones(4)}, None]
        for name, value in entries.items():
            wrong += [entries | {name: other} for other in (None, 3.0, torch.full((7,), 1.0))]
            if name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                wrong += [entries | {name: value.double()}, entries | {name: value * torch.inf}]
        if "use_muon" in entries:  # a matrix with AdamW's state, a vector with Muon's
            wrong.append(entries | {"use_muon": not entries["use_muon"]})
        for other in wrong:
            broken = saved | {"state": saved["state"] | {i: other}}
            with pytest.raises(ValueError, match="optimizer"):
                load_optimizer(optimizer, broken)


def test_an_evaluation_takes_no_more_images_than_the_training_between(pretrained, tmp_path):
    """With 400 training and 1,000 test images: after 1,200 training images, and at the end."""
    flags = "--finetune --epochs 4 --batch_size 100 --no-pictures --name a".split()
    run_linear(pretrained, tmp_path, *flags)
    rows = pandas.read_csv(tmp_path / "a_statistics.csv")
    assert rows["train_acc@1"].notna().all()
    assert rows["epoch"][rows["test_acc@1"].notna()].tolist() == [3, 4]
