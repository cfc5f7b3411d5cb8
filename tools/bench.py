"""Ours and its peers, timed in turns (A B A B ...) in one run: medians and their ratio.

python -m tools.bench views train knn linear start

What is timed are the functions of the rooms and the commands themselves, never a copy of them.
Results are added to results/benchmarks.csv.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas
import torch

import data
import linear
import main
import model
import utils

COLUMNS = (
    "benchmark",
    "ours",
    "peer",
    "peer_name",
    "ratio",
    "unit",
    "threads",
    "cpu",
    "torch",
    "date",
)


def in_turns(*functions: Callable[[], object], rounds: int = 5) -> list[float]:
    """Median seconds of each function, called in turns after a call of each to warm up."""
    seconds = [[] for _ in functions]
    for i in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            begun = time.perf_counter()
            function()
            if i > 0:
                times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in seconds]


def versioned(package: str, what: str) -> str:
    return f"{package} {importlib.metadata.version(package)}: {what}"


def sgemm() -> float:
    """GFLOP/s (multiply-adds count two) of the best of ten fp32 products of 4096 x 4096."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    best = min(in_turns(lambda: a @ b, rounds=1)[0] for _ in range(10))
    return 2 * 4096**3 / best / 1e9


class PilImages(torch.utils.data.Dataset):
    """What a torchvision pipeline reads: PIL images, `views` views each."""

    def __init__(self, images: torch.Tensor, views: int):
        from PIL import Image
        from torchvision import transforms as t

        self.images = [Image.fromarray(x) for x in images.permute(0, 2, 3, 1).numpy()]
        self.views = views
        self.transform = t.Compose(
            [
                t.RandomResizedCrop(32, scale=(0.2, 1.0)),
                t.RandomHorizontalFlip(),
                t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                t.RandomGrayscale(p=0.2),
                t.ToTensor(),
                t.Normalize(main.CIFAR["mean"], main.CIFAR["std"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return tuple(self.transform(self.images[i]) for _ in range(self.views))


def noise(number: int) -> torch.Tensor:
    """Images of the size of CIFAR's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=generator)


def bench_views():
    """The CIFAR recipe's augmentation, batches of 512."""
    import kornia.augmentation as k

    images = noise(512 * 8)
    views = data.Views(32, main.CIFAR["mean"], main.CIFAR["std"])
    pil = torch.utils.data.DataLoader(
        PilImages(images, 1), batch_size=512, num_workers=2, persistent_workers=True
    )
    batched = k.AugmentationSequential(
        k.RandomResizedCrop((32, 32), scale=(0.2, 1.0)),
        k.RandomHorizontalFlip(),
        k.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        k.RandomGrayscale(p=0.2),
        k.Normalize(main.CIFAR["mean"], main.CIFAR["std"]),
    )
    ours, theirs, kornias = in_turns(
        lambda: [views(batch) for batch in images.split(512)],
        lambda: list(pil),
        lambda: [batched(batch.float() / 255) for batch in images.split(512)],
    )
    n = len(images)
    name = versioned("torchvision", "PIL transforms, DataLoader, 2 workers")
    yield "views", n / ours, n / theirs, name, "views/s"
    yield "views", n / ours, n / kornias, versioned("kornia", "batched, eager"), "views/s"


def bench_train():
    """A ResNet-18 CIFAR step of 128 images, augmentation included, against the plain way."""
    steps, batch = 2, 128
    images = noise(steps * batch)
    args = main.parse_args(["--batch_size", str(batch)])[0]
    amp = utils.autocast(torch.device("cpu"), "off")

    def optimizer_of(net, **more):
        groups = [
            {"params": net.encoder_parameters(), "fix_lr": False},
            {"params": net.predictor.parameters(), "fix_lr": False},
        ]
        return torch.optim.SGD(groups, lr=0.015, momentum=0.9, weight_decay=5e-4, **more)

    net = model.SimSiam().to(memory_format=torch.channels_last)
    optimizer = optimizer_of(net, fused=True)
    loader = data.Loader([images], batch)
    views = data.Views(32, args.mean, args.std)

    def ours():
        sums = torch.zeros(3)
        main.train(net, optimizer, loader, views, 0, 0, sums, args, amp, lambda step: None)

    plain_net = model.SimSiam()
    plain_optimizer = optimizer_of(plain_net)
    pairs = torch.utils.data.DataLoader(
        PilImages(images, 2), batch, shuffle=True, num_workers=2, persistent_workers=True
    )

    def plain():
        plain_net.train()
        for x1, x2 in pairs:
            loss, _ = plain_net(x1, x2)
            plain_optimizer.zero_grad()
            loss.backward()
            plain_optimizer.step()
            loss.item()

    fast, slow = in_turns(ours, plain, rounds=3)
    n = len(images)
    name = versioned("torchvision", "PIL views in 2 workers, NCHW, .item() each step")
    yield "train", n / fast, n / slow, name, "images/s"
    # 562.76 M multiply-adds forward, three times that with the backward pass, two views.
    gflop = 2 * 3 * 2 * model.params_and_flops(model.Classifier(net.backbone, 512, 10), 32)[1] / 1e9
    yield "train", gflop * n / fast, sgemm(), "this machine's sgemm", "GFLOP/s"


def extra_memory(function: Callable[[], object]) -> float:
    """Peak resident memory above that before the call, in MB; sampled each millisecond."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page  # noqa: E731
    before = peak = resident()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    function()
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def bench_knn():
    """A bank of 50,000 x 512, 10,000 queries, k = 200, ten classes."""
    import numpy as np
    from lightly.utils.benchmarking import knn_predict
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    centres = torch.randn(10, 512)
    bank_labels, query_labels = torch.arange(50_000) % 10, torch.arange(10_000) % 10
    draw = lambda labels: torch.nn.functional.normalize(  # noqa: E731
        centres[labels] + 6 * torch.randn(len(labels), 512), dim=1
    )
    bank, queries = draw(bank_labels), draw(query_labels)
    found = {}

    def ours():
        found["ours"] = utils.knn(bank, bank_labels, queries)[:, 0]

    def lightlys():
        found["lightly"] = torch.cat(
            [
                knn_predict(chunk, bank.T, bank_labels, 10, knn_k=200, knn_t=0.1)[:, 0]
                for chunk in queries.split(512)
            ]
        )

    judge = KNeighborsClassifier(
        200, weights=lambda d: np.exp((1 - d**2 / 2) / 0.1), algorithm="brute", n_jobs=2
    ).fit(bank.numpy(), bank_labels.numpy())

    def scikits():
        found["scikit-learn"] = torch.from_numpy(judge.predict(queries.numpy()))

    fast, lightly, scikit = in_turns(ours, lightlys, scikits, rounds=3)
    yield "knn", fast, lightly, versioned("lightly", "knn_predict, chunks of 512"), "s"
    yield "knn", fast, scikit, versioned("scikit-learn", "brute force, n_jobs=2"), "s"
    flop = 2 * 50_000 * 10_000 * 512 / 1e9
    yield "knn, its products only", flop / fast, sgemm(), "this machine's sgemm", "GFLOP/s"
    for name in ("lightly", "scikit-learn"):
        same = (found["ours"] == found[name]).float().mean().item()
        print(f"knn: {100 * same:.2f} % of the predictions equal {name}'s")
    print(f"knn: {extra_memory(ours):.0f} MB of memory besides its arguments")
    for size in (10_000, 50_000, 200_000, 1_000_000):
        large = torch.nn.functional.normalize(torch.randn(size, 512), dim=1)
        labels = torch.arange(size) % 10
        some = queries[:1000]
        seconds = in_turns(lambda: utils.knn(large, labels, some), rounds=3)[0]  # noqa: B023
        memory = extra_memory(lambda: utils.knn(large, labels, some))  # noqa: B023
        print(f"knn: bank of {size}, 1,000 queries: {seconds:.3f} s, {memory:.0f} MB")


def bench_linear(*flags: str):
    """90 epochs on the same images, cached (its extraction included) and augmented, by linear.py.

    `flags` are linear.py's; without --model_path, of an epoch of pre-training on textures.
    """
    with tempfile.TemporaryDirectory() as place:
        if "--model_path" not in flags:
            name = ["--data_name", "textures", "--epochs", "1", "--name", "bench"]
            main.main([*name, "--out", place])
            flags = (*flags, "--model_path", f"{place}/bench_model.pth")

        def seconds(name: str, *more: str) -> pandas.Series:
            linear.main([*flags, "--out", place, "--name", name, *more])
            return pandas.read_csv(f"{place}/{name}_statistics.csv")["seconds"]

        first = seconds("cached1", "--cached")
        slow = seconds("augmented")
        fast = (first + seconds("cached2", "--cached")) / 2
    yield "linear, extraction included", fast.sum(), slow.sum(), "the augmented protocol", "s"
    # The first epoch holds the extraction, and the warm-up of both.
    fast, slow = (90 * epochs[1:].mean() for epochs in (fast, slow))
    yield "linear, 90 epochs alone", fast, slow, "the augmented protocol", "s"


def bench_start():
    """From the command to the first training step on textures, and what it is spent on."""
    code = (
        "import time, sys; t = [('python', time.time())]\n"
        "import torch, torchvision; t.append(('import torch', time.time()))\n"
        "import main, data; t.append(('other imports', time.time()))\n"
        "load, train = data.load, main.train\n"
        "def loaded(*a):\n"
        "    t.append(('network, flags', time.time())); x = load(*a)\n"
        "    t.append(('textures', time.time())); return x\n"
        "def first(*a):\n"
        "    t.append(('thop, kNN of pixels and untrained encoder', time.time()))\n"
        "    def stop(step):\n"
        "        t.append(('first step', time.time()))\n"
        "        for name, when in t: print(f'T {when} {name}')\n"
        "        sys.exit()\n"
        "    train(*a[:-1], stop)\n"
        "data.load, main.train = loaded, first\n"
        "main.main(['--data_name', 'textures', '--out', sys.argv[1]])\n"
    )
    begun = before = time.time()
    with tempfile.TemporaryDirectory() as place:
        out = subprocess.run(
            [sys.executable, "-c", code, place], capture_output=True, text=True, check=True
        ).stdout
    for line in out.splitlines():
        if line.startswith("T "):
            _, when, name = line.split(maxsplit=2)
            print(f"start: {float(when) - before:5.2f} s {name}")
            before = float(when)
    yield "start", before - begun, None, None, "s"


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


BENCHMARKS = {
    "views": bench_views,
    "train": bench_train,
    "knn": bench_knn,
    "linear": bench_linear,
    "start": bench_start,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    parser.add_argument("--csv", default="results/benchmarks.csv", help="(results/benchmarks.csv)")
    args, rest = parser.parse_known_args()  # what is left are linear.py's flags
    names = args.benchmarks or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"{name}: choose from {', '.join(BENCHMARKS)}")
    if rest and names != ["linear"]:
        parser.error(f"{rest[0]}: only `linear` alone takes linear.py's flags")
    for name in names:
        for what, ours, peer, peer_name, unit in BENCHMARKS[name](*rest):
            ratio = None
            if peer is not None:  # above 1 where ours is the better
                ratio = peer / ours if unit == "s" else ours / peer
                print(f"{what}: ours {ours:.4g} {unit}, {peer_name} {peer:.4g}: ratio {ratio:.2f}")
            else:
                print(f"{what}: {ours:.4g} {unit}")
            machine = (torch.get_num_threads(), cpu_name(), str(torch.__version__))
            values = (what, ours, peer, peer_name, ratio, unit, *machine, datetime.date.today())
            row = dict(zip(COLUMNS, values, strict=True))
            rows = []
            if Path(args.csv).is_file():
                rows = pandas.read_csv(args.csv, dtype=str, keep_default_na=False).to_dict(
                    "records"
                )
            same = (what, peer_name or "")
            rows = [old for old in rows if (old["benchmark"], old["peer_name"]) != same]
            utils.write_csv(args.csv, [*rows, row], COLUMNS)
