"""The door for torch.hub: torch.hub.load(DIR, "simsiam", source="local", checkpoint=PATH).

`simsiam`, `encoder` and `classifier` take ours and other projects', whose classes are numbers.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import data
import model
import utils

dependencies = ["torch", "torchvision", "thop", "pandas", "tqdm", "filelock"]


def _loaded(checkpoint: str) -> tuple[nn.Module, dict, dict]:
    """The network, its encoder's arguments, and what a checkpoint of ours holds."""
    try:
        state = utils.load_checkpoint(checkpoint)
    except ValueError:
        state = None
    with utils.about(checkpoint):
        net, args, _ = model.load_any(checkpoint, state)
    return net.eval(), args, state or {}


def simsiam(checkpoint: str | None = None, **settings: object) -> model.SimSiam:
    """SimSiam with a checkpoint's weights, or a new one by `model.SimSiam`'s settings.

    Raises FileNotFoundError, or ValueError for what is not one.
    """
    if checkpoint is None:
        return model.SimSiam(**settings)
    net = _loaded(checkpoint)[0]
    if not isinstance(net, model.SimSiam):
        raise ValueError(f"{checkpoint}: is a linear model: choose classifier or encoder")
    return net


def encoder(checkpoint: str) -> nn.Module:
    """A checkpoint's backbone: N x 3 x H x W, normalised -> N x features. Raises as `simsiam`."""
    return _loaded(checkpoint)[0].backbone


def classifier(checkpoint: str) -> "Predictor":
    """A linear model of linear.py, with its own transform. Raises as `simsiam`."""
    net, args, state = _loaded(checkpoint)
    if not isinstance(net, model.Classifier):
        raise ValueError(f"{checkpoint}: is not a linear model; linear.py makes one of it")
    classes = state.get("classes") or [str(i) for i in range(net.fc.out_features)]
    # What is not ours, with ImageNet's stem, is taken for ImageNet's.
    name = state["args"].get("data_name") if state else args["stem"]
    return Predictor(net, data.usual_input(args["stem"]) | args, classes, name or "").eval()


class Predictor(nn.Module):
    """A classifier that knows its classes and its test transform."""

    def __init__(self, net: model.Classifier, encoder: dict, classes: list[str], data_name: str):
        super().__init__()
        self.net, self.classes, self.size = net, classes, encoder["image_size"]
        self.shorter = data.shorter_side(data_name, self.size)
        self.views = data.Views(self.size, encoder["mean"], encoder["std"])

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, N x 3 x size x size -> logits, N x classes."""
        return self.net(x)

    @torch.no_grad()
    def predict(self, images: object) -> list[dict[str, object]]:
        """The `class` and `score` of each image, and the `scores` of all classes.

        `images`: a PIL image or a tensor 3 x H x W (bytes, or floats from 0 to 1), or many of them.
        """
        many = images if isinstance(images, list | tuple) else [images]
        if isinstance(images, Tensor) and images.dim() == 4:
            many = list(images)
        cut = [data.centre(data.to_rgb(pil(image)), self.size, self.shorter) for image in many]
        device = next(self.parameters()).device
        x = torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).to(device)
        found = []
        for scores in self.net(self.views.plain(x)).softmax(1).tolist():
            best = max(range(len(scores)), key=scores.__getitem__)
            every = dict(zip(self.classes, scores, strict=True))
            found.append({"class": self.classes[best], "score": scores[best], "scores": every})
        return found


def pil(image: Image.Image | Tensor) -> Image.Image:
    """A tensor, 3 x H x W, as PIL's image."""
    if isinstance(image, Image.Image):
        return image
    if image.is_floating_point():
        image = (255 * image).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())
