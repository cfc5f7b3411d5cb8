"""What others do, for tools/bench.py to time: their functions in a plain loop, as users write it.

Each peer has a process of its own, so that no setting of ours reaches it. A peer is a function
that prepares what its users keep, and returns the function to be timed.
"""

import multiprocessing
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor
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
    from simsiam.network import SimSiam

    net = SimSiam().to(device)
    optimizer = torch.optim.SGD(
        net.parameters(), recipe["lr"], recipe["momentum"], weight_decay=recipe["weight_decay"]
    )
    views = PilViews(pil(images), 2, recipe, images.shape[-1])
    loader = DataLoader(views, batch, shuffle=True, num_workers=2, persistent_workers=True)

    def run() -> float:
        total = 0.0
        for x1, x2 in loader:
            loss, _ = net(x1.to(device), x2.to(device))
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


def lightly_training(images, args) -> Callable:
    """Lightly's SimSiam example: its transform, heads, loss and `knn_predict`; an epoch a call.

    `images` is a `Data`. Backbone, optimizer, schedule and batches are those of main.py's
    `args`.
    """
    import torchvision.transforms as t
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead
    from lightly.transforms import SimSiamTransform
    from lightly.utils.benchmarking import knn_predict

    from simsiam import network

    torch.manual_seed(args.seed)
    d, peak = args.feature_dim, args.lr * args.batch_size / 256
    backbone, features = network.backbone(args.arch, args.stem, args.width)
    projector = SimSiamProjectionHead(features, d, d)
    predictor = SimSiamPredictionHead(d, d // 4, d)
    criterion = NegativeCosineSimilarity()
    encoder = [*backbone.parameters(), *projector.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": encoder}, {"params": predictor.parameters(), "fix_lr": args.fix_pred_lr}],
        peak,
        args.momentum,
        weight_decay=args.weight_decay,
    )
    train = Labelled(
        images.train_images, images.train_labels, SimSiamTransform(images.train_images.shape[-1])
    )
    loader = DataLoader(
        train, args.batch_size, shuffle=True, drop_last=True, num_workers=2, persistent_workers=True
    )
    normalise = SimSiamTransform(images.train_images.shape[-1]).transforms[0].transform.transforms
    plain = t.Compose([t.ToTensor(), normalise[-1]])
    bank, queries = (
        DataLoader(Labelled(*part, plain), 512, num_workers=2, persistent_workers=True)
        for part in (
            (images.train_images, images.train_labels),
            (images.test_images, images.test_labels),
        )
    )

    def run(epoch: int) -> float:
        for part in (backbone, projector, predictor):
            part.train()
        for step, ((x0, x1), _) in enumerate(loader):
            progress = epoch + step / len(loader)
            for group in optimizer.param_groups:
                fixed = group.get("fix_lr")
                group["lr"] = peak * (1 if fixed else network.schedule(progress, args.epochs))
            z0, z1 = projector(backbone(x0)), projector(backbone(x1))
            p0, p1 = predictor(z0), predictor(z1)
            loss = 0.5 * (criterion(z0.detach(), p1) + criterion(z1.detach(), p0))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        backbone.eval()
        embed = lambda x: torch.nn.functional.normalize(backbone(x), dim=1)  # noqa: E731
        with torch.no_grad():
            features, labels = zip(*((embed(x), y) for x, y in bank), strict=True)
            features, labels = torch.cat(features).T.contiguous(), torch.cat(labels)
            classes, hits = len(images.classes), 0
            for x, y in queries:
                found = knn_predict(embed(x), features, labels, classes, args.k, args.temperature)
                hits += (found[:, 0] == y).sum().item()
        return 100 * hits / len(images.test_labels)

    return run


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
