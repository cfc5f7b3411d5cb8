"""The network: a backbone, heads, loss, linear model, Params/FLOPs, learning-rate schedule.

The symbols are the paper's: x a view, z = projector(backbone(x)), p = predictor(z).
Chen & He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566.
"""

import copy
import math
from collections.abc import Mapping
from itertools import pairwise

import thop
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.models.backbones import backbone, channels_of


def D(p: Tensor, z: Tensor) -> Tensor:
    """Negative cosine similarity, Eq. 1 of the paper, mean over the batch: N x d, N x d -> scalar.

    In fp32 whatever autocast says: bf16 cannot tell -0.999 from -1.
    """
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """In the place of D (sec. 4.5): -softmax(z) . log softmax(p), over the channels.

    N x d, N x d -> scalar, the mean over the batch, in fp32; from 0 to about log d.
    """
    return -(z.float().softmax(1) * p.float().log_softmax(1)).sum(1).mean()


def covariance(z: Tensor) -> Tensor:
    """VICReg's covariance term (Bardes et al. 2022, arXiv 2105.04906, Eq. 3, 4): N x d -> scalar.

    The squared covariances of each two channels, summed over them and divided by d, in fp32: 0
    where no channel tells of another one.
    """
    z = z.float() - z.float().mean(0)
    found = z.T @ z / (len(z) - 1)
    return (found.pow(2).sum() - found.diagonal().pow(2).sum()) / z.shape[1]


SIMILARITIES = {"cosine": D, "cross_entropy": cross_entropy}
# Which view's p meets which view's z, by --loss (sec. 4.6).
PAIRS = {"symmetric": ((0, 1), (1, 0)), "asymmetric": ((0, 1),), "asymmetric_2x": ((0, 1), (2, 3))}
# What z a view's p meets: the other view's, or the mean of all the others'.
TARGETS = ("other", "mean")
PREDICTORS = ("mlp", "none", "fixed")
BN = ("default", "none", "hidden", "all")


def mlp(widths: list[int], hidden_bn: bool, output_bn: bool, affine: bool = True) -> nn.Sequential:
    """Linear layers from width to width, with BN if so asked, and ReLU after all but the last.

    A Linear has a bias where no BN follows, which would cancel it. `affine`: the output's BN.
    Layers have the same numbers, and parameters the same names, with BN and without.
    """
    *hidden, (before, d) = pairwise(widths)
    layers: list[nn.Module] = []
    for inputs, outputs in hidden:
        layers += [
            nn.Linear(inputs, outputs, bias=not hidden_bn),
            nn.BatchNorm1d(outputs) if hidden_bn else nn.Identity(),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(before, d, bias=not output_bn))
    if output_bn:
        layers.append(nn.BatchNorm1d(d, affine=affine))
    return nn.Sequential(*layers)


def target_assignment(
    loss: str, target: str, num_views: int
) -> tuple[int, list[tuple[int, list[int]]]]:
    """Assign to each prediction the views whose embeddings are its target.

    Returns the number of views, and pairs of a view's index and its targets' indices; a prediction
    meets the mean of its targets. The arguments are `SimSiam`'s. Raises ValueError.
    """
    if loss != "symmetric" and target == "mean":
        raise ValueError(f"--target mean: goes with --loss symmetric, not {loss}")
    if num_views != 2 and (target != "mean" or num_views not in range(2, 17)):
        raise ValueError(f"--num_views {num_views}: from 2 to 16, and goes with --target mean")
    views = range(num_views)
    if target == "mean":
        return num_views, [(i, [j for j in views if j != i]) for i in views]
    return 1 + max(map(max, PAIRS[loss])), [(i, [j]) for i, j in PAIRS[loss]]


class SimSiam(nn.Module):
    """A backbone f, a projection MLP (with it the paper's "encoder") and a prediction MLP h.

    `feature_dim` is d, the width of z and of the projector's hidden layers. The predictor is a
    bottleneck of d/4 (sec. 3). The paper has 3 projector layers on ImageNet, 2 on CIFAR (App. D).

    `channels`: of the images.

    `projector_affine`: the projector's last BN is affine, as in some other projects' networks (the
    authors' is not).

    The rest are the paper's ablations:
    `stop_grad`: False lets the gradient through z as well (sec. 4.1, Fig. 2).
    `predictor`: `none`, h is the identity; `fixed`, h keeps its random weights (sec. 4.2, Table 1;
    its third row, a constant learning rate, is main.py's --fix_pred_lr).
    `bn`: BN in the heads (sec. 4.4, Table 3). `none`; `hidden` layers of both; `default`, these and
    the projector's output; `all`, and the predictor's output, affine there.
    `similarity`: `cosine`, `D`; or `cross_entropy` (sec. 4.5).
    `loss`: `symmetric`, Eq. 4; `asymmetric`, p of the first view only; `asymmetric_2x`, that of two
    pairs of views an image (sec. 4.6).

    What others have added:
    `target`: `mean`, p of each view meets the mean of the other views' z; there may be more than
    two, `num_views` in all (FastSiam: Pototzky et al. 2022, arXiv 2206.10969, sec. 3).
    `covariance`: by so much `covariance` of z, mean over the views, is added to the loss; of each
    rank's part of the batch.

    Raises ValueError for an unknown value, or a `feature_dim` below 4.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        stem: str = "cifar",
        feature_dim: int = 2048,
        projector_layers: int = 2,
        width: int | None = None,
        stop_grad: bool = True,
        predictor: str = "mlp",
        bn: str = "default",
        similarity: str = "cosine",
        loss: str = "symmetric",
        projector_affine: bool = False,
        target: str = "other",
        num_views: int = 2,
        covariance: float = 0.0,
        channels: int = 3,
    ):
        super().__init__()
        if feature_dim < 4:
            raise ValueError(f"--feature_dim {feature_dim}: must be at least 4")
        for name, value, known in (
            ("predictor", predictor, PREDICTORS),
            ("bn", bn, BN),
            ("similarity", similarity, SIMILARITIES),
            ("loss", loss, PAIRS),
            ("target", target, TARGETS),
        ):
            if value not in known:
                raise ValueError(f"--{name} {value}: choose one of {', '.join(known)}")
        self.num_views, self.meets = target_assignment(loss, target, num_views)
        if not 0 <= covariance < math.inf:
            raise ValueError(f"--covariance {covariance}: must be at least 0")
        d = feature_dim
        hidden_bn, output_bn = bn != "none", bn in ("default", "all")
        self.backbone, self.features = backbone(arch, stem, width, channels)
        self.channels = channels
        widths = [self.features] + [d] * projector_layers
        self.projector = mlp(widths, hidden_bn, output_bn, projector_affine)
        self.predictor: nn.Module = nn.Identity()
        if predictor != "none":
            self.predictor = mlp([d, d // 4, d], hidden_bn, bn == "all")
            self.predictor.requires_grad_(predictor != "fixed")
        self.stop_grad, self.D, self.covariance = stop_grad, SIMILARITIES[similarity], covariance

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Backbone and projector parameters."""
        return [*self.backbone.parameters(), *self.projector.parameters()]

    def predictor_parameters(self) -> list[nn.Parameter]:
        """Trainable predictor parameters."""
        return [p for p in self.predictor.parameters() if p.requires_grad]

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All views, N x C x H x W each -> the loss (a scalar), z1, and f(x1), N x `features`.

        The loss is Eq. 4's, (D(p1, sg(z2)) + D(p2, sg(z1))) / 2, or what flags make of it. z1
        (N x d) and the first view's pooled features are detached: no gradient comes back by them.
        Each view is its own forward pass: BN statistics are per view, as in the authors' code.
        """
        first = self.backbone(views[0])
        z = [self.projector(first), *(self.projector(self.backbone(x)) for x in views[1:])]
        target = [one.detach() for one in z] if self.stop_grad else z  # detach: the stop-gradient
        p = {i: self.predictor(z[i]) for i, _ in self.meets}
        D = [self.D(p[i], mean([target[j] for j in js])) for i, js in self.meets]
        loss = sum(D) / len(D)
        if self.covariance:
            loss = loss + self.covariance * sum(map(covariance, z)) / len(z)
        return loss, z[0].detach(), first.detach()


def mean(tensors: list[Tensor]) -> Tensor:
    """The mean of tensors of one shape; a single one as it is."""
    return torch.stack(tensors).mean(0) if len(tensors) > 1 else tensors[0]


# What of main.py's flags makes a SimSiam, besides --stop_grad and those that are newer.
NETWORK = tuple("arch stem feature_dim projector_layers width predictor bn similarity loss".split())


def simsiam(args: Mapping) -> SimSiam:
    """The network of main.py's flags. Raises ValueError as `SimSiam` does; KeyError."""
    more = {"stop_grad": args["stop_grad"] == "on"}
    # Checkpoints from before them lack these.
    newer = "projector_affine target num_views covariance channels"
    more |= {name: args[name] for name in newer.split() if name in args}
    return SimSiam(**{name: args[name] for name in NETWORK}, **more)


def linear_head(features: int, classes: int) -> nn.Linear:
    """The head of linear evaluation as the authors start it: weight ~ N(0, 0.01), bias 0."""
    head = nn.Linear(features, classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class Classifier(nn.Module):
    """A backbone and a linear head on its pooled features: N x C x H x W -> N x classes."""

    def __init__(self, backbone: nn.Module, features: int, classes: int):
        super().__init__()
        self.backbone, self.features, self.channels = backbone, features, channels_of(backbone)
        self.fc = linear_head(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x))


def params_and_flops(net: SimSiam | Classifier, image_size: int) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image through all parts of the network, in turn.

    thop counts multiply-adds, also where others say FLOPs and count each one twice. Profiled is a
    deep copy, since thop leaves `total_ops` and `total_params` buffers in what it profiles. It
    counts layers with weights: attention's products of queries, keys and values are not in it.
    Raises ValueError for images of a size that the backbone cannot take.
    """
    whole = copy.deepcopy(nn.Sequential(*net.children())).cpu().float()
    image = torch.zeros(1, channels_of(net), image_size, image_size)
    try:
        flops, params = thop.profile(whole, inputs=(image,), verbose=False)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--image_size {image_size}: the backbone refuses it: {reason}") from error
    return int(params), int(flops)


def schedule(progress: float, epochs: int, warmup_epochs: float = 0) -> float:
    """The learning rate over its peak, from 0 to 1, `progress` epochs into a run of `epochs`.

    Linear warm-up, then a cosine to 0, a step at a time (the authors' code: an epoch at a time).
    """
    if progress < warmup_epochs:
        return progress / warmup_epochs
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup_epochs) / (epochs - warmup_epochs)))
