"""What linear.py fits: heads to the features of a frozen encoder, or a whole network to images."""

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms.v2 import MixUp

from simsiam.data.loader import ImageFiles, Loader
from simsiam.evaluation import metrics
from simsiam.runtime import distributed
from simsiam.views.augment import Batch, Views

# A batch's features, N x d, and its targets: labels, int64, N, or their parts, N x classes. Of the
# whole global batch, on every rank.
FeatureFn = Callable[[Batch], tuple[Tensor, Tensor]]


class Task(NamedTuple):
    """What heads are fitted to: images, or features that are at hand, and their labels."""

    inputs: Tensor | ImageFiles
    labels: Tensor
    embed: FeatureFn
    views: Views | None = None
    keep_last: bool = True  # the last, smaller batch of an epoch

    def chosen(self, which: Tensor) -> "Task":
        """A part of it."""
        return self._replace(inputs=self.inputs[which], labels=self.labels[which])

    def loader(self, args: Namespace) -> Loader:
        """Of images a rank gets its share; features are at hand on every rank, and stay whole."""
        batch_size = min(args.batch_size, len(self.labels))
        share = distributed.local_slice if self.views else whole
        of_all = (self.inputs, batch_size, args.seed, self.labels, self.keep_last)
        return Loader(*of_all, self.views, local_slice=share)


def whole(number: int) -> slice:
    """The rows of all ranks."""
    return slice(0, number)


def identity_features(batch: Batch) -> tuple[Tensor, Tensor]:
    """The features of a batch that holds features."""
    return batch.images, batch.labels


class FrozenEncoder:
    """A frozen backbone with its views: features of images, and the proof that it is frozen."""

    def __init__(self, backbone: nn.Module, views: Views, amp: torch.autocast, compiled: bool):
        self.backbone = backbone.eval().requires_grad_(False)
        self.run = torch.compile(backbone) if compiled else backbone
        self.views, self.amp = views, amp
        self.before = {name: value.clone() for name, value in backbone.state_dict().items()}

    def plain(self, images: Tensor | ImageFiles) -> Tensor:
        """Features under the test transform, N x d."""
        return metrics.extract_features(
            self.backbone, self.views.eval_transform, images, self.amp, False
        )

    @torch.no_grad()
    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of one view an image; ranks share the work, and each gets them all."""
        (x,) = self.views(batch)
        with self.amp:
            mine = self.run(x).float()
        return distributed.all_gather(mine, batch.size), batch.labels

    def check(self) -> None:
        """Raises RuntimeError that names a parameter or buffer that has changed by a bit."""
        for name, value in self.backbone.state_dict().items():
            if not torch.equal(value, self.before[name]):
                raise RuntimeError(f"the encoder is not frozen: {name} changed")


class FinetunedEncoder(FrozenEncoder):
    """A backbone that learns with its head (--finetune): BN in train mode, gradients through it.

    `mixup`: alpha of Zhang et al. 2018 (arXiv 1710.09412), by torchvision; 0: none. `classes`: how
    many.
    """

    def __init__(
        self,
        backbone: nn.Module,
        views: Views,
        amp: torch.autocast,
        compiled: bool,
        classes: int,
        mixup: float = 0.0,
    ):
        self.backbone, self.views, self.amp = backbone.requires_grad_(True), views, amp
        distributed.sync_batchnorm(backbone)
        self.run = torch.compile(backbone, dynamic=False) if compiled else backbone
        self.mix = MixUp(alpha=mixup, num_classes=classes) if mixup else None

    def plain(self, images: Tensor | ImageFiles) -> Tensor:
        """As of `FrozenEncoder`, by the first rank's BN statistics."""
        distributed.broadcast_buffers(self.backbone)
        return super().plain(images)

    def augmented(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of one view an image, on every rank, with a gradient for this rank's rows.

        So each rank has the gradient of the head whole, and a part of the backbone's:
        `sum_gradients` adds them up.
        """
        self.backbone.train()
        (x,) = self.views(batch)
        targets = batch.labels
        if self.mix:
            # torchvision draws from the global RNG: here chance is a function of seed and step.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.chance(batch))
                x, mine = self.mix(x, targets[batch.rows])
            targets = distributed.all_gather(mine, batch.size)
        with self.amp:
            mine = self.run(x).float()
        if not distributed.is_distributed():
            return mine, targets
        found = distributed.all_gather(mine.detach(), batch.size).clone()
        found[batch.rows] = mine
        return found, targets

    def chance(self, batch: Batch) -> int:
        """A seed for this rank's part of a step."""
        where = [self.views.seed, batch.epoch, batch.step, distributed.rank()]
        return int(np.random.default_rng(where).integers(2**63))

    def check(self) -> None:
        """It need not be frozen."""


def make_optimizer(
    args: Namespace, heads: nn.ModuleList, lrs: list[float], backbone: nn.Module | None = None
) -> Optimizer:
    """One parameter group a head, each with its own base lr (per 256 images), and the backbone's.

    Weight decay is the flags': by their recipes none where heads are fitted to frozen features.
    """
    per = args.batch_size / 256
    groups = [
        {"params": list(head.parameters()), "peak": lr * per, "lr": lr}
        for head, lr in zip(heads, lrs, strict=True)
    ]
    if backbone is not None:
        lr = lrs[0] if args.encoder_lr is None else args.encoder_lr
        groups.append({"params": list(backbone.parameters()), "peak": lr * per, "lr": lr})
    decay = args.weight_decay
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)
    elif args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    else:
        from timm.optim import Lars  # here: it takes a second

        # Without decay timm's LARS adapts only if told to; apex's, the authors', always does.
        optimizer = Lars(groups, momentum=0.9, trust_coeff=0.001, eps=1e-8, always_adapt=True)
    if backbone is not None and distributed.is_distributed():
        optimizer.register_step_pre_hook(lambda *_: sum_gradients(backbone))
    return optimizer


def sum_gradients(backbone: nn.Module) -> None:
    """Add up the ranks' gradients, each of its own rows of the global batch's mean loss."""
    for parameter in backbone.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)


def topk_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """How many are right, and right among the best five (or all, if fewer), from 0 to 1."""
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return right[:, 0].float().mean(), right.any(1).float().mean()


@torch.no_grad()
def evaluate(head: nn.Module, features: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Loss, top-1 and top-5 (percent) of a head on features."""
    logits = head(features)
    top1, top5 = topk_correct(logits, labels)
    return F.cross_entropy(logits, labels).item(), 100 * top1.item(), 100 * top5.item()
