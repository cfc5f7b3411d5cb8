"""SimSiam (Chen & He, arXiv 2011.10566) as a library; docs/library.md shows it at work.

    import simsiam
    encoder = simsiam.open_encoder("results/..._model.pth")
    features = encoder(["a.jpg", "b.jpg"])  # fp32, 2 x features

`SimSiam` is the network, `Views` makes its augmented inputs by an `Augmentation`, `load_dataset`
reads a data set by name, `knn` classifies features, and `open_encoder` opens any checkpoint. Each
name's module is imported at its first use, so that `import simsiam` alone does not import torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors, which do not run `__getattr__`
    from simsiam.data.datasets import load_dataset
    from simsiam.evaluation.knn import knn
    from simsiam.interop.weights import open_encoder
    from simsiam.models.simsiam import SimSiam
    from simsiam.views.augment import Augmentation, Views

__all__ = ["Augmentation", "SimSiam", "Views", "knn", "load_dataset", "open_encoder"]
MODULE_OF = {
    "Augmentation": "views.augment",
    "SimSiam": "models.simsiam",
    "Views": "views.augment",
    "knn": "evaluation.knn",
    "load_dataset": "data.datasets",
    "open_encoder": "interop.weights",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"simsiam.{MODULE_OF[name]}"), name)
    globals()[name] = value  # later uses do not come here
    return value


def __dir__() -> list[str]:
    """List names that are not imported yet too, for completion in a notebook."""
    return sorted({*globals(), *__all__})
