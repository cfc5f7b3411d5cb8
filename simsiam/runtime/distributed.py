"""Processes: this one's rank, its share of the work, what ranks gather, and who speaks."""

import contextlib
import datetime
import inspect
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from simsiam.runtime import batchnorm

# How long a rank waits for the others: for what they compute together, and where one of them may
# first have to download a data set or look through all of its files.
COLLECTIVE_TIMEOUT, SETUP_TIMEOUT = datetime.timedelta(minutes=10), datetime.timedelta(hours=2)
# By which objects travel, while this process is a rank: it waits until SETUP_TIMEOUT.
object_group: dist.ProcessGroup | None = None


def launched_by_torchrun() -> bool:
    """Whether torchrun, or what sets its environment, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_distributed() -> bool:
    """Whether this process is one of the ranks of --ddp."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number among the ranks, from 0 on; 0 without --ddp."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many ranks there are; 1 without --ddp."""
    return dist.get_world_size() if is_distributed() else 1


def rank_prefix(number: int) -> str:
    """How the lines of rank `number` begin."""
    return f"rank {number}: " if world_size() > 1 else ""


def log(text: str) -> None:
    """Print a line on stdout, above a progress bar if there is one; only the first rank does.

    Where nobody reads any more (`| head -1`), the run goes on without a word.
    """
    if rank() == 0:
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def restart_count() -> int:
    """How many times torchrun has started the ranks again, after one of them was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if is_distributed() else 0


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error says no more than that another rank is gone, whose own message tells why."""
    return is_distributed() and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextlib.contextmanager
def process_group(overwrite: bool = False) -> Iterator[None]:
    """Make this process one of torchrun's ranks while the context lasts.

    Tensors on the CPU travel by gloo, those of an accelerator by its own backend (NCCL on CUDA),
    which gives up when a rank has not come after ten minutes: it is lost, or takes another way.
    Raises ValueError if torchrun did not start it, or --overwrite could meet a restarted rank.
    """
    if not (dist.is_available() and launched_by_torchrun()):
        command = " ".join(["torchrun --standalone --nproc_per_node 2", *sys.argv])
        raise ValueError(f"--ddp: torchrun must start it: {command}")
    if overwrite and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError(
            "--overwrite: a restart by torchrun could not tell the files to replace from its own: "
            "remove them yourself, or leave out --max_restarts"
        )
    global object_group
    backend = "gloo"
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        if kind != "mps":
            backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
    store, number, size = next(dist.rendezvous("env://", timeout=SETUP_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    soon = SETUP_TIMEOUT if backend == "gloo" else COLLECTIVE_TIMEOUT
    dist.init_process_group(backend, None, soon, size, number, store)
    object_group = dist.new_group(timeout=SETUP_TIMEOUT, backend="gloo")
    yield
    dist.destroy_process_group()


def wait_before_fork() -> None:
    """Wait until this process's other threads sleep, a second at most: a rank is about to fork.

    Until Python 3.11 a process that is forked in the moment in which a thread of gloo's registers
    with the interpreter, to drop a tensor, hangs at once: a worker that never sends a batch.
    """
    me, tasks = str(threading.get_native_id()), Path("/proc/self/task")
    for _ in range(1000 if is_distributed() and tasks.is_dir() else 0):
        states = set()
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):  # a thread that has ended
                stat = (task / "stat").read_text() if task.name != me else ") S"
                states.add(stat.rpartition(")")[2].split()[0])
        if states == {"S"}:
            break
        time.sleep(0.001)


def local_device(kind: str) -> torch.device:
    """This rank's accelerator, made the current one. Raises ValueError if there are too few."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    there = 0 if kind == "mps" else torch.accelerator.device_count()
    if local >= there:
        raise ValueError(
            f"--ddp: this machine has {there} {kind} devices that can take part: "
            f"--nproc_per_node {there}, or --device cpu"
        )
    torch.accelerator.set_device_index(local)
    return torch.device(kind, local)


def slice_for_rank(number: int, rank: int, count: int) -> slice:
    """Which of `number` rows one of `world_size` ranks gets: runs of rows, as equal as can be."""
    return slice(number * rank // count, number * (rank + 1) // count)


def local_slice(number: int) -> slice:
    """This rank's rows of `number`. A rank without rows gets one of another's: none may be idle."""
    mine = slice_for_rank(number, rank(), world_size())
    return slice(mine.start, max(mine.stop, mine.start + 1))


def all_gather(rows: Tensor, number: int) -> Tensor:
    """All `number` rows in order, on every rank; each rank brings its `local_slice` of them."""
    if not is_distributed():
        return rows
    sizes = [
        len(range(number)[slice_for_rank(number, i, world_size())]) for i in range(world_size())
    ]
    most = max(sizes)  # ranks send tensors of one shape
    sent = rows if len(rows) == most else torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    received = rows.new_empty(most * len(sizes), *rows.shape[1:])
    batchnorm.all_gather_tensor(received, sent.contiguous())
    if min(sizes) == most:
        return received
    parts = zip(received.split(most), sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


def all_gather_objects(mine: object) -> list:
    """What each rank brings, in the order of the ranks, on every rank."""
    found = [mine] * world_size()
    if is_distributed():
        dist.all_gather_object(found, mine, object_group)
    return found


def all_reduce(x: Tensor) -> Tensor:
    """The sum over the ranks of a tensor that each has one of; changes `x`."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean over the ranks of a tensor that each has one of; changes `x`."""
    return all_reduce(x).div_(world_size()) if is_distributed() else x


def batch_size_per_rank(batch_size: int) -> int:
    """A rank's images of a step. Raises ValueError for a batch that the ranks cannot share."""
    each, rest = divmod(batch_size, world_size())
    if rest or each < 2:
        raise ValueError(
            f"--batch_size {batch_size}: is cut among {world_size()} ranks: give a multiple "
            "of it, of two images a rank at least"
        )
    return each


def broadcast_from_rank0(make: Callable[[], object]) -> object:
    """What `make` gives on the first rank, on all of them; also its ValueError or OSError."""
    if not is_distributed():
        return make()
    found = [None, None]
    if rank() == 0:
        try:
            found = [make(), None]
        except (ValueError, OSError) as error:
            found = [None, error]
    dist.broadcast_object_list(found, group=object_group)
    if found[1] is not None:
        raise found[1]
    return found[0]


def rank0_first(make: Callable[[], object]) -> object:
    """What `make` gives, called on the first rank first: it downloads, then the others read.

    Nothing large is sent between ranks. The first one's ValueError or OSError is raised on all.
    """
    made = []
    broadcast_from_rank0(lambda: made.append(make()))
    return made[0] if made else make()


class AsyncMax:
    """Whole numbers on which all ranks agree: the largest that any rank says. No step waits.

    Each call starts an all-reduce over gloo in the background, and returns what the call before it
    came to, so that an answer is a step old. Without --ddp it is this process's, and new.
    At 64 ranks three numbers of 8 bytes are sent about 2 log2(64) = 12 times, an estimated
    millisecond, which passes while the device works on the step.
    """

    def __init__(self):
        self.sent: list[tuple[dist.Work, Tensor]] = []

    def __call__(self, *numbers: int, wait: bool = False) -> list[int]:
        """`numbers` are this rank's; with `wait`, the answer holds those of this call too."""
        if not is_distributed():
            return list(numbers)
        told = torch.tensor([int(number) for number in numbers])
        before = torch.zeros_like(told)
        self.sent.append((dist.all_reduce(told, dist.ReduceOp.MAX, async_op=True), told))
        while len(self.sent) > (not wait):
            work, answer = self.sent.pop(0)
            work.wait()
            before = before.maximum(answer)
        return before.tolist()

    def forget(self) -> None:
        """Drop what was said before now; all ranks call this after the same step."""
        for work, _ in self.sent:
            work.wait()
        self.sent = []


def prepare_for_training(
    net: nn.Module, image_size: int, compiled: bool = False, captured: bool = False
) -> nn.Module:
    """The SimSiam `net` as the loop needs it, with the same parameters: compiled, distributed.

    Under --ddp gradients are means over the ranks. BN's statistics are of the global batch; on
    CPUs, for which PyTorch has no such functions, of each rank's part of it. `captured`: on cuda a
    compiled step becomes CUDA graphs, for networks that compute faster than Python starts kernels.
    """
    device = next(net.parameters()).device
    if world_size() > 1 and device.type != "cpu":
        batchnorm.synchronise(net)
    elif world_size() > 1:
        log("note: on CPUs BN's statistics are of each rank's part of the batch (no SyncBatchNorm)")
    trained = wrap_ddp(net) if is_distributed() else net
    if compiled:  # from without, so that gradients are sent while others are still computed
        mode = "reduce-overhead" if captured else None
        trained = torch.compile(trained, mode=mode, dynamic=False)  # views have few sizes
    if is_distributed():
        # The first backward pass tells DDP in which order to pack gradients for sending, and from
        # three ranks on their sums' last bits depend on it. So that a run that goes on packs them
        # like one that was never stopped, here is a pass before the first step; it changes nothing.
        nothing = torch.zeros(2, net.channels, image_size, image_size, device=device)
        with torch.compiler.set_stance("force_eager"):  # not to compile for this
            trained.eval()(*[nothing] * net.num_views)[0].backward()
        net.zero_grad()
    return trained


def wrap_ddp(net: nn.Module) -> nn.Module:
    """`net`, whose gradients become means over the ranks while others are still computed.

    BN's buffers are not sent in each step: `broadcast_buffers` sends them before they are used.
    """
    DDP = nn.parallel.DistributedDataParallel
    sync = "forward_sync_buffers"  # its name since PyTorch 2.15
    if sync not in inspect.signature(DDP).parameters:
        sync = "broadcast_buffers"
    return DDP(net, gradient_as_bucket_view=True, **{sync: False})


def broadcast_buffers(net: nn.Module) -> None:
    """Give all ranks the first one's buffers: BN's running statistics, which checkpoints hold."""
    for buffer in net.buffers() if is_distributed() else ():
        dist.broadcast(buffer, 0)
