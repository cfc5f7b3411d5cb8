"""SimSiam (Chen & He, arXiv 2011.10566) as a library; docs/library.md shows it at work.

    import simsiam
    encoder = simsiam.open_encoder("results/..._model.pth")
    features = encoder(["a.jpg", "b.jpg"])  # fp32, 2 x features

`SimSiam` is the network, `Views` its input, `Augmentation` what chance does there, `load` a data
set by its name, `knn` the vote of the nearest, `open_encoder` reads a checkpoint of any origin.
A name's room is imported when the name is first used: `import simsiam` alone imports no torch.

The rooms, each of which imports only those before it: batchnorm, ranks, files, lock, backbones,
network, optimizer, images, folders, textures, operations, views, recipes, loader, shards, datasets,
metrics, scores, fitting, probe, monitor, survey, progress, devices, serialization, checkpoint,
layouts, exports, weights, run, lettering, figures, sheets, pictures.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors, which do not run `__getattr__`
    from simsiam.datasets import load
    from simsiam.metrics import knn
    from simsiam.network import SimSiam
    from simsiam.views import Augmentation, Views
    from simsiam.weights import open_encoder

__all__ = ["Augmentation", "SimSiam", "Views", "knn", "load", "open_encoder"]
ROOM_OF = {
    "Augmentation": "views",
    "SimSiam": "network",
    "Views": "views",
    "knn": "metrics",
    "load": "datasets",
    "open_encoder": "weights",
}


def __getattr__(name: str) -> object:
    """One of the names above, from its room. Raises AttributeError for others."""
    if name not in ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"simsiam.{ROOM_OF[name]}"), name)
    globals()[name] = found  # so that it is looked up once
    return found


def __dir__() -> list[str]:
    """With the names that are not imported yet, for completion in a notebook."""
    return sorted({*globals(), *__all__})
