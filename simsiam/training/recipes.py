"""PretrainConfig and LinearConfig, each setting of main.py and linear.py once; and recipes."""

import dataclasses
import glob
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import ClassVar

from simsiam.data.arrays import MAX_CHANNELS
from simsiam.data.datasets import DATA_NAMES
from simsiam.data.decode import BACKGROUNDS, DecodeOptions, check_decode_options
from simsiam.evaluation.knn import KNN_K, KNN_TEMPERATURE
from simsiam.models.backbones import IMAGENET_ARCHS, STEMS, is_library_arch
from simsiam.models.methods import METHODS
from simsiam.models.simsiam import BN, CRITERIA, LOSSES, PREDICTORS, TARGETS
from simsiam.runtime.config import (
    Auto,
    Choice,
    ConfigError,
    Entry,
    Flag,
    Kind,
    Number,
    RunConfig,
    Several,
    Text,
    file_path,
    option,
)
from simsiam.training.optim import OPTIMIZERS
from simsiam.views.augment import (
    LARGEST_HUE,
    LEAST_STD,
    LIMITS,
    NORMALISATION,
    Augmentation,
)

INIT_PARTS = ("fitting", "backbone", "all")
TEXTURES_HAVE_NO_ROOT = (
    "--data_root: textures are generated: leave it out or, for your own images, add "
    "--data_name folder"
)

# ---- kinds of values that only these settings have ----------------------------------------------


class Roots(Kind):
    """One place of images or several, each a path or a pattern with *, ? or []: one data set.

    Several are joined as in PATH.
    """

    nargs = "+"
    metavar = "ROOT"

    def parse_words(self, words: str | list[str]) -> str:
        if not all(words):
            raise ValueError("must be a folder or a list of images")
        roots = []
        for root in map(absolute_root, words):
            matches = [] if os.path.exists(root) else sorted(glob.glob(root))
            roots += matches or [root]
        return os.pathsep.join(roots)

    def check(self, value: object) -> None:
        if not isinstance(value, str) or not value:
            raise ValueError("must be a folder or a list of images")


def absolute_root(root: str) -> str:
    """Return the absolute path of a data root; an address (scheme:...) stays as it is."""
    return root if re.match(r"[A-Za-z][\w.+-]+:", root) else os.path.abspath(root)


class ViewSize(Number):
    """The side of a view: pixels (a whole number from 8) or a part of the image's side (to 1)."""

    def __init__(self):
        super().__init__(float, 0.1, 1024)

    def expected(self) -> str:
        return "pixels, 8 or more, or a part of the side from 0.1 to 1"

    def parse(self, text: str) -> float:
        value = super().parse(text)
        return int(value) if value > 1 and value == int(value) else value

    def check(self, value: object) -> None:
        super().check(value)
        if value > 1 and (value < 8 or value != int(value)):
            raise ValueError(f"must be {self.expected()}")


PROBABILITY, STRENGTH = Number(float, 0, 1), Number(float, *LIMITS["jitter"])
COUNT, POSITIVE = Number(int, 1, 2**31), Number(float, 1e-12)
LEVELS = Several(Number(float, -1e9, 1e9), 2, metavar=("LOW", "HIGH"))
MEAN, STD = Several(PROBABILITY), Several(Number(float, LEAST_STD, 1))
IMAGE_SIZE = Number(int, 8, 1024)


def view_range(name: str) -> Several:
    """Return the kind of an augmentation's range: from and to."""
    return Several(Number(float, *LIMITS[name]), 2, increasing=True, metavar=("LOW", "HIGH"))


# ---- the settings -------------------------------------------------------------------------------


@dataclasses.dataclass
class PretrainConfig(RunConfig):
    """The settings of a pre-training run. Where a recipe has a default, it wins over the one here.

    Raises ConfigError for settings that are invalid, or that do not go together.
    """

    data_name: str = option(Choice(*DATA_NAMES), "the data set", "cifar10", "data")
    data_root: str = option(
        Roots(), "folder of downloads, or your own images (folders or lists)", "data", "data"
    )
    split_names: tuple[str, ...] | None = option(
        Several(Text("NAME")), "folders or lists in --data_root: training, then test", None, "data"
    )
    exif: bool = option(Flag(), "turn images as EXIF says", True, "data")
    background: str = option(
        Choice(*BACKGROUNDS), "colour behind transparent pixels; none: theirs", "white", "data"
    )
    exclude: tuple[str, ...] | None = option(
        Several(Text("PATTERN")), "names or paths in --data_root to leave out (*, ?)", None, "data"
    )
    channels: int = option(
        Number(int, 1, MAX_CHANNELS), "of an image; other than 1 and 3: TIFF or .npy", 3, "data"
    )
    levels: tuple[float, float] | None = option(
        LEVELS,
        "values in files that become 0 and 255, instead of the type's range",
        None,
        "data",
    )
    train_size: int | None = option(
        COUNT, "train on a class-balanced, seeded subset of this size", None, "data"
    )
    image_size: int | None = option(
        IMAGE_SIZE, "side of the views in pixels, instead of the images'", None, "data"
    )
    view_sizes: tuple[float, ...] | None = option(
        Several(ViewSize()),
        "sides of the views, each for an equal part of the epochs: pixels, or parts of image_size",
        None,
        "data",
    )

    crop_scale: tuple[float, float] = option(
        view_range("crop_scale"), "area of a crop over the image's", (0.2, 1.0), "views"
    )
    crop_ratio: tuple[float, float] = option(
        view_range("crop_ratio"), "width of a crop over its height", (0.75, 4 / 3), "views"
    )
    jitter: tuple[float, float, float, float] = option(
        Several(STRENGTH, 4, metavar=("BRIGHTNESS", "CONTRAST", "SATURATION", "HUE")),
        "strengths of the colour jitter",
        (0.4, 0.4, 0.4, 0.1),
        "views",
    )
    jitter_p: float = option(PROBABILITY, "probability of colour jitter", 0.8, "views")
    gray_p: float = option(PROBABILITY, "probability of grayscale", 0.2, "views")
    blur_p: float = option(PROBABILITY, "probability of a Gaussian blur", 0.0, "views")
    blur_sigma: tuple[float, float] = option(
        view_range("blur_sigma"), "sigma of the blur, in pixels of the view", (0.1, 2.0), "views"
    )
    hflip_p: float = option(PROBABILITY, "probability of a flip left-right", 0.5, "views")
    vflip_p: float = option(PROBABILITY, "probability of a flip up-down", 0.0, "views")
    rotate90_p: float = option(
        PROBABILITY, "probability of a turn by 90, 180 or 270 degrees", 0.0, "views"
    )
    solarize_p: float = option(
        PROBABILITY, "probability of inverting what is brighter than half", 0.0, "views"
    )
    mean: tuple[float, ...] | str = option(
        Auto(MEAN),
        "of each channel, from 0 to 1; auto: measured on the training images",
        "auto",
        "views",
    )
    std: tuple[float, ...] | str = option(Auto(STD), "as --mean, the std", "auto", "views")

    arch: str = option(
        Text("NAME"),
        f"{', '.join(IMAGENET_ARCHS)}; resnet8, resnet14, ... (6n+2); timm:NAME or "
        "torchvision:NAME, any of their models",
        "resnet18",
        "network",
    )
    stem: str = option(Choice(*STEMS), "first layers of resnet18 to resnet152", "cifar", "network")
    width: int | None = option(
        Number(int, 1, 1024), "of the first stage of resnet8, resnet14, ... (16)", None, "network"
    )
    feature_dim: int = option(
        Number(int, 4, 16384), "d, the width of projector and output z", 2048, "network"
    )
    projector_layers: int = option(
        Number(int, 1, 8), "linear layers of the projector", 2, "network"
    )
    projector_affine: bool = option(
        Flag(), "make the projector's last BN affine, as some projects do", False, "network"
    )
    init: str | None = option(
        Text("PATH", file_path), "start from the weights of any checkpoint", None, "network"
    )
    init_parts: str = option(
        Choice(*INIT_PARTS),
        "what --init takes: the backbone and the heads that fit, the backbone, or all parts",
        "fitting",
        "network",
    )

    method: str = option(Entry(METHODS), "the method: network and loss", "simsiam", "network")

    stop_grad: str = option(
        Choice("on", "off"), "stop the gradient through z (sec. 4.1)", "on", "paper's ablations"
    )
    predictor: str = option(
        Choice(*PREDICTORS),
        "none: p = z; fixed: random weights (sec. 4.2)",
        "mlp",
        "paper's ablations",
    )
    bn: str = option(
        Choice(*BN),
        "BN in the heads: on no, hidden or all layers (sec. 4.4)",
        "default",
        "paper's ablations",
    )
    similarity: str = option(
        Entry(CRITERIA), "criterion of p and z (sec. 4.5)", "cosine", "paper's ablations"
    )
    loss: str = option(
        Choice(*LOSSES),
        "pairs of views: both ways or one; 2x: of two pairs (sec. 4.6)",
        "symmetric",
        "paper's ablations",
    )

    target: str = option(
        Choice(*TARGETS),
        "z that p of a view predicts; mean: of all other views (FastSiam)",
        "other",
        "beyond the paper",
    )
    num_views: int = option(
        Number(int, 2, 16), "views per image, with --target mean", 2, "beyond the paper"
    )
    covariance: float = option(
        Number(float, 0), "weight of VICReg's covariance term on z", 0.0, "beyond the paper"
    )

    recipe: str | None = option(
        Choice("cifar", "imagenet", "short", "fast"),
        "defaults (textures: short; imagenet, webdataset: imagenet; else cifar)",
        None,
        "optimization",
    )
    optimizer: str = option(
        Choice(*OPTIMIZERS), "muon: orthogonal updates, by timm", "sgd", "optimization"
    )
    batch_size: int = option(
        Number(int, 2, 2**31), "images per step, of all ranks together", 512, "optimization"
    )
    epochs: int = option(COUNT, "passes over the training set", 800, "optimization")
    lr: float = option(POSITIVE, "base lr: lr = base * batch_size / 256", 0.03, "optimization")
    momentum: float = option(PROBABILITY, "momentum of the optimizer", 0.9, "optimization")
    weight_decay: float = option(Number(float, 0), "weight decay", 5e-4, "optimization")
    bn_decay: bool = option(
        Flag(), "weight decay also on BN's parameters and on biases", True, "optimization"
    )
    warmup_epochs: float = option(Number(float, 0), "epochs of linear warm-up", 0.0, "optimization")
    fix_pred_lr: bool = option(Flag(), "keep the predictor's lr constant", False, "optimization")

    k: int = option(COUNT, "neighbours that vote in the kNN", KNN_K, "monitor")
    temperature: float = option(
        POSITIVE, "temperature of the kNN's vote", KNN_TEMPERATURE, "monitor"
    )
    bank_size: int | None = option(
        COUNT, "class-balanced, seeded subset for the kNN's bank, instead of all", None, "monitor"
    )
    knn_every: int = option(
        COUNT, "epochs from one kNN to the next; the last epoch has one", 1, "monitor"
    )
    probe: bool | None = option(
        Flag(),
        "a linear head that learns on detached features (where there are labels)",
        None,
        "monitor",
    )
    stop_on_collapse: bool = option(
        Flag(), "end the run at its first warning of a collapse", False, "monitor"
    )
    show_views: bool = option(
        Flag(), "draw the views as the network would see them, and exit", False, "monitor"
    )
    tensorboard: bool = option(
        Flag(), "write statistics, pictures and features for TensorBoard too", False, "monitor"
    )
    cuda_graphs: bool = option(
        Flag(), "with --compile on cuda, for small networks: a step as CUDA graphs", False
    )

    selectors: ClassVar[tuple[str, ...]] = ("data_name", "recipe", "arch", "channels")

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, object]]:
        return RECIPES

    @classmethod
    def resolve(cls, overrides: Mapping[str, object]) -> "PretrainConfig":
        data_name = overrides.get("data_name", cls.data_name)
        recipe = overrides.get("recipe") or USUAL_RECIPE.get(data_name, "cifar")
        values = RECIPES[recipe] | overrides | {"recipe": recipe}
        if data_name == "textures" and "data_root" in overrides:
            raise ConfigError(TEXTURES_HAVE_NO_ROOT)
        if is_library_arch(values["arch"]) and "stem" not in overrides:
            values["stem"] = "imagenet"
        if "view_sizes" not in overrides and values["view_sizes"]:
            values["view_sizes"] = values["view_sizes"][-values["epochs"] :]
        channels = values.get("channels", 3)
        if channels != 3:
            brightness, contrast, *_ = values["jitter"]
            of_channels = {"mean": "auto", "std": "auto", "gray_p": 0.0}
            of_channels["jitter"] = (brightness, contrast, 0.0, 0.0)
            values |= {k: v for k, v in of_channels.items() if k not in overrides}
        values = place_of_run(values, overrides)
        config = cls(**values)
        if config.name is None:
            config.name = "{feature_dim}_{k}_{batch_size}_{epochs}".format(**config.as_dict())
            if (config.data_name, config.arch) != ("cifar10", "resnet18"):
                config.name = f"{config.data_name}_{config.arch}_{config.name}"
        return config

    def validate(self) -> None:
        super().validate()
        check_decode_options(vars(self), self.data_name)
        files = self.data_name in ("imagenet", "webdataset")
        sizes, brightness, contrast = self.view_sizes or (), *self.jitter[:2]
        for flag, wrong, reason in (
            ("init_parts", self.init_parts != "fitting" and not self.init, "goes with --init"),
            (
                "view_sizes",
                len(sizes) > self.epochs,
                f"{len(sizes)} sizes are more than the epochs ({self.epochs}): give fewer",
            ),
            ("view_sizes", sizes and files, "is for images in memory, not crops from workers"),
            ("cuda_graphs", self.cuda_graphs and not self.compile, "goes with --compile"),
            (
                "warmup_epochs",
                self.warmup_epochs >= self.epochs,
                f"must be below --epochs {self.epochs}",
            ),
            ("show_views", self.show_views and self.resume, "cannot be combined with --resume"),
            ("overwrite", self.overwrite and self.resume, "cannot be combined with --resume"),
            ("jitter", self.jitter[3] > LARGEST_HUE, f"the hue must be at most {LARGEST_HUE}"),
            *(
                (
                    flag,
                    uses and self.channels != 3,
                    f"saturation, hue and grayscale need three channels, not {self.channels}: "
                    f"--jitter {brightness:g} {contrast:g} 0 0 --gray_p 0",
                )
                for flag, uses in (("jitter", any(self.jitter[2:])), ("gray_p", self.gray_p > 0))
            ),
            *(
                (
                    flag,
                    isinstance(value, tuple) and len(value) != self.channels,
                    f"must be auto, or {self.channels} numbers, one per channel",
                )
                for flag, value in (("mean", self.mean), ("std", self.std))
            ),
            (
                "tensorboard",
                self.tensorboard and importlib.util.find_spec("tensorboard") is None,
                "needs a package: pip install tensorboard",
            ),
        ):
            if wrong:
                raise ConfigError(f"{self.flag(flag)}: {reason}")

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation hyperparameters."""
        names = [field.name for field in dataclasses.fields(Augmentation)]
        return Augmentation(**{name: getattr(self, FLAG_OF.get(name, name)) for name in names})

    @property
    def decode_options(self) -> DecodeOptions:
        """How image files are decoded."""
        return DecodeOptions.from_args(vars(self))


# ---- recipes ------------------------------------------------------------------------------------

# An augmentation field has a flag of its own name, except for this one.
FLAG_OF = {"flip_p": "hflip_p"}


def view_settings(augmentation: Augmentation, normalisation: str) -> dict:
    """Return the settings of a recipe's views: the augmentation, and the images' mean and std."""
    mean, std = NORMALISATION[normalisation]
    fields = {FLAG_OF.get(name, name): value for name, value in vars(augmentation).items()}
    return fields | {"mean": mean, "std": std}


CIFAR = view_settings(Augmentation(), "cifar") | {  # paper, App. D
    "arch": "resnet18",
    "stem": "cifar",
    "image_size": None,  # the data set's own
    "view_sizes": None,  # image_size throughout
    "feature_dim": 2048,
    "projector_layers": 2,
    "covariance": 0.0,
    "optimizer": "sgd",
    "batch_size": 512,
    "epochs": 800,
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "bn_decay": True,
    "warmup_epochs": 0.0,
    "fix_pred_lr": False,
}
# Paper, sec. 3 and App. A; the constant lr of the predictor is the authors' command's.
IMAGENET = (
    CIFAR
    | view_settings(Augmentation(blur_p=0.5), "imagenet")
    | {
        "arch": "resnet50",
        "stem": "imagenet",
        "image_size": 224,
        "projector_layers": 3,
        "epochs": 100,
        "lr": 0.05,
        "weight_decay": 1e-4,
        "fix_pred_lr": True,
    }
)
SHORT = CIFAR | {  # this project's, for minutes to hours on a CPU: see docs/results.md
    "arch": "resnet8",
    "feature_dim": 512,
    "batch_size": 64,
    "epochs": 20,
    "lr": 1.0,
    "fix_pred_lr": True,
}
FAST = SHORT | {  # this project's: the best accuracy per minute of docs/results.md
    "view_sizes": (0.5, 0.625, 0.75),
    "covariance": 0.01,
    "optimizer": "muon",
    "batch_size": 128,
    "lr": 0.08,
    "momentum": 0.95,
    "weight_decay": 0.01,
    # With decay BN's weights in the projector shrink until, at a tenth, the run blows up.
    "bn_decay": False,
    "fix_pred_lr": False,
}
RECIPES = {"cifar": CIFAR, "imagenet": IMAGENET, "short": SHORT, "fast": FAST}
USUAL_RECIPE = {"textures": "short", "imagenet": "imagenet", "webdataset": "imagenet"}

# ---- linear evaluation and fine-tuning ----------------------------------------------------------

# lr is per 256 images. sgd: MoCo's protocol, which the paper "also tried" (App. A), and the usual
# one on CIFAR. lars: the authors' code for ImageNet (the paper, App. A, has a base lr of 0.02).
LINEAR_RECIPES = {
    "sgd": {"lr": (30.0,), "batch_size": 256, "epochs": 90, "weight_decay": 0.0},
    "lars": {"lr": (0.1,), "batch_size": 4096, "epochs": 90, "weight_decay": 0.0},
    # With --finetune, this project's: lr is the head's and, without --encoder_lr, the encoder's.
    "finetune sgd": {"lr": (0.4,), "batch_size": 64, "epochs": 30, "weight_decay": 5e-4},
    "finetune adamw": {"lr": (0.004,), "batch_size": 64, "epochs": 30, "weight_decay": 0.05},
}
# Settings that go with the modes that train nothing, besides the mode's own flag.
MODE_SETTINGS = "model_path device amp deterministic num_workers bad_images overwrite".split()
MODES = {
    "evaluate_only": MODE_SETTINGS
    + "data_name data_root split_names out name ddp pictures".split(),
    "predict": [*MODE_SETTINGS, "out_csv"],
}
# What the file of another project does not tell of its encoder; flags of linear.py and the tools.
SOURCE_OPTIONS = {
    "stem": (Choice(*STEMS), "first layers (by default what the file's layout suggests)"),
    "image_size": (IMAGE_SIZE, "side of the encoder's images in pixels (32 or 224)"),
    "mean": (MEAN, "of the images' channels, from 0 to 1 (by default that of the project)"),
    "std": (STD, "as --mean, the std"),
}


@dataclasses.dataclass
class LinearConfig(RunConfig):
    """The settings of a linear evaluation, of fine-tuning, or of a mode that trains nothing.

    Raises ConfigError for settings that are invalid, or that do not go together.
    """

    model_path: str = option(
        Text("PATH", file_path),
        "a checkpoint of main.py or of another project (docs/checkpoints.md); with "
        "--evaluate_only and --predict, one of linear.py",
        "results/2048_200_512_800_model.pth",
        "what",
    )
    evaluate_only: bool = option(
        Flag(), "score a linear model on the test set; train nothing", False, "what"
    )
    predict: tuple[str, ...] | None = option(
        Several(Text("FILE")), "predict the classes of images, and of folders of them", None, "what"
    )
    out_csv: str | None = option(
        Text("PATH", file_path), "write the predictions to this file too", None, "what"
    )

    stem: str | None = option(*SOURCE_OPTIONS["stem"], None, "another project's encoder")
    image_size: int | None = option(
        *SOURCE_OPTIONS["image_size"], None, "another project's encoder"
    )
    mean: tuple[float, ...] | None = option(
        *SOURCE_OPTIONS["mean"], None, "another project's encoder"
    )
    std: tuple[float, ...] | None = option(
        *SOURCE_OPTIONS["std"], None, "another project's encoder"
    )

    data_name: str | None = option(
        Choice(*DATA_NAMES), "evaluate on another data set than the pre-training's", None, "data"
    )
    data_root: str | None = option(
        Roots(), "where the data set is (as in pre-training; another one: data)", None, "data"
    )
    split_names: tuple[str, ...] | None = option(
        Several(Text("NAME")),
        "folders or lists in --data_root: training, then test (as in pre-training)",
        None,
        "data",
    )
    exif: bool | None = option(
        Flag(), "turn images as EXIF says (as in pre-training)", None, "data"
    )
    background: str | None = option(
        Choice(*BACKGROUNDS), "colour behind transparent pixels (as in pre-training)", None, "data"
    )
    exclude: tuple[str, ...] | None = option(
        Several(Text("PATTERN")),
        "names or paths in --data_root to leave out (as in pre-training)",
        None,
        "data",
    )
    levels: tuple[float, float] | None = option(
        LEVELS, "values in files that become 0 and 255 (as in pre-training)", None, "data"
    )
    label_fraction: float = option(
        Number(float, 1e-9, 1), "use a class-balanced, seeded fraction of the labels", 1.0, "data"
    )

    cached: bool = option(
        Flag(), "extract the features once, without augmentation", False, "protocol"
    )
    optimizer: str = option(
        Choice("sgd", "lars", "adamw"),
        "and its recipe; adamw: with --finetune, lars: without",
        "sgd",
        "protocol",
    )
    batch_size: int = option(COUNT, "images per step, of all ranks together", 256, "protocol")
    epochs: int = option(COUNT, "passes over the training set", 90, "protocol")
    lr: tuple[float, ...] = option(
        Several(POSITIVE),
        "base lr, per 256 images; of several, the best on a held-out tenth of the training set",
        (30.0,),
        "protocol",
    )
    weight_decay: float = option(Number(float, 0), "weight decay", 0.0, "protocol")
    label_smoothing: float = option(
        PROBABILITY, "part of each label that is spread over all classes", 0.0, "protocol"
    )

    finetune: bool = option(
        Flag(), "train the encoder with the head, BN in train mode", False, "the whole network"
    )
    from_scratch: bool = option(
        Flag(), "with --finetune: start from random weights", False, "the whole network"
    )
    encoder_lr: float | None = option(
        POSITIVE, "base lr of the encoder (that of --lr)", None, "the whole network"
    )
    mixup: float = option(
        Number(float, 0, 100), "alpha of mixup in training; 0: none", 0.0, "the whole network"
    )

    selectors: ClassVar[tuple[str, ...]] = ("model_path", "finetune", "optimizer")

    @classmethod
    def recipes(cls) -> Mapping[str, Mapping[str, object]]:
        return LINEAR_RECIPES

    @classmethod
    def resolve(cls, overrides: Mapping[str, object]) -> "LinearConfig":
        """Return the config of explicit settings; without --out, files go beside --model_path.

        The name of a run that trains stays None: it depends on the checkpoint.
        """
        for mode, settings in MODES.items():
            for name in overrides.keys() - {mode, *settings} if overrides.get(mode) else ():
                raise ConfigError(f"--{name}: cannot be combined with --{mode}")
        recipe = "finetune " * bool(overrides.get("finetune")) + overrides.get("optimizer", "sgd")
        values = dict(LINEAR_RECIPES.get(recipe, {}))
        values["out"] = os.path.dirname(overrides.get("model_path", cls.model_path)) or "."
        return cls(**place_of_run(values | overrides, overrides))

    def validate(self) -> None:
        super().validate()
        for flag, wrong, reason in (
            ("cached", self.cached and self.finetune, "features of a trained encoder change"),
            ("optimizer", self.optimizer == "lars" and self.finetune, "is for heads alone"),
            ("amp", self.amp == "fp16" and self.finetune, "is for frozen encoders"),
            *(
                (flag, getattr(self, flag) and not self.finetune, "goes with --finetune")
                for flag in ("from_scratch", "encoder_lr", "mixup")
            ),
            (
                "optimizer",
                self.optimizer == "adamw" and not self.finetune,
                "goes with --finetune",
            ),
            ("predict", self.predict and self.evaluate_only, "choose it or --evaluate_only"),
            ("out_csv", self.out_csv and not self.predict, "goes with --predict"),
            ("overwrite", self.overwrite and self.resume, "cannot be combined with --resume"),
        ):
            if wrong:
                ending = ", so without --finetune" if self.finetune and "goes" not in reason else ""
                raise ConfigError(f"{self.flag(flag)}: {reason}{ending}")

    @property
    def mode(self) -> str:
        """What is trained, as in the names of the run's files."""
        if not self.finetune:
            return "linear"
        return "scratch" if self.from_scratch else "finetune"


# ---- runs ---------------------------------------------------------------------------------------


def place_of_run(values: dict, overrides: Mapping[str, object]) -> dict:
    """Return `values` with the folder and name of the run at --resume PATH, unless overridden."""
    if not isinstance(values.get("resume"), str):
        return values
    folder, name = run_of(values["resume"])
    return values | {"out": overrides.get("out", folder), "name": overrides.get("name", name)}


def run_of(path: str) -> tuple[str, str]:
    """Return the folder and the name of the run whose checkpoint is at `path`."""
    folder, file = os.path.split(path)
    for end in ("_model.prev.pth", "_model.pth", ".pth"):
        file = file.removesuffix(end)
    return folder or ".", file
