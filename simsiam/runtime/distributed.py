"""Processes of a --ddp run: rank, world size, collectives, and the network wrapped for training.

Every function also works in a process without ranks, as rank 0 of a world of size 1.
"""

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

# How long a rank waits for the others: in a collective of an accelerator, and where another rank
# may first download a data set or look through all files.
COLLECTIVE_TIMEOUT, SETUP_TIMEOUT = datetime.timedelta(minutes=10), datetime.timedelta(hours=2)
# The process group that sends Python objects; it waits for SETUP_TIMEOUT.
object_group: dist.ProcessGroup | None = None


def launched_by_torchrun() -> bool:
    """Return True if torchrun, or a launcher with the same environment, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def is_distributed() -> bool:
    """Return True if this process is one of the ranks of --ddp."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process; 0 without --ddp."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without --ddp."""
    return dist.get_world_size() if is_distributed() else 1


def rank_prefix() -> str:
    """Return the start of a line that this rank prints; empty where there is one process."""
    return f"rank {rank()}: " if world_size() > 1 else ""


def log(text: str) -> None:
    """Print a line on stdout, above a progress bar if there is one; only on rank 0.

    A closed stdout (`| head -1`) is ignored: the run goes on in silence.
    """
    if rank() == 0:
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_peer_failure(error: RuntimeError) -> bool:
    """Return True for an error that only says that another rank ended, and not why."""
    return is_distributed() and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextlib.contextmanager
def process_group(overwrite: bool = False) -> Iterator[None]:
    """Make this process one of torchrun's ranks while the context lasts.

    Tensors on the CPU are sent by gloo, those on an accelerator by its own backend (NCCL on CUDA),
    which gives up after COLLECTIVE_TIMEOUT: a rank is lost, or runs another collective. Raises
    ValueError if torchrun did not start the process, or if --overwrite could meet a restart.
    """
    if not (dist.is_available() and launched_by_torchrun()):
        command = " ".join(["torchrun --standalone --nproc_per_node 2", *sys.argv])
        raise ValueError(f"--ddp: must be started by torchrun: {command}")
    if overwrite and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise ValueError(
            "--overwrite: a restarted run could not tell its own files from those to replace: "
            "remove them yourself, or leave out --max_restarts"
        )
    global object_group
    backend, timeout = "gloo", SETUP_TIMEOUT
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        if kind != "mps":
            backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
            timeout = COLLECTIVE_TIMEOUT
    # torchrun's store outlives a restart, and holds the addresses of processes that are gone.
    store, number, size = next(dist.rendezvous("env://", timeout=SETUP_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group(backend, None, timeout, size, number, store)
    object_group = dist.new_group(timeout=SETUP_TIMEOUT, backend="gloo")
    yield
    dist.destroy_process_group()


def wait_before_fork() -> None:
    """Wait, for a second at most, until all other threads of a rank sleep, so that it may fork.

    Before Python 3.12 a process hangs from birth if it is forked while a thread of gloo registers
    with the interpreter in order to drop a tensor: a data worker that never sends a batch.
    """
    this_thread, tasks = str(threading.get_native_id()), Path("/proc/self/task")
    for _ in range(1000 if is_distributed() and tasks.is_dir() else 0):
        states = set()
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):  # a thread that has ended
                stat = (task / "stat").read_text() if task.name != this_thread else ") S"
                states.add(stat.rpartition(")")[2].split()[0])
        if states == {"S"}:
            break
        time.sleep(0.001)


def local_device(kind: str) -> torch.device:
    """Return this rank's accelerator, made the current one. Raises ValueError if there are too few.

    `kind`: a device type, such as cuda.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    available = 0 if kind == "mps" else torch.accelerator.device_count()
    if local_rank >= available:
        raise ValueError(
            f"--ddp: this machine has {available} {kind} devices for its ranks: "
            f"give torchrun --nproc_per_node {available}, or add --device cpu"
        )
    torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


# ---- collectives --------------------------------------------------------------------------------


def slice_for_rank(n: int, rank: int, world_size: int) -> slice:
    """Return the consecutive rows, of `n`, of a rank; sizes differ by one at most."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def local_slice(n: int) -> slice:
    """Return this rank's rows of `n`. Never empty: a rank without rows repeats another's."""
    rows = slice_for_rank(n, rank(), world_size())
    return slice(rows.start, max(rows.stop, rows.start + 1))


def all_gather(rows: Tensor, n: int) -> Tensor:
    """Return all `n` rows in order, on every rank; each rank passes its `local_slice` of them."""
    if not is_distributed():
        return rows
    sizes = [len(range(n)[slice_for_rank(n, i, world_size())]) for i in range(world_size())]
    largest = max(sizes)  # ranks send tensors of one shape
    if len(rows) < largest:
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    received = rows.new_empty(largest * len(sizes), *rows.shape[1:])
    # The name since PyTorch 2.14, which deprecates the older one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(received, rows.contiguous())
    if min(sizes) == largest:
        return received
    parts = zip(received.split(largest), sizes, strict=True)
    return torch.cat([part[:size] for part, size in parts])


def all_gather_objects(value: object) -> list:
    """Return every rank's value, in the order of the ranks, on every rank."""
    values = [value] * world_size()
    if is_distributed():
        dist.all_gather_object(values, value, object_group)
    return values


def all_reduce(x: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place; return it."""
    if is_distributed():
        dist.all_reduce(x)
    return x


def broadcast_from_rank0(fn: Callable[[], object]) -> object:
    """Call `fn` on rank 0 and return its result, or raise its ValueError or OSError, on all ranks.

    The result is pickled and sent: for small objects.
    """
    if not is_distributed():
        return fn()
    message = [None, None]
    if rank() == 0:
        try:
            message[0] = fn()
        except (ValueError, OSError) as error:
            message[1] = error
    dist.broadcast_object_list(message, group=object_group)
    result, error = message
    if error is not None:
        raise error
    return result


def rank0_first(fn: Callable[[], object]) -> object:
    """Call `fn` on rank 0, which may download or write files, then on the other ranks.

    Each rank returns its own result; nothing large is sent. A ValueError or OSError of rank 0 is
    raised on all ranks.
    """
    results = []
    broadcast_from_rank0(lambda: results.append(fn()))
    return results[0] if results else fn()


class AsyncMax:
    """Maximum over the ranks of a few integers, one step late, so that no step waits for it.

    Each call starts an all-reduce over gloo in the background, and returns the result of the call
    before. Without --ddp it returns its arguments. gloo's all-reduce is a ring: at 64 ranks it
    passes 2 x 63 small messages in a row, while the device works on the step.
    """

    def __init__(self):
        self.pending: list[tuple[dist.Work, Tensor]] = []

    def __call__(self, *numbers: int, wait: bool = False) -> list[int]:
        """Send this rank's `numbers`; return the maxima of the calls that have not been returned.

        With `wait` the result includes this call, which then waits for all ranks.
        """
        if not is_distributed():
            return list(numbers)
        values = torch.tensor([int(number) for number in numbers])
        maxima = torch.zeros_like(values)
        self.pending.append((dist.all_reduce(values, dist.ReduceOp.MAX, async_op=True), values))
        while len(self.pending) > (not wait):
            work, reduced = self.pending.pop(0)
            work.wait()
            maxima = maxima.maximum(reduced)
        return maxima.tolist()

    def forget(self) -> None:
        """Drop the numbers sent so far; all ranks must call this after the same step."""
        for work, _ in self.pending:
            work.wait()
        self.pending = []


# ---- the network --------------------------------------------------------------------------------


def prepare_for_training(
    net: nn.Module, image_size: int, compiled: bool = False, cuda_graphs: bool = False
) -> nn.Module:
    """Return SimSiam `net` wrapped for its training loop: synchronized, distributed, compiled.

    The wrapper shares the parameters of `net`. Under --ddp gradients are means over the ranks.
    `image_size`: side of the views in pixels. `cuda_graphs`: capture the compiled step, for
    networks that a GPU computes faster than Python launches kernels.
    """
    device, trained = next(net.parameters()).device, net
    if world_size() > 1 and device.type == "cpu":
        log("note: on CPUs BN's statistics are of each rank's part of the batch (no SyncBatchNorm)")
    sync_batchnorm(net)
    if is_distributed():
        DDP = nn.parallel.DistributedDataParallel
        # BN buffers are not broadcast in each step: `broadcast_buffers` does it before their use.
        sync = "forward_sync_buffers"  # the name since PyTorch 2.15
        if sync not in inspect.signature(DDP).parameters:
            sync = "broadcast_buffers"
        trained = DDP(net, gradient_as_bucket_view=True, **{sync: False})
    if compiled:  # around DDP, so that gradients are sent while others are still computed
        mode = "reduce-overhead" if cuda_graphs else None
        trained = torch.compile(trained, mode=mode, dynamic=False)  # views have few sizes
    if is_distributed():
        # DDP orders its buckets of gradients by the first backward pass, and from three ranks on
        # the last bits of a sum depend on that order. A resumed run must use the order of an
        # uninterrupted one: this pass before the first step sets it, and changes no weight.
        zeros = torch.zeros(2, net.channels, image_size, image_size, device=device)
        with torch.compiler.set_stance("force_eager"):  # compiling for it would take minutes
            trained.eval()([zeros] * net.num_views).loss.backward()
        net.zero_grad()
    return trained


def sync_batchnorm(net: nn.Module) -> None:
    """Convert the BN layers of `net`, in place, to use the statistics of the global batch.

    Without effect on CPUs, which PyTorch's SyncBatchNorm does not support.
    """
    if world_size() == 1 or next(net.parameters()).device.type == "cpu":
        return
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    if any(type(layer).__module__.startswith("timm.") for layer in net.modules()):
        # PyTorch's function would drop the activation that timm has within its BN layers.
        from timm.layers import convert_sync_batchnorm as convert
    convert(net)


def broadcast_buffers(net: nn.Module) -> None:
    """Give all ranks the buffers of rank 0: BN's running statistics, which a checkpoint stores."""
    for buffer in net.buffers() if is_distributed() else ():
        dist.broadcast(buffer, 0)
