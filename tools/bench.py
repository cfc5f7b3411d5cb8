"""Ours and its peers, timed in turns (A B A B ...) in one run: medians and their ratio.

python -m tools.bench                  # all of them, half an hour on two cores
python -m tools.bench views train      # some
python -m tools.bench profile --data_name textures  # where the time of main.py's steps goes

What is timed are the functions of the rooms and the commands themselves, never a copy of them.
Results are added to results/benchmarks.csv.
"""

import datetime
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/bench.py`

import linear
import main
import utils
from simsiam.data.loader import Data, ImageFiles, Loader
from simsiam.data.textures import TEXTURE_CLASSES, make_textures
from simsiam.evaluation.knn import knn
from simsiam.models.classifier import Classifier
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import devices, files
from simsiam.training.collapse import Monitor
from simsiam.training.meters import TrainMeters
from simsiam.training.recipes import VIEWS
from simsiam.views.augment import Batch, Views
from studies import peers
from studies.peers import Peer
from tools import gpu, profiler
from tools.timing import in_turns, machine_name

CPU = torch.device("cpu")
COLUMNS = tuple("benchmark ours peer peer_name ratio unit device threads cpu torch date".split())
# What a benchmark yields: its name, ours, the peer's, the peer's name, the unit.
Row = tuple[str, float, float | None, str | None, str]


def versioned(package: str, what: str) -> str:
    return f"{package} {importlib.metadata.version(package)}: {what}"


def sgemm() -> Callable[[], object]:
    """fp32 products of 4096 x 4096, `SGEMM` multiply-adds a call."""
    a, b = torch.randn(4096, 4096), torch.randn(4096, 4096)
    return lambda: a @ b


SGEMM = 4096**3


def noise(number: int) -> torch.Tensor:
    """Images of the size of CIFAR's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (number, 3, 32, 32), dtype=torch.uint8, generator=generator)


def arguments(flags: str) -> tuple[Namespace, torch.autocast]:
    """main.py's flags on this CPU, and their autocast."""
    args = main.make_flags().read([*flags.split(), "--device", "cpu"])[0]
    return args, devices.autocast(*devices.setup_device(args))


def views_of(recipe: str, size: int, seed: int = 0) -> Views:
    """A recipe's views."""
    augmentation, mean, std = VIEWS[recipe]
    return Views(size, mean, std, augmentation, seed=seed)


def recipe_of(name: str) -> dict:
    """What a peer needs to know of a recipe."""
    augmentation, mean, std = VIEWS[name]
    return main.RECIPES[name] | {"blur_p": augmentation.blur_p, "mean": mean, "std": std}


def bench_views() -> Iterator[Row]:
    """The CIFAR recipe's augmentation, batches of 512."""
    images, recipe = noise(512 * 16), recipe_of("cifar")
    arguments("")
    views = views_of("cifar", 32)
    views.number = 1
    with (
        Peer(peers.torchvision_views, images, recipe, 512) as torchvision,
        Peer(peers.kornia_views, images, recipe, 512) as kornia,
    ):
        ours, theirs, kornias = in_turns(
            lambda: [views(Batch.alone(batch)) for batch in images.split(512)], torchvision, kornia
        )
    n = len(images)
    name = versioned("torchvision", "PIL transforms, DataLoader, 2 workers")
    yield "views", n / ours, n / theirs, name, "views/s"
    yield "views", n / ours, n / kornias, versioned("kornia", "batched, eager"), "views/s"


def training(flags: str, images: torch.Tensor) -> tuple[Callable[[], object], SimSiam]:
    """An epoch of main.py's loop on `images`, and its network."""
    args, autocast = arguments(flags)
    net = build_model(vars(args)).to(memory_format=torch.channels_last)
    optimizer, tally = main.make_optimizer(net, args), TrainMeters(torch.device("cpu"))
    loader = Loader(images, args.batch_size)
    rest = (loader, views_of("cifar", 32), tally, 0, 0, args, autocast)
    return lambda: list(main.train(net, optimizer, *rest)), net


def bench_train() -> Iterator[Row]:
    """ResNet-18 CIFAR steps of 128 images, augmentation included, against a plain loop."""
    images = noise(2 * 128)
    fp32, net = training("--batch_size 128 --amp off", images)
    bf16, _ = training("--batch_size 128 --amp bf16", images)
    with Peer(peers.plain_training, images, recipe_of("cifar"), 128) as plain:
        product = sgemm()  # four a turn: about as long as a turn of the others
        fast, faster, slow, products = in_turns(
            fp32, bf16, plain, lambda: [product() for _ in range(4)], rounds=7
        )
    n = len(images)
    name = versioned("torchvision", "PIL views in 2 workers, NCHW, fp32, .item() each step")
    yield "train", n / fast, n / slow, name, "images/s"
    yield "train, --amp bf16", n / faster, n / slow, name, "images/s"
    # Forward, and twice that backward, of two views; a multiply-add counts two.
    backbone = Classifier(net.backbone, 512, 10)
    gflop = 2 * 3 * 2 * params_and_flops(backbone, 32)[1] / 1e9
    rate = 4 * 2 * SGEMM / products / 1e9
    yield "train", gflop * n / fast, rate, "this machine's sgemm", "GFLOP/s"


def bench_precision() -> Iterator[Row]:
    """Steps in bf16 against fp32 on this CPU, by the network's size: what --amp auto goes by."""
    for arch, width in (("resnet8", 16), ("resnet8", 32), ("resnet20", 32), ("resnet18", None)):
        flags = f"--recipe short --arch {arch} --batch_size 64"
        flags += f" --width {width}" if width else ""
        images = noise(2 * 64)
        (bf16, net), (fp32, _) = (
            training(f"{flags} --amp {amp}", images) for amp in ("bf16", "off")
        )
        fast, slow = in_turns(bf16, fp32)
        adds = params_and_flops(net, 32)[1] / 1e6
        what = (
            f"precision, {arch}"
            + f" of width {width}" * bool(width)
            + f", {adds:.0f}M multiply-adds"
        )
        yield what, len(images) / fast, len(images) / slow, "fp32", "images/s"


def bench_epoch(epochs: int = 3, seeds: int = 3) -> Iterator[Row]:
    """resnet20 on 5,000 textures: an epoch and the kNN at its end, against lightly's example."""
    images = Data(*make_textures(5000, seed=1), *make_textures(1000, seed=2), list(TEXTURE_CLASSES))
    seconds, accuracies = ([], []), ([], [])
    for seed in range(seeds):
        # lr 0.06, as in lightly's example
        flags = f"--data_name textures --arch resnet20 --epochs {epochs} --seed {seed} --lr 0.24"
        args, amp = arguments(f"{flags} --no-fix_pred_lr")
        torch.manual_seed(seed)
        net = build_model(vars(args)).to(memory_format=torch.channels_last)
        optimizer, tally = main.make_optimizer(net, args), TrainMeters(torch.device("cpu"))
        loader, views = Loader(images.train_images, args.batch_size, seed), views_of("short", 32)
        views.seed = seed
        monitor = Monitor(net, views, images, args, args.lr, amp)

        def ours(epoch: int) -> tuple[None, float]:
            list(main.train(net, optimizer, loader, views, tally, epoch, 0, args, amp))  # noqa: B023
            return None, monitor.measure()["test_acc@1"]  # noqa: B023

        with Peer(peers.lightly_training, images, args) as lightly:
            for epoch in range(epochs):
                for i, run in enumerate((ours, lightly)):
                    begun = time.perf_counter()
                    _, accuracy = run(epoch)
                    seconds[i].append(time.perf_counter() - begun)
                    if epoch + 1 == epochs:
                        accuracies[i].append(accuracy)
                    print(
                        f"epoch: seed {seed}, {epoch + 1}/{epochs}, {('ours', 'lightly')[i]}: "
                        f"{seconds[i][-1]:.1f} s, kNN {accuracy:.1f} %",
                        flush=True,
                    )
    name = versioned("lightly", "its example's transform, loader, heads and knn_predict")
    yield "epoch", *map(statistics.median, seconds), name, "s"
    for seed, pair in enumerate(zip(*accuracies, strict=True)):
        yield f"epoch, kNN top-1 after {epochs}, seed {seed}", *pair, name, "%"


def knn_memory(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor):
    """knn for a process of its own: its peak of memory besides its arguments, in MB."""

    def resident() -> int:
        """Pages of this process's own: the arguments are shared."""
        pages, shared = Path("/proc/self/statm").read_text().split()[1:3]
        return int(pages) - int(shared)

    devices.keep_freed_memory()
    knn(bank[:1000], labels[:1000], queries[:100])  # the libraries' own memory

    def run() -> float:
        before = peak = resident()
        done = threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, resident())

        watcher = threading.Thread(target=watch)
        watcher.start()
        knn(bank, labels, queries)
        done.set()
        watcher.join()
        return (peak - before) * os.sysconf("SC_PAGE_SIZE") / 2**20

    return run


def bench_knn() -> Iterator[Row]:
    """A bank of 50,000 x 512, 10,000 queries, k = 200, ten classes."""
    arguments("")
    torch.manual_seed(0)
    centres = torch.randn(10, 512)
    bank_labels, query_labels = torch.arange(50_000) % 10, torch.arange(10_000) % 10
    draw = lambda labels: F.normalize(  # noqa: E731
        centres[labels] + 6 * torch.randn(len(labels), 512), dim=1
    )
    bank, queries = draw(bank_labels), draw(query_labels)
    ours = lambda: knn(bank, bank_labels, queries)[:, 0]  # noqa: E731
    lightly_name = versioned("lightly", "knn_predict, chunks of 512")
    scikit_name = versioned("scikit-learn", "brute force, n_jobs=-1")
    with (
        Peer(peers.lightly_knn, bank, bank_labels, queries) as lightly,
        Peer(peers.scikit_knn, bank, bank_labels, queries) as scikit,
    ):
        product = sgemm()
        fast, lightlys, scikits, products = in_turns(
            ours, lightly, scikit, lambda: [product() for _ in range(4)], rounds=7
        )
        for name, peer in ((lightly_name, lightly), (scikit_name, scikit)):
            same = 100 * (ours() == peer()).float().mean().item()
            yield "knn, predictions that are equal", same, 100.0, name, "%"
    yield "knn", fast, lightlys, lightly_name, "s"
    yield "knn", fast, scikits, scikit_name, "s"
    rate = 4 * 2 * SGEMM / products / 1e9
    gflop = 2 * 50_000 * 10_000 * 512 / 1e9
    yield (
        "knn, its products over its whole time",
        gflop / fast,
        rate,
        "this machine's sgemm",
        "GFLOP/s",
    )
    with Peer(knn_memory, bank, bank_labels, queries) as memory:
        yield "knn, memory", memory(), None, None, "MB"
    for size in (10_000, 50_000, 200_000, 1_000_000):
        large, some = F.normalize(torch.randn(size, 512), dim=1), queries[:2000]
        labels = torch.arange(size) % 10
        run = lambda: knn(large, labels, some)  # noqa: B023, E731
        yield f"knn, bank of {size}, 2000 queries", in_turns(run)[0], None, None, "s"
        with Peer(knn_memory, large, labels, some) as memory:
            yield f"knn, bank of {size}, memory", memory(), None, None, "MB"


def bench_jpeg(number: int = 256, batch: int = 64) -> Iterator[Row]:
    """The ImageNet recipe's views of JPEG files of 500 x 375, delivered by one loader worker."""
    recipe = recipe_of("imagenet")
    arguments("")
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        for i in range(number):  # blurred noise and a little grain: files of about 60 kB, as photos
            coarse = torch.rand(1, 3, 24, 32, generator=generator)
            grain = 0.1 * torch.rand(1, 3, 375, 500, generator=generator)
            image = 0.9 * F.interpolate(coarse, (375, 500), mode="bicubic").clamp(0, 1) + grain
            image = (255 * image[0]).byte().permute(1, 2, 0).numpy()
            Image.fromarray(image).save(f"{place}/{i}.jpg", quality=90)
        paths = [f"{place}/{i}.jpg" for i in range(number)]
        print(f"jpeg: {sum(map(os.path.getsize, paths)) / number / 1000:.0f} kB a file")
        views = views_of("imagenet", 224)
        loader = Loader(ImageFiles(paths, 224, workers=1), batch, views=views)
        with Peer(peers.torchvision_files, paths, recipe, batch) as torchvision:
            ours, theirs = in_turns(lambda: list(loader.epoch(0)), torchvision)
        crops = list(loader.epoch(0))
        device = in_turns(lambda: [views(batch) for batch in crops])[0]
    name = versioned("torchvision", "the authors' PIL transforms, one DataLoader worker")
    yield "jpeg, one worker", number / ours, number / theirs, name, "images/s"
    yield "jpeg, the device's part (this CPU)", number / device, None, None, "images/s"


def bench_linear(*flags: str) -> Iterator[Row]:
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


STAGES = """
import sys, time
stages = [("python", time.time())]
def stage(name): stages.append((name, time.time()))
import torch, torchvision; stage("import of torch and torchvision")
import main; stage("other imports")
prepare, train, load = main.prepare, main.train, main.load
def timed_load(*a, **more):
    stage("network"); found = load(*a, **more); stage("images"); return found
def timed_prepare(run):
    made = prepare(run); stage("Params and FLOPs, optimizer"); return made
def first_step(*a):
    stage("kNN, untrained and of pixels; first checkpoint")
    next(train(*a)); stage("first step")
    for name, when in stages: print(f"STAGE {when} {name}")
    sys.exit()
main.load, main.prepare, main.train = timed_load, timed_prepare, first_step
main.main(["--data_name", "textures", "--out", *sys.argv[1:]])
"""


def bench_start() -> Iterator[Row]:
    """From the command to the first training step on textures, and what it is spent on."""
    runs = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-c", STAGES, place]
            before = begun = time.time()
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stages = {}
        for line in out.splitlines():
            if line.startswith("STAGE "):
                _, when, name = line.split(maxsplit=2)
                stages[name], before = float(when) - before, float(when)
        runs.append(stages | {"in all": before - begun})
    for name in runs[0]:
        yield f"start: {name}", statistics.median(run[name] for run in runs), None, None, "s"


def bench_ddp() -> Iterator[Row]:
    """resnet20 on textures by main.py: two ranks of one thread, and a process of two threads."""
    flags = "--data_name textures --arch resnet20 --train_size 1280 --batch_size 128 --epochs 3"
    flags += " --device cpu --name bench --out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    commands = ([*launch, "main.py", "--ddp"], 1), ([sys.executable, "main.py"], 2)
    speeds = ([], [])
    for _ in range(5):
        for (command, threads), found in zip(commands, speeds, strict=True):
            with tempfile.TemporaryDirectory() as place:
                env = os.environ | {"OMP_NUM_THREADS": str(threads)}
                whole = [*command, *flags.split(), place]
                subprocess.run(whole, env=env, check=True, capture_output=True)
                table = pandas.read_csv(f"{place}/bench_statistics.csv")
            found += table["images_per_sec"][2:].tolist()  # the first epoch holds the warm-up
    ranks, threads = map(statistics.median, speeds)
    yield "ddp", ranks, threads, "one process of two threads", "images/s"


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
    "gpu": gpu.bench,
}


def table_row(row: Row, device: str) -> dict:
    """A row of results/benchmarks.csv; prints it."""
    what, ours, peer, peer_name, unit = row
    ratio, text = None, f"{what}: {ours:.4g} {unit}"
    if peer is not None:
        text += f", {peer_name} {peer:.4g}"
    if peer is not None and unit != "%":  # above 1 where ours is the better
        ratio = peer / ours if unit == "s" else ours / peer
        text += f": ratio {ratio:.2f}"
    print(text, flush=True)
    ours, peer, ratio = (None if x is None else f"{x:.6g}" for x in (ours, peer, ratio))
    machine = (torch.get_num_threads(), machine_name(CPU), str(torch.__version__))
    values = (what, ours, peer, peer_name, ratio, unit, device, *machine, datetime.date.today())
    return dict(zip(COLUMNS, values, strict=True))


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    about = "; ".join(
        f"{name}: {(f.__doc__ or name).splitlines()[0]}" for name, f in BENCHMARKS.items()
    )
    parser = utils.Parser("tools.bench", __doc__, epilog=about)
    names = ", ".join((*BENCHMARKS, "profile"))
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=names)
    parser.add_argument("--csv", default="results/benchmarks.csv", help="(results/benchmarks.csv)")
    trace = "of `profile` (results/profile.json)"
    parser.add_argument("--trace", default="results/profile.json", help=trace)
    args, rest = parser.parse_known_args(argv)  # what is left are flags of linear.py or main.py
    if args.benchmarks == ["profile"]:
        profiler.profile(args.trace, rest)
        return
    for name in args.benchmarks:
        if name not in BENCHMARKS:
            parser.error(f"{name}: choose from {names}")
    if rest and args.benchmarks not in (["linear"], ["gpu"]):
        parser.error(f"{rest[0]}: only `linear`, `gpu` and `profile`, alone, take more flags")
    Path(args.csv).parent.mkdir(parents=True, exist_ok=True)
    for name in args.benchmarks or BENCHMARKS:
        device = gpu.name_of(gpu.read(rest)[0]) if name == "gpu" else "cpu"
        rows = [table_row(row, device) for row in BENCHMARKS[name](*rest)]
        old = []
        if Path(args.csv).is_file():
            old = pandas.read_csv(args.csv, dtype=str, keep_default_na=False).to_dict("records")
        new = {(row["benchmark"], row["peer_name"] or "", device) for row in rows}
        key = lambda row: (row["benchmark"], row["peer_name"], row.get("device") or "cpu")  # noqa: E731
        old = [row for row in old if key(row) not in new]
        files.write_csv(args.csv, [*old, *rows], COLUMNS)


if __name__ == "__main__":
    command()
