"""A pretend accelerator, `pretend`, in the CPU's memory: python -m tests.accelerator BUILD MODE ...

BUILD is the folder in which `accelerator.cpp` is compiled, once (needs g++ and ninja). Modes, of
which the last two print a line of JSON:
runs PLACE DEVICE: this project's commands, from training to prediction, on DEVICE.
steps: what the host waits for in parts of training; and with planted faults.
ranks PLACE FLAGS: three steps on one rank and on two, with and without SyncBatchNorm, whose weights
are written into PLACE; then main.py on two ranks. Printed are exit codes and output.
"""

import contextlib
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
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import knn
from simsiam.runtime import distributed
from tests.helpers import new_state
from tests.ranks import launch
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


def runs(place: str, device: str) -> None:
    """Run the commands in fp32 in the folder `place`, which has image files in `images`."""
    on = f"--device {device} --amp off"
    out = f"{on} --out {place} --no-pictures"
    small = "--width 8 --feature_dim 32 --k 20"
    added = "--target mean --num_views 3 --covariance 0.01"
    first = f"{out} --data_name textures --train_size 256 {small} --epochs 2 {added} --name"
    main.main(f"{first} whole".split())
    with contextlib.suppress(SystemExit):
        main.main(f"{first} parted".split(), lambda epoch, step: stop_at(step == 1))
    main.main(f"{first} parted --resume".split())
    files = f"--data_name imagenet --data_root {place}/images --recipe short --image_size 32"
    files += " --batch_size 32 --epochs 1 --name files --num_workers 1"
    main.main(f"{out} {small} {files}".split())
    for flags in (
        "--epochs 1 --name augmented",
        "--epochs 3 --cached --optimizer lars --lr 0.1 1 --batch_size 64 --name cached",
        "--epochs 1 --finetune --mixup 0.2 --name tuned",
    ):
        linear.main(f"{out} --model_path {place}/whole_model.pth {flags}".split())
    predict = f"--predict {place}/images --out_csv {place}/predictions.csv"
    linear.main(f"{on} --model_path {place}/augmented_model.pth {predict}".split())
    bench.command(f"gpu --device {device} --small --quick --csv {place}/benchmarks.csv".split())
    extract = f"--data_root {place}/images/train --out {place}/features.csv"
    features.command(f"{on} --model_path {place}/whole_model.pth {extract}".split())


def stop_at(due: bool) -> None:
    """If `due`, send this process the signal that ends a run after its step."""
    if due:
        signal.raise_signal(signal.SIGTERM)


# ---- steps --------------------------------------------------------------------------------------


def waits(native: types.ModuleType, work: Callable[[], object]) -> dict[str, int]:
    """Count what the host waits for in `work`, by kind."""
    before = native.counts()
    work()
    return {name: number - before[name] for name, number in native.counts().items()}


def three_steps(
    native: types.ModuleType,
    device: torch.device,
    fault: Callable[[torch.Tensor], object] = lambda x: None,
) -> tuple[nn.Module, dict[str, int]]:
    """Return a network after three steps, and their waits. `fault` gets each step's first view."""
    flags = "--recipe short --train_size 96 --width 8 --feature_dim 32 --batch_size 32 --probe"
    state, config = new_state(flags, device)
    views = state.views

    def faulty(batch):
        x = views(batch)
        fault(x[0])
        return x

    state.views = faulty
    return state.net, waits(native, lambda: list(main.train(state, 0, config)))


def steps(native: types.ModuleType) -> dict:
    """Count the waits of three steps, without and with a planted fault; of features, kNN, rank."""
    device = torch.device("pretend", 0)
    faults = {
        "none": lambda x: None,
        "number": lambda x: x[0, 0, 0, 0].item(),
        "copy": lambda x: torch.ones(3).to(x.device),
        "mask": lambda x: x[x > 0],
        "back": lambda x: x.cpu(),
    }
    counts = {name: three_steps(native, device, fault)[1] for name, fault in faults.items()}
    try:
        three_steps(native, device, lambda x: x + torch.ones(32))
        counts["mix"] = ""
    except RuntimeError as error:
        counts["mix"] = str(error)
    state, _ = new_state("--recipe short --train_size 96 --width 8 --feature_dim 32", device)
    images, labels = state.loader.images, torch.arange(96).to(device) % 10

    def extract() -> torch.Tensor:
        transform = state.views.eval_transform
        return metrics.extract_features(state.net.backbone, transform, images, state.autocast)

    bank = extract()
    work = {
        "features": extract,
        "knn": lambda: knn(bank, labels, bank),
        "rank": lambda: metrics.effective_rank(bank),
    }
    return counts | {name: waits(native, some) for name, some in work.items()}


# ---- ranks --------------------------------------------------------------------------------------


def weights_of_a_rank(native: types.ModuleType, synced: bool) -> tuple[dict, float]:
    """Return the network after three steps, and the timeout of a collective in seconds."""
    if not synced:
        distributed.sync_batchnorm = lambda net: None
    with distributed.process_group():
        net, _ = three_steps(native, distributed.local_device("pretend"))
        return {name: value.cpu() for name, value in net.state_dict().items()}, native.patience


def on_ranks(native: types.ModuleType, place: str, flags: list[str]) -> dict:
    """Write weights after three steps; run main.py on two ranks: its output, all exit codes."""
    codes, output = [], ""
    for name, ranks, synced in (("one", 1, True), ("two", 2, True), ("apart", 2, False)):
        outcome = launch(ranks, weights_of_a_rank, native, synced, method="fork")
        output += outcome.output
        torch.save(outcome.results[0], f"{place}/{name}.pth")
        codes += outcome.codes
    work = lambda: utils.run_command(lambda: main.main(flags))  # noqa: E731
    outcome = launch(2, work, method="fork")
    return {"codes": codes + outcome.codes, "output": output + outcome.output}


def command() -> None:
    """The command line."""
    folder, mode, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        native = register(folder)
        if mode == "runs":
            result = runs(*rest)
        elif mode == "steps":
            result = steps(native)
        else:
            result = on_ranks(native, rest[0], rest[1:])
    print(json.dumps(result))


if __name__ == "__main__":
    command()
