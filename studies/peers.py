"""What others do, for bench and speedrun: their functions in a plain loop, as users write it.

Each peer has a process of its own, so that no setting of ours reaches it. A peer is a function
that prepares what its users keep, and returns the function to be timed.
"""

import copy
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Peer:
    """`peer(*args)` in a process of its own; called, it runs there once and gives the result."""

    def __init__(self, peer: Callable, *args):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=serve, args=(end, peer, args))
        self.process.start()
        end.close()
        self.pipe.recv()  # it is ready

    def __call__(self, *args) -> Any:
        self.pipe.send(args)
        return self.pipe.recv()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *error) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(pipe, peer: Callable, args: tuple) -> None:
    """The other end of a Peer."""
    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as Linux has it
    run = peer(*args)
    pipe.send("ready")
    while (args := pipe.recv()) is not None:
        pipe.send(run(*args))


class PilBlur:
    """The authors' Gaussian blur, PIL's."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class PilViews(Dataset):
    """`number` views of each PIL image, or file, by torchvision's transforms, one at a time."""

    def __init__(self, images: list, number: int, recipe: dict, size: int):
        from torchvision import transforms as t

        self.images, self.number = images, number
        self.transform = t.Compose(
            [
                t.RandomResizedCrop(size, scale=(0.2, 1.0)),
                t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                t.RandomGrayscale(p=0.2),
                *([t.RandomApply([PilBlur()], p=recipe["blur_p"])] if recipe["blur_p"] else []),
                t.RandomHorizontalFlip(),
                t.ToTensor(),
                t.Normalize(recipe["mean"], recipe["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        image = self.images[i]
        if isinstance(image, str):
            image = Image.open(image).convert("RGB")
        return tuple(self.transform(image) for _ in range(self.number))


def pil(images: Tensor) -> list:
    """uint8, N x 3 x H x W -> N PIL images."""
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def torchvision_views(images: Tensor, recipe: dict, batch: int) -> Callable:
    """A view of each image: torchvision's PIL transforms in a DataLoader with two workers."""
    views = PilViews(pil(images), 1, recipe, images.shape[-1])
    loader = DataLoader(views, batch, num_workers=2, persistent_workers=True)
    return lambda: sum(len(x) for (x,) in loader)


def torchvision_files(paths: list[str], recipe: dict, batch: int) -> Callable:
    """Two views of each file: the transforms of the authors' code, in one DataLoader worker."""
    views = PilViews(paths, 2, recipe, recipe["image_size"])
    loader = DataLoader(views, batch, num_workers=1, persistent_workers=True)
    return lambda: sum(len(x) for x, _ in loader)


def kornia_views(images: Tensor, recipe: dict, batch: int) -> Callable:
    """A view of each image: kornia's transforms, a batch at a time."""
    import kornia.augmentation as k

    transform = k.AugmentationSequential(
        k.RandomResizedCrop(images.shape[2:], scale=(0.2, 1.0)),
        k.RandomHorizontalFlip(),
        k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.Normalize(recipe["mean"], recipe["std"]),
    )
    return lambda: sum(len(transform(chunk.float() / 255)) for chunk in images.split(batch))


def plain_training(images: Tensor, recipe: dict, batch: int, device: str = "cpu") -> Callable:
    """Steps of SimSiam as a plain loop has them: NCHW, PIL views, `.item()` each step."""
    from simsiam.models.simsiam import SimSiam

    net = SimSiam().to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), recipe["lr"], recipe["momentum"], weight_decay=recipe["weight_decay"]
    )
    views = PilViews(pil(images), 2, recipe, images.shape[-1])
    loader = DataLoader(views, batch, shuffle=True, num_workers=2, persistent_workers=True)

    def run() -> float:
        total = 0.0
        for x1, x2 in loader:
            loss, *_ = net([x1.to(device), x2.to(device)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    return run


class Labelled(Dataset):
    """PIL images and their labels."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable):
        self.images, self.labels, self.transform = pil(images), labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(self.images[i]), self.labels[i]


def lightly_training(
    images, args, method: str = "SimSiam", amp: bool = False, **options: object
) -> Callable:
    """Lightly's SimSiam, BYOL or FastSiam: its transforms, heads, loss and `knn_predict`.

    `images` is a `Data`. Backbone, optimizer, schedule, batches and device are those of main.py's
    `args`; d, too, but for BYOL, whose heads are those of lightly's benchmark on CIFAR-10. `amp`:
    in bf16. `options`: of lightly's transforms. Returns an `epochs_of`.
    """
    import torchvision.transforms as t
    from lightly import transforms

    from simsiam.models.backbones import build_backbone

    torch.manual_seed(args.seed)
    options |= {"input_size": images.train_images.shape[-1]}
    body, features = build_backbone(args.arch, args.stem, args.width)
    if method == "BYOL":
        first, second = transforms.BYOLView1Transform, transforms.BYOLView2Transform
        views = transforms.BYOLTransform(first(**options), second(**options))
        net = LightlyByol(body, features)
    else:
        views = getattr(transforms, f"{method}Transform")(**options)
        net = LightlySimSiam(body, features, args.feature_dim)
    normalise = transforms.SimSiamTransform().transforms[0].transform.transforms[-1]
    train = Labelled(images.train_images, images.train_labels, views)
    plain = t.Compose([t.ToTensor(), normalise])
    return epochs_of(net, body, net.encoder.parameters(), train, images, plain, args, amp)


def plain_learning(images, args, recipe: dict, amp: bool = False) -> Callable:
    """The paper's SimSiam with torchvision's transforms, as most write it: an `epochs_of`."""
    import torchvision.transforms as t

    from simsiam.models.methods import build_model

    torch.manual_seed(args.seed)
    net = build_model(vars(args))
    size = images.train_images.shape[-1]
    train = Labelled(images.train_images, images.train_labels, None)
    views = PilViews(train.images, 2, recipe, size)
    train.transform = lambda image: [views.transform(image) for _ in range(2)]
    plain = t.Compose([t.ToTensor(), t.Normalize(recipe["mean"], recipe["std"])])
    encoder = net.encoder_parameters()
    return epochs_of(net, net.backbone, encoder, train, images, plain, args, amp)


def epochs_of(
    net: nn.Module,
    backbone: nn.Module,
    encoder: Iterable[nn.Parameter],
    train: Dataset,
    images,
    plain: Callable,
    args,
    amp: bool,
) -> Callable:
    """A function to be called with each epoch: the seconds of its training, and the kNN's top-1.

    With `judge` False there is None in the place of the kNN. `train`: views, a list, and a label;
    `net`: views to the loss; `encoder`: its parameters but the predictor's; `plain`: the test
    transform of a PIL image.
    """
    from simsiam.runtime.schedule import cosine_schedule

    peak, device = args.lr * args.batch_size / 256, torch.device(args.device)
    net.to(device)
    groups = [{"params": [*encoder]}, {"params": [*net.predictor.parameters()], "fix": True}]
    sgd = {"momentum": args.momentum, "weight_decay": args.weight_decay}
    optimizer = torch.optim.SGD(groups, peak, **sgd)
    cores = getattr(os, "sched_getaffinity", lambda _: range(2))(0)
    # One core: a worker beside the loop would only wait for it.
    workers = {"num_workers": 2, "persistent_workers": True} if len(cores) > 1 else {}
    loader = DataLoader(train, args.batch_size, shuffle=True, drop_last=True, **workers)
    score = lightly_score(images, args, plain, workers)

    def run(epoch: int, judge: bool = True) -> tuple[float, float | None]:
        begun = time.perf_counter()
        net.train()
        for step, (x, _) in enumerate(loader):
            lr = peak * cosine_schedule(epoch + step / len(loader), args.epochs)
            for group in optimizer.param_groups:
                group["lr"] = peak if "fix" in group and args.fix_pred_lr else lr
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = net([one.to(device) for one in x])
            loss = loss[0] if isinstance(loss, tuple) else loss  # ours gives more besides
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - begun
        return seconds, score(backbone) if judge else None

    return run


class LightlySimSiam(nn.Module):
    """The step of lightly's examples of SimSiam and, with more than two views, of FastSiam."""

    def __init__(self, backbone: nn.Module, features: int, d: int):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

        super().__init__()
        self.encoder = nn.Sequential(backbone, SimSiamProjectionHead(features, d, d))
        self.predictor = SimSiamPredictionHead(d, d // 4, d)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor]) -> Tensor:
        z = [self.encoder(x) for x in views]
        others = [torch.stack(z[:i] + z[i + 1 :]).mean(0).detach() for i in range(len(z))]
        pairs = zip(z, others, strict=True)
        return sum(self.criterion(self.predictor(one), rest) for one, rest in pairs) / len(z)


class LightlyByol(nn.Module):
    """The step of lightly's example of BYOL, with the numbers of its benchmark."""

    def __init__(self, backbone: nn.Module, features: int):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.encoder = nn.Sequential(backbone, BYOLProjectionHead(features, 1024, 256))
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        self.follower = copy.deepcopy(self.encoder)
        deactivate_requires_grad(self.follower)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, views: list[Tensor]) -> Tensor:
        from lightly.models.utils import update_momentum

        update_momentum(self.encoder, self.follower, 0.99)
        p = [self.predictor(self.encoder(x)) for x in views]
        with torch.no_grad():
            z = [self.follower(x) for x in views]
        return 0.5 * (self.criterion(p[0], z[1]) + self.criterion(p[1], z[0]))


def lightly_score(images, args, plain: Callable, workers: dict) -> Callable[[nn.Module], float]:
    """The kNN's top-1 of a backbone, as lightly's benchmark takes it; `plain`: its transform."""
    from lightly.utils.benchmarking import knn_predict

    bank, queries = (
        DataLoader(Labelled(*part, plain), 512, **workers)
        for part in (
            (images.train_images, images.train_labels),
            (images.test_images, images.test_labels),
        )
    )

    @torch.no_grad()
    def score(backbone: nn.Module) -> float:
        backbone.eval()
        embed = lambda x: F.normalize(backbone(x.to(args.device)), dim=1)  # noqa: E731
        features, labels = zip(*((embed(x), y) for x, y in bank), strict=True)
        features, labels = torch.cat(features).T.contiguous(), torch.cat(labels).to(args.device)
        classes, hits = len(images.classes), 0
        for x, y in queries:
            found = knn_predict(embed(x), features, labels, classes, args.k, args.temperature)
            hits += (found[:, 0].cpu() == y).sum().item()
        return 100 * hits / len(images.test_labels)

    return score


def lightly_knn(bank: Tensor, labels: Tensor, queries: Tensor) -> Callable:
    """`knn_predict` in chunks of 512."""
    from lightly.utils.benchmarking import knn_predict

    bank, classes = bank.T.contiguous(), int(labels.max()) + 1
    return lambda: torch.cat(
        [
            knn_predict(x, bank, labels, classes, knn_k=200, knn_t=0.1)[:, 0]
            for x in queries.split(512)
        ]
    )


def scikit_knn(bank: Tensor, labels: Tensor, queries: Tensor) -> Callable:
    """Brute force on all cores, with the same vote: unit vectors' cosine is 1 - distance^2 / 2."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    judge = KNeighborsClassifier(
        200, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1), algorithm="brute", n_jobs=-1
    ).fit(bank.numpy(), labels.numpy())
    return lambda: torch.from_numpy(judge.predict(queries.numpy()))
