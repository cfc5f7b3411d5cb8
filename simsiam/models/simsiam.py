"""SimSiam: projector, predictor, criteria and loss, on a backbone of `simsiam.models.backbones`.

Symbols are the paper's: x is a view, z = projector(backbone(x)), p = predictor(z).
Chen & He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsiam.models.backbones import build_backbone


class Outputs(NamedTuple):
    """Result of a method's forward pass over the views of a batch of N images."""

    loss: Tensor  # scalar
    z: Tensor  # embeddings of the first view, N x d, detached
    features: Tensor  # pooled backbone features of the first view, N x `features`, detached


# ---- criteria -----------------------------------------------------------------------------------


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Return the negative cosine similarity, D of Eq. 1, averaged over the batch.

    N x d, N x d -> scalar, in fp32 even under autocast: bf16 cannot tell -0.999 from -1.
    """
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def cross_entropy(p: Tensor, z: Tensor) -> Tensor:
    """Return -softmax(z) . log softmax(p) over the channels (sec. 4.5), averaged over the batch.

    N x d, N x d -> scalar between 0 and about log d, in fp32.
    """
    return -(z.float().softmax(1) * p.float().log_softmax(1)).sum(1).mean()


# Criteria by --similarity: functions (p, z), N x d each, -> the scalar to minimise.
CRITERIA = {"cosine": negative_cosine, "cross_entropy": cross_entropy}


def covariance(z: Tensor) -> Tensor:
    """Return VICReg's covariance term (Bardes et al. 2022, arXiv 2105.04906, Eq. 3 and 4).

    N x d -> scalar, in fp32: the squared off-diagonal covariances of the channels, summed and
    divided by d. It is 0 where the channels are uncorrelated.
    """
    z = z.float() - z.float().mean(0)
    matrix = z.T @ z / (len(z) - 1)
    return (matrix.pow(2).sum() - matrix.diagonal().pow(2).sum()) / z.shape[1]


# ---- heads --------------------------------------------------------------------------------------

# Layers of the heads with batch normalisation, by --bn; see `SimSiam`.
BN = ("default", "none", "hidden", "all")


def mlp(widths: list[int], hidden_bn: bool, output_bn: bool, affine: bool = True) -> nn.Sequential:
    """Build an MLP through `widths`: Linear, BN if any, ReLU; no ReLU after the last layer.

    A Linear has a bias only where no BN follows, which would cancel it. `affine`: of the output BN.
    With an Identity in place of a hidden BN, parameters have the same names with BN and without.
    """
    *hidden, (inputs, outputs) = pairwise(widths)
    layers: list[nn.Module] = []
    for before, after in hidden:
        layers += [
            nn.Linear(before, after, bias=not hidden_bn),
            nn.BatchNorm1d(after) if hidden_bn else nn.Identity(),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(inputs, outputs, bias=not output_bn))
    if output_bn:
        layers.append(nn.BatchNorm1d(outputs, affine=affine))
    return nn.Sequential(*layers)


def projection_mlp(
    features: int, d: int, layers: int, bn: str = "default", affine: bool = False
) -> nn.Sequential:
    """Build a projector, `features` -> d, with `layers` linear layers (sec. 3)."""
    return mlp([features] + [d] * layers, bn != "none", bn in ("default", "all"), affine)


def prediction_mlp(d: int, bn: str = "default") -> nn.Sequential:
    """Build a predictor with a bottleneck, d -> d/4 -> d (sec. 3)."""
    return mlp([d, d // 4, d], bn != "none", bn == "all")


# ---- the network --------------------------------------------------------------------------------

PREDICTORS = ("mlp", "none", "fixed")
TARGETS = ("other", "mean")
# The view whose z is the target of each view's p, by --loss (sec. 4.6).
LOSSES = {
    "symmetric": {0: [1], 1: [0]},
    "asymmetric": {0: [1]},
    "asymmetric_2x": {0: [1], 2: [3]},
}


def target_assignment(loss: str, target: str, num_views: int) -> tuple[int, dict[int, list[int]]]:
    """Assign to each prediction the views whose embeddings are its target.

    Returns the number of views per image and, by the index of the predicting view, the indices of
    its targets, whose mean it predicts. Arguments are those of `SimSiam`. Raises ValueError for
    arguments that exclude each other.
    """
    if loss != "symmetric" and target == "mean":
        raise ValueError(f"--target mean: needs --loss symmetric, not {loss}")
    if num_views != 2 and (target != "mean" or num_views not in range(2, 17)):
        raise ValueError(f"--num_views {num_views}: must be 2, or from 2 to 16 with --target mean")
    if target == "mean":
        views = range(num_views)
        return num_views, {i: [j for j in views if j != i] for i in views}
    targets = LOSSES[loss]
    return 1 + max(j for of_view in targets.values() for j in of_view), targets


class SimSiam(nn.Module):
    """SimSiam: a backbone, a projector (together the paper's encoder), a predictor, and the loss.

    `arch`, `stem`, `width`, `channels`: of the backbone; see `build_backbone`.
    `feature_dim`: d, the width of z and of the projector's hidden layers.
    `projector_layers`: 3 on ImageNet (sec. 3), 2 on CIFAR (App. D).
    `projector_affine`: an affine BN at the projector's output, as some other projects have it.
    `heads`: a projector and a predictor to use in place of new ones.

    Ablations of the paper:
    `stop_grad`: stop the gradient at z (sec. 4.1); without it the network collapses.
    `predictor`: `mlp`; `none`, so that p = z; `fixed`, which keeps its random weights (sec. 4.2).
    `bn`: layers of the heads with BN (sec. 4.4, Table 3): `none`; `hidden`, those of both heads;
    `default`, these and the projector's output; `all`, and the predictor's output too.
    `similarity`: the criterion, a name of `CRITERIA` (sec. 4.5).
    `loss`: `symmetric`, Eq. 4; `asymmetric`, only the first view predicts; `asymmetric_2x`, the
    same of two pairs of views per image (sec. 4.6).

    Beyond the paper:
    `target`: `other`, each view predicts the other one's z; `mean`, it predicts the mean of all
    other views' z, of `num_views` per image (FastSiam: Pototzky et al. 2022, arXiv 2206.10969).
    `covariance`: weight of the `covariance` of z in the loss, averaged over the views. Under DDP
    each rank takes that of its own part of the batch.

    Raises ValueError, which names the flag, for an unknown value or a `feature_dim` below 4.
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
        heads: tuple[nn.Module, nn.Module] | None = None,
    ):
        super().__init__()
        for name, value, choices in (
            ("predictor", predictor, PREDICTORS),
            ("bn", bn, BN),
            ("similarity", similarity, CRITERIA),
            ("loss", loss, LOSSES),
            ("target", target, TARGETS),
        ):
            if value not in choices:
                raise ValueError(f"--{name} {value}: choose one of {', '.join(choices)}")
        if feature_dim < 4:
            raise ValueError(f"--feature_dim {feature_dim}: must be at least 4")
        if not 0 <= covariance < math.inf:
            raise ValueError(f"--covariance {covariance}: must be at least 0")
        self.num_views, self.targets = target_assignment(loss, target, num_views)
        self.criterion, self.covariance = CRITERIA[similarity], covariance
        self.stop_grad, self.channels = stop_grad, channels
        # The order of construction fixes the random weights of a seed.
        self.backbone, self.features = build_backbone(arch, stem, width, channels)
        if heads is not None:
            self.projector, self.predictor = heads
            return
        self.projector = projection_mlp(
            self.features, feature_dim, projector_layers, bn, projector_affine
        )
        self.predictor = nn.Identity() if predictor == "none" else prediction_mlp(feature_dim, bn)
        self.predictor.requires_grad_(predictor != "fixed")

    def encoder_parameters(self) -> list[nn.Parameter]:
        """Backbone and projector parameters."""
        return [*self.backbone.parameters(), *self.projector.parameters()]

    def predictor_parameters(self) -> list[nn.Parameter]:
        """Trainable predictor parameters."""
        return [p for p in self.predictor.parameters() if p.requires_grad]

    def forward(self, views: list[Tensor]) -> Outputs:
        """Return the loss of `num_views` views per image, each N x C x H x W.

        By default the loss is Eq. 4: (D(p1, stopgrad(z2)) + D(p2, stopgrad(z1))) / 2. Each view is
        a forward pass of its own, so that BN statistics are per view, as in the authors' code.
        """
        features = self.backbone(views[0])
        z = [self.projector(features), *(self.projector(self.backbone(x)) for x in views[1:])]
        targets = [one.detach() for one in z] if self.stop_grad else z
        p = {i: self.predictor(z[i]) for i in self.targets}
        losses = [
            # The mean of a single target is that target, to the bit.
            self.criterion(p[i], torch.stack([targets[j] for j in of_view]).mean(0))
            for i, of_view in self.targets.items()
        ]
        loss = sum(losses) / len(losses)
        if self.covariance:
            loss = loss + self.covariance * sum(map(covariance, z)) / len(z)
        return Outputs(loss, z[0].detach(), features.detach())
