"""The optimizer of pre-training: SGD or Muon, groups of parameters, and the learning rate."""

from argparse import Namespace

import torch

from simsiam.models import simsiam as network


def lr_at(args: Namespace, progress: float) -> float:
    """The learning rate `progress` epochs into the run."""
    peak = args.lr * args.batch_size / 256
    return peak * network.schedule(progress, args.epochs, args.warmup_epochs)


OPTIMIZERS = ("sgd", "muon")
# Where PyTorch's fused step heeds `found_inf`; on mps it does not.
FUSED = ("cpu", "cuda")
# Of Muon's learning rate, that of NAdamW, which moves what is no matrix.
NADAMW_PART = 0.25


def make_optimizer(net: network.SimSiam, args: Namespace) -> torch.optim.Optimizer:
    """SGD or Muon over two groups, of which the predictor's may keep its learning rate.

    With --no-bn_decay there are two more, of the parameters that are no matrices, without decay.
    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon, as timm has it) makes the update of
    each matrix, or of a convolution's out x (in kernel^2), orthogonal; vectors have NAdamW.
    """
    device = next(net.parameters()).device.type
    groups = [
        {"params": net.encoder_parameters(), "fix_lr": False},
        {"params": net.predictor_parameters(), "fix_lr": args.fix_pred_lr},
    ]
    if not args.bn_decay:
        groups = [
            group | {"params": [p for p in group["params"] if (p.dim() > 1) == decays]} | more
            for group in groups
            for decays, more in ((True, {}), (False, {"weight_decay": 0.0}))
        ]
    of_all = {"lr": args.lr * args.batch_size / 256, "momentum": args.momentum}
    of_all |= {"weight_decay": args.weight_decay}
    if args.optimizer == "muon":
        from timm.optim import Muon  # here: it takes a second

        muon = {"nesterov": True, "ns_coefficients": "original", "adjust_lr_fn": "original"}
        nadamw = {"fallback_lr_scale": NADAMW_PART, "betas": (0.9, 0.99)}
        return Muon(groups, **of_all, **muon, **nadamw)
    # Fused SGD never sets the momentum of a first step that a scaler left out.
    return torch.optim.SGD(groups, **of_all, fused=device in FUSED and args.amp != "fp16")
