"""The optimizer of pre-training: SGD, its groups of parameters, and its learning rate."""

from argparse import Namespace

import torch

from simsiam import network


def rate(args: Namespace, progress: float) -> float:
    """The learning rate `progress` epochs into the run."""
    peak = args.lr * args.batch_size / 256
    return peak * network.schedule(progress, args.epochs, args.warmup_epochs)


# Where PyTorch's fused step heeds `found_inf`; on mps it does not.
FUSED = ("cpu", "cuda")


def make_optimizer(net: network.SimSiam, args: Namespace) -> torch.optim.SGD:
    """SGD over two groups, of which the predictor's may keep its learning rate.

    With --no-bn_decay there are two more, of the parameters that are no matrices, without decay.
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
    return torch.optim.SGD(
        groups,
        lr=args.lr * args.batch_size / 256,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        # Fused SGD never sets the momentum of a first step that a scaler left out.
        fused=device in FUSED and args.amp != "fp16",
    )
