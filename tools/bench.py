"""Benchmarks against other projects, timed in turns (A B A B ...) in one run.

python -m tools.bench                  # all of them: half an hour on two cores
python -m tools.bench views train      # some
python -m tools.bench profile --data_name textures  # where the time of main.py's steps goes

They time the library's functions and the commands themselves, never a copy of them. Rows with
medians and their ratio are added to results/benchmarks.csv.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
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
from simsiam.runtime import devices, files
from simsiam.training.collapse import Monitor
from simsiam.training.recipes import RECIPES, PretrainConfig
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Batch
from studies import peers
from studies.peers import Peer
from tools import gpu
from tools.timing import (
    Row,
    epoch_of_steps,
    machine_name,
    median_seconds,
    noise,
    read_config,
    training_state,
)

CPU = torch.device("cpu")
COLUMNS = tuple("benchmark ours peer peer_name ratio unit device threads cpu torch date".split())
MATRIX = 4096  # rows and columns in `sgemm`
PRODUCTS = 4  # per call of `sgemm`, which then takes about as long as what it is timed beside


def peer_name(package: str, details: str) -> str:
    """Return a peer's name with its version, for the table."""
    return f"{package} {importlib.metadata.version(package)}: {details}"


def sgemm() -> Callable[[], object]:
    """Return a function that multiplies fp32 matrices, PRODUCTS times."""
    a, b = torch.randn(MATRIX, MATRIX), torch.randn(MATRIX, MATRIX)
    return lambda: [a @ b for _ in range(PRODUCTS)]


def sgemm_gflops(seconds: float) -> float:
    """Return the GFLOP/s of a call of `sgemm` that took so long."""
    return PRODUCTS * 2 * MATRIX**3 / seconds / 1e9


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


def cpu_epoch(flags: str, images: torch.Tensor) -> tuple[Callable[[], object], TrainState]:
    """Return a function that trains an epoch on the CPU, and its state."""
    config, state = training_state(f"{flags} --device cpu", images)
    return epoch_of_steps(config, state), state


def bench_train(batch_size: int = 128) -> Iterator[Row]:
    """ResNet-18 CIFAR steps of 128 images, augmentation included, against a plain loop."""
    images = noise(2 * batch_size, 3, 32, 32)
    fp32, state = cpu_epoch(f"--batch_size {batch_size} --amp off", images)
    bf16, _ = cpu_epoch(f"--batch_size {batch_size} --amp bf16", images)
    with Peer(peers.plain_training, images, RECIPES["cifar"], batch_size) as plain:
        fp32_seconds, bf16_seconds, plain_seconds, sgemm_seconds = median_seconds(
            fp32, bf16, plain, sgemm(), rounds=7
        )
    n = len(images)
    name = peer_name("torchvision", "PIL views in 2 workers, NCHW, fp32, .item() each step")
    yield Row("train", n / fp32_seconds, "images/s", n / plain_seconds, name)
    yield Row("train, --amp bf16", n / bf16_seconds, "images/s", n / plain_seconds, name)
    # Of two views, forward and twice that backward; a multiply-add counts two.
    backbone = Classifier(state.net.backbone, 512, 10)
    gflop = 2 * 3 * 2 * params_and_flops(backbone, 32)[1] / 1e9
    peak = sgemm_gflops(sgemm_seconds)
    yield Row("train", gflop * n / fp32_seconds, "GFLOP/s", peak, "this machine's sgemm")


def bench_precision(batch_size: int = 64) -> Iterator[Row]:
    """Steps in bf16 against fp32 on this CPU, by the network's size: what --amp auto goes by."""
    for arch, width in (("resnet8", 16), ("resnet8", 32), ("resnet20", 32), ("resnet18", None)):
        flags = f"--recipe short --arch {arch} --batch_size {batch_size}"
        flags += f" --width {width}" if width else ""
        images = noise(2 * batch_size, 3, 32, 32)
        bf16, state = cpu_epoch(f"{flags} --amp bf16", images)
        fp32, _ = cpu_epoch(f"{flags} --amp off", images)
        bf16_seconds, fp32_seconds = median_seconds(bf16, fp32)
        flops = params_and_flops(state.net, 32)[1] / 1e6
        of_width = f" of width {width}" if width else ""
        name = f"precision, {arch}{of_width}, {flops:.0f}M multiply-adds"
        n = len(images)
        yield Row(name, n / bf16_seconds, "images/s", n / fp32_seconds, "fp32")


def bench_epoch(epochs: int = 3, seeds: int = 3) -> Iterator[Row]:
    """resnet20 on 5,000 textures: an epoch and the kNN at its end, against lightly's example."""
    images = Data(*make_textures(5000, seed=1), *make_textures(1000, seed=2), list(TEXTURE_CLASSES))
    seconds, accuracies = {"simsiam": [], "lightly": []}, {"simsiam": [], "lightly": []}
    for seed in range(seeds):
        # lr 0.06, as in lightly's example
        flags = f"--data_name textures --arch resnet20 --epochs {epochs} --seed {seed} --lr 0.24"
        config, state = training_state(f"{flags} --no-fix_pred_lr --device cpu", images)
        monitor = Monitor(state.net, state.views, images, config, state.autocast)
        with Peer(peers.lightly_training, images, config) as lightly:
            for epoch in range(epochs):
                start = time.perf_counter()
                list(main.train(state, epoch, config))
                accuracy = monitor.measure()["test_acc@1"]
                middle = time.perf_counter()
                _, lightly_accuracy = lightly(epoch)
                seconds["simsiam"].append(middle - start)
                seconds["lightly"].append(time.perf_counter() - middle)
                for name, top1 in (("simsiam", accuracy), ("lightly", lightly_accuracy)):
                    print(
                        f"epoch: seed {seed}, {epoch + 1}/{epochs}, {name}: "
                        f"{seconds[name][-1]:.1f} s, kNN {top1:.1f} %",
                        flush=True,
                    )
        accuracies["simsiam"].append(accuracy)
        accuracies["lightly"].append(lightly_accuracy)
    name = peer_name("lightly", "its example's transform, loader, heads and knn_predict")
    medians = {project: statistics.median(times) for project, times in seconds.items()}
    yield Row("epoch", medians["simsiam"], "s", medians["lightly"], name)
    for seed in range(seeds):
        top1, lightly_top1 = accuracies["simsiam"][seed], accuracies["lightly"][seed]
        yield Row(f"epoch, kNN top-1 after {epochs}, seed {seed}", top1, "%", lightly_top1, name)


def knn_memory(
    bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor
) -> Callable[[], float]:
    """Return a function that runs the kNN and returns its peak memory without arguments, in MB.

    For a process of its own, a `Peer`.
    """

    def resident_pages() -> int:
        """Pages that this process alone has: the arguments are shared memory."""
        pages, shared = Path("/proc/self/statm").read_text().split()[1:3]
        return int(pages) - int(shared)

    devices.keep_freed_memory()
    knn(bank[:1000], labels[:1000], queries[:100])  # allocates what the libraries keep

    def run() -> float:
        before = peak = resident_pages()
        done = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, resident_pages())

        watcher = threading.Thread(target=watch)
        watcher.start()
        knn(bank, labels, queries)
        done.set()
        watcher.join()
        return (peak - before) * os.sysconf("SC_PAGE_SIZE") / 2**20

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

    def classify() -> torch.Tensor:
        return knn(bank, bank_labels, queries)[:, 0]

    lightly_name = peer_name("lightly", "knn_predict, chunks of 512")
    sklearn_name = peer_name("scikit-learn", "brute force, n_jobs=-1")
    with (
        Peer(peers.lightly_knn, bank, bank_labels, queries) as lightly,
        Peer(peers.sklearn_knn, bank, bank_labels, queries) as sklearn,
    ):
        seconds, lightly_seconds, sklearn_seconds, sgemm_seconds = median_seconds(
            classify, lightly, sklearn, sgemm(), rounds=7
        )
        for name, peer in ((lightly_name, lightly), (sklearn_name, sklearn)):
            equal = 100 * (classify() == peer()).float().mean().item()
            yield Row("knn, predictions that are equal", equal, "%", 100.0, name)
    yield Row("knn", seconds, "s", lightly_seconds, lightly_name)
    yield Row("knn", seconds, "s", sklearn_seconds, sklearn_name)
    gflops, peak = 2 * 50_000 * 10_000 * 512 / 1e9 / seconds, sgemm_gflops(sgemm_seconds)
    name = "knn, its products over its whole time"
    yield Row(name, gflops, "GFLOP/s", peak, "this machine's sgemm")
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
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for _ in zip(range(3), steps, strict=False):
            pass
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
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
    if row.peer is not None and row.unit != "%":  # above 1 where this project is better
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
    for name in args.benchmarks or BENCHMARKS:
        device = "cpu"
        if name == "gpu" and (accelerator := gpu.read(rest)[0]).type != "cpu":
            device = machine_name(accelerator)
        rows = [table_row(row, device) for row in BENCHMARKS[name](*rest)]
        new = {(row["benchmark"], row["peer_name"] or "", device) for row in rows}
        old = []
        if Path(args.csv).is_file():
            table = pandas.read_csv(args.csv, dtype=str, keep_default_na=False)
            for row in table.to_dict("records"):
                if (row["benchmark"], row["peer_name"], row.get("device") or "cpu") not in new:
                    old.append(row)
        files.write_csv(args.csv, [*old, *rows], COLUMNS)


if __name__ == "__main__":
    command()
