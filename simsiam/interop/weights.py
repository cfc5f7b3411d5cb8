"""Checkpoints of any origin: their weights read safely, and the network, its input and its classes.

A `LoadedCheckpoint` is a checkpoint of this program or of another project. A `Predictor` is a
linear model that knows its classes and its test transform.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from simsiam.data.datasets import resize_size
from simsiam.data.decode import DEFAULT_DECODE, DecodeOptions, as_list, preprocess
from simsiam.data.loader import ImageFiles
from simsiam.evaluation import metrics
from simsiam.interop.layouts import translate
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam, prediction_mlp, projection_mlp
from simsiam.runtime import reader
from simsiam.runtime.config import Config
from simsiam.runtime.files import error_prefix
from simsiam.training import checkpoint
from simsiam.views.augment import Views


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of any checkpoint, by their names in the file; no code of it is run.

    Raises FileNotFoundError, or ValueError for a file that has none.
    """
    return find_weights(reader.read(path))


def find_weights(state: object) -> dict[str, Tensor]:
    """Return the tensors in a value from `reader.read`, with or without a dict around them.

    Floats become fp32. Raises ValueError for a value without tensors.
    """
    for name in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    tensors = {}
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, tuple) and len(value) == 2:  # Paddle's: its own name, and the array
            value = value[1]
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value.float() if value.is_floating_point() else value
    if not tensors:
        raise ValueError("has no weights")
    return tensors


# ---- networks of other projects' weights --------------------------------------------------------


def build_head(weights: dict[str, Tensor], name: str) -> nn.Sequential:
    """A projector or predictor of the shapes of its weights; its last BN is affine if theirs is."""
    layers: list[nn.Module] = []
    for i in (0, 3, 6):
        if f"{name}.{i}.weight" not in weights:
            break
        layers += [nn.ReLU(inplace=True)] if i else []
        outputs, inputs = weights[f"{name}.{i}.weight"].shape
        layers.append(nn.Linear(inputs, outputs, bias=f"{name}.{i}.bias" in weights))
        if f"{name}.{i + 1}.running_mean" in weights:
            layers.append(nn.BatchNorm1d(outputs, affine=f"{name}.{i + 1}.weight" in weights))
    return nn.Sequential(*layers)


def build_network(
    weights: dict[str, Tensor], stem: str | None = None
) -> tuple[SimSiam | Classifier, dict, list[str]]:
    """The network in another project's checkpoint, its encoder, and what to say of it.

    `stem` as in `layouts.translated`. With an fc it is a classifier; a projector or predictor that
    the file does not have is empty. Raises ValueError, which does not name the file.
    """
    weights, encoder, notes = translate(weights, stem)
    arch, stem, width, channels = checkpoint.backbone_args(encoder)
    with torch.device("meta"):
        heads = build_head(weights, "projector"), build_head(weights, "predictor")
        net = SimSiam(arch, stem, width=width, channels=channels, heads=heads)
        if "fc.weight" in weights:
            net = Classifier(net.backbone, net.features, len(weights["fc.weight"]))
    checkpoint.load_strictly(net, weights)
    return net, encoder, notes


# ---- a network that starts from a checkpoint's weights ------------------------------------------


def init_from_checkpoint(net: SimSiam, path: str | Path, parts: str = "fitting") -> list[str]:
    """Give `net` the weights of a checkpoint of any origin or version; returns what to say of it.

    `parts`, one of INIT_PARTS: the backbone and the heads that fit, the backbone alone, or all
    parts. What is not taken stays as it is. Raises FileNotFoundError; ValueError that names what
    does not fit, but not the file.
    """
    given, encoder, notes = weights_for(net, path)
    mine = net.state_dict()
    for part in ("backbone",) if parts == "backbone" else ("backbone", "projector", "predictor"):
        theirs, wanted = select_part(given, part), select_part(mine, part)
        name = first_mismatch(wanted, theirs)
        if name is None:
            mine |= theirs
            continue
        if not wanted:
            notes.append(f"its {part} is not used: this network has none")
            continue
        reason = f"its {part} does not fit the flags of the network: {name}"
        if not theirs:
            reason = f"it has no {part}"
        if part == "backbone":
            flags = [f"--{flag} {encoder[flag]}" for flag in ("arch", "stem", "width")]
            flags = [flag for flag in flags if not flag.endswith("None")]
            raise ValueError(f"{reason}; it is of {' '.join(flags)}")
        fits = head_flags(part, given)
        fits = f"; it fits with {fits}" if fits else ""
        if parts == "all":
            raise ValueError(f"{reason}{fits}; --init_parts fitting starts that at random")
        notes.append(f"{reason}: that starts at random{fits}")
    checkpoint.load_strictly(net, mine)
    return notes


def weights_for(net: SimSiam, path: str | Path) -> tuple[dict[str, Tensor], dict, list[str]]:
    """The weights in a checkpoint of any origin or version, its encoder, and what to say of it.

    The encoder is empty where all weights, or all of a bare backbone, are those of `net`.
    """
    value = reader.read(path)
    with contextlib.suppress(ValueError):  # of another project or version
        state = checkpoint.parse(value)
        return state["model"], state["encoder"], []
    weights = find_weights(value)
    if first_mismatch(net.state_dict(), weights) is None:
        return weights, {}, []
    try:
        found, encoder, notes = translate(weights)
    except ValueError:  # else all of it under its library's own names, with a classifier at most
        wanted = select_part(net.state_dict(), "backbone")
        named = {f"backbone.{name}": value for name, value in weights.items()}
        bare = {name: value for name, value in named.items() if name in wanted}
        rest = {name.rpartition(".")[0] for name in weights if f"backbone.{name}" not in wanted}
        if first_mismatch(wanted, bare) or len(rest) > 1:
            raise
        return bare, {}, [f"its {name} is not used" for name in rest]
    if encoder["stem"] != "imagenet":
        notes.append(f"its --stem is {encoder['stem']}")
    return found, encoder, notes


def select_part(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights whose names begin with `part`, a dot after it."""
    return {name: value for name, value in weights.items() if name.startswith(f"{part}.")}


def first_mismatch(wanted: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
    """The first name that only one has, or both in other shapes; None if there is none."""
    for name in sorted(wanted.keys() ^ given.keys()) or sorted(wanted):
        if name not in wanted or name not in given or wanted[name].shape != given[name].shape:
            return name
    return None


def head_flags(part: str, given: dict[str, Tensor]) -> str | None:
    """The flags of main.py for which the projector or predictor in `given` fits, if there are."""
    *layers, last = build_head(given, "projector") or [None]
    if not isinstance(last, nn.BatchNorm1d) or last.num_features < 4:
        return None
    d, number = last.num_features, sum(isinstance(layer, nn.Linear) for layer in layers)
    with torch.device("meta"):
        projector = projection_mlp(layers[0].in_features, d, number, affine=last.affine)
        heads = nn.ModuleDict({"projector": projector, "predictor": prediction_mlp(d)})
    if first_mismatch(select_part(heads.state_dict(), part), select_part(given, part)):
        return None
    return f"--feature_dim {d} --projector_layers {number}" + " --projector_affine" * last.affine


# ---- a checkpoint, opened -----------------------------------------------------------------------


@dataclasses.dataclass
class LoadedCheckpoint:
    """The network in a checkpoint and what its encoder sees. It can be sent between ranks.

    Called with images, it returns their features: `source(["a.jpg", "b.jpg"])`.

    `net`: in eval mode, on the CPU at first. `encoder`: a dict of `checkpoint.ENCODER`.
    `notes`: lines to say. `state`: what `checkpoint.FORMAT` names, less the weights and the
    optimizer; None for another project's file.
    """

    path: str
    net: SimSiam | Classifier = dataclasses.field(repr=False)
    encoder: dict
    notes: list[str]
    state: dict | None = dataclasses.field(repr=False)

    @classmethod
    def open(
        cls,
        path: str | Path,
        stem: str | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> "LoadedCheckpoint":
        """Read a checkpoint of this program or, if it is none, of another project.

        `stem`, `image_size` (pixels) and the images' `mean` and `std` (of each channel) say what
        another project's file does not; by default they are what its layout suggests. Raises
        FileNotFoundError; ValueError, which names the file.
        """
        told = {"stem": stem, "image_size": image_size, "mean": mean, "std": std}
        told = {name: value for name, value in told.items() if value is not None}
        with error_prefix(str(path)):
            value = reader.read(path)
        try:
            state = checkpoint.parse(value)
        except checkpoint.NotOursError as error:
            try:
                net, encoder, notes = build_network(find_weights(value), stem)
            except ValueError as other:
                reason = f"{path}: {error}; nor one of another that is known: {other}"
                raise ValueError(reason) from other
            for name in sorted(told.keys() & {"mean", "std"}):
                told[name] = tuple(map(float, told[name]))
                if len(told[name]) != len(encoder[name]):
                    raise ValueError(f"--{name}: must be {len(encoder[name])} numbers") from error
            encoder |= told
            size, *usual = (encoder[name] for name in ("image_size", "mean", "std"))
            mean, std = (", ".join(f"{value:g}" for value in three) for three in usual)
            notes.append(
                f"taken to see {size} pixels, normalised by mean {mean} and std {std} "
                "(--image_size, --mean, --std)"
            )
            with error_prefix(str(path)):
                return cls(str(path), net.eval(), checkpoint.check_encoder(encoder), notes, None)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        for name in told:
            raise ValueError(f"--{name}: {path} is ours, and has its own")
        with error_prefix(str(path)):
            net = checkpoint.network(state).eval()
        rest = {name: state[name] for name in checkpoint.FORMAT}
        del rest["model"], rest["optimizer"]  # `net` has the weights, and ranks are sent no more
        return cls(str(path), net, rest["encoder"], [], rest)

    def to(self, device: torch.device | str) -> "LoadedCheckpoint":
        """Move the network to `device`, its weights channels_last; returns the same source."""
        self.net.to(device, memory_format=torch.channels_last)
        return self

    @property
    def config(self) -> Config | None:
        """The settings of the run that wrote the checkpoint; None for another project's file."""
        return self.state["config"] if self.state else None

    @property
    def is_linear(self) -> bool:
        """Whether the network is a linear model."""
        return isinstance(self.net, Classifier)

    @property
    def views(self) -> Views:
        """The encoder's input; `views.eval_transform` is its test transform."""
        return Views(self.encoder["image_size"], self.encoder["mean"], self.encoder["std"])

    @property
    def data_name(self) -> str:
        """The data set of the training images, one of `datasets.DATA_NAMES`; "" if not known.

        Another project's file with ImageNet's stem is taken for ImageNet's.
        """
        if self.state is None:
            return "imagenet" if self.encoder["stem"] == "imagenet" else ""
        return self.config.data_name or ""

    @property
    def decode(self) -> DecodeOptions:
        """How the files of the training images were read, in the encoder's channels."""
        decode = DecodeOptions.from_args(vars(self.config)) if self.state else DEFAULT_DECODE
        return dataclasses.replace(decode, channels=len(self.encoder["mean"]))

    @property
    def resize(self) -> int:
        """Pixels of an image's shorter side before the centre crop."""
        return resize_size(self.data_name, self.encoder["image_size"])

    @property
    def classes(self) -> list[str]:
        """Names of a linear model's classes, numbers where no names are known; else none."""
        if not self.is_linear:
            return []
        if self.state is None:
            return [str(i) for i in range(self.net.fc.out_features)]
        return self.state["classes"]

    def preprocess(self, images: object) -> Tensor:
        """Images as the encoder sees them, by `preprocess` -> uint8, N x C x size x size."""
        return preprocess(images, self.decode, self.encoder["image_size"], self.resize)

    def __call__(self, images: object, normalise: bool = False) -> Tensor:
        """Features of images of any size: fp32, N x features, on the encoder's device.

        `images`: a PIL image, a file's path, an array H x W x C or a tensor C x H x W, of bytes or
        of floats from 0 to 1; or many: a list, an array N x H x W x C or a tensor N x C x H x W.
        One gives one row. Each is cut as the test transform does: the shorter side resized, then
        the centre cropped. `normalise`: to unit length, so that products are cosines. There is no
        gradient. Raises ValueError for what is no image, naming a file.
        """
        off, many = torch.autocast("cpu", enabled=False), as_list(images)
        places = range(0, max(1, len(many)), 512)  # so many are decoded at once
        parts = [self.features(self.preprocess(many[i : i + 512]), off, normalise) for i in places]
        return torch.cat(parts)

    def features(
        self, images: Tensor | ImageFiles, amp: torch.autocast, normalise: bool = False
    ) -> Tensor:
        """Return the encoder's features on its device, as `metrics.extract_features` does.

        `images`: uint8, N x C x H x W -> fp32, N x features. Ranks share the work.
        """
        device = next(self.net.parameters()).device
        images = images.to(device)
        return metrics.extract_features(
            self.net.backbone, self.views.eval_transform, images, amp, normalise
        )


open_encoder = LoadedCheckpoint.open  # its name in the package `simsiam`


# ---- classes of images --------------------------------------------------------------------------


class Predictor(nn.Module):
    """A linear model that knows its classes and its test transform.

    `size` and `resize`: pixels of the centre crop, and of the shorter side before it. Raises
    ValueError for a source that is not a linear model.
    """

    def __init__(self, source: LoadedCheckpoint):
        super().__init__()
        if not source.is_linear:
            raise ValueError(f"{source.path}: is not a linear model; linear.py makes one of it")
        self.net, self.classes, self.views = source.net, source.classes, source.views
        self.size, self.resize = self.views.size, source.resize
        self.decode = source.decode
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, N x C x size x size -> logits, N x classes."""
        return self.net(x)

    @torch.no_grad()
    def scores(self, images: Tensor, amp: torch.autocast | None = None) -> Tensor:
        """The softmax of each image, fp32, N x classes, on the network's device.

        `images`: uint8, N x C x size x size, as `images.decode` cuts them with `size` and
        `shorter`. Each process scores its own. `amp`: for the backbone, if any.
        """
        device, rows = next(self.parameters()).device, []
        for chunk in images.split(512):
            x = self.views.eval_transform(chunk.to(device))
            with amp or contextlib.nullcontext():
                found = self.net.backbone(x).float()
            rows.append(self.net.fc(found).softmax(1))
        return torch.cat(rows)

    def predict(self, images: object) -> list[dict[str, object]]:
        """The `class` and `score` of each image, and the `scores` of all classes.

        `images`: what `preprocess` takes. Raises ValueError for what is no image, naming a file.
        """
        pixels, found = preprocess(images, self.decode, self.size, self.resize), []
        for scores in self.scores(pixels).tolist():
            best = max(range(len(scores)), key=scores.__getitem__)
            every = dict(zip(self.classes, scores, strict=True))
            found.append({"class": self.classes[best], "score": scores[best], "scores": every})
        return found
