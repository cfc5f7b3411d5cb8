"""What is done to the pixels of views: operations on batches, equal to torchvision's.

Images are N x channels x H x W, fp32 from 0 to 1, but for the bytes that `resample` takes too.
What an operation does differs from image to image. Saturation and hue are of three channels.
"""

import torch
from torch import Tensor


def resize_weights(start: Tensor, length: Tensor, before: int, after: int) -> Tensor:
    """One axis of a crop and resize as matrices: N starts and lengths -> N x after x before.

    Bilinear with antialiasing, as torchvision's `resize`: a triangle as wide as the step between
    output pixels (but at least an input pixel), over the pixels of the crop only.
    """
    step = length[:, None, None] / after
    out = torch.arange(after, device=start.device)[:, None] + 0.5
    pixel = torch.arange(before, device=start.device) + 0.5 - start[:, None, None]  # N x 1 x before
    weights = (1 - (pixel - step * out).abs() / step.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def blur_weights(sigma: Tensor, size: int, taps: int) -> Tensor:
    """One axis of a Gaussian blur as matrices: N sigmas (pixels) -> N x size x size.

    `taps` wide, reflected at the borders, as torchvision's `gaussian_blur`. Sigma near 0: identity.
    """
    pixel = torch.arange(size, device=sigma.device)
    out = pixel[:, None]
    last = size - 1

    def gauss(offset: Tensor) -> Tensor:
        bell = torch.exp(-0.5 * (offset / sigma[:, None, None]) ** 2)
        return bell * (offset.abs() <= taps // 2)

    weights = gauss(pixel - out)
    weights = weights + gauss(-pixel - out) * (pixel > 0)
    weights = weights + gauss(2 * last - pixel - out) * (pixel < last)
    return weights / weights.sum(-1, keepdim=True)


def resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Two matrix products a channel: N x C x H x W, N x h x H, N x w x W -> N x C x h x w.

    The result is fp32, and in memory channel by channel: each one's N x h x w numbers lie
    together, which the colour operations below run through several times faster.
    """
    n, channels = images.shape[:2]
    x = by_channel(images)
    found = x.new_empty(channels, n, rows.shape[1], columns.shape[1])
    for plane, out in zip(x.unbind(1), found, strict=True):
        torch.bmm(rows, plane @ columns.mT, out=out)
    return found.transpose(0, 1)


def by_channel(images: Tensor) -> Tensor:
    """N x C x H x W -> the same in fp32, laid out in memory as by `resample`; copied if need be."""
    planes = images.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    return planes.contiguous().transpose(0, 1)


def to_gray(x: Tensor) -> Tensor:
    """ITU-R 601 luma as torchvision rounds it: N x 3 x H x W -> N x 1 x H x W.

    Of other channels than three it is their mean.
    """
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


# The colour operations: images in [0, 1], N x C x H x W, and a factor an image, N x 1 x 1 x 1.
# A factor of 1 (hue: 0) leaves an image as it is.


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Toward black (below 1) or away from it."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Toward the image's mean gray (below 1) or away from it."""
    mean = to_gray(x).flatten(1).mean(1).view_as(factor)
    return (x * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Toward each pixel's gray (below 1) or away from it."""
    return (x * factor).add_(to_gray(x).mul_(1 - factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by `turns` of the colour circle, value and chroma kept."""
    red, green, blue = x.unbind(1)  # N x H x W
    # Arithmetic instead of three cases by the largest channel, since `where` is slow. With green
    # and blue in order, and then the larger of them and red, hue in sixths of the circle is
    # |start + (middle - rest) / chroma|, `start` telling which were exchanged.
    larger, smaller = torch.maximum(green, blue), torch.minimum(green, blue)
    value, middle = torch.maximum(red, larger), torch.minimum(red, larger)
    lowest = torch.minimum(middle, smaller)
    chroma = value - lowest
    exchanged = (green < blue).float()
    start = (exchanged * 12).sub_(2).mul_(red < larger).sub_(exchanged, alpha=6)
    # No chroma, no hue: 0 / tiny is 0.
    hue = (middle.sub_(smaller)).div_(chroma.clamp(min=1e-12)).add_(start).abs_()
    hue = hue.add_(6 * turns[:, 0]).remainder_(6)
    found = torch.empty_like(x)
    # Each channel's part of the chroma is a trapezoid over the circle.
    trapezoids = (3, 1, -1), (2, -1, 2), (4, -1, 2)
    for out, (centre, slope, offset) in zip(found.unbind(1), trapezoids, strict=True):
        part = (hue - centre).abs_().mul_(slope).add_(offset).clamp_(0, 1)
        torch.addcmul(lowest, chroma, part, out=out)
    return found


COLOUR = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def exchange_axes(x: Tensor, which: Tensor) -> Tensor:
    """Rows and columns exchanged, of square images, where `which`, N x 1 x 1 of bool, says so."""
    planes = x.transpose(0, 1)  # as they lie in memory
    return torch.where(which, planes.mT, planes).transpose(0, 1)


def solarize(x: Tensor, which: Tensor) -> Tensor:
    """What is brighter than 1/2 inverted, where `which`, N x 1 x 1 x 1 of bool, says so."""
    return torch.where(which, torch.minimum(x, 1 - x), x)  # from 1/2 on 1 - x is the smaller one
