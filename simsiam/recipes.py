"""Recipes of main.py: the defaults of its flags, and the views, by name."""

from simsiam.views import NORMALISATION, Augmentation

CIFAR = {  # paper, App. D
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
IMAGENET = CIFAR | {  # paper, sec. 3 and App. A; the predictor's lr as in the authors' command
    "arch": "resnet50",
    "stem": "imagenet",
    "image_size": 224,
    "projector_layers": 3,
    "epochs": 100,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "fix_pred_lr": True,
}
SHORT = CIFAR | {  # ours, for minutes to hours on a CPU: see docs/results.md
    "arch": "resnet8",
    "feature_dim": 512,
    "batch_size": 64,
    "epochs": 20,
    "lr": 1.0,
    "fix_pred_lr": True,
}
FAST = SHORT | {  # ours: the most accuracy a minute of what docs/results.md compares
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
# What the views of a recipe are, and mean and std of the images.
VIEWS = {
    "cifar": (Augmentation(), *NORMALISATION["cifar"]),
    "imagenet": (Augmentation(blur_p=0.5), *NORMALISATION["imagenet"]),
    "short": (Augmentation(), *NORMALISATION["cifar"]),
    "fast": (Augmentation(), *NORMALISATION["cifar"]),
}
USUAL_RECIPE = {"textures": "short", "imagenet": "imagenet", "webdataset": "imagenet"}
