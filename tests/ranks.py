"""Run a function on several ranks on this machine, and return what each of them returns.

The ranks are forked from a server that has imported everything once, in a fraction of the seconds
that torchrun takes. Under torchrun: python -m tests.ranks RANK STEP SIGNAL FLAGS, as `signal_at`.
"""

import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist

import linear
import main
import utils
from simsiam.data.loader import Loader, kill_workers
from simsiam.data.textures import make_textures
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from simsiam.runtime import distributed
from simsiam.training.heads import FinetunedEncoder, make_optimizer
from simsiam.training.meters import Meters
from simsiam.training.probe import Probe
from simsiam.training.recipes import LinearConfig
from simsiam.training.state import TrainState
from simsiam.views.augment import Views
from tests.helpers import new_state

# Seconds after which a rank counts as hanging: it prints its stack, and ends.
HANG = 300


class Outcome(NamedTuple):
    """Exit codes and results by rank (None for a rank that failed), and the output of all."""

    codes: list[int]
    results: list
    output: str


def launch(world_size: int, work: Callable, *args: object, method: str = "forkserver") -> Outcome:
    """Call `work(*args)` on `world_size` ranks of one thread each, in torchrun's environment.

    `method`: of multiprocessing; with "fork" the ranks inherit all that this process has set up.
    """
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["tests.ranks"])
    # As under torchrun the store belongs to the parent, which also picks a free port for it.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": True, "LOCAL_WORLD_SIZE": world_size}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(world_size)]
        output = Path(folder, "output")
        output.touch()
        ranks = [
            context.Process(
                target=run_rank,
                args=(env | {"RANK": i, "LOCAL_RANK": i}, str(output), str(file), work, args),
            )
            for i, file in enumerate(files)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(HANG + 60)
        for rank in ranks:
            rank.kill()
            rank.join()
        results = [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]
        return Outcome([rank.exitcode for rank in ranks], results, output.read_text())


def run_rank(env: dict, output: str, result: str, work: Callable, args: tuple) -> None:
    """Run a rank: append its output to one file, and pickle what `work` returns into another."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {name: str(value) for name, value in env.items()}
    torch.set_num_threads(1)  # a forked process lacks the threads of its parent
    # The default of a process started by torchrun, for the workers of a loader.
    multiprocessing.set_start_method("fork", force=True)
    faulthandler.dump_traceback_later(HANG, exit=True, file=2)
    try:
        value = work(*args)
        Path(result).write_bytes(pickle.dumps(value))
    finally:
        kill_workers()
        sys.stdout.flush()


# ---- the commands -------------------------------------------------------------------------------


def run(command: str, *flags: object, on_step: Callable[[int, int], None] | None = None) -> None:
    """Run main.py or linear.py."""
    module = {"main": main, "linear": linear}[command]
    utils.run_command(lambda: module.main([str(flag) for flag in flags], on_step))


def run_with(rank: int, step: int, action: Callable[[], None], *flags: object) -> None:
    """Run main.py; call `action` in a step of a rank. Steps count from 1 on, over all epochs."""
    steps = []

    def on_step(*epoch_and_step: int) -> None:
        steps.append(epoch_and_step)
        if len(steps) == step and os.environ["RANK"] == str(rank):
            action()

    run("main", *flags, on_step=on_step)


def signal_at(rank: int, step: int, number: int, *flags: object) -> None:
    """Run main.py; send a signal to one rank twice, as torchrun and SLURM do."""
    run_with(rank, step, lambda: [os.kill(os.getpid(), number) for _ in range(2)], *flags)


def fail_at(rank: int, step: int, *flags: object) -> None:
    """Run main.py; raise an unexpected error on one rank."""

    def fail() -> None:
        raise ZeroDivisionError

    run_with(rank, step, fail, *flags)


# ---- parts of a run -----------------------------------------------------------------------------


def gradients(compiled: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the gradients of SimSiam's parameters, of one process and of all ranks.

    In eval mode, since in train mode BN's statistics are of other images. `compiled`: by all of
    torch.compile but its code generator, which takes a minute.
    """
    compile = torch.compile
    torch.compile = lambda net, mode, dynamic: compile(net, backend="aot_eager", dynamic=dynamic)
    with distributed.process_group():
        torch.manual_seed(0)
        net = SimSiam("resnet8", feature_dim=64)
        views = [torch.randn(32, 3, 32, 32) for _ in range(2)]

        def backward(model: torch.nn.Module, rows: slice) -> list[torch.Tensor]:
            net.zero_grad()
            model.eval()([view[rows] for view in views]).loss.backward()
            return [parameter.grad.clone() for parameter in net.parameters()]

        alone = backward(net, slice(None))
        trained = distributed.prepare_for_training(net, 32, compiled)
        return alone, backward(trained, distributed.local_slice(32))


def epoch() -> tuple[dict, dict]:
    """Return the network and the probe after an epoch of main.py's loop on textures."""
    flags = "--train_size 128 --width 8 --feature_dim 64 --batch_size 32 --device cpu --probe"
    with distributed.process_group():
        state, config = new_state(flags)
        for _ in main.train(state, 0, config):
            pass
        return state.net.state_dict(), state.probe.state_dict()


def probe() -> dict[str, torch.Tensor]:
    """Return a probe after three steps on fixed features, 33 x 32, divided among the ranks."""
    schedule = SimpleNamespace(batch_size=33, epochs=1, warmup_epochs=0)
    generator, head = torch.Generator().manual_seed(0), Probe(32, 10, schedule, torch.device("cpu"))
    for _ in range(3):
        features = torch.rand(33, 32, generator=generator)
        head.learn(features[distributed.local_slice(33)], torch.arange(33) % 11 - 1, 0.0)
    return head.state_dict()


def probe_on_ranks() -> dict[str, torch.Tensor]:
    """Return `probe()` of a rank."""
    with distributed.process_group():
        return probe()


def finetuning() -> list[torch.Tensor]:
    """Return the weights after a step of linear.py --finetune, of one process and of all ranks.

    The backbone has no BN, whose statistics would be of other images on each rank.
    """
    parser = utils.ConfigParser("linear.py", linear.__doc__, LinearConfig)
    config, _ = parser.read("--finetune --lr 1 --batch_size 10 --epochs 2".split())
    (images, labels), weights = make_textures(10, seed=1), []
    with distributed.process_group():
        for alone in (True, False):
            torch.manual_seed(0)
            backbone = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(3 * 32**2, 6), torch.nn.ReLU()
            )
            net = Classifier(backbone, 6, 10)
            heads = torch.nn.ModuleList([net.fc])
            views = Views(32, (0.5,) * 3, (0.2,) * 3, number=1)
            if alone:
                feature_fn = lambda batch: (backbone(views(batch)[0]), batch.labels)  # noqa: B023, E731
                optimizer = make_optimizer(config, heads, [1.0])
                optimizer.add_param_group({"params": backbone.parameters(), "peak": 10 / 256})
            else:
                off = torch.autocast("cpu", enabled=False)
                feature_fn = FinetunedEncoder(backbone, views, off, False, 10).augmented_features
                optimizer = make_optimizer(config, heads, [1.0], backbone)
            rows = (lambda number: slice(0, number)) if alone else distributed.local_slice
            loader = Loader(images, 10, 0, labels, views=views, local_slice=rows)
            meters = Meters(torch.device("cpu"), "top1", "top5")
            state = TrainState(net, optimizer, loader, meters, lambda epochs: 1.0, heads)
            list(linear.train(state, feature_fn, 0, config))
            weights.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return weights


def rank0_first(folder: Path) -> tuple[str, str]:
    """Return what `distributed.rank0_first` returns, and what it raises."""
    with distributed.process_group():
        rank, file = distributed.rank(), folder / "file"

        def write_and_read() -> str:
            if rank == 0:
                time.sleep(0.5)  # a rank that does not wait finds no file
                file.write_text("written by rank 0")
            return file.read_text()

        def fail() -> None:
            raise OSError(f"rank {rank} failed")

        content = distributed.rank0_first(write_and_read)
        try:
            distributed.rank0_first(fail)
        except OSError as error:
            return content, str(error)


if __name__ == "__main__":
    rank, step, number, *flags = sys.argv[1:]
    faulthandler.dump_traceback_later(HANG, exit=True)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        signal_at(int(rank), int(step), int(number), *flags)
    else:
        run("main", *flags)
