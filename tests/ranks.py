"""What tests do on ranks: python -m tests.ranks N MODE ... [then N MODE ...]

main FLAGS, linear FLAGS: the commands.
gradients: compare those of all ranks with one process's; weights, loss and std after 20 steps.
signal RANK STEP NUMBER FLAGS: main.py, whose RANK gets signal NUMBER in its STEP, the first time.
fail RANK STEP FLAGS: main.py, whose RANK meets an error of ours in its STEP.

The N processes are forked with all imports done, in seconds less than torchrun takes, which does no
more than to set their environment, and to start them again. Started by it, this is one of them.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist

import data
import linear
import main
import model
import utils

FLAGS = "--ddp --data_name textures --width 8 --feature_dim 64 --batch_size 32 --device cpu".split()


def gradients() -> None:
    """Prints the largest difference of a gradient, and whether all weights are equal."""
    args, parser, _ = main.parse_args(FLAGS)
    with utils.joined(args, parser):
        _, amp = utils.set_up(args)
        torch.manual_seed(0)
        net = model.SimSiam(args.arch, args.stem, args.feature_dim, args.projector_layers, 8)
        trained = utils.for_training(net, False, 32)
        images = data.textures(640, seed=1)[0]
        found = []
        for network, share in ((net, data.whole), (trained, utils.share)):
            views = data.Views(32, args.mean, args.std, share=share)
            loader = data.Loader([images], args.batch_size, views=views, share=share)
            step, (batch,) = next(loader.epoch(0))
            assert len(batch) == len(range(32)[share(32)])
            views.seed(0, step, loader.number(step))
            network.eval()  # else BN's statistics would be of other images
            network.zero_grad()
            network(views(batch), views(batch))[0].backward()
            found.append([parameter.grad.clone() for parameter in net.parameters()])
        difference = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
        largest = max(gradient.abs().max().item() for gradient in found[0])
        optimizer = main.optimizer_of(net, args)
        sums = torch.zeros(5)
        main.train(trained, optimizer, loader, views, 0, 0, sums, args, amp, lambda step: None)
        weights = torch.cat([sums, *(p.detach().flatten() for p in net.parameters())])
        everyones = [torch.empty_like(weights) for _ in range(utils.ranks())]
        dist.all_gather(everyones, weights)
        equal = all(torch.equal(weights, others) for others in everyones)
        utils.say(f"largest {largest} difference {difference} after {len(loader)} steps {equal}")


def at_step(rank: str, step: str, then: Callable[[], None]) -> None:
    """Calls `then` in a step of a rank, unless torchrun has started the ranks again."""
    if os.environ["RANK"] != rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    std, steps = utils.collapse_std, []

    def counting(z: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        if len(steps) == int(step):
            then()
        return std(z)

    utils.collapse_std = counting


def fail() -> None:
    raise ZeroDivisionError("a mistake of ours")


def work(mode: str, rest: list[str]) -> None:
    """What a rank does."""
    if mode == "gradients":
        gradients()
        return
    if mode == "signal":
        rank, step, number, *rest = rest
        at_step(rank, step, lambda: os.kill(os.getpid(), int(number)))
    elif mode == "fail":
        rank, step, *rest = rest
        at_step(rank, step, fail)
    command = linear if mode == "linear" else main
    utils.run_command(lambda: command.main(rest), data.BadImage)


def launch(ranks: int, mode: str, rest: list[str]) -> list[int]:
    """The exit codes of the ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            status = 1
            try:
                work(mode, rest)
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                data.end_workers()
                sys.stdout.flush()
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    if utils.under_torchrun():
        work(sys.argv[2], sys.argv[3:])
        sys.exit()
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    for command in " ".join(sys.argv[1:]).split(" then "):
        ranks, mode, *rest = command.split(" ")
        codes = launch(int(ranks), mode, rest)
        print("exit codes", *codes, flush=True)
