"""Benchmarks against other projects, timed in turns (A B A B ...) in one run.

python -m tools.bench                  # all of them: half an hour on two cores
python -m tools.bench views train      # some
python -m tools.bench gpu              # an accelerator: training and the work around it
python -m tools.bench profile --data_name textures  # where the time of main.py's steps goes

They call the functions that the commands call, and the commands themselves. Medians and ratios go
to results/benchmarks.csv, where a row replaces an older one of the same benchmark and device.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/bench.py`

import linear
import main
import utils
from simsiam.data.loader import Data, ImageFiles, Loader
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.models.classifier import Classifier
from simsiam.models.flops import params_and_flops
from simsiam.runtime import devices, files
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.recipes import RECIPES, PretrainConfig
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Batch
from studies import peers
from studies.peers import Peer
from tools.common import DEVICE_HELP, machine_name, read_rows

CPU = torch.device("cpu")
COLUMNS = tuple("benchmark ours peer peer_name ratio unit device threads cpu torch date".split())
MATRIX = 4096  # rows and columns of the matrices in `sgemm`
# Of two views, forward and twice that backward; a multiply-add counts two.
FLOP_PER_MULTIPLY_ADD = 2 * 3 * 2
PLAIN_LOOP = "NCHW, PIL views in 2 workers, fp32"


class Row(NamedTuple):
    """A result: a value of this project in a unit, and a peer's value, if there is one."""

    benchmark: str
    value: float
    unit: str
    peer: float | None = None
    peer_name: str | None = None


def peer_name(package: str, details: str) -> str:
    """Return a peer's name with its version, for the table."""
    return f"{package} {importlib.metadata.version(package)}: {details}"


def median_seconds(
    *functions: Callable[[], object], rounds: int = 5, device: torch.device = CPU
) -> list[float]:
    """Return the median seconds of each function, called in turns (A B A B ...).

    Each is called once before to warm up, and waits for its work on `device`.
    """
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    seconds = [[] for _ in functions]
    for _ in range(rounds + 1):
        for times, function in zip(seconds, functions, strict=True):
            wait()
            start = time.perf_counter()
            function()
            wait()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


def noise(*shape: int) -> Tensor:
    """Return random bytes, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def multiply(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Return a function that multiplies two square matrices, in 2 x side^3 FLOP."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b


# ---- training of main.py on images in memory ----------------------------------------------------


def read_config(flags: str) -> tuple[PretrainConfig, torch.device]:
    """Return the config of main.py's flags, its `amp` resolved, and its device, set up."""
    config, _ = utils.ConfigParser("tools.bench", None, PretrainConfig).read(flags.split())
    device, amp = devices.setup_device(config)
    return dataclasses.replace(config, amp=amp), device


def unlabelled(images: Tensor) -> Data:
    """Return a data set of images whose labels do not matter."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Data(images, labels, images[:1], labels[:1], ["none"])


def training(
    flags: str, images: Tensor | Data
) -> tuple[Callable[[], object], PretrainConfig, TrainState]:
    """Return a function that trains an epoch with main.py's loop, its config and its state.

    `flags`: of main.py. `images`: a data set, or uint8 images, N x C x S x S or
    N x views x C x S x S (crops from loader workers).
    """
    config, device = read_config(flags)
    images = images if isinstance(images, Data) else unlabelled(images)
    net, encoder = main.initial_network(config), main.encoder_config(config, images)
    state = main.make_state(config, net, images.to(device), encoder, device)
    return lambda: list(main.train(state, 0, config)), config, state


@contextlib.contextmanager
def plain_loop(images: Tensor, config: PretrainConfig) -> Iterator[Callable[[], object]]:
    """Provide a function that trains the same network for an epoch in a usual loop."""
    with Peer(peers.plain_training, unlabelled(images), config, RECIPES["cifar"]) as plain:
        yield lambda: plain(0, False)


# ---- benchmarks on the CPU ----------------------------------------------------------------------


def bench_views(batch_size: int = 512) -> Iterator[Row]:
    """The CIFAR recipe's augmentation, batches of 512."""
    images, recipe = noise(16 * batch_size, 3, 32, 32), RECIPES["cifar"]
    config, _ = read_config("--device cpu")
    views = main.make_views(config, recipe | {"image_size": 32}, 1)
    batches = [Batch.alone(batch) for batch in images.split(batch_size)]
    with (
        Peer(peers.torchvision_views, images, recipe, batch_size) as torchvision,
        Peer(peers.kornia_views, images, recipe, batch_size) as kornia,
    ):
        seconds, torchvision_seconds, kornia_seconds = median_seconds(
            lambda: list(map(views, batches)), torchvision, kornia
        )
    n = len(images)
    name = peer_name("torchvision", "PIL transforms, DataLoader, 2 workers")
    yield Row("views", n / seconds, "views/s", n / torchvision_seconds, name)
    name = peer_name("kornia", "batched, eager")
    yield Row("views", n / seconds, "views/s", n / kornia_seconds, name)


def bench_train(batch_size: int = 128) -> Iterator[Row]:
    """ResNet-18 CIFAR steps of 128 images, augmentation included, against a usual loop."""
    images = noise(2 * batch_size, 3, 32, 32)
    flags = f"--batch_size {batch_size} --device cpu --amp"
    fp32, config, state = training(f"{flags} off", images)
    bf16, *_ = training(f"{flags} bf16", images)
    sgemm = multiply(MATRIX, torch.float32, CPU)
    with plain_loop(images, config) as plain:
        fp32_seconds, bf16_seconds, plain_seconds, sgemm_seconds = median_seconds(
            fp32, bf16, plain, sgemm, rounds=7
        )
    n, name = len(images), peer_name("torchvision", PLAIN_LOOP)
    yield Row("train", n / fp32_seconds, "images/s", n / plain_seconds, name)
    yield Row("train, --amp bf16", n / bf16_seconds, "images/s", n / plain_seconds, name)
    backbone = Classifier(state.net.backbone, 512, 10)
    gflop = FLOP_PER_MULTIPLY_ADD * params_and_flops(backbone, 32)[1] / 1e9
    peak = 2 * MATRIX**3 / sgemm_seconds / 1e9
    yield Row("train", gflop * n / fp32_seconds, "GFLOP/s", peak, "this machine's sgemm")


def bench_precision(batch_size: int = 64) -> Iterator[Row]:
    """Steps in bf16 against fp32 on this CPU, by the network's size: what --amp auto goes by."""
    for arch, width in (("resnet8", 16), ("resnet8", 32), ("resnet20", 32), ("resnet18", None)):
        flags = f"--recipe short --arch {arch} --batch_size {batch_size} --device cpu"
        flags += f" --width {width}" if width else ""
        images = noise(2 * batch_size, 3, 32, 32)
        bf16, _, state = training(f"{flags} --amp bf16", images)
        fp32, *_ = training(f"{flags} --amp off", images)
        bf16_seconds, fp32_seconds = median_seconds(bf16, fp32)
        flops = params_and_flops(state.net, 32)[1] / 1e6
        of_width = f" of width {width}" if width else ""
        name = f"precision, {arch}{of_width}, {flops:.0f}M multiply-adds"
        n = len(images)
        yield Row(name, n / bf16_seconds, "images/s", n / fp32_seconds, "fp32")


def bench_epoch(epochs: int = 3, seeds: int = 3) -> Iterator[Row]:
    """resnet20 on 5,000 textures: an epoch and the kNN at its end, against lightly's example."""
    images = Data(*make_textures(5000, seed=1), *make_textures(1000, seed=2), list(TEXTURE_CLASSES))
    name = peer_name("lightly", "its example's transform, loader, heads and knn_predict")
    seconds, peer_seconds, rows = [], [], []
    for seed in range(seeds):
        # lr 0.06, as in lightly's example
        flags = f"--data_name textures --arch resnet20 --epochs {epochs} --seed {seed} --lr 0.24"
        _, config, state = training(f"{flags} --no-fix_pred_lr --device cpu", images)
        monitor = Monitor(state.net, state.views, images, config, state.autocast)
        with Peer(peers.lightly_training, images, config) as lightly:
            for epoch in range(epochs):
                start = time.perf_counter()
                list(main.train(state, epoch, config))
                top1 = monitor.measure()["test_acc@1"]
                middle = time.perf_counter()
                _, peer_top1 = lightly(epoch)
                seconds.append(middle - start)
                peer_seconds.append(time.perf_counter() - middle)
        label = f"epoch, kNN top-1 after {epochs}, seed {seed}"
        rows.append(Row(label, top1, "%", peer_top1, name))
    medians = map(statistics.median, (seconds, peer_seconds))
    yield Row("epoch", next(medians), "s", next(medians), name)
    yield from rows


def knn_memory(bank: Tensor, labels: Tensor, queries: Tensor) -> Callable[[], float]:
    """Return a function that runs the kNN and returns its peak memory without arguments, in MB.

    For a process of its own, a `Peer`, on Linux.
    """
    devices.keep_freed_memory()
    knn(bank[:1000], labels[:1000], queries[:100])  # allocates what the libraries keep
    bank.sum(), queries.sum()  # shared memory counts from the first use

    def megabytes(entry: str) -> float:
        return int(re.search(rf"{entry}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    def run() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = megabytes("VmRSS")
        knn(bank, labels, queries)
        return megabytes("VmHWM") - before

    return run


def bench_knn() -> Iterator[Row]:
    """A bank of 50,000 x 512, 10,000 queries, k = 200, ten classes."""
    read_config("--device cpu")
    torch.manual_seed(0)
    centres = torch.randn(10, 512)
    bank_labels, query_labels = torch.arange(50_000) % 10, torch.arange(10_000) % 10
    bank, queries = (
        F.normalize(centres[labels] + 6 * torch.randn(len(labels), 512), dim=1)
        for labels in (bank_labels, query_labels)
    )

    def classify() -> Tensor:
        return knn(bank, bank_labels, queries)[:, 0]

    lightly_name = peer_name("lightly", "knn_predict, chunks of 512")
    sklearn_name = peer_name("scikit-learn", "brute force, n_jobs=-1")
    with (
        Peer(peers.lightly_knn, bank, bank_labels, queries) as lightly,
        Peer(peers.sklearn_knn, bank, bank_labels, queries) as sklearn,
    ):
        seconds, *peer_seconds = median_seconds(classify, lightly, sklearn, rounds=7)
        for i, (name, peer) in enumerate([(lightly_name, lightly), (sklearn_name, sklearn)]):
            equal = 100 * (classify() == peer()).float().mean().item()
            yield Row("knn, predictions that are equal", equal, "%", 100.0, name)
            yield Row("knn", seconds, "s", peer_seconds[i], name)
    with Peer(knn_memory, bank, bank_labels, queries) as memory:
        yield Row("knn, memory", memory(), "MB")
    queries = queries[:2000]
    for size in (10_000, 50_000, 200_000, 1_000_000):
        bank, labels = F.normalize(torch.randn(size, 512), dim=1), torch.arange(size) % 10
        (seconds,) = median_seconds(functools.partial(knn, bank, labels, queries))
        yield Row(f"knn, bank of {size}, 2000 queries", seconds, "s")
        with Peer(knn_memory, bank, labels, queries) as memory:
            yield Row(f"knn, bank of {size}, memory", memory(), "MB")


def bench_jpeg(number: int = 256, batch_size: int = 64) -> Iterator[Row]:
    """The ImageNet recipe's views of JPEG files of 500 x 375, delivered by one loader worker."""
    recipe = RECIPES["imagenet"]
    config, _ = read_config("--recipe imagenet --device cpu")
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(number)]
        for path in paths:  # blurred noise and a little grain: files of about 60 kB, as photos
            coarse = torch.rand(1, 3, 24, 32, generator=generator)
            grain = 0.1 * torch.rand(1, 3, 375, 500, generator=generator)
            image = 0.9 * F.interpolate(coarse, (375, 500), mode="bicubic").clamp(0, 1) + grain
            image = (255 * image[0]).byte().permute(1, 2, 0).numpy()
            Image.fromarray(image).save(path, quality=90)
        print(f"jpeg: {sum(map(os.path.getsize, paths)) / number / 1000:.0f} kB per file")
        views = main.make_views(config, recipe, 2)
        loader = Loader(ImageFiles(paths, 224, workers=1), batch_size, views=views)
        with Peer(peers.torchvision_files, paths, recipe, batch_size) as torchvision:
            seconds, peer_seconds = median_seconds(lambda: list(loader.epoch(0)), torchvision)
        crops = list(loader.epoch(0))
        (device_seconds,) = median_seconds(lambda: list(map(views, crops)))
    name = peer_name("torchvision", "the authors' PIL transforms, one DataLoader worker")
    yield Row("jpeg, one worker", number / seconds, "images/s", number / peer_seconds, name)
    yield Row("jpeg, the device's part (this CPU)", number / device_seconds, "images/s")


def bench_linear(*flags: str) -> Iterator[Row]:
    """90 epochs on the same images, cached (its extraction included) and augmented, by linear.py.

    `flags`: of linear.py; without --model_path, the encoder of one epoch on textures.
    """
    with tempfile.TemporaryDirectory() as folder:
        if "--model_path" not in flags:
            main.main(f"--data_name textures --epochs 1 --name bench --out {folder}".split())
            flags = (*flags, "--model_path", f"{folder}/bench_model.pth")

        def epoch_seconds(name: str, *options: str) -> pandas.Series:
            linear.main([*flags, "--out", folder, "--name", name, *options])
            return pandas.read_csv(f"{folder}/{name}_statistics.csv")["seconds"]

        first = epoch_seconds("cached1", "--cached")
        augmented = epoch_seconds("augmented")
        cached = (first + epoch_seconds("cached2", "--cached")) / 2
    name = "the augmented protocol"
    yield Row("linear, extraction included", cached.sum(), "s", augmented.sum(), name)
    # The first epoch holds the extraction, and the warm-up of both.
    cached, augmented = (90 * epochs[1:].mean() for epochs in (cached, augmented))
    yield Row("linear, 90 epochs alone", cached, "s", augmented, name)


# A program that prints when each stage of a run's start ended: "STAGE seconds name".
STAGES = """
import sys, time
stages = [("python", time.time())]
def stage(name): stages.append((name, time.time()))
import torch, torchvision; stage("import of torch and torchvision")
import main; stage("other imports")
def record(name, before=None, after=None):
    function = getattr(main, name)
    def wrapper(*args):
        if before: stage(before)
        result = function(*args)
        if after: stage(after)
        return result
    setattr(main, name, wrapper)
record("load_images", "network", "images")
record("prepare", after="Params and FLOPs, optimizer")
record("train", "kNN, untrained and of pixels; first checkpoint")
def on_step(epoch, step):
    stage("first step")
    for name, when in stages: print(f"STAGE {when} {name}")
    sys.exit()
main.main(["--data_name", "textures", "--out", *sys.argv[1:]], on_step)
"""


def bench_start() -> Iterator[Row]:
    """From the command to the first training step on textures, and what it is spent on."""
    runs = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", STAGES, folder]
            before = start = time.time()
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stages = {}
        for line in output.splitlines():
            if line.startswith("STAGE "):
                _, when, name = line.split(maxsplit=2)
                stages[name], before = float(when) - before, float(when)
        runs.append(stages | {"in all": before - start})
    for name in runs[0]:
        yield Row(f"start: {name}", statistics.median(run[name] for run in runs), "s")


def bench_ddp() -> Iterator[Row]:
    """resnet20 on textures by main.py: two ranks of one thread, and a process of two threads."""
    flags = "--data_name textures --arch resnet20 --train_size 1280 --batch_size 128 --epochs 3"
    flags += " --device cpu --name bench --out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    commands = ([*launch, "main.py", "--ddp"], 1), ([sys.executable, "main.py"], 2)
    speeds = ([], [])
    for _ in range(5):
        for (command, threads), images_per_sec in zip(commands, speeds, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                env = os.environ | {"OMP_NUM_THREADS": str(threads)}
                command = [*command, *flags.split(), folder]
                subprocess.run(command, env=env, check=True, capture_output=True)
                table = pandas.read_csv(f"{folder}/bench_statistics.csv")
            # The first epoch holds the warm-up.
            images_per_sec += table["images_per_sec"][2:].tolist()
    ranks, threads = map(statistics.median, speeds)
    yield Row("ddp", ranks, "images/s", threads, "one process of two threads")


# ---- an accelerator -----------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Sizes of the accelerator's benchmarks. `cifar`, `imagenet`: flags of main.py."""

    cifar: str
    steps: int  # per epoch
    bank: int  # features in the kNN's bank
    matrix: int  # rows and columns
    imagenet: str


LARGE = Sizes(
    "--batch_size 512", 16, 50_000, 8192, "--arch resnet50 --batch_size 256 --image_size 224"
)
SMALL = Sizes(
    "--arch resnet8 --width 8 --feature_dim 64 --batch_size 32",
    2,
    2_000,
    512,
    "--arch resnet18 --feature_dim 64 --batch_size 8 --image_size 64",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def read_gpu(flags: Sequence[str]) -> tuple[torch.device, Sizes, bool]:
    """Return the device, the sizes, and whether --quick is given. Exits if a flag is wrong."""
    parser = utils.Parser("tools.bench gpu", bench_gpu.__doc__)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--small", action="store_true", help="small networks, as on a CPU")
    parser.add_argument("--quick", action="store_true", help="no --compile and no plain loop")
    args = parser.parse_args(flags)
    with parser.bad_input():
        device = devices.pick_device(args.device)
    return device, SMALL if args.small or device.type == "cpu" else LARGE, args.quick


def gpu_steps(name: str, flags: str, images: Tensor, peak: float, compiles: bool) -> Iterator[Row]:
    """Training steps, with --compile and without. `peak`: FLOP/s of a matrix product."""
    device = images.device
    for option in ("", " --compile") if compiles else ("",):
        epoch, config, state = training(f"{flags} --device {device}{option}", images)
        (seconds,) = median_seconds(epoch, device=device)
        flop = FLOP_PER_MULTIPLY_ADD * params_and_flops(state.net, images.shape[-1])[1]
        label = f"{name}, {config.amp}" + ", --compile" * bool(option)
        speed = len(images) / seconds
        yield Row(label, speed, "images/s")
        yield Row(f"{label}: FLOP/s", flop * speed, "FLOP/s", peak, "a matrix product")


def gpu_epoch(flags: str, images: Tensor, labels: Tensor) -> Iterator[Row]:
    """Time an epoch's kNN and rank, a checkpoint, and feature extraction."""
    device, test = images.device, slice(len(images) // 5)
    data = Data(images, labels, images[test], labels[test], [str(i) for i in range(10)])
    _, config, state = training(flags, data)
    monitor = Monitor(state.net, state.views, data, config, state.autocast)

    def extract() -> Tensor:
        transform = state.views.eval_transform
        return metrics.extract_features(state.net.backbone, transform, images, state.autocast)

    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            entries = dict.fromkeys(checkpoint.FORMAT) | state.state_dict()
            checkpoint.save(f"{folder}/a_model.pth", None, entries)

        evaluation, features, saving = median_seconds(monitor.measure, extract, save, device=device)
    yield Row("gpu epoch: kNN and rank", evaluation, "s")
    yield Row("gpu epoch: a checkpoint", saving, "s")
    yield Row("gpu features", len(images) / features, "images/s")


def gpu_knn(device: torch.device, size: int, side: int) -> Iterator[Row]:
    """kNN and rank of a bank of `size` x 512, with a fifth as many queries."""
    bank = F.normalize(torch.randn(size, 512, device=device), dim=1)
    labels = torch.arange(size, device=device) % 10
    queries = bank[: size // 5]
    seconds, rank_seconds, product_seconds = median_seconds(
        lambda: knn(bank, labels, queries),
        lambda: metrics.effective_rank(bank),
        multiply(side, torch.float32, device),
        device=device,
    )
    speed, peak = 2 * size * len(queries) * 512 / seconds, 2 * side**3 / product_seconds
    name = f"gpu kNN, bank of {size}"
    yield Row(name, seconds, "s")
    yield Row(f"{name}: FLOP/s", speed, "FLOP/s", peak, "a matrix product in fp32")
    yield Row(f"gpu rank, bank of {size}", rank_seconds, "s")


def bench_gpu(*flags: str) -> Iterator[Row]:
    """Training on an accelerator, and the work around it; --device NAME, --small, --quick.

    Speeds stand beside those of a large matrix product (FLOP/s) and a large copy (B/s). A CPU gets
    small networks.
    """
    device, sizes, is_quick = read_gpu(flags)
    cifar = f"{sizes.cifar} --device {device}"
    _, config, state = training(cifar, noise(512, 3, 32, 32))
    dtype, batch_size = DTYPES[config.amp], config.batch_size
    source, target = torch.empty(2, sizes.matrix, sizes.matrix, dtype=dtype, device=device)
    product, copy = median_seconds(
        multiply(sizes.matrix, dtype, device), lambda: target.copy_(source), device=device
    )
    peak, bandwidth = 2 * sizes.matrix**3 / product, 2 * source.nbytes / copy
    yield Row(f"gpu: a matrix product, {dtype}", peak, "FLOP/s")
    yield Row("gpu: a copy", bandwidth, "B/s")

    textures = make_textures(sizes.steps * batch_size, seed=1)
    images, labels = (part.to(device) for part in textures)
    batches = [Batch.alone(part) for part in images.split(batch_size)]
    (seconds,) = median_seconds(lambda: list(map(state.views, batches)), device=device)
    views = 2 * len(images)
    yield Row("gpu views", views / seconds, "views/s")
    traffic = views * 3 * 32 * 32 * (1 + 4)  # each is read as bytes and written as fp32
    yield Row("gpu views: read and written", traffic / seconds, "B/s", bandwidth, "a copy")
    compiles = not is_quick
    try:
        if compiles:
            devices.check_compile(device)
    except ValueError as error:
        compiles = False
        print(error)
    yield from gpu_steps("gpu step", cifar, images, peak, compiles)
    if device.type in ("cpu", "cuda") and not is_quick:  # a peer's process has only these
        part, resnet18 = images[: 2 * batch_size], f"--batch_size {batch_size} --device {device}"
        epoch, config, _ = training(resnet18, part)
        with plain_loop(part.cpu(), config) as plain:
            seconds, plain_seconds = median_seconds(epoch, plain, rounds=3, device=device)
        speed, name = len(part) / seconds, f"a plain loop: {PLAIN_LOOP}"
        yield Row("gpu, ResNet-18", speed, "images/s", len(part) / plain_seconds, name)
    yield from gpu_epoch(cifar, images, labels)
    yield from gpu_knn(device, sizes.bank, sizes.matrix)
    flags = f"{sizes.imagenet} --recipe imagenet"
    config, _ = read_config(f"{flags} --device {device}")
    crops = noise(2 * config.batch_size, 2, 3, config.image_size, config.image_size).to(device)
    yield from gpu_steps("gpu ImageNet's step", flags, crops, peak, compiles)
    if device.type == "cuda":
        yield Row("gpu memory", torch.cuda.max_memory_allocated(device) / 2**20, "MB")


# ---- the command --------------------------------------------------------------------------------

BENCHMARKS = {
    "views": bench_views,
    "train": bench_train,
    "precision": bench_precision,
    "epoch": bench_epoch,
    "knn": bench_knn,
    "linear": bench_linear,
    "jpeg": bench_jpeg,
    "start": bench_start,
    "ddp": bench_ddp,
    "gpu": bench_gpu,
}


def profile(trace: str, flags: list[str]) -> None:
    """Profile steps of main.py with torch.profiler: print a table, and write a trace file.

    `flags`: of main.py. Six steps of an epoch are done, of which the last three are recorded.
    """
    Path(trace).parent.mkdir(parents=True, exist_ok=True)
    parser = utils.ConfigParser("tools.bench profile", None, PretrainConfig)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        config, overrides = parser.read([*flags, "--out", folder])
        with parser.bad_input():
            run = stack.enter_context(Run("main.py", config, overrides, main.STATISTICS))
            state, _, _ = main.prepare(run, parser)
        steps, device = main.train(state, 0, run.config), state.meters.values.device.type
        for _ in zip(range(3), steps, strict=False):
            pass
        with torch.profiler.profile(record_shapes=True) as profiler:
            number = len(list(zip(range(3), steps, strict=False)))
        averages = profiler.key_averages()
        key = f"self_{device}_time_total"
        print(averages.table(sort_by=key, row_limit=20, max_name_column_width=40))
        profiler.export_chrome_trace(trace)
        print(f"{number} steps; wrote {trace}: open it in ui.perfetto.dev or chrome://tracing")


def table_row(row: Row, device: str) -> dict:
    """Return a row of results/benchmarks.csv, and print it."""
    ratio, text = None, f"{row.benchmark}: {row.value:.4g} {row.unit}"
    if row.peer is not None:
        text += f", {row.peer_name} {row.peer:.4g}"
        if row.unit != "%":  # above 1 where this project is better
            ratio = row.peer / row.value if row.unit == "s" else row.value / row.peer
            text += f": ratio {ratio:.2f}"
    print(text, flush=True)
    value, peer, ratio = (None if x is None else f"{x:.6g}" for x in (row.value, row.peer, ratio))
    machine = (torch.get_num_threads(), machine_name(CPU), str(torch.__version__))
    values = (row.benchmark, value, peer, row.peer_name, ratio, row.unit, device, *machine)
    return dict(zip(COLUMNS, (*values, datetime.date.today()), strict=True))


def command(argv: list[str] | None = None) -> None:
    """Run the command."""
    summary = "; ".join(
        f"{name}: {(function.__doc__ or name).splitlines()[0].rstrip('.')}"
        for name, function in BENCHMARKS.items()
    )
    parser = utils.Parser("tools.bench", __doc__, epilog=summary)
    names = ", ".join((*BENCHMARKS, "profile"))
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=names)
    parser.add_argument(
        "--csv", default="results/benchmarks.csv", help="the table (results/benchmarks.csv)"
    )
    trace = "trace file of `profile` (results/profile.json)"
    parser.add_argument("--trace", default="results/profile.json", help=trace)
    args, rest = parser.parse_known_args(argv)  # the rest are flags of linear.py, main.py or gpu
    if args.benchmarks == ["profile"]:
        profile(args.trace, rest)
        return
    for name in args.benchmarks:
        if name not in BENCHMARKS:
            parser.error(f"{name}: choose one of {names}")
    if rest and args.benchmarks not in (["linear"], ["gpu"]):
        parser.error(f"{rest[0]}: only `linear`, `gpu` and `profile`, alone, take more flags")
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)

    def key(row: dict) -> tuple:
        return row["benchmark"], row.get("peer_name"), row.get("device", "cpu")

    for name in args.benchmarks or BENCHMARKS:
        device = "cpu"
        if name == "gpu" and (accelerator := read_gpu(rest)[0]).type != "cpu":
            device = machine_name(accelerator)
        rows = [table_row(row, device) for row in BENCHMARKS[name](*rest)]
        new = set(map(key, rows))
        old = [row for row in read_rows(args.csv, COLUMNS) if key(row) not in new]
        files.write_csv(args.csv, [*old, *rows], COLUMNS)


if __name__ == "__main__":
    command()
