"""What tests do on ranks: python -m tests.ranks N MODE ... [then N MODE ...]

main FLAGS, linear FLAGS: the commands.
gradients: compare those of all ranks with one process's; weights, loss and std after 20 steps.
signal RANK STEP NUMBER FLAGS: main.py, whose RANK gets signal NUMBER in its STEP, the first time,
twice, as torchrun and SLURM send it.
fail RANK STEP FLAGS: main.py, whose RANK meets an error of ours in its STEP.
sent FLAGS: main.py; then the first rank says how large the largest of the objects and tensors was
that one rank sent to others.
probes: whether the network is the same with a probe, and the probe on all ranks.
agree: each rank says what an `Agreement` answers it, call by call.
first FOLDER: each rank says what `first_then_all` gives it, and raises.

The N processes are forked with all imports done, in seconds less than torchrun takes, which does no
more than to set their environment, and to start them again. Started by it, this is one of them.
"""

import faulthandler
import functools
import io
import os
import pickle
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import linear
import main
import utils
from simsiam.data.loader import Loader, kill_workers
from simsiam.data.textures import make_textures
from simsiam.evaluation import linear as fitting
from simsiam.models.classifier import Classifier
from simsiam.models.methods import build_model
from simsiam.runtime import devices, distributed
from simsiam.training.meters import Meters, TrainMeters
from simsiam.training.probe import Probe
from simsiam.training.recipes import VIEWS
from simsiam.views.augment import Views

FLAGS = "--ddp --data_name textures --width 8 --feature_dim 64 --batch_size 32 --device cpu".split()


def gradients() -> None:
    """Prints the largest difference of a gradient, and whether all weights are equal."""
    flags = main.make_flags()
    args, _ = flags.read(FLAGS)
    with utils.joined(args, flags):
        device, amp = devices.setup_device(args)
        torch.manual_seed(0)
        net = build_model(vars(args))
        trained = distributed.prepare_for_training(net, 32)
        images = make_textures(640, seed=1)[0]
        views = Views(32, *VIEWS[args.recipe][1:])
        found = []
        for one, share in ((net, fitting.whole), (trained, distributed.local_slice)):
            loader = Loader(images, args.batch_size, views=views, local_slice=share)
            batch = next(loader.epoch(0))
            assert len(batch.images) == len(range(32)[share(32)])
            one.eval()  # else BN's statistics would be of other images
            one.zero_grad()
            one(views(batch)).loss.backward()
            found.append([parameter.grad.clone() for parameter in net.parameters()])
        difference = max((a - b).abs().max().item() for a, b in zip(*found, strict=True))
        largest = max(gradient.abs().max().item() for gradient in found[0])
        optimizer, tally = main.make_optimizer(net, args), TrainMeters(device)
        rest = (views, tally, 0, 0, args, devices.autocast(device, amp))
        for _ in main.train(trained, optimizer, loader, *rest):
            pass
        weights = torch.cat([tally.values, *(p.detach().flatten() for p in net.parameters())])
        everyones = [torch.empty_like(weights) for _ in range(distributed.world_size())]
        dist.all_gather(everyones, weights)
        equal = all(torch.equal(weights, others) for others in everyones)
        distributed.log(
            f"largest {largest} difference {difference} after {len(loader)} steps {equal}"
        )


def plainly(backbone, views, batch):
    """The features of a batch, with their gradient; and its labels."""
    return backbone(views(batch)[0]), batch.labels


def tuned() -> None:
    """Prints how far a step of linear.py --finetune on all ranks is from one process's.

    Of a backbone without BN, whose statistics are of each rank's part of the batch.
    """
    flags = linear.make_flags()
    args, _ = flags.read("--ddp --finetune --lr 1 --batch_size 10 --device cpu".split())
    with utils.joined(args, flags):
        found, (images, labels) = [], make_textures(10, seed=1)
        for share in (fitting.whole, distributed.local_slice):
            torch.manual_seed(0)
            pixels = [torch.nn.Flatten(), torch.nn.Linear(3 * 32**2, 6), torch.nn.ReLU()]
            net = Classifier(torch.nn.Sequential(*pixels), 6, 10)
            views = Views(32, *VIEWS["cifar"][1:], linear.AUGMENTATION, 1)
            off = torch.autocast("cpu", enabled=False)
            alone = share is fitting.whole
            embed = fitting.FinetunedEncoder(net.backbone, views, off, False, 10).augmented
            if alone:
                embed = functools.partial(plainly, net.backbone, views)
            loader = Loader(images, 10, 0, labels, views=views, local_slice=share)
            heads = torch.nn.ModuleList([net.fc])
            optimizer = fitting.make_optimizer(args, heads, [1.0], None if alone else net.backbone)
            if alone:
                optimizer.add_param_group({"params": net.backbone.parameters(), "peak": 10 / 256})
            tally = Meters(torch.device("cpu"), "top1", "top5")
            list(linear.train(heads, optimizer, loader, embed, tally, 0, 0, 2))
            found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        tell((found[0] - found[1]).abs().max().item() < 1e-7)


def head_of(learn: Callable[[Probe, torch.Tensor, torch.Tensor], None], args) -> int:
    """A checksum of a probe after three steps of fixed features, 33 x 32, and their labels."""
    probe, content = Probe(32, 10, args, torch.device("cpu")), io.BytesIO()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        learn(probe, torch.rand(33, 32, generator=generator), torch.arange(33) % 11 - 1)
    for tensor in probe.state_dict().values():
        content.write(tensor.numpy().tobytes())
    return zlib.crc32(content.getvalue())


def probes() -> None:
    """Prints whether a probe leaves the network's bits, and ranks have the same one; a checksum.

    The checksum is of a probe that gets of each batch this rank's part.
    """
    flags = main.make_flags()
    args, _ = flags.read(FLAGS)
    with utils.joined(args, flags):
        device, amp = devices.setup_device(args)
        images, labels = make_textures(128, seed=1)
        views, found = Views(32, *VIEWS[args.recipe][1:]), []
        probe = Probe(32, 10, args, device)
        for one in (probe, None):
            torch.manual_seed(0)
            net = build_model(vars(args))
            trained, optimizer = (
                distributed.prepare_for_training(net, 32),
                main.make_optimizer(net, args),
            )
            loader = Loader(images, args.batch_size, 0, labels if one else None, views=views)
            rest = (views, TrainMeters(device), 0, 0, args, devices.autocast(device, amp))
            for _ in main.train(trained, optimizer, loader, *rest, main.UNSCALED, one):
                pass
            found.append(net.state_dict())
        equal = all(torch.equal(value, found[1][name]) for name, value in found[0].items())
        sums = [part.abs().sum().item() for part in probe.state_dict().values()]
        equal = equal and distributed.all_gather_objects(sums) == [sums] * 2 and sums[0] > 0.1
        mine = distributed.local_slice(33)
        head = head_of(lambda probe, x, y: probe.learn(x[mine], y, 0.0), args)
        tell(f"equal {equal} head {head}")


def at_step(rank: str, step: str, then: Callable[[], None]) -> None:
    """Calls `then` in a step of a rank, unless torchrun has started the ranks again."""
    if os.environ["RANK"] != rank or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    train, steps = main.train, []

    def counting(*args):
        for step_of_epoch in train(*args):
            steps.append(0)
            if len(steps) == int(step):
                then()
            yield step_of_epoch

    main.train = counting


def tell(text: object) -> None:
    """Prints a rank's line, whole even where others print too."""
    os.write(1, f"rank {os.environ['RANK']}: {text}\n".encode())


def fail() -> None:
    raise ZeroDivisionError("a mistake of ours")


def sent(flags: list[str]) -> None:
    """Runs main.py, and prints the size of the largest object or tensor that a rank sent."""
    sizes = []

    def watched(send, at):
        def sending(*args, **more):
            sizes.append(len(pickle.dumps(args[at])))
            return send(*args, **more)

        return sending

    for name, at in (("broadcast_object_list", 0), ("all_gather_object", 1), ("broadcast", 0)):
        setattr(dist, name, watched(getattr(dist, name), at))
    main.main(flags)
    if os.environ["RANK"] == "0":
        tell(f"{len(sizes)} times, {max(sizes)} bytes at most")


def agree() -> None:
    """Prints what an `Agreement` answers: two numbers a call, the second call's a call later."""
    with distributed.process_group():
        agree, me = distributed.AsyncMax(), distributed.rank()
        found = [agree(7 * (me == 2), 10 + me), agree(0, 0), agree(0, 0)]
        found += [agree(5 * (me == 1), 0, wait=True), agree(0, 0)]
        found += [agree(0, 3 * (me == 2)), agree(4 * (me == 1), 0, wait=True), agree(0, 0)]
        agree(9 * (me == 0), 9)
        agree.forget()
        found += [agree(0, 0), agree(0, 0)]
        tell(found)


def first(folder: str) -> None:
    """Prints what `first_then_all` gives and raises on each rank."""
    with distributed.process_group():
        me, file = distributed.rank(), Path(folder, "made")

        def make() -> str:
            if me == 0:
                time.sleep(0.5)  # who does not wait for the first finds nothing
                file.write_text("a file of the first's")
            return file.read_text()

        def cannot() -> None:
            raise OSError(f"no room on rank {me}")

        tell(distributed.rank0_first(make))
        try:
            distributed.rank0_first(cannot)
        except OSError as error:
            tell(error)


def work(mode: str, rest: list[str]) -> None:
    """What a rank does."""
    alone = {"gradients": gradients, "tuned": tuned, "probes": probes}
    alone |= {"agree": agree, "first": first}
    if mode in alone:
        alone[mode](*rest)
        return
    if mode == "sent":
        sent(rest)
        return
    if mode == "signal":
        rank, step, number, *rest = rest
        at_step(rank, step, lambda: [os.kill(os.getpid(), int(number)) for _ in range(2)])
    elif mode == "fail":
        rank, step, *rest = rest
        at_step(rank, step, fail)
    command = linear if mode == "linear" else main
    utils.run_command(lambda: command.main(rest))


def launch(number: int, work: Callable[[], None]) -> list[int]:
    """The exit codes of `number` ranks that do this work."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    pids = []
    for rank in range(number):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            status = 1
            faulthandler.dump_traceback_later(90, exit=True)  # else nobody knows where it hangs
            try:
                work()
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                kill_workers()
                sys.stdout.flush()
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    if distributed.launched_by_torchrun():
        work(sys.argv[2], sys.argv[3:])
        sys.exit()
    torch.set_num_threads(1)  # a forked process has no threads of its parent's
    for command in " ".join(sys.argv[1:]).split(" then "):
        number, mode, *rest = command.split(" ")
        codes = launch(int(number), functools.partial(work, mode, rest))
        print("exit codes", *codes, flush=True)
