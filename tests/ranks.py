"""What tests do on torchrun's ranks: torchrun --nproc_per_node N -m tests.ranks MODE ...

gradients: compare those of all ranks with one process's; weights, loss and std after 20 steps.
signal RANK STEP NUMBER FLAGS: main.py, whose RANK gets signal NUMBER in its STEP, the first time.
fail RANK STEP FLAGS: main.py, whose RANK meets an error of ours in its STEP.
"""

import os
import sys

import torch
import torch.distributed as dist

import data
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
        sums = torch.zeros(3)
        main.train(trained, optimizer, loader, views, 0, 0, sums, args, amp, lambda step: None)
        weights = torch.cat([sums, *(p.detach().flatten() for p in net.parameters())])
        everyones = [torch.empty_like(weights) for _ in range(utils.ranks())]
        dist.all_gather(everyones, weights)
        equal = all(torch.equal(weights, others) for others in everyones)
        utils.say(f"largest {largest} difference {difference} after {len(loader)} steps {equal}")


def at_step(rank: int, step: int, then) -> None:
    """Calls `then` in a step of a rank, unless torchrun has started the ranks again."""
    if os.environ["RANK"] != str(rank) or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    std, steps = utils.collapse_std, []

    def counting(z: torch.Tensor) -> torch.Tensor:
        steps.append(0)
        if len(steps) == step:
            then()
        return std(z)

    utils.collapse_std = counting


def fail() -> None:
    raise ZeroDivisionError("a mistake of ours")


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    if mode == "gradients":
        gradients()
    elif mode == "signal":
        rank, step, number, *flags = rest
        at_step(int(rank), int(step), lambda: os.kill(os.getpid(), int(number)))
        utils.run_command(lambda: main.main(flags))
    elif mode == "fail":
        rank, step, *flags = rest
        at_step(int(rank), int(step), fail)
        utils.run_command(lambda: main.main(flags))
