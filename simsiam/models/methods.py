"""Methods of pre-training by name, and the network of a configuration.

A method is an nn.Module with
- constructor parameters that are named as fields of main.py's configuration,
- `backbone` and `projector`; optionally `predictor`,
- `num_views`, the views it takes per image; `features`, the width of the pooled backbone features;
  `channels` of the images,
- `encoder_parameters()` and `predictor_parameters()`, together all that the optimizer trains; the
  latter follow --fix_pred_lr and may be empty,
- `forward(views: list[Tensor]) -> Outputs`.

To add one: write the class, and enter it in `METHODS`.
"""

import inspect
from collections.abc import Mapping

from torch import nn

from simsiam.models.simsiam import SimSiam

METHODS: dict[str, type[nn.Module]] = {"simsiam": SimSiam}


def unused_fields(method: str) -> set[str]:
    """Return the fields of the configuration that SimSiam takes and another method does not."""
    taken = inspect.signature(METHODS.get(method, SimSiam)).parameters
    return inspect.signature(SimSiam).parameters.keys() - taken.keys()


def build_model(config: Mapping) -> nn.Module:
    """Build the network of a configuration, with random weights.

    `config["method"]`: a name in `METHODS`, by default simsiam. Each constructor parameter takes
    the value of the field with its name, or keeps its default where `config` has no such field.
    Raises ValueError for an unknown method, and whatever the constructor raises.
    """
    name = config.get("method", "simsiam")
    if name not in METHODS:
        raise ValueError(f"--method {name}: choose one of {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters
    arguments = {key: config[key] for key in parameters if key in config}
    if "stop_grad" in arguments:  # on the command line it is on or off
        arguments["stop_grad"] = arguments["stop_grad"] in ("on", True)
    return METHODS[name](**arguments)
