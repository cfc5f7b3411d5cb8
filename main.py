"""Pre-train SimSiam.

python main.py --data_name textures          # minutes on a laptop CPU, no download
python main.py --batch_size 256 --epochs 800 # CIFAR-10, ResNet-18, one GPU
torchrun --nproc_per_node 8 main.py --ddp --data_name imagenet --data_root DIR
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch

import utils
from simsiam.data import survey
from simsiam.data.datasets import check_data_root, load_dataset
from simsiam.data.loader import Data, Loader, images_checksum
from simsiam.evaluation import metrics
from simsiam.interop import weights
from simsiam.models.backbones import has_batchnorm
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import build_model
from simsiam.models.simsiam import SimSiam
from simsiam.plots import run as plots
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import RunError, error_prefix
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.meters import TrainMeters
from simsiam.training.optim import lr_at, make_optimizer
from simsiam.training.probe import Probe, resolve_probe
from simsiam.training.progress import Progress
from simsiam.training.recipes import PretrainConfig, absolute_root
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Views

STATISTICS = tuple(
    "epoch lr train_loss std rank alignment collapse test_acc@1 test_acc@5 probe_acc@1".split()
    + "images_per_sec seconds".split()
)

# ---- the loop -----------------------------------------------------------------------------------


def train(state: TrainState, epoch: int, config: PretrainConfig, start: int = 0) -> Iterator[int]:
    """Train an epoch (paper, Algorithm 1) from step `start` on; yield each step when it is done."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    model.train()
    for batch in state.loader.epoch(epoch, start):
        views = state.views(batch)  # x1, x2: the same images, augmented twice
        progress = epoch + batch.step / len(state.loader)
        lr = lr_at(config, progress)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.batch_size / 256 if group["fix_lr"] else lr
        with state.autocast:
            loss, z, features = model(views)  # D(p1, sg(z2))/2 + D(p2, sg(z1))/2
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        # A loss that is not finite moves no weight; a fused step sees to it without a wait.
        found_inf = state.meters.add(loss, z)
        is_fused = optimizer.defaults.get("fused")
        if is_fused:
            optimizer.found_inf = found_inf
        if is_fused or not found_inf:
            scaler.step(optimizer)
            scaler.update()
        if state.probe is not None:  # after the step, of which it changes nothing
            state.probe.learn(features, batch.labels, progress)
        yield batch.step


# ---- what a run trains on, and with -------------------------------------------------------------


def load_images(config: PretrainConfig) -> Data:
    """Return the data set of a config. Raises as `load_dataset`."""
    images = load_dataset(
        config.data_name,
        config.data_root,
        config.image_size,
        config.num_workers,
        config.bad_images,
        decode=config.decode_options,
        split_names=config.split_names,
    )
    return images if config.train_size is None else images.subset(config.train_size, config.seed)


def initial_network(config: PretrainConfig) -> SimSiam:
    """Return the network of a config, with random weights or those of --init."""
    torch.manual_seed(config.seed)
    net = build_model(vars(config))
    if not has_batchnorm(net.backbone):
        distributed.log(
            "the backbone has no BN: a collapse is more likely (paper, sec. 4.4); watch std"
        )
    if config.init:
        with error_prefix(f"--init {config.init}"):
            for note in weights.init_from_checkpoint(net, config.init, config.init_parts):
                distributed.log(f"{config.init}: {note}")
    return net


def encoder_config(config: PretrainConfig, images: Data) -> dict:
    """Return the encoder and its input, as a checkpoint stores them."""
    encoder = {"arch": config.arch, "stem": config.stem, "width": config.width}
    encoder |= {"image_size": config.image_size or images.train_images.shape[-1]}
    return encoder | survey.channel_stats(config, images.train_images)


def make_views(config: PretrainConfig, encoder: dict, number: int) -> Views:
    """Return the augmentation of a run, with `number` views per image."""
    side, epochs, mean, std = encoder["image_size"], config.epochs, encoder["mean"], encoder["std"]
    sizes = [max(8, round(s * side)) if s <= 1 else int(s) for s in config.view_sizes or ()]
    schedule = [sizes[epoch * len(sizes) // epochs] for epoch in range(epochs)] if sizes else ()
    settings = config.augmentation, number, config.seed, config.compile, schedule
    return Views(side, mean, std, *settings)


def make_state(
    config: PretrainConfig, net: SimSiam, images: Data, encoder: dict, device: torch.device
) -> TrainState:
    """Return the state of a new run on `device`. `config`: its amp and probe are resolved.

    `images` are on the device already. Raises ValueError for a batch that the images do not fit.
    """
    views = make_views(config, encoder, net.num_views)
    probe = Probe(net.features, len(images.classes), config, device) if config.probe else None
    labels = images.train_labels if config.probe else None
    loader = Loader(images.train_images, config.batch_size, config.seed, labels, views=views)
    net.to(device, memory_format=torch.channels_last)
    size, compiled, cuda_graphs = encoder["image_size"], config.compile, config.cuda_graphs
    return TrainState(
        net=net,
        optimizer=make_optimizer(net, config),
        loader=loader,
        meters=TrainMeters(device),
        lr_at=functools.partial(lr_at, config),
        model=distributed.prepare_for_training(net, size, compiled, cuda_graphs),
        views=views,
        autocast=devices.autocast(device, config.amp),
        scaler=torch.amp.GradScaler(device.type, enabled=config.amp == "fp16"),
        probe=probe,
    )


# ---- a run --------------------------------------------------------------------------------------


def prepare(run: Run, parser: utils.Parser) -> tuple[TrainState, Monitor, dict]:
    """Return the state of a run, new or from its checkpoint, its monitor, and a row of results.csv.

    Raises ValueError and OSError for what the user is to mend.
    """
    saved, config = run.checkpoint, run.config
    ranks = distributed.world_size()
    if config.batch_size % ranks or config.batch_size < 2 * ranks:
        raise ValueError(
            f"--batch_size {config.batch_size}: must be a multiple of the world size ({ranks}), "
            "with at least two images per rank"
        )
    with parser.bad_input():  # one rank alone may lack its device
        device, amp = devices.setup_device(config)
    net = None if saved else initial_network(config)
    images = load_images(config)
    if saved:
        encoder = saved["encoder"]
        with error_prefix(run.checkpoint_path):
            net = checkpoint.network(saved)
    else:
        encoder = encoder_config(config, images)
    counts = params_and_flops(net, encoder["image_size"])
    root = config.data_root
    run.set_config(
        amp=devices.training_precision(device, config.amp, amp, counts[1]),
        image_size=encoder["image_size"],
        probe=resolve_probe(config.probe, images),
        data_root=root if config.data_name == "textures" else absolute_root(root),
    )
    config = run.config
    run.check_unchanged(
        images_checksum=images_checksum(images.train_images),
        classes=images.classes,
        encoder=encoder,
    )
    has_baselines = saved and {"raw_acc@1", "test_acc@1"} <= run.history[0].keys()
    if saved and images.test_images is not None and not has_baselines:
        raise ValueError(
            f"--data_root {root}: has test images, and {run.checkpoint_path} began without"
        )
    run.list_bad_images(images.unreadable)
    title = f"{run.path}: {type(net).__name__} {config.arch}, d = {config.feature_dim}"
    result = utils.print_summary(title, net, counts, images, encoder, config, device)
    result |= {"feature_dim": config.feature_dim, "k": config.k, "protocol": "KNN"}
    if not saved:
        survey.print_survey(config, images)
    if config.ddp:
        distributed.log(
            f"world size {ranks}: {config.batch_size // ranks} images per rank and step; whatever "
            f"the world size, lr is {config.lr:g} x {config.batch_size} / 256 = "
            f"{lr_at(config, config.warmup_epochs):g}"
        )
    images = images.to(device)
    state = make_state(config, net, images, encoder, device)
    if config.bank_size is not None:
        images = images.subset(config.bank_size, config.seed, "--bank_size")
        result["protocol"] += f", bank of {config.bank_size}"
    monitor = Monitor(net, state.views, images, config, state.autocast, "collapse" in run.extra)
    return state, monitor, result


def pretrain(
    run: Run,
    state: TrainState,
    monitor: Monitor,
    result: dict,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Train the epochs of a run that are left, and write its last files."""
    if run.checkpoint is None:
        run.start(state, [monitor.untrained()])
    config, meters, steps = run.config, state.meters, len(state.loader)
    board = None
    if config.tensorboard and distributed.rank() == 0:
        board = plots.Board(f"{run.path}_tensorboard", run.history, STATISTICS)
    start_rank = run.history[0].get("rank", 0.0)
    smaller = f"python main.py --data_name {config.data_name} --data_root {config.data_root}"
    smaller += " --recipe short --epochs 5"
    labels = {"loss": "loss", "std": "std"}
    for epoch in run.epochs():
        stop_on_collapse(run)
        rest = state.views.remaining_work(epoch, config.epochs)
        with Progress(epoch, config, steps, labels, smaller, state.step, rest=rest) as progress:
            for step in train(state, epoch, config, state.step):
                if on_step is not None:
                    on_step(epoch, step)
                was_read = progress(step, meters)
                has_collapsed = monitor.check_step(epoch, step, steps, meters, start_rank)
                if has_collapsed:
                    run.extra["collapse"] = epoch * steps + step + 1
                run.after_step(step, was_read, has_collapsed and config.stop_on_collapse)
                stop_on_collapse(run)
        means = meters.means(steps)
        images_per_sec = steps * config.batch_size / run.seconds()
        row = {"train_loss": means["loss"], "std": means["std"], "images_per_sec": images_per_sec}
        is_last = epoch + 1 == config.epochs
        if (epoch + 1) % config.knn_every == 0 or is_last:
            with run.evaluation_phase():
                row |= monitor.measure(is_last, state.probe)
        if monitor.check_collapse(epoch, steps, row["std"], row.get("rank"), start_rank):
            run.extra["collapse"] = (epoch + 1) * steps
        if run.extra.get("collapse", 0) > epoch * steps:
            row["collapse"] = run.extra["collapse"]
        row = run.after_epoch(row)
        if board:
            board.add_row(row)
        distributed.log(
            f"epoch {epoch + 1}/{config.epochs} loss {row['train_loss']:.3f} std {row['std']:.2f}"
            + (f" rank {row['rank']:.1f}" if "rank" in row else "")
            + (f" alignment {row['alignment']:.3f}" if "alignment" in row else "")
            + (f" kNN top-1 {row['test_acc@1']:.1f} %" if "test_acc@1" in row else "")
            + (f" probe {row['probe_acc@1']:.1f} %" if "probe_acc@1" in row else "")
            + f" ({row['images_per_sec']:.0f} images/s, {row['seconds']:.0f} s)"
        )
    first, last = run.history[0], run.history[-1]
    with run.finalize():
        if "test_acc@1" in last:
            best = run.write_result(**result)
            distributed.log(
                f"kNN top-1 {last['test_acc@1']:.1f} % (best {best:.1f} %), "
                + (f"linear probe {last['probe_acc@1']:.1f} %, " if "probe_acc@1" in last else "")
                + f"untrained encoder {first['test_acc@1']:.1f} %, raw pixels "
                f"{first['raw_acc@1']:.1f} %"
            )
        elif "alignment" in last:
            distributed.log(metrics.alignment_summary(last["alignment"], first.get("alignment")))
        if config.pictures:
            plots.draw_run(run.path, config.name, run.history, monitor, board)
    if board:
        board.close()
    drawn = " and pictures" if config.pictures else ""
    distributed.log(f"wrote {run.path}_model.pth, {run.path}_statistics.csv{drawn}")


def stop_on_collapse(run: Run) -> None:
    """End a run with --stop_on_collapse after its warning of a collapse. Raises RunError."""
    if run.config.stop_on_collapse and "collapse" in run.extra:
        raise RunError(
            f"--stop_on_collapse: ended after the warning; {run.path}_model.pth is from this step. "
            "To continue all the same: --resume --no-stop_on_collapse"
        )


def show_views(config: PretrainConfig) -> None:
    """Draw `<run>_views.png`: the views of a few images, as the network gets them."""
    images, label = load_images(config), utils.data_label(config.data_name, config.data_root)
    views = make_views(config, encoder_config(config, images), 2)
    path = os.path.join(config.out, f"{config.name}_views.png")
    os.makedirs(config.out, exist_ok=True)
    survey.print_survey(config, images)
    plots.draw_views(path, label, images.train_images, views, config.seed)
    distributed.log(f"wrote {path}")


def main(argv: list[str] | None = None, on_step: Callable[[int, int], None] | None = None) -> None:
    """Run the command. `on_step(epoch, step)` is called after each step, before it is counted."""
    parser = utils.ConfigParser("main.py", __doc__, PretrainConfig)
    config, overrides = parser.read(argv)
    with utils.on_ranks(config, parser), contextlib.ExitStack() as stack:
        with parser.bad_input():
            if "data_root" in overrides and "data_name" not in overrides and not config.resume:
                check_data_root(config.data_name, config.data_root)
            if config.show_views:
                show_views(config)
                return
            run = stack.enter_context(Run("main.py", config, overrides, STATISTICS))
            state, monitor, result = prepare(run, parser)
            if run.checkpoint:
                run.resume(state)
        pretrain(run, state, monitor, result, on_step)


if __name__ == "__main__":
    utils.run_command(main)
