"""Open checkpoints of this project, in any version, and of others.

`LoadedCheckpoint` is a network with its input transform. `Predictor` is a linear model that returns
classes of images. `init_from_checkpoint` loads weights into a network that is to be trained.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from simsiam.data.decode import DEFAULT_DECODE, DecodeOptions, as_list, preprocess, resize_size
from simsiam.data.loader import ImageFiles
from simsiam.evaluation import metrics
from simsiam.interop.layouts import translate
from simsiam.models.backbones import build_backbone
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam, prediction_mlp, projection_mlp
from simsiam.runtime import reader
from simsiam.runtime.config import Config
from simsiam.runtime.files import error_prefix
from simsiam.training import checkpoint
from simsiam.views.augment import Views

# ---- weights of any origin ----------------------------------------------------------------------


def find_weights(value: object) -> dict[str, Tensor]:
    """Return the tensors in a value from `reader.read`, by name; floats become fp32.

    They may be the value itself, or its `state_dict` or `model`. Raises ValueError for a value
    without tensors.
    """
    for name in ("state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(name), dict):
            value = value[name]
    weights = {}
    for name, tensor in value.items() if isinstance(value, dict) else ():
        if isinstance(tensor, tuple) and len(tensor) == 2:  # Paddle: its own name, and the array
            tensor = tensor[1]
        if isinstance(name, str) and isinstance(tensor, Tensor):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    if not weights:
        raise ValueError("has no weights")
    return weights


def select_part(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """Return the weights of a submodule, under their full names."""
    return {name: value for name, value in weights.items() if name.startswith(f"{part}.")}


def first_mismatch(expected: dict[str, Tensor], weights: dict[str, Tensor]) -> str | None:
    """Return the first name that only one has, or whose shapes differ; None if all fit."""
    names = expected.keys() ^ weights.keys() or (
        name for name in expected if expected[name].shape != weights[name].shape
    )
    return min(names, default=None)


# Settings that did not exist in all older versions, with the behaviour before them.
BEFORE = {"exif": False, "background": "none", "optimizer": "sgd", "probe": False}
SINGLE_START = ("resume", "overwrite", "ddp")  # settings of a single start of a run
# Parts that networks no longer have; they were of no use after training.
REMOVED_PARTS = ("local_predictor.", "momentum_encoder.")


def parse_own(value: object) -> tuple[dict, list[str]]:
    """Validate a value from `reader.read` as a checkpoint of this project; return it, and notes.

    Of an older version only what describes the weights is read: settings, encoder, classes, epoch
    and history. The other entries are empty. Raises NotOursError; ValueError for an unknown
    version.
    """
    version = value.get("version") if isinstance(value, dict) else None
    if type(version) is not int or not 1 <= version < checkpoint.VERSION:
        return checkpoint.parse(value), []
    try:
        model, args = value["model"], value["args"]
        command = "linear.py" if "fc.weight" in model else "main.py"
        encoder = value.get("encoder", args.get("encoder", args))  # version 2; of 1 linear.py's
        state = {name: kind() for name, (kind, _) in checkpoint.FORMAT.items()} | {
            "version": version,
            "command": command,
            "config": older_config(command, args),
            "encoder": checkpoint.check_encoder({key: encoder[key] for key in checkpoint.ENCODER}),
            "classes": value.get("classes", []),
            "model": {k: v for k, v in model.items() if not k.startswith(REMOVED_PARTS)},
            "epoch": value.get("epoch", 0),
            "history": value["history"] or [{}],
        }
        is_valid = (
            type(state["epoch"]) is int
            and all(isinstance(tensor, Tensor) for tensor in state["model"].values())
            and all(isinstance(name, str) for name in state["classes"])
            and all(checkpoint.is_number(x) for row in state["history"] for x in row.values())
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise checkpoint.NotOursError()
    return state, [f"version {version} of the format: its weights are used; no run resumes from it"]


def older_config(command: str, args: dict) -> Config:
    """Return the settings of an older checkpoint that exist today; invalid ones are left out.

    Raises ConfigError for settings that exclude each other.
    """
    config, values = checkpoint.CONFIGS[command], {}
    skipped = {*SINGLE_START, "tensorboard", "cuda_graphs"}  # not for another machine
    if args.get("data_name") == "textures":  # generated, so that a root is refused
        skipped.add("data_root")
    for field in dataclasses.fields(config):
        value = (BEFORE | args).get(field.name)
        value = tuple(value) if isinstance(value, list) else value
        if value is not None and field.name not in skipped:
            with contextlib.suppress(ValueError):
                field.metadata["kind"].check(value)
                values[field.name] = value
    return config(**values)


# ---- networks made from weights -----------------------------------------------------------------


def build_head(weights: dict[str, Tensor], name: str) -> nn.Sequential:
    """Return a projector or predictor for its weights: Linear, BN and ReLU where there are some."""
    layers: list[nn.Module] = []
    for i in itertools.count(0, 3):
        if f"{name}.{i}.weight" not in weights:
            return nn.Sequential(*layers)
        if layers:
            layers += [nn.Identity()] * (i - 1 - len(layers)) + [nn.ReLU(inplace=True)]
        outputs, inputs = weights[f"{name}.{i}.weight"].shape
        layers.append(nn.Linear(inputs, outputs, bias=f"{name}.{i}.bias" in weights))
        if f"{name}.{i + 1}.running_mean" in weights:
            layers.append(nn.BatchNorm1d(outputs, affine=f"{name}.{i + 1}.weight" in weights))


def build_network(weights: dict[str, Tensor], encoder: dict) -> SimSiam | Classifier:
    """Return a network with these weights, whose heads have the weights' shapes.

    With `fc` it is a Classifier. Heads without weights are empty. Raises ValueError.
    """
    arch, stem, width, channels = checkpoint.backbone_args(encoder)
    try:
        with torch.device("meta"):
            if "fc.weight" in weights:
                body, features = build_backbone(arch, stem, width, channels)
                net = Classifier(body, features, len(weights["fc.weight"]))
            else:
                heads = build_head(weights, "projector"), build_head(weights, "predictor")
                net = SimSiam(arch, stem, width=width, channels=channels, heads=heads)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"its encoder cannot be built: {error}") from error
    checkpoint.load_strictly(net, weights)
    return net


# ---- a network that starts from a checkpoint's weights ------------------------------------------


def init_from_checkpoint(net: SimSiam, path: str | Path, parts: str = "fitting") -> list[str]:
    """Load the weights of a checkpoint of any project or version into `net`; return notes.

    `parts`, one of `recipes.INIT_PARTS`: `fitting`, the backbone and the heads that fit;
    `backbone`; or `all` parts. Parts that are not loaded stay as they are. Raises
    FileNotFoundError, or ValueError that names what does not fit, but not the file.
    """
    weights, encoder, notes = weights_for(net, reader.read(path))
    state = net.state_dict()
    for part in ("backbone",) if parts == "backbone" else ("backbone", "projector", "predictor"):
        saved, expected = select_part(weights, part), select_part(state, part)
        mismatch = first_mismatch(expected, saved)
        if mismatch is None:
            state |= saved
            continue
        if not expected:
            notes.append(f"its {part} is not used: this network has none")
            continue
        reason = f"it has no {part}"
        if saved:
            reason = f"its {part} does not fit the flags of the network: {mismatch}"
        if part == "backbone":
            sizes = {name: encoder[name] for name in ("arch", "stem", "width") if encoder[name]}
            flags = " ".join(f"--{name} {value}" for name, value in sizes.items())
            raise ValueError(f"{reason}; it has {flags}")
        flags = head_flags(part, weights)
        fits = f"; it fits {flags}" if flags else ""
        if parts == "all":
            raise ValueError(f"{reason}{fits}; --init_parts fitting starts it at random")
        notes.append(f"{reason}: it starts at random{fits}")
    checkpoint.load_strictly(net, state)
    return notes


def weights_for(net: SimSiam, value: object) -> tuple[dict[str, Tensor], dict, list[str]]:
    """Return the weights in a value from `reader.read` by their names in `net`; encoder and notes.

    The encoder is empty where all weights, or all of a bare backbone, have names and shapes of
    `net`. Raises ValueError.
    """
    with contextlib.suppress(ValueError):  # another project's, or damaged in other parts
        state, notes = parse_own(value)
        return state["model"], state["encoder"], notes
    weights = find_weights(value)
    if first_mismatch(net.state_dict(), weights) is None:
        return weights, {}, []
    try:
        translated, encoder, notes = translate(weights)
    except ValueError:  # a backbone of timm or torchvision, by its library's names
        expected = select_part(net.state_dict(), "backbone")
        bare = {f"backbone.{name}": value for name, value in weights.items()}
        rest = {name.split(".", 1)[1].rpartition(".")[0] for name in bare.keys() - expected.keys()}
        bare = {name: bare[name] for name in bare if name in expected}
        if first_mismatch(expected, bare) or len(rest) > 1:  # more than a classifier
            raise
        return bare, {}, [f"its {name} is not used" for name in rest]
    if encoder["stem"] != "imagenet":
        notes.append(f"its --stem is {encoder['stem']}")
    return translated, encoder, notes


def head_flags(part: str, weights: dict[str, Tensor]) -> str | None:
    """Return the flags of main.py that fit the projector or predictor in `weights`, if any do."""
    with torch.device("meta"):
        *layers, last = build_head(weights, "projector") or [None]
        if not isinstance(last, nn.BatchNorm1d) or last.num_features < 4:
            return None
        d, number = last.num_features, sum(isinstance(layer, nn.Linear) for layer in layers)
        head = prediction_mlp(d)
        if part == "projector":
            head = projection_mlp(layers[0].in_features, d, number, affine=last.affine)
    expected = {f"{part}.{name}": value for name, value in head.state_dict().items()}
    if first_mismatch(expected, select_part(weights, part)):
        return None
    return f"--feature_dim {d} --projector_layers {number}" + " --projector_affine" * last.affine


# ---- a checkpoint, opened -----------------------------------------------------------------------


@dataclasses.dataclass
class LoadedCheckpoint:
    """A checkpoint's network with its input transform. Called with images, it returns features.

        source = LoadedCheckpoint.open(path)
        features = source(["a.jpg", "b.jpg"])

    It can be pickled, to be sent to other ranks.

    `net`: in eval mode, on the CPU at first. `encoder`: a dict of `checkpoint.ENCODER`. `notes`:
    assumptions, for the user. `state`: the entries of `checkpoint.FORMAT` without the weights and
    the optimizer; None for another project's file.
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
        """Open a checkpoint of this project or of another one.

        `stem`, `image_size` (pixels), `mean` and `std` (per channel, from 0 to 1) replace what is
        assumed of another project's file. Raises FileNotFoundError; ValueError, which names the
        file.
        """
        mean, std = (values and tuple(map(float, values)) for values in (mean, std))
        overrides = {"stem": stem, "image_size": image_size, "mean": mean, "std": std}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        with error_prefix(str(path)):
            value = reader.read(path)
            try:
                state, notes = parse_own(value)
            except checkpoint.NotOursError:
                net, encoder, notes = cls._open_foreign(value, overrides)
                return cls(str(path), net.eval(), encoder, notes, None)
            for name in overrides:
                raise ValueError(f"--{name}: the checkpoint is this program's, and has its own")
            if state["version"] == checkpoint.VERSION:
                net = checkpoint.network(state)
            else:
                net = build_network(state["model"], state["encoder"])
        del state["model"], state["optimizer"]  # `net` has the weights, and ranks are sent no more
        return cls(str(path), net.eval(), state["encoder"], notes, state)

    @staticmethod
    def _open_foreign(
        value: object, overrides: dict
    ) -> tuple[SimSiam | Classifier, dict, list[str]]:
        """Return the network in another project's file, its encoder, and notes."""
        try:
            weights, encoder, notes = translate(find_weights(value), overrides.get("stem"))
            net = build_network(weights, encoder)
        except ValueError as error:
            raise ValueError(
                f"is not a checkpoint of this program, nor of a known project: {error}"
            ) from error
        for name in ("mean", "std"):
            if len(overrides.get(name, encoder[name])) != len(encoder[name]):
                raise ValueError(f"--{name}: must be {len(encoder[name])} numbers")
        encoder |= overrides
        mean, std = (", ".join(f"{x:g}" for x in encoder[name]) for name in ("mean", "std"))
        notes.append(
            f"assumed input: {encoder['image_size']} pixels, normalised by mean {mean} and std "
            f"{std} (--image_size, --mean, --std)"
        )
        return net, checkpoint.check_encoder(encoder), notes

    def to(self, device: torch.device | str) -> "LoadedCheckpoint":
        """Move the network to `device`, with channels_last weights; return the same object."""
        self.net.to(device, memory_format=torch.channels_last)
        return self

    @property
    def config(self) -> Config | None:
        """The settings of the run that wrote the checkpoint; None for another project's file."""
        return self.state["config"] if self.state else None

    @property
    def is_linear(self) -> bool:
        """True for a linear model (backbone and classifier)."""
        return isinstance(self.net, Classifier)

    @property
    def views(self) -> Views:
        """The encoder's input; `views.eval_transform` is its test transform."""
        return Views(self.encoder["image_size"], self.encoder["mean"], self.encoder["std"])

    @property
    def data_name(self) -> str:
        """The training data, one of `datasets.DATASETS`; "" if unknown.

        Another project's file with ImageNet's stem is assumed to be trained on ImageNet.
        """
        if self.state is None:
            return "imagenet" if self.encoder["stem"] == "imagenet" else ""
        return self.config.data_name or ""

    @property
    def decode(self) -> DecodeOptions:
        """The options by which the training images were decoded."""
        decode = DecodeOptions.from_args(vars(self.config)) if self.state else DEFAULT_DECODE
        return dataclasses.replace(decode, channels=len(self.encoder["mean"]))

    @property
    def resize(self) -> int:
        """Pixels of an image's shorter side before the centre crop."""
        return resize_size(self.data_name, self.encoder["image_size"])

    @property
    def classes(self) -> list[str]:
        """Names of a linear model's classes, numbers where they have none; else empty."""
        if not self.is_linear:
            return []
        if self.state is None:
            return [str(i) for i in range(self.net.fc.out_features)]
        return self.state["classes"]

    def preprocess(self, images: object) -> Tensor:
        """Resize and crop images as for testing -> uint8, N x C x size x size."""
        return preprocess(images, self.decode, self.encoder["image_size"], self.resize)

    def __call__(self, images: object, normalise: bool = False) -> Tensor:
        """Return features of images of any size: fp32, N x features, on the encoder's device.

        `images`: a PIL image, a file's path, an array H x W x C or a tensor C x H x W, of bytes or
        of floats from 0 to 1; or many: a list, an array N x H x W x C or a tensor N x C x H x W.
        One image gives one row. `normalise`: scale rows to unit length, so that products are
        cosines. There is no gradient. Raises ValueError for what is no image, naming a file.
        """
        off, many = torch.autocast("cpu", enabled=False), as_list(images)
        starts = range(0, max(1, len(many)), 512)  # so many are decoded at once
        parts = [self.features(self.preprocess(many[i : i + 512]), off, normalise) for i in starts]
        return torch.cat(parts)

    def features(
        self, images: Tensor | ImageFiles, amp: torch.autocast, normalise: bool = False
    ) -> Tensor:
        """Return features of uint8 images, N x C x H x W -> fp32, N x features.

        They are on the encoder's device. Ranks share the work.
        """
        images = images.to(next(self.net.parameters()).device)
        transform = self.views.eval_transform
        return metrics.extract_features(self.net.backbone, transform, images, amp, normalise)


open_encoder = LoadedCheckpoint.open  # its name in the package `simsiam`


# ---- classes of images --------------------------------------------------------------------------


class Predictor(nn.Module):
    """A linear model with its classes and its test transform.

    `size` and `resize`: pixels of the centre crop, and of the shorter side before it. Raises
    ValueError for a source that is not a linear model.
    """

    def __init__(self, source: LoadedCheckpoint):
        super().__init__()
        if not source.is_linear:
            raise ValueError(f"{source.path}: is not a linear model; linear.py makes one of it")
        self.net, self.classes, self.views = source.net, source.classes, source.views
        self.size, self.resize, self.decode = self.views.size, source.resize, source.decode
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images, N x C x size x size -> logits, N x classes."""
        return self.net(x)

    @torch.no_grad()
    def scores(self, images: Tensor, amp: torch.autocast | None = None) -> Tensor:
        """Return the softmax of uint8 images, N x C x size x size -> fp32, N x classes.

        The scores are on the network's device. Ranks do not share the work. `amp`: autocast of the
        backbone.
        """
        device, scores = next(self.parameters()).device, []
        for chunk in images.split(512):
            x = self.views.eval_transform(chunk.to(device))
            with amp or contextlib.nullcontext():
                features = self.net.backbone(x).float()
            scores.append(self.net.fc(features).softmax(1))
        return torch.cat(scores)

    def predict(self, images: object) -> list[dict[str, object]]:
        """Return the `class` and `score` of each image, and the `scores` of all classes.

        `images`: as of `LoadedCheckpoint.__call__`. Raises ValueError for what is no image.
        """
        pixels, predictions = preprocess(images, self.decode, self.size, self.resize), []
        for row in self.scores(pixels).tolist():
            scores = dict(zip(self.classes, row, strict=True))
            best = max(scores, key=scores.__getitem__)
            predictions.append({"class": best, "score": scores[best], "scores": scores})
        return predictions
