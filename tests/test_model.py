"""Parity of the network and the loss with independent implementations."""

import copy

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
from lightly.models.modules.heads import ProjectionHead
from torch import nn

import model


def lightly_twin(net: model.SimSiam, d: int, features: int, layers: int) -> nn.ModuleDict:
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
    net = model.SimSiam("resnet8", feature_dim=32, projector_layers=layers).double()
    for parameter in net.backbone.parameters():  # zero_init_residual would hide half the backbone
        nn.init.normal_(parameter, std=0.2)
    twin = lightly_twin(net, 32, 64, layers)
    encoder = copy.deepcopy(net.backbone)
    criterion = NegativeCosineSimilarity()
    x1, x2 = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)

    loss, z = net(x1, x2)
    loss.backward()
    z1, z2 = twin["projector"](encoder(x1)), twin["projector"](encoder(x2))
    p1, p2 = twin["predictor"](z1), twin["predictor"](z2)
    theirs = 0.5 * (criterion(p1, z2.detach()) + criterion(p2, z1.detach()))
    theirs.backward()

    # Our loss is fp32 by intent, so the two agree to fp32.
    torch.testing.assert_close(loss.double(), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(z, z1.detach(), atol=1e-6, rtol=0)
    assert not z.requires_grad
    pairs = [(net.backbone, encoder)]
    pairs += [(getattr(net, name), twin[name].layers) for name in twin]
    for ours, other in pairs:
        for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
            assert a.grad.abs().max() > 0, name
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=0, msg=name)


def test_loss_is_minus_one_for_equal_directions_and_computed_in_fp32():
    p = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert model.D(p, 3 * p) == -1
    assert model.D(p, p.flip(1)) == 0
    assert model.D(p, -p) == 1
    assert model.D(p.bfloat16(), p.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("similarity", model.SIMILARITIES)
@pytest.mark.parametrize(("loss", "targets"), [("symmetric", {0, 1}), ("asymmetric", {1})])
def test_the_stop_gradient_is_exact(similarity, loss, targets):
    """Each half of the loss alone, without the way through p: no gradient reaches its z."""

    class NoWayBack(nn.Module):
        def forward(self, z):
            return z.detach().flip(1).requires_grad_()

    for stop_grad in (True, False):
        torch.manual_seed(0)
        ablations = {"similarity": similarity, "loss": loss, "stop_grad": stop_grad}
        net = model.SimSiam("resnet8", feature_dim=16, **ablations)
        net.predictor, z = NoWayBack(), []
        net.projector.register_forward_hook(lambda *io, z=z: z.append(io[2]))
        total, _ = net(*torch.randn(2, 8, 3, 16, 16))
        found = torch.autograd.grad(total, z, allow_unused=True)
        assert len(found) == 2
        for i, gradient in enumerate(found):
            reached = gradient is not None and bool((gradient != 0).any())
            assert reached == (i in targets and not stop_grad)


def test_losses_of_the_ablations():
    p, z = torch.randn(2, 8, 16)
    theirs = nn.functional.cross_entropy(p, z.softmax(1))
    torch.testing.assert_close(model.cross_entropy(p, z), theirs)
    assert model.cross_entropy(p.bfloat16(), z.bfloat16()).dtype == torch.float32
    torch.manual_seed(0)
    nets = {loss: model.SimSiam("resnet8", feature_dim=16, loss=loss) for loss in model.PAIRS}
    for net in nets.values():
        net.load_state_dict(nets["symmetric"].state_dict())
    x = torch.randn(4, 8, 3, 16, 16)
    assert [net.looks for net in nets.values()] == [2, 2, 4]

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
        net = model.SimSiam("resnet8", feature_dim=16, bn=name)
        assert (places(net.projector), places(net.predictor)) == found
        for head in (net.projector, net.predictor):
            linears = [i for i, layer in enumerate(head) if isinstance(layer, nn.Linear)]
            assert linears == [0, 3]
            # A bias, unless a BN takes it away again.
            assert [i for i in linears if head[i].bias is None] == [i - 1 for i in places(head)]
        net(*x)[0].backward()

    net = model.SimSiam("resnet8", feature_dim=16, predictor="none")
    z = net.projector(net.backbone(x[0])), net.projector(net.backbone(x[1]))
    torch.testing.assert_close(net(*x)[0], model.D(*z))
    net = model.SimSiam("resnet8", feature_dim=16, predictor="fixed")
    net(*x)[0].backward()
    assert all(p.grad is None for p in net.predictor.parameters())
    assert net.projector[0].weight.grad.any()
    for flag in ("predictor", "bn", "similarity", "loss"):
        with pytest.raises(ValueError, match=f"--{flag} some"):
            model.SimSiam("resnet8", **{flag: "some"})


def test_cifar_stem_leaves_4x4_in_layer4():
    net = model.SimSiam("resnet18")
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
    net = model.SimSiam(**kwargs)
    keys = set(net.state_dict())
    counted, flops = model.params_and_flops(net, size)
    assert counted == params == sum(p.numel() for p in net.parameters())
    assert set(net.state_dict()) == keys  # thop's buffers stay in the copy
    if kwargs["arch"] == "resnet18":
        # 562.76 M multiply-adds of convolutions and linear layers, and thop's share for BN.
        assert 562.76e6 < flops < 566e6
    assert net.projector[-1].affine is False


def test_cifar_resnets_have_the_papers_sizes():
    # He et al. 2016, Table 6, with the fc of 64 x 10 + 10 that we leave out.
    for depth, millions in [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]:
        net, features = model.backbone(f"resnet{depth}")
        params = sum(p.numel() for p in net.parameters()) + 650
        assert round(params / 1e6, 1 if depth == 110 else 2) == millions
        assert features == 64
    net, features = model.backbone("resnet8", width=32)
    assert net(torch.zeros(1, 3, 28, 28)).shape == (1, features) == (1, 128)


@pytest.mark.parametrize("arch", ["resnet18", "resnet8"])
def test_residual_branches_start_at_zero(arch):
    net, _ = model.backbone(arch)
    branches = [m.weight for n, m in net.named_modules() if n.endswith("bn2")]
    assert branches
    assert all((weight == 0).all() for weight in branches)


@pytest.mark.parametrize("arch", ["resnet9", "resnet2", "vgg16", "resnet", ""])
def test_unknown_arch_is_named(arch):
    with pytest.raises(ValueError, match=f"--arch {arch}"):
        model.SimSiam(arch)
