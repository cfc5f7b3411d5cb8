"""The online probe: a linear head that learns beside the encoder, from its detached features."""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.data.loader import Data
from simsiam.data.shards import Shards
from simsiam.models import simsiam as network
from simsiam.runtime import distributed

# Its base learning rate, per 256 images and per feature: the sum of squares of what the head sees
# is `features`, and so grows what a step of the same lr does. Measured on textures: after 10 epochs
# of 2,000 images a half to four times of it end within half a point, with 64 features, and with 512
# (a random layer on these) within two points; after 20 epochs of 4,000 within a tenth.
LR = 640.0
MOMENTUM = 0.9  # of SGD
NO_LABEL = -1  # in `Data`
OLDER = {"mean", "var"}  # what checkpoints had besides: running statistics of the BN


def wanted(asked: bool | None, images: Data) -> bool:
    """Whether a run on `images` has a probe: by --probe or, where it is silent, if it can have one.

    Raises ValueError where it is asked for one and cannot have it.
    """
    lacks = None
    if isinstance(images.train_images, Shards):
        lacks = "shards are read from end to end, without their labels"
    elif not bool((images.train_labels != NO_LABEL).any()):
        lacks = "the training images have no labels"
    elif images.test_images is None:
        lacks = "there are no labelled test images to score with"
    if asked and lacks:
        raise ValueError(f"--probe: {lacks}")
    return asked is not False and lacks is None


class Probe:
    """A linear head on features, with its own SGD, whose gradient never goes to their encoder.

    It sees a feature vector's direction, since the test images' features are L2-normalised for the
    kNN, and that through a BN without weights (as in MAE's linear probing: He et al. 2022, arXiv
    2111.06377, App. A.1): directions of ReLU's outputs have most of their length in common, and SGD
    learns slowly from what little they differ in. In training the BN's statistics are of the
    batch, in `accuracy` of the bank.

    All is zero at the start, also the head (its loss is convex): nothing is drawn at random, so
    that a run draws what it would draw without. Under --ddp each rank learns from the features of
    all, by the same sums: the same head on every rank.

    `args`: main.py's, for batch_size and the schedule, which is the run's own.
    """

    def __init__(self, features: int, classes: int, args: Namespace, device: torch.device):
        self.args, self.peak = args, LR / features * args.batch_size / 256
        self.eps = 1e-5 / features  # a feature's mean square is 1 / features
        # SGD by hand, as torch.optim's: that one has a momentum only after its first step, and a
        # checkpoint of ours has all from the start.
        self.head = [
            torch.zeros(*shape, device=device, requires_grad=True)
            for shape in ((classes, features), (classes,))
        ]
        self.momentum = [torch.zeros_like(part) for part in self.head]

    def learn(self, features: Tensor, labels: Tensor, progress: float) -> None:
        """A step by the cross-entropy of a batch, `progress` epochs into the run; no wait.

        `features`: N x `features`, of this rank's images; `labels`: int64, of the whole global
        batch, where -1 counts for nothing.
        """
        rows = distributed.all_gather(features.detach().float(), len(labels))
        x = F.batch_norm(F.normalize(rows, dim=1), None, None, training=True, eps=self.eps)
        loss = F.cross_entropy(
            F.linear(x, *self.head), labels, ignore_index=NO_LABEL, reduction="sum"
        )
        loss = loss / (labels != NO_LABEL).sum().clamp(min=1)  # there may be no label at all
        gradients = torch.autograd.grad(loss, self.head)
        schedule = network.schedule(progress, self.args.epochs, self.args.warmup_epochs)
        with torch.no_grad():
            for part, momentum, gradient in zip(self.head, self.momentum, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                part.sub_(momentum, alpha=self.peak * schedule)

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor, bank: Tensor) -> float:
        """Top-1 in percent on L2-normalised features, M x `features`, and M labels; ranks share.

        `bank`: those of training images, likewise under the test transform, for the BN. The views
        that the head learned from are crops, whose features have another mean.
        """
        var, mean = torch.var_mean(bank, dim=0, correction=0)
        mine, parts = features[distributed.local_slice(len(features))], []
        for part in mine.split(10_000):
            x = F.batch_norm(part, mean, var, eps=self.eps)
            parts.append(F.linear(x, *self.head).argmax(1))
        predicted = distributed.all_gather(torch.cat(parts), len(features))
        return 100 * (predicted == labels).float().mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: its own tensors, by name."""
        weight, bias = self.head
        found = {"weight": weight.detach(), "bias": bias.detach()}
        return found | {f"{name} momentum": x for name, x in zip(found, self.momentum, strict=True)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's. Raises ValueError where it does not fit, or is not finite."""
        ours = self.state_dict()
        fits = state.keys() - OLDER == ours.keys()
        for name, mine in ours.items() if fits else ():
            saved = state[name]
            fits = fits and (saved.shape, saved.dtype) == (mine.shape, mine.dtype)
            fits = fits and bool(saved.isfinite().all())
        if not fits:
            raise ValueError("its probe does not fit its network")
        for name, mine in ours.items():
            mine.copy_(state[name])
