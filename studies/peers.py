"""Peers for benchmarks: functions of lightly, torchvision, kornia and scikit-learn in plain loops.

Each peer has a process of its own, so that no setting of this project reaches it. A peer is a
function that prepares what its users prepare once, and returns the function to be timed.
"""

import copy
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from simsiam.data.loader import Data
from simsiam.models.backbones import build_backbone
from simsiam.models.methods import build_model
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training.recipes import PretrainConfig


class Peer:
    """A process that calls `function(*args)`, and then its result each time the Peer is called."""

    def __init__(self, function: Callable, *args: object):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, function, args))
        self.process.start()
        end.close()
        self.pipe.recv()  # ready

    def __call__(self, *args: object) -> Any:
        self.pipe.send(args)
        return self.pipe.recv()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(pipe: Connection, function: Callable, args: tuple) -> None:
    """Run the process of a `Peer`."""
    multiprocessing.set_start_method("fork", force=True)  # for loader workers: Linux's default
    run = function(*args)
    pipe.send("ready")
    while (args := pipe.recv()) is not None:
        pipe.send(run(*args))


def blur(image: Image.Image) -> Image.Image:
    """PIL's Gaussian blur, as the authors' code has it."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def pil_views(recipe: dict, size: int, number: int) -> Callable[[Image.Image], list[Tensor]]:
    """Return a function of a PIL image: `number` views, by torchvision's transforms.

    `recipe`: blur_p, mean and std. `size`: pixels.
    """
    from torchvision import transforms as t

    transform = t.Compose(
        [
            t.RandomResizedCrop(size, scale=(0.2, 1.0)),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            *([t.RandomApply([blur], p=recipe["blur_p"])] if recipe["blur_p"] else []),
            t.RandomHorizontalFlip(),
            t.ToTensor(),
            t.Normalize(recipe["mean"], recipe["std"]),
        ]
    )
    return lambda image: [transform(image) for _ in range(number)]


class Transformed(Dataset):
    """PIL images or paths of files, each as `transform` returns it, with labels (0 if None)."""

    def __init__(self, images: list, labels: Tensor | None, transform: Callable):
        self.images, self.transform = images, transform
        self.labels = torch.zeros(len(images)) if labels is None else labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[object, Tensor]:
        image = self.images[i]
        if isinstance(image, str):
            image = Image.open(image).convert("RGB")
        return self.transform(image), self.labels[i]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return images (uint8, N x 3 x H x W) as N PIL images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def torchvision_views(images: Tensor, recipe: dict, batch: int) -> Callable:
    """One view per image: torchvision's PIL transforms in a DataLoader with two workers."""
    views = Transformed(to_pil(images), None, pil_views(recipe, images.shape[-1], 1))
    loader = DataLoader(views, batch, num_workers=2, persistent_workers=True)
    return lambda: sum(len(labels) for _, labels in loader)


def torchvision_files(paths: list[str], recipe: dict, batch: int) -> Callable:
    """Two views per file: the transforms of the authors' code, in one DataLoader worker."""
    views = Transformed(paths, None, pil_views(recipe, recipe["image_size"], 2))
    loader = DataLoader(views, batch, num_workers=1, persistent_workers=True)
    return lambda: sum(len(labels) for _, labels in loader)


def kornia_views(images: Tensor, recipe: dict, batch: int) -> Callable:
    """One view per image: kornia's transforms, in batches."""
    import kornia.augmentation as k

    transform = k.AugmentationSequential(
        k.RandomResizedCrop(images.shape[2:], scale=(0.2, 1.0)),
        k.RandomHorizontalFlip(),
        k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.Normalize(recipe["mean"], recipe["std"]),
    )
    return lambda: sum(len(transform(chunk.float() / 255)) for chunk in images.split(batch))


def lightly_training(
    images: Data, config: PretrainConfig, method: str = "SimSiam", amp: bool = False
) -> Callable:
    """Lightly's SimSiam, BYOL or FastSiam: its transforms, heads, loss and `knn_predict`.

    Backbone, optimizer, schedule, batch size and device are those of `config`; d, too, except for
    BYOL, whose heads are those of lightly's benchmark on CIFAR-10. `amp`: in bf16.
    Returns an `epoch_function`.
    """
    import torchvision.transforms as t
    from lightly import transforms

    torch.manual_seed(config.seed)
    size = images.train_images.shape[-1]
    body, features = build_backbone(config.arch, config.stem, config.width)
    if method == "BYOL":
        first, second = transforms.BYOLView1Transform, transforms.BYOLView2Transform
        views = transforms.BYOLTransform(first(input_size=size), second(input_size=size))
        net = LightlyByol(body, features)
    else:
        views = getattr(transforms, f"{method}Transform")(input_size=size)
        net = LightlySimSiam(body, features, config.feature_dim)
    normalise = transforms.SimSiamTransform().transforms[0].transform.transforms[-1]
    train = Transformed(to_pil(images.train_images), images.train_labels, views)
    transform = t.Compose([t.ToTensor(), normalise])
    encoder = net.encoder.parameters()
    return epoch_function(net, body, encoder, train, images, transform, config, amp)


def plain_training(
    images: Data, config: PretrainConfig, recipe: dict, amp: bool = False
) -> Callable:
    """SimSiam in a usual loop, NCHW, with torchvision's PIL transforms: an `epoch_function`."""
    import torchvision.transforms as t

    torch.manual_seed(config.seed)
    net = build_model(vars(config))
    views = pil_views(recipe, images.train_images.shape[-1], 2)
    train = Transformed(to_pil(images.train_images), images.train_labels, views)
    transform = t.Compose([t.ToTensor(), t.Normalize(recipe["mean"], recipe["std"])])
    encoder = net.encoder_parameters()
    return epoch_function(net, net.backbone, encoder, train, images, transform, config, amp)


def epoch_function(
    net: nn.Module,
    backbone: nn.Module,
    encoder: Iterable[nn.Parameter],
    train: Dataset,
    images: Data,
    transform: Callable,
    config: PretrainConfig,
    amp: bool,
) -> Callable[..., tuple[float, float | None]]:
    """Return a function that trains an epoch and returns its seconds, and the kNN's top-1.

    The function's arguments: the epoch, and whether to evaluate; if not, the top-1 is None.
    `net`: maps a list of views to the loss. `encoder`: its parameters without the predictor's.
    `train`: pairs of views and a label. `transform`: the test transform of a PIL image.
    """
    peak, device = config.lr * config.batch_size / 256, torch.device(config.device)
    net.to(device)
    groups = [{"params": [*encoder]}, {"params": [*net.predictor.parameters()], "fix_lr": True}]
    sgd = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    optimizer = torch.optim.SGD(groups, peak, **sgd)
    cores = getattr(os, "sched_getaffinity", lambda _: range(2))(0)
    # One core: a worker beside the loop would only wait for it.
    workers = {"num_workers": 2, "persistent_workers": True} if len(cores) > 1 else {}
    loader = DataLoader(train, config.batch_size, shuffle=True, drop_last=True, **workers)
    evaluate = lightly_knn_accuracy(images, config, transform, workers)

    def run(epoch: int, is_due: bool = True) -> tuple[float, float | None]:
        start = time.perf_counter()
        net.train()
        for step, (x, _) in enumerate(loader):
            lr = peak * cosine_schedule(epoch + step / len(loader), config.epochs)
            for group in optimizer.param_groups:
                group["lr"] = peak if "fix_lr" in group and config.fix_pred_lr else lr
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = net([view.to(device) for view in x])
            loss = loss[0] if isinstance(loss, tuple) else loss  # SimSiam's Outputs
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        return seconds, evaluate(backbone) if is_due else None

    return run


class LightlySimSiam(nn.Module):
    """The loss in lightly's examples of SimSiam and, with more than two views, of FastSiam."""

    def __init__(self, backbone: nn.Module, features: int, d: int):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

        super().__init__()
        self.encoder = nn.Sequential(backbone, SimSiamProjectionHead(features, d, d))
        self.predictor = SimSiamPredictionHead(d, d // 4, d)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor]) -> Tensor:
        z = [self.encoder(x) for x in views]
        targets = [torch.stack(z[:i] + z[i + 1 :]).mean(0).detach() for i in range(len(z))]
        losses = map(self.criterion, map(self.predictor, z), targets)
        return sum(losses) / len(z)


class LightlyByol(nn.Module):
    """The loss in lightly's example of BYOL, with the settings of its benchmark on CIFAR-10."""

    def __init__(self, backbone: nn.Module, features: int):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.encoder = nn.Sequential(backbone, BYOLProjectionHead(features, 1024, 256))
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        self.momentum_encoder = copy.deepcopy(self.encoder)
        deactivate_requires_grad(self.momentum_encoder)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor]) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.encoder, self.momentum_encoder, 0.99)
        p = [self.predictor(self.encoder(x)) for x in views]
        with torch.no_grad():
            z = [self.momentum_encoder(x) for x in views]
        return 0.5 * (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0]))


def lightly_knn_accuracy(
    images: Data, config: PretrainConfig, transform: Callable, workers: dict
) -> Callable[[nn.Module], float]:
    """Return a function of a backbone: its kNN top-1 as lightly's benchmark computes it."""
    bank, queries = (
        DataLoader(Transformed(to_pil(x), labels, transform), 512, **workers)
        for x, labels in (
            (images.train_images, images.train_labels),
            (images.test_images, images.test_labels),
        )
    )

    @torch.no_grad()
    def evaluate(backbone: nn.Module) -> float:
        from lightly.utils.benchmarking import knn_predict

        backbone.eval()
        embed = lambda x: F.normalize(backbone(x.to(config.device)), dim=1)  # noqa: E731
        features, labels = zip(*((embed(x), y) for x, y in bank), strict=True)
        features, labels = torch.cat(features).T.contiguous(), torch.cat(labels).to(config.device)
        classes, correct = len(images.classes), 0
        for x, y in queries:
            ranking = knn_predict(embed(x), features, labels, classes, config.k, config.temperature)
            correct += (ranking[:, 0].cpu() == y).sum().item()
        return 100 * correct / len(images.test_labels)

    return evaluate


def lightly_knn(bank: Tensor, labels: Tensor, queries: Tensor) -> Callable:
    """Lightly's `knn_predict` in chunks of 512."""
    from lightly.utils.benchmarking import knn_predict

    bank, classes = bank.T.contiguous(), int(labels.max()) + 1
    return lambda: torch.cat(
        [
            knn_predict(x, bank, labels, classes, knn_k=200, knn_t=0.1)[:, 0]
            for x in queries.split(512)
        ]
    )


def sklearn_knn(bank: Tensor, labels: Tensor, queries: Tensor) -> Callable:
    """scikit-learn's brute force on all cores. For unit vectors, cosine = 1 - distance^2 / 2."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(
        200, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1), algorithm="brute", n_jobs=-1
    ).fit(bank.numpy(), labels.numpy())
    return lambda: torch.from_numpy(classifier.predict(queries.numpy()))
