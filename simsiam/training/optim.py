"""Optimizer of pre-training: SGD or Muon, parameter groups, and the learning-rate schedule."""

import torch

from simsiam.models.simsiam import SimSiam
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training.recipes import PretrainConfig

# Devices whose fused step heeds `found_inf`; on mps it does not.
FUSED = ("cpu", "cuda")
# Learning rate of NAdamW, which updates vectors, as a part of Muon's.
NADAMW_LR_SCALE = 0.25


def lr_at(config: PretrainConfig, progress: float) -> float:
    """Return the learning rate `progress` epochs into the run."""
    peak = config.lr * config.batch_size / 256
    return peak * cosine_schedule(progress, config.epochs, config.warmup_epochs)


def make_optimizer(net: SimSiam, config: PretrainConfig) -> torch.optim.Optimizer:
    """Create SGD or Muon with one parameter group for the encoder and one for the predictor.

    Groups with "fix_lr" keep their learning rate (`fix_pred_lr`). Without `bn_decay`, vectors (BN
    parameters and biases) have groups of their own without weight decay. Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon, timm's implementation) orthogonalises the update of each
    matrix, of a convolution reshaped to out x (in * kernel^2); NAdamW updates vectors.
    """
    device = next(net.parameters()).device.type
    groups = [
        {"params": net.encoder_parameters(), "fix_lr": False},
        {"params": net.predictor_parameters(), "fix_lr": config.fix_pred_lr},
    ]
    if not config.bn_decay:
        groups = [
            group | {"params": [p for p in group["params"] if (p.dim() > 1) == is_matrix]} | options
            for group in groups
            for is_matrix, options in ((True, {}), (False, {"weight_decay": 0.0}))
        ]
    options = {
        "lr": config.lr * config.batch_size / 256,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "muon":
        from timm.optim import Muon  # here, since importing timm takes a second

        options |= {"nesterov": True, "ns_coefficients": "original", "adjust_lr_fn": "original"}
        return Muon(groups, **options, fallback_lr_scale=NADAMW_LR_SCALE, betas=(0.9, 0.99))
    # Fused SGD never creates momentum if a GradScaler skips the first step.
    return torch.optim.SGD(groups, **options, fused=device in FUSED and config.amp != "fp16")
