"""Where the time of an accelerator goes: views, steps, an epoch, kNN, features, a checkpoint.

`python -m tools.bench gpu` runs it. Speeds stand beside what the device reaches in the same run in
a large matrix product (FLOP/s) and a large copy (GB/s). On a CPU everything is small.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import main
import utils
from simsiam.data.loader import Data, Loader
from simsiam.data.textures import make_textures
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import build_model
from simsiam.runtime import devices, distributed
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.meters import TrainMeters
from simsiam.training.recipes import VIEWS
from simsiam.views.augment import Batch, Views
from studies.peers import Peer, plain_training
from tools.timing import in_turns

# A benchmark's name, our number, the one beside it and its name, the unit.
Row = tuple[str, float, float | None, str | None, str]
# What is timed: flags of main.py; steps an epoch; images and width of a kNN's bank; the side of a
# matrix; flags and image size of ImageNet's part.
LARGE = ("--batch_size 512", 16, 50_000, 8192, "--arch resnet50 --batch_size 256", 224)
SMALL = ("--arch resnet8 --width 8 --feature_dim 64 --batch_size 32", 2, 2_000, 512)
SMALL += ("--arch resnet18 --feature_dim 64 --batch_size 8", 64)
PASSES = 2 * 3  # of a step: two views, each forward and twice that backward


def name_of(device: torch.device) -> str:
    """The device's name, as its driver tells it; `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def timed(device: torch.device, *functions: Callable[[], object], rounds: int = 5) -> list[float]:
    """As `in_turns`, of work on `device`, which is waited for."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else (lambda: None)
    return in_turns(*functions, rounds=rounds, wait=wait)


def peaks(device: torch.device, side: int, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a matrix product of `side`, and bytes/s that a copy of its size moves."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    to = torch.empty_like(a)
    product, copy = timed(device, lambda: a @ b, lambda: to.copy_(a))
    return 2 * side**3 / product, 2 * a.numel() * a.element_size() / copy


class Training:
    """main.py's training on images that are at hand, uint8, N x 3 x S x S or N x 2 x 3 x S x S."""

    def __init__(self, flags: str, recipe: str, images: Tensor, compiled: bool):
        device, size = images.device, images.shape[-1]
        line = [*flags.split(), "--recipe", recipe, "--device", str(device)]
        self.args = main.make_flags().read(line)[0]
        self.amp_name = devices.setup_device(self.args)[1]
        net = build_model(vars(self.args)).to(device, memory_format=torch.channels_last)
        self.flop = 2 * PASSES * params_and_flops(net, size)[1]  # of a step, for an image
        augmentation, mean, std = VIEWS[recipe]
        self.images, self.net = images, net
        self.views = Views(size, mean, std, augmentation, net.num_views, 0, compiled)
        self.trained = distributed.prepare_for_training(net, size, compiled)
        self.optimizer, self.tally = main.make_optimizer(net, self.args), TrainMeters(device)
        self.amp = devices.autocast(device, self.amp_name)

    def __call__(self) -> None:
        """An epoch of steps."""
        loader = Loader(self.images, self.args.batch_size)
        if self.images.dim() == 5:  # crops, as workers have cut them
            parts = self.images.split(self.args.batch_size)
            loader.epoch = lambda *when: (Batch.alone(part, 0, i) for i, part in enumerate(parts))
        rest = (self.views, self.tally, 0, 0, self.args, self.amp)
        for _ in main.train(self.trained, self.optimizer, loader, *rest):
            pass


def noise(device: torch.device, *shape: int) -> Tensor:
    """Bytes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def steps(
    what: str, flags: str, recipe: str, images: Tensor, flops: float, compiles: bool
) -> Iterator[Row]:
    """Images a second and FLOP/s of training, with --compile and without."""
    n, device = len(images), images.device
    for compiled in (False, True) if compiles else (False,):
        torch.manual_seed(0)
        run = Training(flags, recipe, images, compiled)
        (seconds,) = timed(device, run)
        label = f"{what}, {run.amp_name}" + ", --compile" * compiled
        yield label, n / seconds, None, None, "images/s"
        yield f"{label}: FLOP/s", run.flop * n / seconds, flops, "a matrix product", "FLOP/s"


def epoch(flags: str, images: Tensor, labels: Tensor) -> Iterator[Row]:
    """An epoch with its kNN and rank, the features alone, and a checkpoint."""
    device, run = images.device, Training(flags, "cifar", images, False)
    some = slice(len(images) // 5)
    data = Data(images, labels, images[some], labels[some], [str(i) for i in range(10)])
    monitor = Monitor(run.net, run.views, data, run.args, 1.0, run.amp)
    of_images = (run.net.backbone, run.views.eval_transform, images, run.amp)
    features = lambda: metrics.extract_features(*of_images)  # noqa: E731
    kept = {"command": "main.py", "args": vars(run.args), "encoder": {}, "augmentation": {}}
    kept |= {"images_crc": 0, "classes": [], "epoch": 0, "step": 0, "tally": {}, "seconds": 0.0}
    kept |= {"history": [], "facts": {}, "probe": {}}
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/a_model.pth"
        save = lambda: checkpoint.save(path, None, run.net, run.optimizer, **kept)  # noqa: E731
        work = (run, monitor.measure, features, save)
        training, watching, features, saving = timed(device, *work)
    yield "gpu epoch: its steps", training, None, None, "s"
    yield "gpu epoch: kNN and rank", watching, None, None, "s"
    yield "gpu epoch: a checkpoint", saving, None, None, "s"
    yield "gpu features", len(images) / features, None, None, "images/s"


def time_knn(device: torch.device, size: int, side: int, dtype: torch.dtype) -> Iterator[Row]:
    """kNN and rank of a bank of `size` x 512, with a fifth as many queries."""
    bank = torch.nn.functional.normalize(torch.randn(size, 512, device=device), dim=1)
    labels = torch.arange(size, device=device) % 10
    some = bank[: size // 5]
    seconds, rank = timed(
        device, lambda: knn(bank, labels, some), lambda: metrics.effective_rank(bank)
    )
    flops = peaks(device, side, torch.float32)[0]
    yield f"gpu kNN, bank of {size}", seconds, None, None, "s"
    rate = 2 * size * len(some) * 512 / seconds
    yield f"gpu kNN, bank of {size}: FLOP/s", rate, flops, "a matrix product in fp32", "FLOP/s"
    yield f"gpu rank, bank of {size}", rank, None, None, "s"


def bench(*flags: str) -> Iterator[Row]:
    """What an accelerator does in training and around it; --device NAME, --small, --quick."""
    device, small, quick = read(flags)
    cifar, number, bank, side, imagenet, size = SMALL if small else LARGE
    batch = int(cifar.split()[-1])
    run = Training(cifar, "cifar", noise(device, batch, 3, 32, 32), False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.amp_name, torch.float32)
    flops, bandwidth = peaks(device, side, dtype)
    yield f"gpu: a matrix product, {dtype}", flops, None, None, "FLOP/s"
    yield "gpu: a copy", bandwidth, None, None, "B/s"

    images, labels = (part.to(device) for part in make_textures(number * batch, seed=1))
    parts = [Batch.alone(part) for part in images.split(batch)]
    (seconds,) = timed(device, lambda: [run.views(part) for part in parts])
    n = run.views.number * len(images)
    yield "gpu views", n / seconds, None, None, "views/s"
    least = n * 3 * 32 * 32 * (1 + 4)  # each is read as bytes and written as fp32
    yield "gpu views: read and written", least / seconds, bandwidth, "a copy", "B/s"
    compiles = not quick
    try:
        if compiles:
            devices.check_compile(device)
    except ValueError as error:
        compiles = False
        print(error)
    yield from steps("gpu step", cifar, "cifar", images, flops, compiles)
    if device.type in ("cpu", "cuda") and not quick:  # what a process of its own knows
        recipe = main.RECIPES["cifar"] | {"blur_p": 0.0}
        recipe |= dict(zip(("mean", "std"), VIEWS["cifar"][1:], strict=True))
        some = images[: 2 * batch].cpu()
        with Peer(plain_training, some, recipe, batch, str(device)) as plain:
            full = Training(f"--batch_size {batch}", "cifar", some.to(device), False)
            ours, theirs = timed(device, full, plain, rounds=3)
        what = "a plain loop: NCHW, PIL views in 2 workers, fp32, .item() each step"
        yield "gpu, ResNet-18", len(some) / ours, len(some) / theirs, what, "images/s"
    yield from epoch(cifar, images, labels)
    yield from time_knn(device, bank, side, dtype)
    each = int(imagenet.split()[-1])
    crops = noise(device, 2 * each, 2, 3, size, size)
    yield from steps("gpu ImageNet's step", imagenet, "imagenet", crops, flops, compiles)
    if device.type == "cuda":
        yield "gpu memory", torch.cuda.max_memory_allocated(device) / 2**20, None, None, "MB"


def read(flags: Sequence[str]) -> tuple[torch.device, bool, bool]:
    """The device of these flags, whether all is to be small, and quick. Exits on bad ones."""
    parser = utils.Parser("tools.bench gpu", __doc__)
    parser.add_argument("--device", default="auto", help="as of main.py (auto)")
    parser.add_argument("--small", action="store_true", help="small networks, as on a CPU")
    parser.add_argument("--quick", action="store_true", help="no --compile and no plain loop")
    args = parser.parse_args(flags)
    with parser.bad_input():
        device = devices.pick_device(args.device)
    return device, args.small or device.type == "cpu", args.quick
