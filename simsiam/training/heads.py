"""Train linear heads on a frozen encoder, or a head together with its encoder (fine-tuning)."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.transforms.v2 import MixUp

from simsiam.data.loader import Data, ImageFiles, Loader, balanced_subset
from simsiam.evaluation import metrics
from simsiam.models.classifier import linear_head
from simsiam.runtime import distributed
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training.meters import Meters
from simsiam.training.progress import Progress
from simsiam.training.recipes import LinearConfig
from simsiam.training.state import TrainState
from simsiam.views.augment import Augmentation, Batch, Views

# From a batch, features (N x d) and targets: labels (int64, N) or class probabilities (N x
# classes). Both are of the whole global batch, on every rank.
FeatureFn = Callable[[Batch], tuple[Tensor, Tensor]]
# The training transform: random resized crop and flip.
AUGMENTATION = Augmentation(crop_scale=(0.08, 1.0), jitter_p=0.0, gray_p=0.0)
# Parts of the default lr to choose from, for features on an unusual scale.
LR_PARTS = (1.0, 0.1, 0.01, 0.001)


# ---- features -----------------------------------------------------------------------------------


class FrozenEncoder:
    """A frozen backbone with its views: features of images, and a check that nothing changed."""

    def __init__(
        self, backbone: nn.Module, views: Views, autocast: torch.autocast, compiled: bool = False
    ):
        self.backbone = backbone.eval().requires_grad_(False)
        self.model = torch.compile(backbone) if compiled else backbone
        self.views, self.autocast = views, autocast
        self.initial = {name: value.clone() for name, value in backbone.state_dict().items()}

    def extract(self, images: Tensor | ImageFiles) -> Tensor:
        """Return features under the test transform: N x d, fp32, on every rank."""
        transform = self.views.eval_transform
        return metrics.extract_features(self.backbone, transform, images, self.autocast, False)

    @torch.no_grad()
    def augmented_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return features of one random view per image, and the labels (a `FeatureFn`)."""
        (x,) = self.views(batch)
        with self.autocast:
            features = self.model(x).float()
        return distributed.all_gather(features, batch.size), batch.labels

    def check_frozen(self) -> None:
        """Raise RuntimeError if a bit of a parameter or buffer changed since the start."""
        for name, value in self.backbone.state_dict().items():
            if not torch.equal(value, self.initial[name]):
                raise RuntimeError(f"the encoder is not frozen: {name} changed")


class FinetunedEncoder(FrozenEncoder):
    """A backbone that is trained with its head: BN in train mode, gradients through it.

    `mixup`: alpha of mixup (Zhang et al. 2018, arXiv 1710.09412); 0: none. `classes`: their number.
    """

    def __init__(
        self,
        backbone: nn.Module,
        views: Views,
        autocast: torch.autocast,
        compiled: bool,
        classes: int,
        mixup: float = 0.0,
    ):
        self.settings = (views, autocast, compiled, classes, mixup)
        self.backbone, self.views, self.autocast = backbone.requires_grad_(True), views, autocast
        distributed.sync_batchnorm(backbone)
        self.model = torch.compile(backbone, dynamic=False) if compiled else backbone
        self.mix = MixUp(alpha=mixup, num_classes=classes) if mixup else None

    def copy(self) -> "FinetunedEncoder":
        """Return an encoder with a copy of the backbone."""
        return FinetunedEncoder(copy.deepcopy(self.backbone), *self.settings)

    def extract(self, images: Tensor | ImageFiles) -> Tensor:
        """Return features under the test transform, with the BN statistics of rank 0: N x d."""
        distributed.broadcast_buffers(self.backbone)
        return super().extract(images)

    def augmented_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return features of one random view per image, and the targets (a `FeatureFn`).

        Gradients flow through this rank's rows alone: each rank has the whole gradient of the head,
        and a part of the backbone's, which `all_reduce_gradients` adds up.
        """
        self.backbone.train()
        (x,) = self.views(batch)
        targets = batch.labels
        if self.mix:
            # torchvision draws from the global RNG; seeded so, mixup is a function of the step.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.mixup_seed(batch))
                x, local_targets = self.mix(x, targets[batch.rows])
            targets = distributed.all_gather(local_targets, batch.size)
        with self.autocast:
            local_features = self.model(x).float()
        if not distributed.is_distributed():
            return local_features, targets
        features = distributed.all_gather(local_features.detach(), batch.size).clone()
        features[batch.rows] = local_features
        return features, targets

    def mixup_seed(self, batch: Batch) -> int:
        """Return the seed of mixup for this rank's part of a step."""
        key = [self.views.seed, batch.epoch, batch.step, distributed.rank()]
        return int(np.random.default_rng(key).integers(2**63))

    def check_frozen(self) -> None:
        """Do nothing: this encoder is not frozen."""


def identity_features(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the features and labels of a batch of cached features (a `FeatureFn`)."""
    return batch.images, batch.labels


class HeadTask(NamedTuple):
    """The training set of a head: images and their features' functions, or cached features.

    `inputs`: images, or features (N x d); `labels`: int64, N. `feature_fn`: features of a training
    batch; `extract`: features under the test transform. `views`: of images; None for cached
    features. `keep_last`: train on the last, smaller batch of an epoch.
    """

    inputs: Tensor | ImageFiles
    labels: Tensor
    feature_fn: FeatureFn = identity_features
    extract: Callable[[Tensor | ImageFiles], Tensor] = lambda features: features
    views: Views | None = None
    keep_last: bool = True

    def loader(self, config: LinearConfig) -> Loader:
        """Return the batches. Ranks share the images of a batch; each has all cached features."""
        return Loader(
            self.inputs,
            min(config.batch_size, len(self.labels)),
            config.seed,
            self.labels,
            self.keep_last,
            self.views,
            distributed.local_slice if self.views else lambda number: slice(0, number),
        )


# ---- training -----------------------------------------------------------------------------------


def make_optimizer(
    config: LinearConfig,
    heads: nn.ModuleList,
    lrs: tuple[float, ...],
    backbone: nn.Module | None = None,
) -> Optimizer:
    """Return the optimizer: a parameter group per head with its own base lr, one for a backbone.

    `lrs`: per 256 images, as in the paper; `peak` of a group is the rate at --batch_size.
    """
    scale = config.batch_size / 256
    groups = [
        {"params": list(head.parameters()), "peak": lr * scale, "lr": lr}
        for head, lr in zip(heads, lrs, strict=True)
    ]
    if backbone is not None:
        lr = lrs[0] if config.encoder_lr is None else config.encoder_lr
        groups.append({"params": list(backbone.parameters()), "peak": lr * scale, "lr": lr})
    decay = config.weight_decay
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)
    elif config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=decay)
    else:
        from timm.optim import Lars  # imported here: it takes a second

        # Without weight decay timm's LARS adapts only if asked; apex's, the authors', always does.
        optimizer = Lars(groups, momentum=0.9, trust_coeff=0.001, eps=1e-8, always_adapt=True)
    if backbone is not None and distributed.is_distributed():
        optimizer.register_step_pre_hook(lambda *_: all_reduce_gradients(backbone))
    return optimizer


def all_reduce_gradients(backbone: nn.Module) -> None:
    """Sum the gradients over ranks: each has those of its rows of the global batch's mean loss."""
    for parameter in backbone.parameters():
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)


def train(
    state: TrainState, feature_fn: FeatureFn, epoch: int, config: LinearConfig, start: int = 0
) -> Iterator[int]:
    """Train an epoch of all heads (`state.model`) from step `start` on; yield each step when done.

    The heads are independent: each gets the gradient of its own loss from the sum of the losses.
    The encoder is trained too if `feature_fn` lets gradients through. The meters sum the first
    head's loss, top-1 and top-5 over images.
    """
    for batch in state.loader.epoch(epoch, start):
        features, targets = feature_fn(batch)
        factor = cosine_schedule(epoch + batch.step / len(state.loader), config.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        logits = [head(features) for head in state.model]
        losses = [
            F.cross_entropy(scores, targets, label_smoothing=config.label_smoothing)
            for scores in logits
        ]
        state.optimizer.zero_grad()
        sum(losses).backward()
        state.optimizer.step()
        top1, top5 = topk_correct(logits[0].detach(), batch.labels)
        n = batch.size
        state.meters.add(loss=n * losses[0].detach(), top1=n * top1, top5=n * top5)
        yield batch.step


def epoch_progress(epoch: int, config: LinearConfig, loader: Loader, start: int = 0) -> Progress:
    """Return the progress display of an epoch."""
    shown, smaller = {"loss": "loss", "top1": "acc"}, "the same command with --cached"
    return Progress(epoch, config, len(loader), shown, smaller, start, loader.batch_size)


def fit(
    head: nn.Linear,
    lrs: tuple[float, ...],
    task: HeadTask,
    config: LinearConfig,
    backbone: nn.Module | None = None,
) -> nn.ModuleList:
    """Train a copy of `head` per lr, side by side, for all epochs; with one lr, `backbone` too."""
    heads = nn.ModuleList(copy.deepcopy(head) for _ in lrs)
    state = TrainState(
        net=heads,
        model=heads,
        optimizer=make_optimizer(config, heads, lrs, backbone),
        loader=task.loader(config),
        meters=Meters(task.labels.device, "top1", "top5"),
        lr_at=lambda progress: 0.0,
    )
    for epoch in range(config.epochs):
        state.meters.clear()
        with epoch_progress(epoch, config, state.loader) as progress:
            for step in train(state, task.feature_fn, epoch, config):
                progress(step, state.meters)
    return heads


def choose_lr(
    lrs: tuple[float, ...],
    head: nn.Linear,
    task: HeadTask,
    config: LinearConfig,
    encoder: FinetunedEncoder | None = None,
) -> float:
    """Return the lr that scores best on a held-out tenth of the training set.

    Frozen features train all heads in one pass. An `encoder` to fine-tune is copied for each lr.
    """
    labels = task.labels
    rest = balanced_subset(labels.cpu(), len(labels) - max(1, len(labels) // 10), config.seed)
    rest = rest.to(labels.device)
    held_out = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    held_out[rest] = False
    part = task._replace(inputs=task.inputs[rest], labels=labels[rest])
    scores = []
    for group in [lrs] if encoder is None else [(lr,) for lr in lrs]:
        backbone = None
        if encoder is not None:
            tuned = encoder.copy()
            backbone = tuned.backbone
            part = part._replace(feature_fn=tuned.augmented_features, extract=tuned.extract)
        heads = fit(head, group, part, config, backbone)
        features = part.extract(task.inputs[held_out])
        scores += [evaluate(fitted, features, labels[held_out])[1] for fitted in heads]
    for lr, score in zip(lrs, scores, strict=True):
        distributed.log(f"--lr {lr:g}: {score:.2f} % of the held-out tenth of the training set")
    return lrs[scores.index(max(scores))]


# ---- scores -------------------------------------------------------------------------------------


def topk_correct(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return top-1 and top-5 accuracy from 0 to 1, as tensors (no wait for the device).

    `logits`: N x classes, where with fewer than five classes all count as the best five.
    """
    is_correct = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return is_correct[:, 0].float().mean(), is_correct.any(1).float().mean()


@torch.no_grad()
def evaluate(head: nn.Module, features: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Return the cross-entropy, top-1 and top-5 (percent) of a head on features."""
    logits = head(features)
    top1, top5 = topk_correct(logits, labels)
    return F.cross_entropy(logits, labels).item(), 100 * top1.item(), 100 * top5.item()


def raw_pixel_baseline(images: Data, encoder: FrozenEncoder, config: LinearConfig) -> float:
    """Return the test top-1 of a linear head on raw pixels, trained in the same way.

    Pixels have another scale than features: of four lr, the best on the test set counts, which
    favours the baseline.
    """
    images = images.limit(metrics.MAX_RAW_PIXEL_IMAGES, config.seed)
    pixels, views = metrics.raw_pixels(encoder.views.size), encoder.views
    inputs, test = (
        metrics.extract_features(pixels, views.eval_transform, part, encoder.autocast, False)
        for part in (images.train_images, images.test_images)
    )
    head = linear_head(inputs.shape[1], len(images.classes)).to(inputs.device)
    lrs = tuple(config.lr[0] * part for part in LR_PARTS)
    heads = fit(head, lrs, HeadTask(inputs, images.train_labels), config)
    return max(evaluate(head, test, images.test_labels)[1] for head in heads)
