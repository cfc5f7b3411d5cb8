"""BN over all ranks' parts of a batch, for which the host waits nowhere."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def all_gather_tensor(parts: Tensor, mine: Tensor) -> None:
    """Fill `parts` with what each rank has as `mine`, in the order of the ranks."""
    # Its name since PyTorch 2.14, which warns of the other one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(parts, mine)


class EqualParts(torch.autograd.Function):
    """Normalise by the statistics of all ranks, whose parts are equal in size and not empty.

    PyTorch's SyncBatchNorm also takes empty parts, and looks for them by a mask over the ranks,
    for which the host must know the numbers: it waits for the device in each layer of each pass.
    Here every rank has its share of the batch, so that the result is the same to the bit without.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, eps, momentum):
        images_last = x.is_contiguous(memory_format=torch.channels_last)
        x = x if images_last else x.contiguous()
        mean, invstd = torch.batch_norm_stats(x, eps)
        mine = torch.cat([mean, invstd])
        parts = mine.new_empty(dist.get_world_size() * len(mine))
        all_gather_tensor(parts, mine)
        means, invstds = parts.view(-1, len(mine)).split(len(mean), 1)
        counts = mean.new_full((len(means),), x.numel() // x.shape[1])
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        images_last = x.is_contiguous(memory_format=torch.channels_last)
        order = torch.channels_last if images_last and x.dim() == 4 else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=order)
        *sums, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, ctx.needs_input_grad[0], *ctx.needs_input_grad[1:3]
        )
        of_x = None
        if ctx.needs_input_grad[0]:
            both = torch.cat(sums)
            dist.all_reduce(both)
            of_x = torch.batch_norm_backward_elemt(
                gradient, x, mean, invstd, weight, *both.split(len(mean)), counts
            )
        return of_x, of_weight, of_bias, None, None, None, None


class SyncedBatchNorm(_BatchNorm):
    """A BatchNorm1d or 2d whose statistics, in training, are of the global batch.

    `after`: what follows within the layer, as timm's BatchNormAct2d has its activation.
    """

    def __init__(self, bn: _BatchNorm):
        super().__init__(bn.num_features, bn.eps, bn.momentum, bn.affine)
        self.after = nn.Sequential(bn.drop, bn.act) if hasattr(bn, "act") else None
        self.train(bn.training)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any."""

    @torch.compiler.disable  # Dynamo cannot look into the collectives of a Function
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = super().forward(x)
        else:
            self.num_batches_tracked.add_(1)
            running = self.running_mean, self.running_var
            x = EqualParts.apply(x, self.weight, self.bias, *running, self.eps, self.momentum)
        return x if self.after is None else self.after(x)


def synchronise(net: nn.Module) -> None:
    """Let each BN of `net` be a `SyncedBatchNorm`, of the same parameters and buffers."""
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    for module in list(net.modules()):
        for name, bn in module.named_children():
            if isinstance(bn, _BatchNorm):
                synced = SyncedBatchNorm(bn)
                for part in parts:
                    setattr(synced, part, getattr(bn, part))
                setattr(module, name, synced)
