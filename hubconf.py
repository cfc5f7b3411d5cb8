"""The door for torch.hub: torch.hub.load(DIR, "simsiam", source="local", checkpoint=PATH).

`simsiam`, `encoder` and `classifier` take checkpoints of this program and of other projects, whose
classes are numbers. Of the latter `stem`, `image_size`, `mean` and `std` can be told, as to
`weights.Source.open`.
"""

from torch import nn

from simsiam.interop import weights as _weights

# An entry's name hides the package's, and torch.hub lists what has no underscore. Nothing else of
# this directory is imported: whoever calls may have a `utils` or `model` of their own.
from simsiam.models import simsiam as _network

dependencies = ["torch", "torchvision", "thop", "pandas", "tqdm", "filelock"]


def simsiam(checkpoint: str | None = None, **settings: object) -> _network.SimSiam:
    """SimSiam with a checkpoint's weights, or a new one by the settings of `network.SimSiam`.

    Raises FileNotFoundError, or ValueError for what is not one.
    """
    if checkpoint is None:
        return _network.SimSiam(**settings)
    source = _weights.LoadedCheckpoint.open(checkpoint, **settings)
    if source.is_linear:
        raise ValueError(f"{checkpoint}: is a linear model: choose classifier or encoder")
    return source.net


def encoder(checkpoint: str, **told: object) -> nn.Module:
    """A checkpoint's backbone: N x C x H x W, normalised -> N x features. Raises as `simsiam`."""
    return _weights.LoadedCheckpoint.open(checkpoint, **told).net.backbone


def classifier(checkpoint: str, **told: object) -> _weights.Predictor:
    """A linear model of linear.py, with its own transform. Raises as `simsiam`."""
    return _weights.Predictor(_weights.LoadedCheckpoint.open(checkpoint, **told))
