"""Pre-train SimSiam: recipes, flags, the loop.

python main.py --data_name textures          # minutes on a laptop CPU, no download
python main.py --batch_size 256 --epochs 800 # CIFAR-10, ResNet-18, one GPU
torchrun --nproc_per_node 8 main.py --ddp --data_name imagenet --data_root DIR
"""

import contextlib
import functools
import importlib.util
import os
from argparse import Namespace
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

import utils
from simsiam.data import survey
from simsiam.data.datasets import DATA_NAMES, check_data_root, load_dataset
from simsiam.data.decode import DecodeOptions, add_decode_options, check_decode_options
from simsiam.data.loader import Data, Loader, images_checksum
from simsiam.evaluation import metrics
from simsiam.evaluation.knn import KNN_K, KNN_TEMPERATURE
from simsiam.interop import weights
from simsiam.models.backbones import IMAGENET_ARCHS, STEMS, has_bn, is_of_library
from simsiam.models.flops import params_and_flops
from simsiam.models.methods import build_model
from simsiam.models.simsiam import BN, CRITERIA, LOSSES, PREDICTORS, TARGETS, SimSiam
from simsiam.plots import run as pictures
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import RunError, error_prefix
from simsiam.training import checkpoint
from simsiam.training.collapse import Monitor
from simsiam.training.meters import TrainMeters
from simsiam.training.optim import OPTIMIZERS, lr_at, make_optimizer
from simsiam.training.probe import Probe, resolve_probe
from simsiam.training.progress import Progress
from simsiam.training.recipes import (
    RECIPES,
    USUAL_RECIPE,
    augmentation_of,
    for_channels,
    view_flags,
)
from simsiam.training.run import Run
from simsiam.views.augment import Augmentation, Views
from utils import number

STATISTICS = tuple(
    "epoch lr train_loss std rank alignment collapse test_acc@1 test_acc@5 probe_acc@1".split()
    + "images_per_sec seconds".split()
)
SHOWN = {"loss": "loss", "std": "std"}  # what the progress of an epoch tells, and its labels


def make_flags() -> utils.Flags:
    """The flags of this command."""
    flags = utils.Flags("main.py", __doc__, fill, RECIPES)
    count, positive = number(int, 1, 2**31), number(float, 1e-12)
    add = flags.group("data")
    add("data_name", DATA_NAMES, "the data set", "cifar10")
    root = {"nargs": "+", "action": utils.Places, "metavar": "ROOT"}
    add("data_root", utils.data_place, "of downloads, or of images of one's own", "data", **root)
    parts = "folders or lists in --data_root to train on and, if you like, to score with"
    add("split_names", str, parts, nargs="+", metavar="NAME")
    add_decode_options(add, pre_trained=False)
    add("train_size", count, "train on a class-balanced, seeded subset of this size")
    add("image_size", number(int, 8, 1024), "side of the views, in pixels; None: as the images")
    sides = "sides of the views, each for a part of the epochs: pixels, or parts of --image_size"
    add("view_sizes", utils.side, sides, nargs="+", metavar="SIDE")
    view_flags(flags.group("views"))
    add = flags.group("network")
    ours = f"{', '.join(IMAGENET_ARCHS)}; resnet8, resnet14, ... (6n+2)"
    add("arch", str, f"{ours}; timm:NAME or torchvision:NAME, any of their models")
    add("stem", STEMS, "first layers of resnet18 to resnet152")
    add("width", number(int, 1, 1024), "of the first stage of resnet8, resnet14, ... (16)")
    add("feature_dim", number(int, 4, 16384), "d, the width of projector and output z")
    add("projector_layers", number(int, 1, 8), "linear layers of the projector")
    add("projector_affine", "switch", "its last BN is affine, as in some others' networks", False)
    add("init", utils.file_path, "start from a checkpoint's weights, ours or others'")
    parts = "what --init takes: the backbone and the heads that fit, the backbone, or all parts"
    add("init_parts", weights.INIT_PARTS, parts, "fitting")
    add = flags.group("the paper's ablations")
    add("stop_grad", ("on", "off"), "stop the gradient through z (sec. 4.1)", "on")
    predictors = "none: p = z; fixed: as it starts (sec. 4.2)"
    add("predictor", PREDICTORS, predictors, "mlp")
    add("bn", BN, "BN in the heads: on no, hidden or all layers (sec. 4.4)", "default")
    add("similarity", tuple(CRITERIA), "of p and z (sec. 4.5)", "cosine")
    add("loss", tuple(LOSSES), "one way or both; 2x: of two pairs (sec. 4.6)", "symmetric")
    add = flags.group("what others have added")
    add("target", TARGETS, "z that a view's p meets; mean: of all other views", "other")
    add("num_views", number(int, 2, 16), "views of an image in a step, with --target mean", 2)
    add("covariance", number(float, 0), "weight of VICReg's covariance term, of z")
    add = flags.group("optimization")
    usual = ", ".join(f"{name}: {recipe}" for name, recipe in USUAL_RECIPE.items())
    add("recipe", tuple(RECIPES), f"defaults (by --data_name: {usual}, others: cifar)")
    add("optimizer", OPTIMIZERS, "muon: orthogonal updates, by timm")
    add("batch_size", number(int, 2, 2**31), "images a step, of all ranks together")
    add("epochs", count, "sweeps over the training set")
    add("lr", positive, "base learning rate: lr = base * batch_size / 256")
    add("momentum", number(float, 0, 1), "of the optimizer")
    add("weight_decay", number(float, 0), "of the optimizer")
    add("bn_decay", "two", "weight decay also on BN's parameters and on biases")
    add("warmup_epochs", number(float, 0), "epochs of linear warm-up")
    add("fix_pred_lr", "two", "keep the predictor's lr constant")
    add = flags.group("monitor")
    add("k", count, "neighbours that vote in the kNN", KNN_K)
    add("temperature", positive, "of the kNN's vote", KNN_TEMPERATURE)
    add("bank_size", count, "images of the kNN's bank, class-balanced and seeded; None: all")
    add("knn_every", count, "epochs from one kNN to the next; the last epoch has one", 1)
    probe = "a linear head that learns beside, from detached features (where there are labels)"
    add("probe", "two", probe)
    add("stop_on_collapse", "two", "end the run where it warns of a collapse", False)
    add("show_views", "switch", "draw what the network would see, and exit", False)
    add("tensorboard", "switch", "statistics, pictures and features for it too", False)
    utils.run_flags(flags)
    add = flags.group("small networks on cuda")
    add("cuda_graphs", "switch", "with --compile: a step's work is started as a whole", False)
    return flags


def fill(flags: dict, given: dict) -> dict:
    """The flags with the recipe's values and the run's name. Raises ValueError."""
    recipe = flags["recipe"] or USUAL_RECIPE.get(flags["data_name"], "cifar")
    flags = for_channels(flags | RECIPES[recipe] | given | {"recipe": recipe}, given)
    if is_of_library(flags["arch"]):
        flags["stem"] = given.get("stem", "imagenet")
    check_decode_options(flags, flags["data_name"])
    if flags["init_parts"] != "fitting" and not flags["init"]:
        raise ValueError("--init_parts: goes with --init")
    if "view_sizes" not in given:
        flags["view_sizes"] = (flags["view_sizes"] or [])[-flags["epochs"] :] or None
    sizes = flags["view_sizes"] or ()
    if len(sizes) > flags["epochs"]:
        raise ValueError(f"--view_sizes: {len(sizes)} sizes are more than the epochs: give fewer")
    if sizes and flags["data_name"] in ("imagenet", "webdataset"):
        raise ValueError("--view_sizes: is for images in memory, not for crops that workers cut")
    if flags["cuda_graphs"] and not flags["compile"]:
        raise ValueError("--cuda_graphs: goes with --compile")
    if flags["warmup_epochs"] >= flags["epochs"]:
        raise ValueError(
            f"--warmup_epochs {flags['warmup_epochs']:g}: must be below --epochs {flags['epochs']}"
        )
    if flags["show_views"] and flags["resume"]:
        raise ValueError("--show_views: draws no run, but what its flags say: leave out --resume")
    if flags["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        raise ValueError("--tensorboard: needs a package: pip install tensorboard")
    flags = utils.place_of_run(flags, given)
    if flags["name"] is None:
        name = "{feature_dim}_{k}_{batch_size}_{epochs}"
        if (flags["data_name"], flags["arch"]) != ("cifar10", "resnet18"):
            name = "{data_name}_{arch}_" + name
        flags["name"] = name.format(**flags)
    return flags


# ---- the loop -----------------------------------------------------------------------------------


UNSCALED = torch.amp.GradScaler("cpu", enabled=False)


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    views: Views,
    tally: TrainMeters,
    epoch: int,
    start: int,
    args: Namespace,
    amp: torch.autocast,
    scaler: torch.amp.GradScaler = UNSCALED,
    probe: Probe | None = None,
) -> Iterator[int]:
    """One epoch (paper, Algorithm 1) from step `start` on; yields each step when it is done.

    `scaler`: of the gradients of an fp16 `amp`. `probe`: needs a `loader` of labels, too.
    """
    net.train()
    for batch in loader.epoch(epoch, start):
        x = views(batch)  # x1, x2: the same images, augmented twice
        lr = lr_at(args, progress := epoch + batch.step / len(loader))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * args.batch_size / 256 if group["fix_lr"] else lr
        with amp:
            loss, z, features = net(x)  # D(p1, sg(z2))/2 + D(p2, sg(z1))/2
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        # A loss that is not finite moves no weight; a fused step sees to it without a wait.
        bad = tally.add(loss, z)
        fused = optimizer.defaults.get("fused")
        if fused:
            optimizer.found_inf = bad
        if fused or not bad:
            scaler.step(optimizer)
            scaler.update()
        if probe is not None:  # after the step, of which it changes nothing
            probe.learn(features, batch.labels, progress)
        yield batch.step


# ---- a run --------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """What a run trains with, what watches it, and what is known of its row in results.csv."""

    trained: nn.Module  # the network, compiled or distributed
    optimizer: torch.optim.Optimizer
    loader: Loader
    views: Views
    tally: TrainMeters
    amp: torch.autocast
    scaler: torch.amp.GradScaler
    probe: Probe | None
    monitor: Monitor
    result: dict


def images_of(args: Namespace) -> Data:
    """The data set of the flags. Raises as `datasets.load`."""
    place = (args.data_name, args.data_root)
    how = {"decode": DecodeOptions.from_args(vars(args)), "split_names": args.split_names}
    images = load_dataset(*place, args.image_size, args.num_workers, args.bad_images, **how)
    return images if args.train_size is None else images.subset(args.train_size, args.seed)


def initial_network(args: Namespace) -> SimSiam:
    """The network of the flags, with random weights, or those of --init."""
    torch.manual_seed(args.seed)
    net = build_model(vars(args))
    if not has_bn(net.backbone):
        distributed.log(
            "the backbone has no BN: a collapse is more likely (paper, sec. 4.4); see std"
        )
    if args.init:
        with error_prefix(f"--init {args.init}"):
            for note in weights.init_from_checkpoint(net, args.init, args.init_parts):
                distributed.log(f"{args.init}: {note}")
    return net


def described(args: Namespace, images: Data) -> tuple[dict, Augmentation]:
    """The encoder of the flags with its input, as a checkpoint has it; and its augmentation."""
    encoder = {"arch": args.arch, "stem": args.stem, "width": args.width}
    encoder |= {"image_size": args.image_size or images.train_images.shape[-1]}
    return encoder | survey.channel_stats(args, images.train_images), augmentation_of(vars(args))


def views_of(args: Namespace, encoder: dict, augmentation: Augmentation, number: int) -> Views:
    """The views of a run; `number` of them per image."""
    plain = (encoder["image_size"], encoder["mean"], encoder["std"])
    whole, epochs = encoder["image_size"], args.epochs
    sizes = [max(8, round(s * whole)) if s <= 1 else s for s in args.view_sizes or []]
    sides = [sizes[epoch * len(sizes) // epochs] for epoch in range(epochs)] if sizes else ()
    return Views(*plain, augmentation, number, args.seed, args.compile, sides)


def prepare(run: Run) -> Prepared:
    """All that a run needs, new or from its checkpoint. Raises ValueError and OSError."""
    args, state, each = run.args, run.state, distributed.batch_size_per_rank(run.args.batch_size)
    if args.data_name == "textures" and "data_root" in run.given:
        raise ValueError(utils.TEXTURES_HAVE_NO_ROOT)
    with run.flags.bad_input():  # one rank alone may lack its device
        device, amp = devices.setup_device(args)
    if not state:
        net = initial_network(args)
    images = images_of(args)
    if state:
        encoder, augmentation = state["encoder"], Augmentation.read(state["augmentation"])
        with error_prefix(run.from_path):
            net = checkpoint.network(state)
            if any(encoder[name] != getattr(args, name) for name in ("arch", "stem", "width")):
                raise ValueError("its encoder is not that of its arguments")
    else:
        encoder, augmentation = described(args, images)
    size = encoder["image_size"]
    counts = params_and_flops(net, size)
    amp = devices.training_precision(device, args.amp, amp, counts[1])
    has_probe = resolve_probe(args.probe, images)
    run.settle(amp=amp, image_size=size, probe=has_probe)
    if args.data_name != "textures":
        run.settle(data_root=utils.data_place(args.data_root))
    of_images = {"images_crc": images_checksum(images.train_images), "classes": images.classes}
    run.same(**of_images, encoder=encoder, augmentation=vars(augmentation).copy())
    baselines = {"raw_acc@1", "test_acc@1"}
    if state and images.test_images is not None and not baselines <= run.history[0].keys():
        raise ValueError(
            f"--data_root {args.data_root}: has test images, and {run.from_path} began without"
        )
    run.list_bad_images(images.unreadable)
    what = f"{run.path}: SimSiam {args.arch}, d = {args.feature_dim}"
    result = utils.print_summary(what, net, counts, images, args.data_name, size, device, amp)
    if not state:
        survey.print_survey(args, images)
    if args.ddp:
        distributed.log(
            f"ranks: {distributed.world_size()}, {each} images each a step; whatever their number, "
            f"lr is {args.lr:g} x {args.batch_size} / 256 = {lr_at(args, args.warmup_epochs):g}"
        )
    result |= {"data": utils.data_label(args.data_name, args.data_root), "arch": args.arch}
    result |= {"feature_dim": args.feature_dim, "k": args.k, "protocol": "KNN"}
    images, autocast = images.to(device), devices.autocast(device, amp)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    views = views_of(args, encoder, augmentation, net.num_views)
    probe = Probe(net.features, len(images.classes), args, device) if has_probe else None
    labels = images.train_labels if has_probe else None
    loader = Loader(images.train_images, args.batch_size, args.seed, labels, views=views)
    if args.bank_size is not None:
        images = images.subset(args.bank_size, args.seed, "--bank_size")
        result["protocol"] += f", bank of {args.bank_size}"
    net.to(device, memory_format=torch.channels_last)
    optimizer, tally = make_optimizer(net, args), TrainMeters(device)
    trained = distributed.prepare_for_training(net, size, args.compile, args.cuda_graphs)
    run.keep(net, optimizer, tally, len(loader), functools.partial(lr_at, args), scaler, probe)
    warned = "collapse" in run.facts
    monitor = Monitor(net, views, images, args, RECIPES[args.recipe]["lr"], autocast, warned)
    steps = (trained, optimizer, loader, views, tally, autocast, scaler, probe)
    return Prepared(*steps, monitor, result)


def pretrain(run: Run, made: Prepared) -> None:
    """The epochs of a run, and its last files."""
    args, tally, monitor, steps = run.args, made.tally, made.monitor, len(made.loader)
    if run.state is None:
        run.begin([monitor.untrained()])
    board = None
    if args.tensorboard and distributed.rank() == 0:
        board = pictures.Board(f"{run.path}_tensorboard", run.history, STATISTICS)
    start_rank = run.history[0].get("rank", 0.0)
    smaller = f"python main.py --data_name {args.data_name} --data_root {args.data_root}"
    smaller += " --recipe short --epochs 5"
    for epoch in run.epochs():
        stop_on_collapse(run)
        rest = made.views.remaining_work(epoch, args.epochs)
        with Progress(epoch, args, steps, SHOWN, smaller, run.step, rest=rest) as progress:
            for step in train(*made[:5], epoch, run.step, args, *made[5:8]):
                seen = progress(step, tally)
                collapsed = monitor.check_step(epoch, step, steps, tally, start_rank)
                if collapsed:
                    run.facts["collapse"] = epoch * steps + step + 1
                run.after_step(step, seen, collapsed and args.stop_on_collapse)
                stop_on_collapse(run)
        mean, speed = tally.means(steps), steps * args.batch_size / run.seconds()
        row = {"train_loss": mean["loss"], "std": mean["std"], "images_per_sec": speed}
        last = epoch + 1 == args.epochs
        if (epoch + 1) % args.knn_every == 0 or last:
            with run.measuring():
                row |= monitor.measure(last, made.probe)
        if monitor.check_collapse(epoch, steps, row["std"], row.get("rank"), start_rank):
            run.facts["collapse"] = (epoch + 1) * steps
        if run.facts.get("collapse", 0) > epoch * steps:
            row["collapse"] = run.facts["collapse"]
        row = run.after_epoch(row)
        if board:
            board.row(row)
        distributed.log(
            f"epoch {epoch + 1}/{args.epochs} loss {row['train_loss']:.3f} std {row['std']:.2f}"
            + (f" rank {row['rank']:.1f}" if "rank" in row else "")
            + (f" alignment {row['alignment']:.3f}" if "alignment" in row else "")
            + (f" kNN top-1 {row['test_acc@1']:.1f} %" if "test_acc@1" in row else "")
            + (f" probe {row['probe_acc@1']:.1f} %" if "probe_acc@1" in row else "")
            + f" ({row['images_per_sec']:.0f} images/s, {row['seconds']:.0f} s)"
        )
    start, end = run.history[0], run.history[-1]
    with run.finishing():
        if "test_acc@1" in end:
            best = run.report(**made.result)
            distributed.log(
                f"kNN top-1 {end['test_acc@1']:.1f} % (best {best:.1f} %), "
                + (f"linear probe {end['probe_acc@1']:.1f} %, " if "probe_acc@1" in end else "")
                + f"untrained encoder {start['test_acc@1']:.1f} %, raw pixels "
                f"{start['raw_acc@1']:.1f} %"
            )
        elif "alignment" in end:
            distributed.log(metrics.alignment_summary(end["alignment"], start.get("alignment")))
        if args.pictures:
            pictures.draw_run(run.path, args.name, run.history, monitor, board)
    if board:
        board.close()
    drawn = " and pictures" if args.pictures else ""
    distributed.log(f"wrote {run.path}_model.pth, {run.path}_statistics.csv{drawn}")


def stop_on_collapse(run: Run) -> None:
    """End a run that was warned of a collapse, if it is to. Raises RunError."""
    if run.args.stop_on_collapse and "collapse" in run.facts:
        raise RunError(
            f"--stop_on_collapse: ended, and {run.path}_model.pth is from here. To go on all the "
            "same: --resume --no-stop_on_collapse"
        )


def show_views(args: Namespace) -> None:
    """`<run>_views.png`: two views of a few images, as the network gets them; trains nothing."""
    images, label = images_of(args), utils.data_label(args.data_name, args.data_root)
    encoder, augmentation = described(args, images)
    views = views_of(args, encoder, augmentation, 2)
    path = os.path.join(args.out, f"{args.name}_views.png")
    os.makedirs(args.out, exist_ok=True)
    survey.print_survey(args, images)
    pictures.draw_views(path, label, images.train_images, views, args.seed)
    distributed.log(f"wrote {path}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    flags = make_flags()
    args, given = flags.read(argv)
    with utils.joined(args, flags), contextlib.ExitStack() as stack:
        with flags.bad_input():
            if "data_root" in given and "data_name" not in given and not args.resume:
                check_data_root(args.data_name, args.data_root)
            if args.show_views:
                show_views(args)
                return
            run = stack.enter_context(Run(args, given, flags, STATISTICS))
            made = prepare(run)
        pretrain(run, made)


if __name__ == "__main__":
    utils.run_command(main)
