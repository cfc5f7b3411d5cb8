"""Online probe: a linear classifier trained beside the encoder, on its detached features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from simsiam.data.loader import Data
from simsiam.data.shards import Shards
from simsiam.runtime import distributed
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training.recipes import PretrainConfig

# Base learning rate, per 256 images and divided by the feature dimension, with which the squared
# norm of the BN's output, and so the effect of one step, grows. Measured on textures, with 64 and
# with 512 features: half to four times this rate end within two points.
BASE_LR = 640.0
MOMENTUM = 0.9
NO_LABEL = -1  # in `Data`


def resolve_probe(requested: bool | None, images: Data) -> bool:
    """Return whether a run on `images` has a probe; None requests one wherever it is possible.

    Raises ValueError if it is requested but impossible.
    """
    reason = None
    if isinstance(images.train_images, Shards):
        reason = "shards are streamed without their labels"
    elif not bool((images.train_labels != NO_LABEL).any()):
        reason = "the training images have no labels"
    elif images.test_images is None:
        reason = "there are no labelled test images to score it on"
    if requested and reason:
        raise ValueError(f"--probe: {reason}: leave it out")
    return requested is not False and reason is None


class Probe:
    """A linear head with its own SGD; no gradient reaches the encoder.

    Features are L2-normalised, as for the kNN, and pass a BN without affine parameters (as in MAE's
    linear probing: He et al. 2022, arXiv 2111.06377, App. A.1): ReLU features have most of their
    direction in common, and SGD learns slowly from the small rest. The BN uses statistics of the
    batch in training, and of the feature bank in `accuracy`.

    The head starts at zero (its loss is convex), so that it draws no random number and leaves the
    run's as they are. Each rank learns from the all-gathered features: all have the same head.

    `features`: their dimension. `config`: of pre-training, for the batch size and the schedule.
    """

    def __init__(self, features: int, classes: int, config: PretrainConfig, device: torch.device):
        self.config, self.peak_lr = config, BASE_LR / features * config.batch_size / 256
        self.eps = 1e-5 / features  # the mean square of an L2-normalised feature is 1 / features
        self.weight = torch.zeros(classes, features, device=device, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, requires_grad=True)
        # SGD by hand, with the arithmetic of torch.optim.SGD: that has no momentum before its first
        # step, and a probe's state_dict must always have the same entries to be checked on resume.
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)

    def learn(self, features: Tensor, labels: Tensor, progress: float) -> None:
        """Take one SGD step on the cross-entropy of a batch. Does not wait for the device.

        `features`: of this rank's images, n x `features`; `labels`: of the global batch, int64,
        -1 for images without one; `progress`: epochs since the start of the run.
        """
        rows = distributed.all_gather(features.detach().float(), len(labels))
        x = F.batch_norm(F.normalize(rows, dim=1), None, None, training=True, eps=self.eps)
        logits = F.linear(x, self.weight, self.bias)
        loss = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
        loss = loss / (labels != NO_LABEL).sum().clamp(min=1)  # "mean" of no labels would be nan
        gradients = torch.autograd.grad(loss, (self.weight, self.bias))
        lr = self.peak_lr * cosine_schedule(progress, self.config.epochs, self.config.warmup_epochs)
        parts = (self.weight, self.bias), (self.weight_momentum, self.bias_momentum), gradients
        with torch.no_grad():
            for parameter, momentum, gradient in zip(*parts, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(momentum, alpha=lr)

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor, bank: Tensor) -> float:
        """Return the top-1 accuracy in percent; ranks share the work.

        `features`: L2-normalised, M x `features`; `labels`: int64, M. `bank`: L2-normalised
        features of training images under the same test transform, for the BN's statistics; those
        of the training views, which are crops, differ.
        """
        var, mean = torch.var_mean(bank, dim=0, correction=0)
        chunks = []
        for chunk in features[distributed.local_slice(len(features))].split(10_000):
            x = F.batch_norm(chunk, mean, var, eps=self.eps)
            chunks.append(F.linear(x, self.weight, self.bias).argmax(1))
        predicted = distributed.all_gather(torch.cat(chunks), len(features))
        return 100 * (predicted == labels).float().mean().item()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the probe's own tensors by name."""
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        return {name: getattr(self, name).detach() for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the tensors of `state_dict()`.

        Raises ValueError for other names, shapes or dtypes, or values that are not finite.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or not all(
            (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype)
            and bool(state[name].isfinite().all())
            for name, tensor in own.items()
        ):
            raise ValueError("its probe does not fit its network")
        for name, tensor in own.items():
            tensor.copy_(state[name])
