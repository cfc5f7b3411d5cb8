"""Entry points for torch.hub: torch.hub.load(DIR, "simsiam", source="local", checkpoint=PATH).

Checkpoints of this project and of other projects can be loaded. `stem`, `image_size`, `mean` and
`std` describe another project's checkpoint where its file does not: see
`simsiam.interop.weights.LoadedCheckpoint.open`.
"""

from torch import nn

# torch.hub lists the names without an underscore as entry points. No other file of this directory
# is imported: the caller may have a `utils` or `model` of its own.
from simsiam.interop import weights as _weights
from simsiam.models.simsiam import SimSiam as _SimSiam

dependencies = ["torch", "torchvision", "thop", "pandas", "tqdm", "filelock"]


def simsiam(checkpoint: str | None = None, **settings: object) -> nn.Module:
    """Load a pre-training checkpoint, or build a new SimSiam from its constructor's arguments.

    Raises FileNotFoundError, and ValueError for a file that is not such a checkpoint.
    """
    if checkpoint is None:
        return _SimSiam(**settings)
    source = _weights.LoadedCheckpoint.open(checkpoint, **settings)
    if source.is_linear:
        raise ValueError(f"{checkpoint}: is a linear model: choose classifier or encoder")
    return source.net


def encoder(checkpoint: str, **settings: object) -> nn.Module:
    """Load a checkpoint's backbone: normalised images, N x C x H x W -> features, N x `features`.

    Raises the errors of `simsiam`.
    """
    return _weights.LoadedCheckpoint.open(checkpoint, **settings).net.backbone


def classifier(checkpoint: str, **settings: object) -> _weights.Predictor:
    """Load a linear model of linear.py with its test transform. Raises the errors of `simsiam`."""
    return _weights.Predictor(_weights.LoadedCheckpoint.open(checkpoint, **settings))
