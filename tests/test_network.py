"""Heads, criteria, loss and methods against independent implementations; model.py."""

import copy
import functools
import types

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity
from lightly.loss.vicreg_loss import covariance_loss
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.models.modules.heads import ProjectionHead
from torch import Tensor, nn

import main
import model
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.backbones import build_backbone
from simsiam.models.classifier import Classifier
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import METHODS, build_model
from simsiam.models.simsiam import (
    CRITERIA,
    LOSSES,
    Outputs,
    SimSiam,
    covariance,
    cross_entropy,
    negative_cosine,
    projection_mlp,
)
from simsiam.runtime.schedule import cosine_schedule
from tests.helpers import interrupt, refused, same_bits


def seeded(**settings) -> SimSiam:
    torch.manual_seed(0)
    return SimSiam("resnet8", feature_dim=32, width=4, **settings)


def views(n: int, seed: int = 1) -> list[Tensor]:
    """`n` views of 8 images."""
    return list(torch.randn(n, 8, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))


# ---- SimSiam ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 3])
def test_loss_and_every_gradient_equal_lightly(layers):
    torch.manual_seed(0)
    net = SimSiam("resnet8", feature_dim=32, projector_layers=layers).double()
    for parameter in net.backbone.parameters():  # zero_init_residual would hide half the backbone
        nn.init.normal_(parameter, std=0.2)
    last = (32, 32, nn.BatchNorm1d(32, affine=False), None)
    project = ProjectionHead([(64, 32, nn.BatchNorm1d(32), nn.ReLU()), last])
    if layers == 3:
        project = SimSiamProjectionHead(64, 32, 32)
    backbone, predict = copy.deepcopy(net.backbone), SimSiamPredictionHead(32, 8, 32)
    project.layers.load_state_dict(net.projector.state_dict())
    predict.layers.load_state_dict(net.predictor.state_dict())
    twin = nn.ModuleList([backbone, project, predict]).double()

    x1, x2 = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    outputs, z1, z2 = net([x1, x2]), project(backbone(x1)), project(backbone(x2))
    criterion = NegativeCosineSimilarity()
    expected = 0.5 * (criterion(predict(z1), z2.detach()) + criterion(predict(z2), z1.detach()))

    # The criterion is fp32 on purpose: agreement is to fp32.
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=0)
    close(outputs.loss.double(), expected)
    close(outputs.z, z1.detach())
    close(outputs.features, backbone(x1).detach())
    assert not outputs.z.requires_grad
    assert not outputs.features.requires_grad
    outputs.loss.backward()
    expected.backward()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert a.grad.abs().max() > 0
        close(a.grad, b.grad)


def test_criteria():
    p = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert negative_cosine(p, 3 * p) == -1
    assert negative_cosine(p, p.flip(1)) == 0
    assert negative_cosine(p, -p) == 1
    p, z = torch.randn(2, 8, 16)
    torch.testing.assert_close(cross_entropy(p, z), nn.functional.cross_entropy(p, z.softmax(1)))
    for criterion in CRITERIA.values():
        assert criterion(p.bfloat16(), z.bfloat16()).dtype == torch.float32


def test_a_criterion_is_one_entry(monkeypatch):
    monkeypatch.setitem(CRITERIA, "mse", lambda p, z: (p - z).pow(2).mean())
    net, (x1, x2) = seeded(similarity="mse"), views(2)
    z1, z2 = net.projector(net.backbone(x1)), net.projector(net.backbone(x2))
    p1, p2 = net.predictor(z1), net.predictor(z2)
    expected = (nn.functional.mse_loss(p1, z2) + nn.functional.mse_loss(p2, z1)) / 2
    torch.testing.assert_close(net([x1, x2]).loss, expected)


@pytest.mark.parametrize(("loss", "targets"), [("symmetric", {0, 1}), ("asymmetric", {1})])
def test_the_stop_gradient_is_exact(loss, targets):
    """Without the way through p no gradient reaches a target's z."""

    class NoWayBack(nn.Module):
        def forward(self, z):
            return z.detach().flip(1).requires_grad_()

    for stop_grad in (True, False):
        net, z = seeded(loss=loss, stop_grad=stop_grad), []
        net.predictor = NoWayBack()
        net.projector.register_forward_hook(lambda *io, z=z: z.append(io[2]))
        gradients = torch.autograd.grad(net(views(2)).loss, z, allow_unused=True)
        assert len(gradients) == 2
        for i, gradient in enumerate(gradients):
            reached = gradient is not None and bool((gradient != 0).any())
            assert reached == (i in targets and not stop_grad)


def test_one_way_losses():
    nets, x = {loss: seeded(loss=loss) for loss in LOSSES}, views(4)
    assert [net.num_views for net in nets.values()] == [2, 2, 4]
    one_way = lambda a, b: nets["asymmetric"]([x[a], x[b]]).loss  # noqa: E731
    both, twice = (one_way(0, 1) + one_way(1, 0)) / 2, (one_way(0, 1) + one_way(2, 3)) / 2
    torch.testing.assert_close(nets["symmetric"](x[:2]).loss, both)
    torch.testing.assert_close(nets["asymmetric_2x"](x).loss, twice)
    assert abs(both - twice) > 1e-4


@pytest.mark.parametrize(
    ("bn", "projector", "predictor"),
    [("none", [], []), ("hidden", [1], [1]), ("default", [1, 4], [1]), ("all", [1, 4], [1, 4])],
)
def test_bn_of_the_heads(bn, projector, predictor):
    net = seeded(bn=bn)
    for head, expected in ((net.projector, projector), (net.predictor, predictor)):
        norms = [i for i, layer in enumerate(head) if isinstance(layer, nn.BatchNorm1d)]
        assert norms == expected
        # A bias only where no BN follows.
        assert [i for i in (0, 3) if head[i].bias is None] == [i - 1 for i in norms]
    net(views(2)).loss.backward()


def test_predictors_of_the_ablations():
    x, net = views(2), seeded(predictor="none")
    z = [net.projector(net.backbone(one)) for one in x]
    torch.testing.assert_close(net(x).loss, negative_cosine(*z))
    assert net.predictor_parameters() == []
    net = seeded(predictor="fixed")
    net(x).loss.backward()
    assert all(p.grad is None for p in net.predictor.parameters())
    assert net.projector[0].weight.grad.any()
    assert net.predictor_parameters() == []


def test_a_mean_target_of_two_views_is_simsiam_to_the_bit():
    results = []
    for net in (seeded(), seeded(target="mean")):
        loss, z, _ = net(views(2))
        loss.backward()
        results.append([loss, z, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_mean_targets_of_four_views_equal_lightly_s_fastsiam():
    net, x, criterion = seeded(target="mean", num_views=4), views(4), NegativeCosineSimilarity()
    assert net.num_views == 4
    z = [net.projector(net.backbone(one)) for one in x]
    expected = 0.0
    for i in range(4):
        others = torch.stack(z[:i] + z[i + 1 :]).detach()
        expected += criterion(net.predictor(z[i]), others.mean(0)) / 4
    loss = net(x).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(one, list(net.parameters())) for one in (loss, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_covariance_by_hand_and_in_the_loss():
    # Channels (1, -1) and (2, -2): a covariance of 4 over n - 1 = 1, twice squared, over d = 2.
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert covariance(z).item() == pytest.approx(2 * 4**2 / 2)
    assert covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == 0
    z = torch.randn(64, 16) @ torch.randn(16, 16)
    torch.testing.assert_close(covariance(z), covariance_loss(z), rtol=1e-4, atol=0)

    plain, net, x = seeded(), seeded(covariance=0.5), views(2)
    z = [net.projector(net.backbone(one)) for one in x]
    loss, expected = net(x).loss, plain(x).loss.detach()
    expected = expected + 0.5 * (covariance_loss(z[0]) + covariance_loss(z[1])) / 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_dim": 3},
        {"predictor": "some"},
        {"bn": "some"},
        {"similarity": "some"},
        {"loss": "some"},
        {"target": "median"},
        {"target": "mean", "loss": "asymmetric"},
        {"num_views": 3},
        {"num_views": 17, "target": "mean"},
        {"covariance": -1.0},
    ],
)
def test_a_refused_setting_is_named(settings):
    with pytest.raises(ValueError, match=f"^--{next(iter(settings))} "):
        SimSiam(**{"arch": "resnet8"} | settings)


def test_compiled_it_returns_the_same():
    net = seeded()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    eager, outputs = net(views(2)), compiled(views(2))
    assert isinstance(outputs, Outputs)
    torch.testing.assert_close(tuple(outputs), tuple(eager))


# ---- methods ------------------------------------------------------------------------------------

FIELDS = {"arch": "resnet8", "stem": "cifar", "width": 4, "feature_dim": 32, "lr": 1.0}


def test_build_model_passes_the_fields_that_a_method_has():
    ablations = {"loss": "asymmetric_2x", "similarity": "cross_entropy", "stop_grad": "off"}
    net = build_model(FIELDS | ablations)
    assert (net.features, net.num_views, net.stop_grad) == (16, 4, False)
    assert net.criterion is cross_entropy
    assert build_model(FIELDS | {"stop_grad": "on"}).stop_grad is True
    torch.manual_seed(0)
    for a, b in zip(build_model(FIELDS).parameters(), seeded().parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="^--method some: .*simsiam"):
        build_model(FIELDS | {"method": "some"})


class BarlowTwins(nn.Module):
    """Zbontar et al. 2021, arXiv 2103.03230: a method from outside the package."""

    num_views = 2

    def __init__(self, arch: str, stem: str, feature_dim: int, width: int, channels: int = 3):
        super().__init__()
        self.channels = channels
        self.backbone, self.features = build_backbone(arch, stem, width, channels)
        self.projector = projection_mlp(self.features, feature_dim, layers=2)

    def encoder_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def predictor_parameters(self) -> list[nn.Parameter]:
        return []

    def forward(self, views: list[Tensor]) -> Outputs:
        features = [self.backbone(x) for x in views]
        z = [self.projector(one) for one in features]
        c = z[0].T @ z[1] / len(z[0])  # the projector's last BN has normalised z
        off_diagonal = c.pow(2).sum() - c.diagonal().pow(2).sum()
        loss = (c.diagonal() - 1).pow(2).sum() + 0.005 * off_diagonal
        return Outputs(loss, z[0].detach(), features[0].detach())


def test_a_method_from_outside_is_one_entry(monkeypatch):
    monkeypatch.setitem(METHODS, "barlow_twins", BarlowTwins)
    net, x = build_model(FIELDS | {"method": "barlow_twins"}), views(2)
    z = [net.projector(net.backbone(one)) for one in x]
    loss = net(x).loss
    torch.testing.assert_close(loss, BarlowTwinsLoss()(*z), rtol=1e-3, atol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.encoder_parameters())
    params, flops = params_and_flops(net, 16)
    assert params == sum(p.numel() for p in net.parameters())
    assert flops > 0


def test_a_flag_that_the_method_does_not_use_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(METHODS, "barlow_twins", BarlowTwins)
    err = refused(capsys, main, "--method", "barlow_twins", "--predictor", "fixed")
    assert "--predictor" in err


def test_the_command_trains_and_resumes_a_method_from_outside(monkeypatch, tmp_path):
    monkeypatch.setitem(METHODS, "barlow_twins", BarlowTwins)
    flags = "--method barlow_twins --data_name textures --train_size 64 --width 4 --feature_dim 16 "
    flags += f"--batch_size 32 --lr 0.1 --k 5 --epochs 2 --no-pictures --out {tmp_path} --name"

    main.main([*flags.split(), "whole"])
    interrupt(main, [*flags.split(), "cut"], epoch=1)
    main.main([*flags.split(), "cut", "--resume"])
    sources = [LoadedCheckpoint.open(tmp_path / f"{name}_model.pth") for name in ("whole", "cut")]
    assert all(isinstance(source.net, BarlowTwins) for source in sources)
    assert same_bits(*(source.net.state_dict() for source in sources))
    features = sources[0](torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.shape == (2, 16)


# ---- parameters, multiply-adds, schedule, classifier --------------------------------------------


def test_params_and_flops_leave_the_network_as_it_is():
    net = SimSiam("resnet18")
    keys = set(net.state_dict())
    params, flops = params_and_flops(net, 32)
    assert params == 18_516_032 == sum(p.numel() for p in net.parameters())
    # 562.76 M multiply-adds of convolutions and linear layers, and thop's share for BN.
    assert 562.76e6 < flops < 566e6
    assert set(net.state_dict()) == keys  # thop's buffers stay in the copy


def test_a_classifier_is_a_backbone_and_a_head_that_starts_as_the_authors():
    torch.manual_seed(0)
    net = Classifier(*build_backbone("resnet8"), 1000)
    assert net.fc.bias.abs().max() == 0
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(net.eval()(x), net.backbone(x) @ net.fc.weight.T)


def test_cosine_schedule_is_torch_s():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(41):
        rate = optimizer.param_groups[0]["lr"]
        assert cosine_schedule(step / 4, 10) == pytest.approx(rate, abs=1e-9)
        assert cosine_schedule(2 + step / 4, 12, warmup_epochs=2) == pytest.approx(rate, abs=1e-9)
        optimizer.step()
        cosine.step()
    assert [cosine_schedule(e, 12, warmup_epochs=2) for e in (0, 0.5, 1)] == [0, 0.25, 0.5]


# ---- model.py -----------------------------------------------------------------------------------


def test_the_command_prints_params_and_flops(capsys):
    """With the ImageNet stem and three layers: torchvision's ResNet-50 has 25.557 M with its fc.

    It has 4.09 G multiply-adds (torchvision's weights' `_ops`); thop adds some for BN.
    """
    model.command(["--arch", "resnet50"])
    rows = [line[12:].split() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert all(row[1::2] == ["M", "G"] for row in rows)
    # In millions: the backbone, SimSiam, and the backbone with an fc of 1000 classes.
    assert [float(row[0]) for row in rows] == [23.51, 38.20, 25.56]
    backbone, whole, linear = (float(row[2]) for row in rows)
    assert backbone <= linear <= whole + 0.001
    assert linear == pytest.approx(4.11, abs=0.04)


def test_the_command_names_what_is_wrong(capsys):
    command = types.SimpleNamespace(main=model.command)
    for flag, value in (
        ("--arch", "vgg16"),
        ("--stem", "some"),
        ("--width", 8),
        ("--feature_dim", 3),
        ("--image_size", "nan"),
    ):
        assert flag in refused(capsys, command, flag, value)
