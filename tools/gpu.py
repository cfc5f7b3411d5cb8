"""Benchmarks of an accelerator: views, steps, an epoch, kNN, features, a checkpoint.

`python -m tools.bench gpu` runs them. Speeds stand beside what the device reaches in the same run
in a large matrix product (FLOP/s) and a large copy (B/s). On a CPU everything is small.
"""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import utils
from simsiam.data.loader import Data
from simsiam.data.textures import make_textures
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.models.flops import params_and_flops
from simsiam.runtime import devices
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.recipes import RECIPES
from simsiam.views.augment import Batch
from studies.peers import Peer, plain_training
from tools.common import DEVICE_HELP
from tools.timing import Row, epoch_of_steps, median_seconds, noise, training_state


@dataclasses.dataclass
class Sizes:
    """Sizes of the benchmarks. `cifar`, `imagenet`: flags of main.py; `steps`: per epoch."""

    cifar: str = "--batch_size 512"
    batch_size: int = 512
    steps: int = 16
    bank: int = 50_000  # features in the kNN's bank
    matrix: int = 8192  # rows and columns
    imagenet: str = "--arch resnet50 --batch_size 256"
    imagenet_batch_size: int = 256
    imagenet_size: int = 224  # pixels


SMALL = Sizes(
    cifar="--arch resnet8 --width 8 --feature_dim 64 --batch_size 32",
    batch_size=32,
    steps=2,
    bank=2_000,
    matrix=512,
    imagenet="--arch resnet18 --feature_dim 64 --batch_size 8",
    imagenet_batch_size=8,
    imagenet_size=64,
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}


def peak_speeds(device: torch.device, side: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return FLOP/s of a matrix product of `side`, and bytes/s that a copy of its size moves."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    target = torch.empty_like(a)
    product, copy = median_seconds(lambda: a @ b, lambda: target.copy_(a), device=device)
    return 2 * side**3 / product, 2 * a.numel() * a.element_size() / copy


def bench_steps(
    name: str, flags: str, images: Tensor, peak: float, compiles: bool
) -> Iterator[Row]:
    """Training steps, with --compile and without. `peak`: FLOP/s of a matrix product."""
    device = images.device
    for option in ("", " --compile") if compiles else ("",):
        config, state = training_state(f"{flags} --device {device}{option}", images)
        (seconds,) = median_seconds(epoch_of_steps(config, state), device=device)
        # Of two views, forward and twice that backward; a multiply-add counts two.
        flop = 2 * 3 * 2 * params_and_flops(state.net, images.shape[-1])[1]
        label = f"{name}, {config.amp}" + ", --compile" * bool(option)
        speed = len(images) / seconds
        yield Row(label, speed, "images/s")
        yield Row(f"{label}: FLOP/s", flop * speed, "FLOP/s", peak, "a matrix product")


def bench_epoch(flags: str, images: Tensor, labels: Tensor) -> Iterator[Row]:
    """An epoch with its kNN and rank, the features alone, and a checkpoint."""
    device, test = images.device, slice(len(images) // 5)
    data = Data(images, labels, images[test], labels[test], [str(i) for i in range(10)])
    config, state = training_state(flags, data)
    monitor = Monitor(state.net, state.views, data, config, state.autocast)

    def extract() -> Tensor:
        transform = state.views.eval_transform
        return metrics.extract_features(state.net.backbone, transform, images, state.autocast)

    with tempfile.TemporaryDirectory() as folder:

        def save() -> None:
            entries = dict.fromkeys(checkpoint.FORMAT) | state.state_dict()
            checkpoint.save(f"{folder}/a_model.pth", None, entries)

        steps, evaluation, features, saving = median_seconds(
            epoch_of_steps(config, state), monitor.measure, extract, save, device=device
        )
    yield Row("gpu epoch: its steps", steps, "s")
    yield Row("gpu epoch: kNN and rank", evaluation, "s")
    yield Row("gpu epoch: a checkpoint", saving, "s")
    yield Row("gpu features", len(images) / features, "images/s")


def bench_knn(device: torch.device, size: int, side: int) -> Iterator[Row]:
    """kNN and rank of a bank of `size` x 512, with a fifth as many queries."""
    bank = F.normalize(torch.randn(size, 512, device=device), dim=1)
    labels = torch.arange(size, device=device) % 10
    queries = bank[: size // 5]
    seconds, rank_seconds = median_seconds(
        lambda: knn(bank, labels, queries), lambda: metrics.effective_rank(bank), device=device
    )
    peak = peak_speeds(device, side, torch.float32)[0]
    speed = 2 * size * len(queries) * 512 / seconds
    name = f"gpu kNN, bank of {size}"
    yield Row(name, seconds, "s")
    yield Row(f"{name}: FLOP/s", speed, "FLOP/s", peak, "a matrix product in fp32")
    yield Row(f"gpu rank, bank of {size}", rank_seconds, "s")


def bench(*flags: str) -> Iterator[Row]:
    """Training on an accelerator, and the work around it; --device NAME, --small, --quick."""
    device, sizes, is_quick = read(flags)
    batch_size, matrix = sizes.batch_size, sizes.matrix
    cifar = f"{sizes.cifar} --device {device}"
    config, state = training_state(cifar, noise(batch_size, 3, 32, 32))
    dtype = DTYPES[config.amp]
    peak, bandwidth = peak_speeds(device, matrix, dtype)
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
    yield from bench_steps("gpu step", cifar, images, peak, compiles)
    if device.type in ("cpu", "cuda") and not is_quick:  # a peer's process has only these
        part = images[: 2 * batch_size]
        step = epoch_of_steps(*training_state(f"--batch_size {batch_size} --device {device}", part))
        with Peer(plain_training, part.cpu(), RECIPES["cifar"], batch_size, str(device)) as plain:
            seconds, peer_seconds = median_seconds(step, plain, rounds=3, device=device)
        name = "a plain loop: NCHW, PIL views in 2 workers, fp32, .item() each step"
        yield Row("gpu, ResNet-18", len(part) / seconds, "images/s", len(part) / peer_seconds, name)
    yield from bench_epoch(cifar, images, labels)
    yield from bench_knn(device, sizes.bank, matrix)
    size = sizes.imagenet_size
    crops = noise(2 * sizes.imagenet_batch_size, 2, 3, size, size).to(device)
    flags = f"{sizes.imagenet} --recipe imagenet --image_size {size}"
    yield from bench_steps("gpu ImageNet's step", flags, crops, peak, compiles)
    if device.type == "cuda":
        yield Row("gpu memory", torch.cuda.max_memory_allocated(device) / 2**20, "MB")


def read(flags: Sequence[str]) -> tuple[torch.device, Sizes, bool]:
    """Return the device, the sizes, and whether --quick is given. Exits if a flag is wrong."""
    parser = utils.Parser("tools.bench gpu", __doc__)
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument("--small", action="store_true", help="small networks, as on a CPU")
    parser.add_argument("--quick", action="store_true", help="no --compile and no plain loop")
    args = parser.parse_args(flags)
    with parser.bad_input():
        device = devices.pick_device(args.device)
    return device, SMALL if args.small or device.type == "cpu" else Sizes(), args.quick
