"""Parity of the network and the loss with independent implementations; model.py, its door."""

import copy
import math
import types

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.loss.vicreg_loss import covariance_loss
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.models.modules.heads import ProjectionHead
from torch import nn

import model
from simsiam.models import backbones
from simsiam.models import simsiam as network
from tests.helpers import refused


def lightly_twin(net: network.SimSiam, d: int, features: int, layers: int) -> nn.ModuleDict:
    """lightly's heads with our weights; its loss takes their outputs."""
    projector = SimSiamProjectionHead(features, d, d)  # of three layers
    if layers == 2:
        last = (d, d, nn.BatchNorm1d(d, affine=False), None)
        projector = ProjectionHead([(features, d, nn.BatchNorm1d(d), nn.ReLU()), last])
    predictor = SimSiamPredictionHead(d, d // 4, d)
    twin = nn.ModuleDict({"projector": projector, "predictor": predictor})
    for name in twin:
        ours = getattr(net, name).state_dict()
        missing, unexpected = twin[name].layers.load_state_dict(ours, strict=False)
        assert not missing
        assert not unexpected
    return twin.double()


@pytest.mark.parametrize("layers", [2, 3])
def test_loss_and_every_gradient_equal_lightly(layers):
    torch.manual_seed(0)
    net = network.SimSiam("resnet8", feature_dim=32, projector_layers=layers).double()
    for parameter in net.backbone.parameters():  # zero_init_residual would hide half the backbone
        nn.init.normal_(parameter, std=0.2)
    twin = lightly_twin(net, 32, 64, layers)
    encoder = copy.deepcopy(net.backbone)
    criterion = NegativeCosineSimilarity()
    x1, x2 = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)

    loss, z, features = net(x1, x2)
    loss.backward()
    z1, z2 = twin["projector"](encoder(x1)), twin["projector"](encoder(x2))
    p1, p2 = twin["predictor"](z1), twin["predictor"](z2)
    theirs = 0.5 * (criterion(p1, z2.detach()) + criterion(p2, z1.detach()))
    theirs.backward()

    # Our loss is fp32 by intent, so the two agree to fp32.
    torch.testing.assert_close(loss.double(), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(z, z1.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(features, encoder(x1).detach(), atol=1e-6, rtol=0)
    assert not z.requires_grad
    assert not features.requires_grad
    pairs = [(net.backbone, encoder)]
    pairs += [(getattr(net, name), twin[name].layers) for name in twin]
    for ours, other in pairs:
        for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
            assert a.grad.abs().max() > 0, name
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0, msg=name)


def test_loss_is_minus_one_for_equal_directions_and_computed_in_fp32():
    p = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert network.D(p, 3 * p) == -1
    assert network.D(p, p.flip(1)) == 0
    assert network.D(p, -p) == 1
    assert network.D(p.bfloat16(), p.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("similarity", network.SIMILARITIES)
@pytest.mark.parametrize(("loss", "targets"), [("symmetric", {0, 1}), ("asymmetric", {1})])
def test_the_stop_gradient_is_exact(similarity, loss, targets):
    """Each half of the loss alone, without the way through p: no gradient reaches its z."""

    class NoWayBack(nn.Module):
        def forward(self, z):
            return z.detach().flip(1).requires_grad_()

    for stop_grad in (True, False):
        torch.manual_seed(0)
        ablations = {"similarity": similarity, "loss": loss, "stop_grad": stop_grad}
        net = network.SimSiam("resnet8", feature_dim=16, **ablations)
        net.predictor, z = NoWayBack(), []
        net.projector.register_forward_hook(lambda *io, z=z: z.append(io[2]))
        total, *_ = net(*torch.randn(2, 8, 3, 16, 16))
        found = torch.autograd.grad(total, z, allow_unused=True)
        assert len(found) == 2
        for i, gradient in enumerate(found):
            reached = gradient is not None and bool((gradient != 0).any())
            assert reached == (i in targets and not stop_grad)


def test_losses_of_the_ablations():
    p, z = torch.randn(2, 8, 16)
    theirs = nn.functional.cross_entropy(p, z.softmax(1))
    torch.testing.assert_close(network.cross_entropy(p, z), theirs)
    assert network.cross_entropy(p.bfloat16(), z.bfloat16()).dtype == torch.float32
    torch.manual_seed(0)
    nets = {loss: network.SimSiam("resnet8", feature_dim=16, loss=loss) for loss in network.PAIRS}
    for net in nets.values():
        net.load_state_dict(nets["symmetric"].state_dict())
    x = torch.randn(4, 8, 3, 16, 16)
    assert [net.num_views for net in nets.values()] == [2, 2, 4]

    def one_way(a, b):
        return nets["asymmetric"](x[a], x[b])[0]

    both = (one_way(0, 1) + one_way(1, 0)) / 2
    torch.testing.assert_close(nets["symmetric"](*x[:2])[0], both)
    twice = (one_way(0, 1) + one_way(2, 3)) / 2
    torch.testing.assert_close(nets["asymmetric_2x"](*x)[0], twice)
    assert abs(both - twice) > 1e-4


def test_heads_of_the_ablations():
    def places(head):
        return [i for i, layer in enumerate(head) if isinstance(layer, nn.BatchNorm1d)]

    x = torch.randn(2, 8, 3, 16, 16)
    bn = {"none": ([], []), "hidden": ([1], [1]), "default": ([1, 4], [1]), "all": ([1, 4], [1, 4])}
    for name, found in bn.items():
        net = network.SimSiam("resnet8", feature_dim=16, bn=name)
        assert (places(net.projector), places(net.predictor)) == found
        for head in (net.projector, net.predictor):
            linears = [i for i, layer in enumerate(head) if isinstance(layer, nn.Linear)]
            assert linears == [0, 3]
            # A bias, unless a BN takes it away again.
            assert [i for i in linears if head[i].bias is None] == [i - 1 for i in places(head)]
        net(*x)[0].backward()

    net = network.SimSiam("resnet8", feature_dim=16, predictor="none")
    z = net.projector(net.backbone(x[0])), net.projector(net.backbone(x[1]))
    torch.testing.assert_close(net(*x)[0], network.D(*z))
    net = network.SimSiam("resnet8", feature_dim=16, predictor="fixed")
    net(*x)[0].backward()
    assert all(p.grad is None for p in net.predictor.parameters())
    assert net.projector[0].weight.grad.any()
    for flag in ("predictor", "bn", "similarity", "loss"):
        with pytest.raises(ValueError, match=f"--{flag} some"):
            network.SimSiam("resnet8", **{flag: "some"})


def test_cifar_stem_leaves_4x4_in_layer4():
    net = network.SimSiam("resnet18")
    shapes = {}
    net.backbone.layer4.register_forward_hook(lambda *io: shapes.update(layer4=io[2].shape))
    features = net.backbone(torch.zeros(2, 3, 32, 32))
    assert shapes["layer4"] == (2, 512, 4, 4)
    assert features.shape == (2, 512)
    assert net.backbone.conv1.stride == (1, 1)


@pytest.mark.parametrize(
    ("kwargs", "size", "params"),
    [
        ({"arch": "resnet18"}, 32, 18_516_032),
        ({"arch": "resnet50", "stem": "imagenet", "projector_layers": 3}, 224, 38_199_360),
    ],
)
def test_params_and_flops_by_thop(kwargs, size, params):
    net = network.SimSiam(**kwargs)
    keys = set(net.state_dict())
    counted, flops = network.params_and_flops(net, size)
    assert counted == params == sum(p.numel() for p in net.parameters())
    assert set(net.state_dict()) == keys  # thop's buffers stay in the copy
    if kwargs["arch"] == "resnet18":
        # 562.76 M multiply-adds of convolutions and linear layers, and thop's share for BN.
        assert 562.76e6 < flops < 566e6
    assert net.projector[-1].affine is False


def test_cifar_resnets_have_the_papers_sizes():
    # He et al. 2016, Table 6, with the fc of 64 x 10 + 10 that we leave out.
    for depth, millions in [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]:
        net, features = backbones.backbone(f"resnet{depth}")
        params = sum(p.numel() for p in net.parameters()) + 650
        assert round(params / 1e6, 1 if depth == 110 else 2) == millions
        assert features == 64
    net, features = backbones.backbone("resnet8", width=32)
    assert net(torch.zeros(1, 3, 28, 28)).shape == (1, features) == (1, 128)


@pytest.mark.parametrize("arch", ["resnet18", "resnet8"])
def test_residual_branches_start_at_zero(arch):
    net, _ = backbones.backbone(arch)
    branches = [m.weight for n, m in net.named_modules() if n.endswith("bn2")]
    assert branches
    assert all((weight == 0).all() for weight in branches)


@pytest.mark.parametrize("arch", ["resnet9", "resnet2", "vgg16", "resnet", ""])
def test_unknown_arch_is_named(arch):
    with pytest.raises(ValueError, match=f"--arch {arch}"):
        network.SimSiam(arch)


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"arch": "resnet18", "stem": "some"}, "--stem some: choose one of cifar, imagenet"),
        ({"arch": "resnet18", "width": 8}, "--width 8: resnet18 has its own"),
        ({"arch": "resnet8", "stem": "imagenet"}, "--stem imagenet: resnet8 has the CIFAR stem"),
        ({"arch": "resnet8", "feature_dim": 3}, "--feature_dim 3: must be at least 4"),
    ],
)
def test_what_does_not_go_together_is_named(kwargs, named):
    with pytest.raises(ValueError, match=named):
        network.SimSiam(**kwargs)


def test_stems_differ_in_padding_and_relu():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    nets = {stem: backbones.backbone("resnet18", stem)[0] for stem in backbones.STEMS}
    for net in nets.values():
        net.eval()
    cifar = nets["cifar"]
    assert (nets["imagenet"].conv1.kernel_size, nets["imagenet"].conv1.stride) == ((7, 7), (2, 2))
    assert isinstance(nets["imagenet"].maxpool, nn.MaxPool2d)
    assert nets["cifar_pad2"].conv1(x).shape == (2, 64, 34, 34)
    for layer in cifar.modules():  # with zero_init_residual's weights a block is a ReLU itself
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1)
    no_relu = nets["cifar_no_relu"]
    no_relu.load_state_dict(cifar.state_dict())
    stem = cifar.bn1(cifar.conv1(x))
    # By its parts: a ReLU less after bn1, and nowhere else.
    rest = nn.Sequential(cifar.layer1, cifar.layer2, cifar.layer3, cifar.layer4)
    torch.testing.assert_close(no_relu(x), rest(stem).mean((2, 3)))
    torch.testing.assert_close(cifar(x), rest(stem.relu()).mean((2, 3)))
    assert (cifar(x) - no_relu(x)).abs().max() > 0.01


def test_the_network_of_flags_is_that_of_the_constructor():
    flags = {"arch": "resnet8", "stem": "cifar", "feature_dim": 16, "projector_layers": 3}
    flags |= {"width": 8, "predictor": "fixed", "bn": "all", "similarity": "cross_entropy"}
    flags |= {"loss": "asymmetric_2x", "stop_grad": "off", "lr": "what no network has"}
    net = network.simsiam(flags)
    assert (net.features, net.num_views, net.stop_grad) == (32, 4, False)
    assert net.D is network.cross_entropy
    assert [layer.out_features for layer in net.projector if isinstance(layer, nn.Linear)] == [
        16
    ] * 3
    assert net.predictor[-1].affine
    assert not any(p.requires_grad for p in net.predictor.parameters())
    assert network.simsiam(flags | {"stop_grad": "on"}).stop_grad is True
    with pytest.raises(KeyError, match="width"):
        network.simsiam({name: flags[name] for name in flags if name != "width"})


def test_a_classifier_is_a_backbone_and_a_head_that_starts_as_the_authors():
    torch.manual_seed(0)
    net = network.Classifier(*backbones.backbone("resnet18"), 1000)
    assert net.fc.bias.abs().max() == 0
    assert net.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    x = torch.randn(2, 3, 32, 32)
    net.eval()
    torch.testing.assert_close(net(x), net.backbone(x) @ net.fc.weight.T)


def test_schedule():
    factors = [network.schedule(e, 10) for e in (0, 2.5, 5, 10)]
    assert factors == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0])
    warm = [network.schedule(e, 12, warmup_epochs=2) for e in (0, 1, 2, 7, 12)]
    assert warm == pytest.approx([0, 0.5, 1, 0.5, 0])


# ---- model.py -----------------------------------------------------------------------------------


def test_the_door_leads_to_the_network():
    for name in ("SimSiam", "Classifier", "D", "backbone", "params_and_flops", "simsiam"):
        assert getattr(model, name) is getattr(network, name)


def counted(capsys, *argv):
    """What `python model.py` prints: its lines, and by part Params and FLOPs."""
    model.command([str(word) for word in argv])
    lines = capsys.readouterr().out.splitlines()
    rows = [line[12:].split() for line in lines[2:5]]
    assert all(row[1::2] == ["M", "G"] for row in rows)
    return lines, [(float(row[0]), float(row[2])) for row in rows]


def test_the_command_prints_parts_params_and_flops(capsys):
    lines, (backbone, whole, linear) = counted(capsys, "--arch", "resnet8", "--feature_dim", 64)
    assert lines[0] == "SimSiam, resnet8, stem cifar, d = 64, 32 pixels"
    net = network.SimSiam("resnet8", feature_dim=64)
    for part, (params, flops) in ((net.backbone, backbone), (net, whole)):
        assert params == pytest.approx(sum(p.numel() for p in part.parameters()) / 1e6, abs=0.005)
        assert flops > 0.01  # about 12 M multiply-adds
    assert linear[0] == pytest.approx(backbone[0] + 65_000 / 1e6, abs=0.01)
    assert backbone[1] <= linear[1] <= whole[1] + 0.001
    assert lines[5] == "SimSiam("
    for part in ("(backbone)", "(projector)", "(predictor)"):
        assert sum(part in line for line in lines) == 1


def test_the_command_gives_deeper_networks_the_imagenet_stem(capsys):
    lines, (backbone, whole, linear) = counted(capsys, "--arch", "resnet50")
    assert lines[0] == "SimSiam, resnet50, stem imagenet, d = 2048, 224 pixels"
    # torchvision: 25.557 M parameters with its fc of 1000 classes, 4.09 G multiply-adds (its
    # weights' `_ops`; thop adds some for BN).
    assert backbone[0] == 23.51
    assert linear[0] == 25.56
    assert linear[1] == pytest.approx(4.11, abs=0.04)
    assert whole[0] == 38.20  # of three layers
    assert whole[1] > backbone[1]
    lines, (backbone, _, _) = counted(
        capsys, "--arch", "resnet34", "--projector_layers", 1, "--image_size", 64
    )
    assert lines[0] == "SimSiam, resnet34, stem cifar, d = 2048, 64 pixels"
    assert backbone[0] == 21.28


def test_the_command_names_what_is_wrong(capsys):
    door = types.SimpleNamespace(main=model.command)
    assert "--arch vgg16" in refused(capsys, door, "--arch", "vgg16")
    assert "--stem" in refused(capsys, door, "--stem", "some")
    assert "--width 8" in refused(capsys, door, "--width", 8)
    assert "--feature_dim" in refused(capsys, door, "--feature_dim", 3)
    assert "--image_size" in refused(capsys, door, "--image_size", "nan")


# ---- what others have added ---------------------------------------------------------------------


def seeded(**more):
    torch.manual_seed(0)
    return network.SimSiam("resnet8", feature_dim=32, width=4, **more)


def test_a_mean_target_of_two_views_is_simsiam_to_the_bit():
    views, found = torch.randn(2, 8, 3, 16, 16), []
    for net in (seeded(), seeded(target="mean")):
        loss, z, _ = net(*views)
        loss.backward()
        found.append([loss, z, *(p.grad for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_mean_targets_of_four_views_equal_lightly_s_fastsiam():
    """Each p against the mean of the other three z, as in lightly's example of FastSiam."""
    net, views = seeded(target="mean", num_views=4), torch.randn(4, 8, 3, 16, 16)
    assert net.num_views == 4
    loss, *_ = net(*views)
    criterion = NegativeCosineSimilarity()
    z = [net.projector(net.backbone(x)) for x in views]
    theirs = 0.0
    for i in range(4):
        others = torch.stack(z[:i] + z[i + 1 :]).detach()
        theirs += criterion(net.predictor(z[i]), others.mean(0)) / 4
    gradients = [torch.autograd.grad(one, list(net.parameters())) for one in (loss, theirs)]
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-6)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_covariance_by_hand_and_against_lightly():
    # Channels (1, -1) and (2, -2): a covariance of 4 over n - 1 = 1, twice squared, over d = 2.
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert network.covariance(z).item() == pytest.approx(2 * 4**2 / 2)
    assert network.covariance(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item() == 0
    z = torch.randn(64, 16) @ torch.randn(16, 16)
    torch.testing.assert_close(network.covariance(z), covariance_loss(z), rtol=1e-4, atol=0)


def test_covariance_is_added_by_its_weight_and_reaches_the_encoder():
    views = torch.randn(2, 8, 3, 16, 16)
    plain, weighed = seeded(), seeded(covariance=0.5)
    loss, *_ = plain(*views)
    more, *_ = weighed(*views)
    z = [weighed.projector(weighed.backbone(x)) for x in views]
    added = 0.5 * (covariance_loss(z[0]) + covariance_loss(z[1])) / 2
    torch.testing.assert_close(more - loss, added, rtol=1e-3, atol=1e-5)
    (more - loss.detach()).backward()
    loss.backward()
    weights = (net.backbone.conv1.weight.grad for net in (plain, weighed))
    assert not torch.allclose(*weights)


@pytest.mark.parametrize(
    "flags",
    [
        {"num_views": 3},
        {"num_views": 17, "target": "mean"},
        {"target": "mean", "loss": "asymmetric"},
        {"target": "median"},
        {"covariance": -1.0},
    ],
)
def test_what_others_have_added_does_not_go_with_all(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))}"):
        seeded(**flags)
