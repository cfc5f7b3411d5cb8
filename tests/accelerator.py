"""A pretend accelerator, `pretend`, in the CPU's memory: python -m tests.accelerator BUILD MODE ...

BUILD is the folder in which `accelerator.cpp` is compiled, once (needs g++ and ninja). The modes
print a line of JSON, which tests/test_accelerator.py looks at:
runs PLACE DEVICE: the commands of this project, from training to prediction, on DEVICE.
steps: what the host waited for in training, in each of its parts; and for planted faults.
ranks PLACE FLAGS: three steps on one rank and on two, with and without SyncBatchNorm, whose weights
are written into PLACE; then main.py on two ranks.
"""

import contextlib
import functools
import json
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils import cpp_extension

import linear
import main
import utils
from simsiam.data.loader import Loader
from simsiam.data.textures import make_textures
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import devices, distributed
from simsiam.training.meters import TrainMeters
from simsiam.training.probe import Probe
from simsiam.training.recipes import VIEWS
from simsiam.views.augment import Batch, Views
from tests import ranks as tests_ranks
from tools import bench, features

SOURCE = Path(__file__).with_name("accelerator.cpp")


def register(folder: str) -> types.ModuleType:
    """Compile the backend if `folder` does not have it; from here on it is the accelerator."""
    native = cpp_extension.load(
        "pretend_accelerator", [str(SOURCE)], ["-O0"], build_directory=folder
    )
    torch.utils.rename_privateuse1_backend("pretend")
    module = types.ModuleType("torch.pretend")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 2
    module.current_device = native.get
    module.set_device = lambda device: native.set(
        device if isinstance(device, int) else torch.device(device).index or 0
    )
    module.synchronize = lambda *device: None
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda *device: torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda *state: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module("pretend", module)
    native.setup()
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

    def collectives(store, rank, size, timeout):
        native.patience = timeout.total_seconds()
        return native.wrap(dist.ProcessGroupGloo(store, rank, size, timeout=timeout))

    dist.Backend.register_backend("pretendccl", collectives, devices=["pretend"])
    return native


# ---- the commands -------------------------------------------------------------------------------


def run(command: types.ModuleType, line: str, stop_at: int | None = None) -> None:
    """A command; with `stop_at` a signal arrives in that step of its loop, and it ends."""
    train = command.train

    def interrupted(*args):
        for step in train(*args):
            if step == stop_at:
                signal.raise_signal(signal.SIGTERM)
            yield step

    command.train = interrupted
    try:
        command.main(line.split())
    except SystemExit as stop:
        if stop_at is None or stop.code != 128 + signal.SIGTERM:
            raise
    finally:
        command.train = train


def runs(place: str, device: str) -> dict:
    """What a user does, in `place`, which has image files in `images`; in fp32."""
    on = f"--device {device} --amp off --out {place}"
    small = "--width 8 --feature_dim 32 --no-pictures --k 20"
    added = "--target mean --num_views 3 --covariance 0.01"
    first = f"{on} --data_name textures --train_size 256 {small} --epochs 2 {added} --name whole"
    run(main, first)
    parted = first.replace("whole", "parted")
    run(main, parted, stop_at=1)
    run(main, f"{parted} --resume")
    files = f"{on} --data_name imagenet --data_root {place}/images --recipe short --image_size 32"
    run(main, f"{files} --batch_size 32 {small} --epochs 1 --name files --num_workers 1")
    whole = f"{on} --model_path {place}/whole_model.pth --no-pictures"
    run(linear, f"{whole} --epochs 1 --name augmented")
    run(linear, f"{whole} --epochs 3 --cached --lr 1 30 --name cached")
    run(linear, f"{whole} --epochs 1 --optimizer lars --name lars --batch_size 64")
    run(linear, f"{whole} --epochs 1 --finetune --mixup 0.2 --name tuned")
    judged = f"--device {device} --amp off --model_path {place}/augmented_model.pth"
    run(linear, f"{judged} --evaluate_only --no-pictures")
    run(linear, f"{judged} --predict {place}/images --out_csv {place}/predictions.csv")
    images = f"--data_root {place}/images/train --out {place}/features.csv"
    bench.command(f"gpu --device {device} --small --quick --csv {place}/benchmarks.csv".split())
    features.command(
        f"--device {device} --amp off --model_path {place}/whole_model.pth {images}".split()
    )
    return {}


# ---- steps --------------------------------------------------------------------------------------

FLAGS = "--data_name textures --width 8 --feature_dim 32 --batch_size 32 --amp off"


def waits(native: types.ModuleType, work: Callable[[], object]) -> dict[str, int]:
    """What `work` lets the host wait for."""
    before = native.counts()
    work()
    return {name: number - before[name] for name, number in native.counts().items()}


def trained(
    native: types.ModuleType,
    device: torch.device,
    fault: Callable[[torch.Tensor], object] = lambda x: None,
) -> tuple[nn.Module, dict[str, int]]:
    """A network after three steps, and what these waited for. `fault` gets each step's x1."""
    args = main.make_flags().read([*FLAGS.split(), "--device", "cpu"])[0]
    torch.manual_seed(0)
    net = build_model(vars(args)).to(device, memory_format=torch.channels_last)
    optimizer, tally = main.make_optimizer(net, args), TrainMeters(device)
    images, labels = (part.to(device) for part in make_textures(96, seed=1))
    augment = Views(32, *VIEWS["short"][1:])
    loader = Loader(images, args.batch_size, 0, labels, views=augment)
    probe = Probe(net.features, 10, args, device)

    def views(batch: Batch) -> list[torch.Tensor]:
        x = augment(batch)
        fault(x[0])
        return x

    wrapped = distributed.prepare_for_training(net, 32)
    off = devices.autocast(device, "off")
    rest = (views, tally, 0, 0, args, off, main.UNSCALED, probe)
    return net, waits(native, lambda: list(main.train(wrapped, optimizer, loader, *rest)))


def steps(native: types.ModuleType) -> dict:
    """Waits of three steps, healthy and with a fault planted in each; of features, kNN, rank."""
    device = torch.device("pretend", 0)
    faults = {
        "none": lambda x: None,
        "number": lambda x: x[0, 0, 0, 0].item(),
        "copy": lambda x: torch.ones(3).to(x.device),
        "mask": lambda x: x[x > 0],
        "back": lambda x: x.cpu(),
    }
    found = {name: trained(native, device, fault=fault)[1] for name, fault in faults.items()}
    try:
        trained(native, device, fault=lambda x: x + torch.ones(32))
        found["mix"] = ""
    except RuntimeError as error:
        found["mix"] = str(error)
    net = SimSiam("resnet8", feature_dim=32).to(device)
    images, labels = (part.to(device) for part in make_textures(96, seed=1))
    views, off = Views(32, *VIEWS["short"][1:]), devices.autocast(device, "off")
    bank = metrics.extract_features(net.backbone, views.eval_transform, images, off)
    work = {
        "features": lambda: metrics.extract_features(
            net.backbone, views.eval_transform, images, off
        ),
        "knn": lambda: knn(bank, labels, bank),
        "rank": lambda: metrics.effective_rank(bank),
    }
    return found | {name: waits(native, some) for name, some in work.items()}


def save_weights(native: types.ModuleType, path: str) -> None:
    """On a rank: write the network after three steps, and how long a collective waits."""
    with distributed.process_group():
        net, _ = trained(native, distributed.local_device("pretend"))
        weights = {key: value.cpu() for key, value in net.state_dict().items()}
        if distributed.rank() == 0:
            torch.save({"weights": weights, "timeout": native.patience}, path)


def command() -> None:
    """The command line."""
    folder, mode, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        native = register(folder)
    if mode == "ranks":
        place, *flags = rest
        sync = distributed.sync_batchnorm
        for ranks, name in ((1, "one"), (2, "two"), (2, "apart")):
            distributed.sync_batchnorm = (lambda net: None) if name == "apart" else sync
            work = functools.partial(save_weights, native, f"{place}/{name}.pth")
            print("exit codes", *tests_ranks.launch(ranks, work), flush=True)
        distributed.sync_batchnorm = sync
        codes = tests_ranks.launch(2, lambda: utils.run_command(lambda: main.main(flags)))
        print("exit codes", *codes, flush=True)
        return
    with contextlib.redirect_stdout(sys.stderr):
        found = runs(*rest) if mode == "runs" else steps(native)
    print(json.dumps(found))


if __name__ == "__main__":
    command()
