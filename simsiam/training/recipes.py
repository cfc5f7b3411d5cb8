"""PretrainConfig and LinearConfig, each setting of main.py and linear.py once; and recipes."""

import dataclasses
import glob
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import ClassVar

from simsiam.data.datasets import DATASETS
from simsiam.data.decode import (
    BACKGROUNDS,
    LEVELS,
    NAMES,
    DecodeOptions,
    check_decode_options,
)
from simsiam.evaluation.knn import KNN_K, KNN_TEMPERATURE
from simsiam.models.backbones import IMAGENET_ARCHS, STEMS, is_library_arch
from simsiam.models.methods import METHODS, unused_fields
from simsiam.models.simsiam import BN, CRITERIA, LOSSES, PREDICTORS, TARGETS
from simsiam.runtime.config import (
    PATH,
    Auto,
    Choice,
    ConfigError,
    Flag,
    Kind,
    Number,
    RunConfig,
    Several,
    Text,
    option,
)
from simsiam.views.augment import MIN_STD, NORMALISATION
from simsiam.views.ops import PROBABILITY, Augmentation

INIT_PARTS = ("fitting", "backbone", "all")
TEXTURES_HAVE_NO_ROOT = (
    "--data_root: textures are generated: leave it out or, for your own images, add "
    "--data_name folder"
)

# ---- kinds of values that only these settings have ----------------------------------------------


class Roots(Kind):
    """Paths of one data set, or patterns with *, ? or []; joined as in the PATH of a shell."""

    nargs = "+"
    metavar = "ROOT"

    def parse(self, words: list[str]) -> str:
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
    """The side of a view: whole pixels from 8 on, or at most 1 as a part of the image's side."""

    def __init__(self):
        super().__init__(float, 0.1, 1024)

    def expected(self) -> str:
        return "pixels, 8 or more, or a part of the side from 0.1 to 1"

    def parse(self, words: str) -> float:
        value = super().parse(words)
        return int(value) if value > 1 and value.is_integer() else value

    def check(self, value: object) -> None:
        super().check(value)
        if value > 1 and (value < 8 or value != int(value)):
            raise ValueError(f"must be {self.expected()}")


COUNT, POSITIVE = Number(int, 1, 2**31), Number(float, 1e-12)
AT_LEAST_0, IMAGE_SIZE = Number(float, 0), Number(int, 8, 1024)
MEAN, STD = Several(PROBABILITY), Several(Number(float, MIN_STD, 1))


# ---- pre-training -------------------------------------------------------------------------------


@dataclasses.dataclass
class PretrainConfig(RunConfig, Augmentation, DecodeOptions):
    """The settings of a pre-training run, of its images and of its views.

    A recipe replaces some of the defaults. Raises ConfigError for settings that are invalid, or
    that do not go together.
    """

    data_name: str = option(Choice(DATASETS), "cifar10", "the data set")
    data_root: str = option(Roots(), "data", "folder of downloads, or folders or lists of images")
    split_names: tuple | None = option(NAMES, None, "folders or lists there: training, then test")
    train_size: int | None = option(COUNT, None, "train on a class-balanced, seeded subset")
    image_size: int | None = option(IMAGE_SIZE, None, "side of the views, instead of the images'")
    view_sizes: tuple | None = option(
        Several(ViewSize()),
        None,
        "sides of the views over equal parts of the epochs: pixels or parts",
    )

    mean: tuple | str = option(
        Auto(MEAN), "auto", "per channel, 0 to 1; auto: of the training images"
    )
    std: tuple | str = option(Auto(STD), "auto", "as --mean, the std")

    method: str = option(Choice(METHODS), "simsiam", "the method: network and loss")
    arch: str = option(
        Text("NAME"),
        "resnet18",
        f"{', '.join(IMAGENET_ARCHS)}; resnet8, resnet14, ... (6n+2); timm:NAME, torchvision:NAME",
    )
    stem: str = option(Choice(STEMS), "cifar", "first layers of resnet18 to resnet152")
    width: int | None = option(
        Number(int, 1, 1024), None, "of the first stage of resnet8, resnet14, ... (16)"
    )
    feature_dim: int = option(Number(int, 4, 16384), 2048, "d, the width of projector and output z")
    projector_layers: int = option(Number(int, 1, 8), 2, "linear layers of the projector")
    projector_affine: bool = option(Flag(), False, "make the projector's last BN affine")
    init: str | None = option(PATH, None, "start from the weights of any checkpoint")
    init_parts: str = option(
        Choice(INIT_PARTS), "fitting", "--init takes: backbone and fitting heads, backbone, or all"
    )

    stop_grad: str = option(Choice(("on", "off")), "on", "stop the gradient through z (sec. 4.1)")
    predictor: str = option(
        Choice(PREDICTORS), "mlp", "none: p = z; fixed: random weights (sec. 4.2)"
    )
    bn: str = option(Choice(BN), "default", "BN in the heads: no, hidden or all layers (sec. 4.4)")
    similarity: str = option(Choice(CRITERIA), "cosine", "criterion of p and z (sec. 4.5)")
    loss: str = option(
        Choice(LOSSES), "symmetric", "pairs of views: both ways, one; 2x: two pairs (sec. 4.6)"
    )

    target: str = option(
        Choice(TARGETS), "other", "z that p predicts; mean: of all other views (FastSiam)"
    )
    num_views: int = option(Number(int, 2, 16), 2, "views per image, with --target mean")
    covariance: float = option(AT_LEAST_0, 0.0, "weight of VICReg's covariance term on z")

    recipe: str | None = option(
        Choice(("cifar", "imagenet", "short", "fast")),
        None,
        "defaults (textures: short; imagenet, webdataset: imagenet; else cifar)",
    )
    optimizer: str = option(Choice(("sgd", "muon")), "sgd", "muon: orthogonal updates, by timm")
    batch_size: int = option(Number(int, 2, 2**31), 512, "images per step, of all ranks together")
    epochs: int = option(COUNT, 800, "passes over the training set")
    lr: float = option(POSITIVE, 0.03, "base lr: lr = base * batch_size / 256")
    momentum: float = option(PROBABILITY, 0.9, "momentum of the optimizer")
    weight_decay: float = option(AT_LEAST_0, 5e-4, "weight decay")
    bn_decay: bool = option(Flag(), True, "weight decay also on BN's parameters and on biases")
    warmup_epochs: float = option(AT_LEAST_0, 0.0, "epochs of linear warm-up")
    fix_pred_lr: bool = option(Flag(), False, "keep the predictor's lr constant")
    cuda_graphs: bool = option(Flag(), False, "with --compile, for small networks on cuda")

    k: int = option(COUNT, KNN_K, "neighbours that vote in the kNN")
    temperature: float = option(POSITIVE, KNN_TEMPERATURE, "temperature of the kNN's vote")
    bank_size: int | None = option(COUNT, None, "class-balanced, seeded subset as the kNN's bank")
    knn_every: int = option(COUNT, 1, "epochs from one kNN to the next; the last epoch has one")
    probe: bool | None = option(Flag(), None, "a linear probe on detached features (with labels)")
    stop_on_collapse: bool = option(Flag(), False, "end the run at its first warning of a collapse")
    show_views: bool = option(Flag(), False, "draw the views as the network sees them, and exit")
    tensorboard: bool = option(Flag(), False, "write for TensorBoard too")

    # Titles of the help's groups, by their first field.
    groups: ClassVar[dict[str, str]] = {
        "data_name": "data",
        "exif": "image files",  # from DecodeOptions
        "crop_scale": "views",  # from Augmentation
        "mean": "views",
        "method": "network",
        "stop_grad": "the paper's ablations",
        "target": "beyond the paper",
        "recipe": "optimization",
        "k": "monitor",
        "seed": "run",  # from RunConfig
    }
    selectors: ClassVar[tuple[str, ...]] = ("data_name", "recipe", "arch", "channels")

    @classmethod
    def resolve(cls, overrides: Mapping[str, object]) -> "PretrainConfig":
        data_name = overrides.get("data_name", cls.data_name)
        recipe = overrides.get("recipe") or USUAL_RECIPE.get(data_name, "cifar")
        place = place_of_run(overrides.get("resume"))
        values = RECIPES[recipe] | place | overrides | {"recipe": recipe}
        if data_name == "textures" and "data_root" in overrides:
            raise ConfigError(TEXTURES_HAVE_NO_ROOT)
        for name in sorted(unused_fields(values["method"]) & overrides.keys()):
            raise ConfigError(f"--{name}: not used by --method {values['method']}: leave it out")
        if is_library_arch(values["arch"]):
            values["stem"] = overrides.get("stem", "imagenet")
        if values["view_sizes"] and "view_sizes" not in overrides:
            values["view_sizes"] = values["view_sizes"][-values["epochs"] :]
        if values["channels"] != 3:
            defaults = {"mean": "auto", "std": "auto", "gray_p": 0.0}
            defaults["jitter"] = (*values["jitter"][:2], 0.0, 0.0)
            values |= {name: overrides.get(name, value) for name, value in defaults.items()}
        config = cls(**values)
        # Not in `validate`: a checkpoint opens where TensorBoard is missing, too.
        lacking = config.tensorboard and importlib.util.find_spec("tensorboard") is None
        config.refuse("tensorboard", lacking, "needs a package: pip install tensorboard")
        if config.name is None:
            config.name = "{feature_dim}_{k}_{batch_size}_{epochs}".format(**values)
            if (config.data_name, config.arch) != ("cifar10", "resnet18"):
                config.name = f"{config.data_name}_{config.arch}_{config.name}"
        return config

    def validate(self) -> None:
        super().validate()
        check_decode_options(vars(self), self.data_name)
        refuse, sizes, channels = self.refuse, self.view_sizes or (), self.channels
        refuse("init_parts", self.init_parts != "fitting" and not self.init, "goes with --init")
        refuse("view_sizes", len(sizes) > self.epochs, f"at most one per epoch ({self.epochs})")
        in_files = self.data_name in ("imagenet", "webdataset")
        refuse("view_sizes", sizes and in_files, "is for images in memory, not for files")
        refuse("cuda_graphs", self.cuda_graphs and not self.compile, "goes with --compile")
        too_long = self.warmup_epochs >= self.epochs
        refuse("warmup_epochs", too_long, f"must be below --epochs {self.epochs}")
        for name in ("show_views", "overwrite"):
            refuse(name, getattr(self, name) and self.resume, "cannot be combined with --resume")
        needed = f"saturation, hue and grayscale need three channels, not {channels}: --jitter "
        needed += f"{self.jitter[0]:g} {self.jitter[1]:g} 0 0 --gray_p 0"
        refuse("jitter", any(self.jitter[2:]) and channels != 3, needed)
        refuse("gray_p", self.gray_p and channels != 3, needed)
        for name in ("mean", "std"):
            wrong = len(getattr(self, name)) != channels and getattr(self, name) != "auto"
            refuse(name, wrong, f"must be auto, or {channels} numbers, one per channel")

    @property
    def augmentation(self) -> Augmentation:
        """The augmentation hyperparameters."""
        return Augmentation.from_args(vars(self))

    @property
    def decode_options(self) -> DecodeOptions:
        """How image files are decoded."""
        return DecodeOptions.from_args(vars(self))


# ---- recipes ------------------------------------------------------------------------------------


def normalisation(name: str) -> dict[str, tuple]:
    """Return the mean and std of a data set's images as settings."""
    return dict(zip(("mean", "std"), NORMALISATION[name], strict=True))


# Paper, App. D: the defaults of all settings.
CIFAR = {field.name: field.default for field in dataclasses.fields(PretrainConfig)}
CIFAR |= normalisation("cifar")
# Paper, sec. 3 and App. A; the constant lr of the predictor is the authors' command's.
IMAGENET = CIFAR | {
    **normalisation("imagenet"),
    "blur_p": 0.5,
    "arch": "resnet50",
    "stem": "imagenet",
    "image_size": 224,
    "projector_layers": 3,
    "epochs": 100,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "fix_pred_lr": True,
}
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
    # With weight decay the projector's BN weights shrink; at a tenth, training diverges.
    "bn_decay": False,
    "fix_pred_lr": False,
}
RECIPES = {"cifar": CIFAR, "imagenet": IMAGENET, "short": SHORT, "fast": FAST}
PretrainConfig.recipes = RECIPES
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
# Settings of an encoder that the file of another project does not have.
SOURCE_OPTIONS = ("stem", "image_size", "mean", "std")


@dataclasses.dataclass
class LinearConfig(RunConfig):
    """The settings of a linear evaluation, of fine-tuning, or of a mode that trains nothing.

    The data's settings default to those of pre-training. Raises ConfigError for settings that are
    invalid, or that do not go together.
    """

    model_path: str = option(
        PATH,
        "results/2048_200_512_800_model.pth",
        "a checkpoint of main.py or of another project (docs/checkpoints.md); with "
        "--evaluate_only and --predict, one of linear.py",
    )
    evaluate_only: bool = option(Flag(), False, "score a linear model on the test set, no training")
    predict: tuple | None = option(
        Several(Text("FILE")), None, "predict the classes of images, and of folders of them"
    )
    out_csv: str | None = option(PATH, None, "write the predictions to this file too")

    stem: str | None = option(Choice(STEMS), None, "first layers (what the file's layout suggests)")
    image_size: int | None = option(IMAGE_SIZE, None, "of the encoder, in pixels (32 or 224)")
    mean: tuple | None = option(MEAN, None, "of the channels, from 0 to 1 (the project's)")
    std: tuple | None = option(STD, None, "as --mean, the std")

    data_name: str | None = option(Choice(DATASETS), None, "evaluate on another data set")
    data_root: str | None = option(Roots(), None, "where the data set is (another one: data)")
    split_names: tuple | None = option(NAMES, None, "folders or lists there: training, then test")
    exif: bool | None = option(Flag(), None, "turn images as EXIF says")
    background: str | None = option(Choice(BACKGROUNDS), None, "behind transparent pixels")
    exclude: tuple | None = option(NAMES, None, "names or paths in --data_root to leave out")
    levels: tuple | None = option(LEVELS, None, "values in files that become 0 and 255")
    label_fraction: float = option(
        Number(float, 1e-9, 1), 1.0, "use a class-balanced, seeded fraction of the labels"
    )

    cached: bool = option(Flag(), False, "extract the features once, without augmentation")
    optimizer: str = option(
        Choice(("sgd", "lars", "adamw")), "sgd", "lars: for heads; adamw: with --finetune"
    )
    batch_size: int = option(COUNT, 256, "images per step, of all ranks together")
    epochs: int = option(COUNT, 90, "passes over the training set")
    lr: tuple = option(
        Several(POSITIVE),
        (30.0,),
        "base lr, per 256 images; of several, the best on a held-out tenth",
    )
    weight_decay: float = option(AT_LEAST_0, 0.0, "weight decay")
    label_smoothing: float = option(PROBABILITY, 0.0, "part of a label spread over all classes")

    finetune: bool = option(Flag(), False, "train the encoder too, BN in train mode")
    from_scratch: bool = option(Flag(), False, "with --finetune: start from random weights")
    encoder_lr: float | None = option(POSITIVE, None, "base lr of the encoder (that of --lr)")
    mixup: float = option(Number(float, 0, 100), 0.0, "alpha of mixup in training; 0: none")

    recipes: ClassVar[Mapping[str, Mapping[str, object]]] = LINEAR_RECIPES
    groups: ClassVar[dict[str, str]] = {
        "model_path": "what",
        "stem": "another project's encoder",
        "data_name": "data (as in pre-training)",
        "cached": "protocol",
        "finetune": "the whole network",
    }
    selectors: ClassVar[tuple[str, ...]] = ("model_path", "finetune", "optimizer")

    @classmethod
    def resolve(cls, overrides: Mapping[str, object]) -> "LinearConfig":
        """Return the config of explicit settings; --out defaults to the folder of --model_path.

        The default name of a run stays None, since it depends on the checkpoint.
        """
        for mode, settings in MODES.items():
            for name in overrides.keys() - {mode, *settings} if overrides.get(mode) else ():
                raise ConfigError(f"--{name}: cannot be combined with --{mode}")
        recipe = "finetune " * bool(overrides.get("finetune")) + overrides.get("optimizer", "sgd")
        values = {"out": os.path.dirname(overrides.get("model_path", cls.model_path)) or "."}
        values |= LINEAR_RECIPES.get(recipe, {}) | place_of_run(overrides.get("resume"))
        return cls(**values | overrides)

    def validate(self) -> None:
        super().validate()
        refuse, tuned = self.refuse, self.finetune
        refuse("cached", self.cached and tuned, "is for a frozen encoder, without --finetune")
        is_lars, is_adamw = self.optimizer == "lars", self.optimizer == "adamw"
        refuse("optimizer", is_lars and tuned, "is for heads alone, without --finetune")
        refuse("amp", self.amp == "fp16" and tuned, "is for frozen encoders, without --finetune")
        refuse("optimizer", is_adamw and not tuned, "goes with --finetune")
        for name in ("from_scratch", "encoder_lr", "mixup"):
            refuse(name, getattr(self, name) and not tuned, "goes with --finetune")
        refuse("predict", self.predict and self.evaluate_only, "choose it or --evaluate_only")
        refuse("out_csv", self.out_csv and not self.predict, "goes with --predict")
        refuse("overwrite", self.overwrite and self.resume, "cannot be combined with --resume")

    @property
    def mode(self) -> str:
        """The kind of training, as in the names of the run's files."""
        if not self.finetune:
            return "linear"
        return "scratch" if self.from_scratch else "finetune"


# ---- runs ---------------------------------------------------------------------------------------


def place_of_run(resume: bool | str | None) -> dict[str, str]:
    """Return the settings `out` and `name` of the run at --resume PATH; empty without a path."""
    if not isinstance(resume, str):
        return {}
    folder, name = run_of(resume)
    return {"out": folder, "name": name}


def run_of(path: str) -> tuple[str, str]:
    """Return the folder and the name of the run whose checkpoint is at `path`."""
    folder, file = os.path.split(path)
    for end in ("_model.prev.pth", "_model.pth", ".pth"):
        file = file.removesuffix(end)
    return folder or ".", file
