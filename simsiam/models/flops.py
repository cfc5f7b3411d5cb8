"""Parameters and multiply-adds of a network."""

import copy

import thop
import torch
from torch import nn

from simsiam.models.backbones import input_channels

PARTS = ("backbone", "projector", "predictor", "fc")


def params_and_flops(net: nn.Module, image_size: int) -> tuple[int, int]:
    """Count parameters and multiply-adds of one image's pass through all `PARTS` of a network.

    thop counts a multiply-add once; where it is counted as two FLOPs, double the number. It counts
    layers with weights: the products of queries, keys and values in attention are left out.
    Raises ValueError for an image size that the backbone cannot take.
    """
    parts = [part for name, part in net.named_children() if name in PARTS]
    # A copy: thop leaves `total_ops` and `total_params` buffers in the module that it profiles.
    chain = copy.deepcopy(nn.Sequential(*parts)).cpu().float()
    image = torch.zeros(1, input_channels(net), image_size, image_size)
    try:
        flops, params = thop.profile(chain, inputs=(image,), verbose=False)
    except (AssertionError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--image_size {image_size}: the backbone refuses it: {reason}") from error
    return int(params), int(flops)
