"""Judge a pre-trained encoder: a linear head on its frozen features; fine-tune; evaluate; predict.

python linear.py --model_path results/2048_200_512_800_model.pth
python linear.py --model_path results/2048_200_512_800_model.pth --finetune
python linear.py --model_path results/..._linear_model.pth --evaluate_only
python linear.py --model_path results/..._linear_model.pth --predict a.jpg my_images/
torchrun --nproc_per_node 8 linear.py --ddp --model_path results/..._model.pth --optimizer lars
"""

import contextlib
import copy
import functools
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import utils
from evaluation import (
    draw_confusion,
    evaluate_only,
    images_of,
    open_source,
    predict,
    reading,
    split_names,
)
from simsiam.data.datasets import DATA_NAMES
from simsiam.data.decode import FOLDER_DATA, add_decode_options
from simsiam.data.loader import (
    Data,
    ImageFiles,
    Loader,
    balanced_subset,
    evenly_spaced,
    images_checksum,
)
from simsiam.evaluation import metrics
from simsiam.evaluation.linear import (
    FeatureFn,
    FinetunedEncoder,
    FrozenEncoder,
    Task,
    evaluate,
    identity_features,
    make_optimizer,
    topk_correct,
)
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models.backbones import backbone
from simsiam.models.classifier import Classifier, linear_head
from simsiam.models.flops import params_and_flops
from simsiam.plots import curves as figures
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import atomic_write, error_prefix
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training import checkpoint
from simsiam.training.meters import Meters
from simsiam.training.progress import Progress
from simsiam.training.run import Run, run_of
from simsiam.views.augment import Augmentation, Views
from utils import number

# lr is per 256 images. sgd: MoCo's protocol, which the paper "also tried" (App. A), and the usual
# one on CIFAR. lars: the authors' code for ImageNet (the paper, App. A, has a base lr of 0.02).
RECIPES = {
    "sgd": {"lr": [30.0], "batch_size": 256, "epochs": 90, "weight_decay": 0.0},
    "lars": {"lr": [0.1], "batch_size": 4096, "epochs": 90, "weight_decay": 0.0},
    # With --finetune, ours: lr is the head's and, without --encoder_lr, the encoder's.
    "finetune sgd": {"lr": [0.4], "batch_size": 64, "epochs": 30, "weight_decay": 5e-4},
    "finetune adamw": {"lr": [0.004], "batch_size": 64, "epochs": 30, "weight_decay": 0.05},
}
# An lr of 30 is for features that are small numbers. Where the mean of their squared norms is above
# this, as it is after Muon, the default is one of these parts of it, chosen on held-out images. SGD
# on textures gives 5; after Muon it was 17 there, and about 200 on CIFAR-10.
LARGE_NORM, PARTS_OF_LR = 10.0, (1.0, 0.1, 0.01, 0.001)
# The training transform: random resized crop and flip.
AUGMENTATION = Augmentation(crop_scale=(0.08, 1.0), jitter_p=0.0, gray_p=0.0)
STATISTICS = tuple(
    "epoch lr train_loss train_acc@1 train_acc@5 test_loss test_acc@1 test_acc@5 seconds".split()
)


def make_flags() -> utils.Flags:
    """The flags of this command."""
    flags = utils.Flags("linear.py", __doc__, fill, RECIPES)
    add = flags.group("what")
    path = "a checkpoint of main.py, or another project's (see docs/checkpoints.md); with "
    path += "--evaluate_only and --predict, one of linear.py"
    add("model_path", str, path, "results/2048_200_512_800_model.pth")
    add("evaluate_only", "switch", "score a linear model's test set, train nothing", False)
    predict = "classes of images, and of folders of them"
    add("predict", str, predict, nargs="+", metavar="FILE")
    add("out_csv", str, "write what --predict finds to this file too")
    add = flags.group("another project's encoder")
    for name, kind, text, more in utils.OF_SOURCE:
        add(name, kind, text, **more)
    add = flags.group("data")
    add("data_name", DATA_NAMES, "judge on another data set than the pre-training's")
    root = "where it is (as in pre-training; data where that was another data set)"
    add("data_root", utils.data_place, root, nargs="+", action=utils.Places, metavar="ROOT")
    parts = "its folders or lists to train on and to score with (as in pre-training)"
    add("split_names", str, parts, nargs="+", metavar="NAME")
    add_decode_options(add, pre_trained=True)
    fraction = "use a class-balanced, seeded fraction of the labels"
    add("label_fraction", number(float, 1e-9, 1), fraction, 1.0)
    add = flags.group("protocol")
    add("cached", "switch", "no augmentation: extract the features once", False)
    optimizers = "and its recipe; adamw: with --finetune, lars: without"
    add("optimizer", ("sgd", "lars", "adamw"), optimizers, "sgd")
    add("batch_size", number(int, 1, 2**31), "images a step")
    add("epochs", number(int, 1, 2**31), "sweeps over the training set")
    lr = "base learning rate, per 256 images; of several, the best on a held-out tenth of the "
    lr += "training set"
    add("lr", number(float, 1e-12), lr, nargs="+")
    add("weight_decay", number(float, 0), "of the optimizer")
    smoothing = "the part of each label that is spread over all classes"
    add("label_smoothing", number(float, 0, 1), smoothing, 0.0)
    add = flags.group("the whole network")
    tuned = "train the encoder with the head, BN in train mode, instead of freezing it"
    add("finetune", "switch", tuned, False)
    scratch = "with --finetune: start from random weights instead"
    add("from_scratch", "switch", scratch, False)
    add("encoder_lr", number(float, 1e-12), "base learning rate of the encoder (that of --lr)")
    add("mixup", number(float, 0, 100), "alpha of mixup, in training; 0: none", 0.0)
    utils.run_flags(flags, "that of --model_path")
    return flags


# What goes with the modes that train nothing, besides their own flag.
FITTING = "model_path device amp deterministic num_workers bad_images overwrite".split()
MODES = {
    "evaluate_only": FITTING + "data_name data_root split_names out name ddp pictures".split(),
    "predict": (*FITTING, "out_csv"),
}


def fill(flags: dict, given: dict) -> dict:
    """The flags with the recipe of optimizer and mode. Raises ValueError.

    Without --out, files go where --model_path lies. Without --name, the name of a run that trains
    stays None: it is made of its --model_path's.
    """
    wrong = {
        "cached": "features that are extracted once are frozen" if flags["cached"] else "",
        "optimizer": "lars is for heads" if flags["optimizer"] == "lars" else "",
        "amp": "fp16 is for frozen encoders" if flags["amp"] == "fp16" else "",
    }
    for name, why in wrong.items() if flags["finetune"] else ():
        if why:
            raise ValueError(f"--{name}: does not go with --finetune: {why}")
    for name in ("from_scratch", "encoder_lr", "mixup"):
        if flags[name] and not flags["finetune"]:
            raise ValueError(f"--{name}: goes with --finetune")
    if flags["optimizer"] == "adamw" and not flags["finetune"]:
        raise ValueError("--optimizer adamw: goes with --finetune")
    flags = flags | RECIPES["finetune " * flags["finetune"] + flags["optimizer"]]
    flags |= {"out": os.path.dirname(flags["model_path"]) or "."} | given
    if flags["evaluate_only"] and flags["predict"]:
        raise ValueError("--evaluate_only and --predict: choose one")
    if flags["out_csv"] and not flags["predict"]:
        raise ValueError("--out_csv: goes with --predict")
    for mode, fitting in MODES.items():
        for name in given.keys() - {mode, *fitting} if flags[mode] else ():
            raise ValueError(f"--{name}: does not go with --{mode}")
    return utils.place_of_run(flags, given)


# ---- fitting ------------------------------------------------------------------------------------


def train(
    heads: nn.ModuleList,
    optimizer: Optimizer,
    loader: Loader,
    embed: FeatureFn,
    tally: Meters,
    epoch: int,
    start: int,
    epochs: int,
    smoothing: float = 0.0,
) -> Iterator[int]:
    """One epoch of all heads side by side, from step `start` on; yields each step.

    The heads do not touch one another: the sum of their losses has for each head the gradient of
    its own. Where `embed` lets gradients through, the encoder learns too. `smoothing`: of labels.
    Adds to `tally`, image by image, the first head's loss, top-1 and top-5.
    """
    for batch in loader.epoch(epoch, start):
        features, targets = embed(batch)
        factor = cosine_schedule(epoch + batch.step / len(loader), epochs)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        logits = [head(features) for head in heads]
        losses = [F.cross_entropy(scores, targets, label_smoothing=smoothing) for scores in logits]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        top1, top5 = topk_correct(logits[0].detach(), batch.labels)
        n = batch.size
        tally.add(loss=n * losses[0].detach(), top1=n * top1, top5=n * top5)
        yield batch.step


def progress_of(epoch: int, args: Namespace, loader: Loader, start: int = 0) -> Progress:
    """The progress of an epoch."""
    shown, smaller = {"loss": "loss", "top1": "acc"}, "the same command with --cached"
    return Progress(epoch, args, len(loader), shown, smaller, start, loader.batch_size)


def fit(
    head: nn.Linear,
    lrs: list[float],
    task: Task,
    args: Namespace,
    backbone: nn.Module | None = None,
) -> nn.ModuleList:
    """A copy of `head` for each lr, trained from the start to the end; a `backbone` with one."""
    heads = nn.ModuleList(copy.deepcopy(head) for _ in lrs)
    optimizer, loader = make_optimizer(args, heads, lrs, backbone), task.loader(args)
    tally = Meters(task.labels.device, "top1", "top5")
    last = (args.epochs, args.label_smoothing)
    for epoch in range(args.epochs):
        tally.clear()
        with progress_of(epoch, args, loader) as progress:
            for step in train(heads, optimizer, loader, task.embed, tally, epoch, 0, *last):
                progress(step, tally)
    return heads


def held_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Which of the training images an lr is chosen with: nine tenths, indices; a tenth, a mask."""
    kept = balanced_subset(labels.cpu(), len(labels) - max(1, len(labels) // 10), seed).to(
        labels.device
    )
    out = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    out[kept] = False
    return kept, out


def usual_lrs(run: Run, made: "Prepared") -> list[float]:
    """The lr of the flags or, where they are silent and the features are large, parts of it."""
    args, images = run.args, made.images.train_images
    if args.finetune or args.optimizer != "sgd" or "lr" in run.given or len(images) < 10:
        return args.lr
    norm = (
        made.encoder.plain(images[evenly_spaced(len(images), 1000)]).square().sum(1).mean().item()
    )
    if norm <= LARGE_NORM:
        return args.lr
    lrs = [args.lr[0] * part for part in PARTS_OF_LR]
    distributed.log(
        f"the features are large (a mean squared norm of {norm:.0f}; --lr {args.lr[0]:g} is for "
        f"{LARGE_NORM:g} at most): the best of --lr {' '.join(f'{lr:g}' for lr in lrs)} is taken"
    )
    return lrs


def best_on_held_out(
    head: nn.Linear,
    lrs: list[float],
    task: Task,
    plain: Callable[[Tensor | ImageFiles], Tensor] | None,
    args: Namespace,
) -> float:
    """The lr whose head does best on a held-out tenth of the training set, trained on the rest.

    `plain` gives the features of held-out images; None where the inputs are features.
    """
    kept, out = held_out(task.labels, args.seed)
    heads = fit(head, lrs, task.chosen(kept), args)
    features = plain(task.inputs[out]) if plain else task.inputs[out]
    scores = [evaluate(head, features, task.labels[out])[1] for head in heads]
    return the_best(lrs, scores)


def best_of_tuned(
    net: Classifier, encoder: FinetunedEncoder, task: Task, args: Namespace, classes: int
) -> float:
    """As `best_on_held_out`, with a copy of the whole network trained for each lr."""
    kept, out = held_out(task.labels, args.seed)
    scores = []
    for lr in args.lr:
        copied = copy.deepcopy(net)
        how = (encoder.views, encoder.amp, args.compile, classes, args.mixup)
        tuned = FinetunedEncoder(copied.backbone, *how)
        some = task.chosen(kept)._replace(embed=tuned.augmented)
        (head,) = fit(copied.fc, [lr], some, args, copied.backbone)
        scores.append(evaluate(head, tuned.plain(task.inputs[out]), task.labels[out])[1])
    return the_best(args.lr, scores)


def the_best(lrs: list[float], scores: list[float]) -> float:
    """The lr with the best score; says all."""
    for lr, score in zip(lrs, scores, strict=True):
        distributed.log(f"--lr {lr:g}: {score:.2f} % of the held-out tenth of the training set")
    return lrs[scores.index(max(scores))]


def pixels_baseline(images: Data, views: Views, amp: torch.autocast, args: Namespace) -> float:
    """Test top-1 of a linear head on raw pixels: the same fit, at the best of four lr.

    The best on the test set, which favours the baseline: pixels have another scale than features.
    """
    pixels = metrics.raw_pixels(views.size)
    images = images.limit(metrics.MAX_RAW_PIXEL_IMAGES, args.seed)
    inputs, test = (
        metrics.extract_features(pixels, views.eval_transform, part, amp, False)
        for part in (images.train_images, images.test_images)
    )
    lrs = [args.lr[0] * part for part in PARTS_OF_LR]
    head = linear_head(inputs.shape[1], len(images.classes)).to(inputs.device)
    heads = fit(head, lrs, Task(inputs, images.train_labels, identity_features), args)
    return max(evaluate(head, test, images.test_labels)[1] for head in heads)


# ---- a run --------------------------------------------------------------------------------------


def mode(args: Namespace) -> str:
    """What is fitted, as the names of its files have it."""
    return ("scratch" if args.from_scratch else "finetune") if args.finetune else "linear"


def run_name(args: Namespace, source: LoadedCheckpoint) -> str:
    """The name of a run: that of its --model_path's file, and what is not the default."""
    saved = source.state["args"] if source.state else {}
    begin = run_of(args.model_path)[1] if saved else Path(args.model_path).stem
    parts = [begin, mode(args)]
    parts += ["cached"] if args.cached else []
    parts += [args.optimizer] if args.optimizer != "sgd" else []
    other = saved and args.data_name not in (None, saved.get("data_name"))
    parts += [args.data_name] if other else []
    parts += [f"{args.label_fraction:g}"] if args.label_fraction < 1 else []
    return "_".join(parts)


class Prepared(NamedTuple):
    """What a run fits with, and what it reports."""

    net: Classifier
    encoder: FrozenEncoder
    task: Task
    images: Data
    test_features: Tensor | None  # of a frozen encoder: the same in all epochs
    optimizer: Optimizer
    loader: Loader
    tally: Meters
    extraction: float  # seconds, of the training images' features
    seen: int  # images an epoch
    knn: float | None  # top-1 at the end of pre-training
    result: dict  # what is known of the row in results.csv

    def of_test(self) -> Tensor:
        """The features of the test images, N x d."""
        if self.test_features is not None:
            return self.test_features
        return self.encoder.plain(self.images.test_images)


def rate(run: Run, progress: float) -> float:
    """The learning rate `progress` epochs into the run."""
    peak = run.facts["lr"] * run.args.batch_size / 256
    return peak * cosine_schedule(progress, run.args.epochs)


def resumed_encoder(run: Run, net: Classifier) -> None:
    """Load a checkpoint's weights into `net`. Raises ValueError if its backbone's are others."""
    before = net.backbone.state_dict(prefix="backbone.")
    with error_prefix(run.from_path):
        checkpoint.load_strictly(net, run.state["model"])
        if run.facts.get("lr", 0) <= 0 or not (run.args.finetune or "baseline" in run.facts):
            raise ValueError("is damaged, or not a checkpoint of linear.py")
    if not run.args.finetune and not all(
        torch.equal(run.state["model"][name], value) for name, value in before.items()
    ):
        raise ValueError(f"--model_path {run.args.model_path}: not the encoder of {run.from_path}")


def fitted_to(
    args: Namespace, net: Classifier, images: Data, views: Views, amp: torch.autocast
) -> tuple[FrozenEncoder, Task, Tensor | None, float]:
    """The encoder, what the head is fitted to, and what it is judged by; seconds of extraction."""
    how = (net.backbone, views, amp, args.compile)
    if args.finetune:
        tuned = FinetunedEncoder(*how, len(images.classes), args.mixup)
        distributed.log(
            "the whole network is trained, with BN in train mode; it is scored in eval mode"
        )
        task = Task(images.train_images, images.train_labels, tuned.augmented, views, False)
        return tuned, task, None, 0.0
    encoder = FrozenEncoder(*how)
    test_features = encoder.plain(images.test_images)  # the same in all epochs
    task = Task(images.train_images, images.train_labels, encoder.augmented, views)
    begun = time.perf_counter()
    if args.cached:
        task = Task(encoder.plain(images.train_images), images.train_labels, identity_features)
    return encoder, task, test_features, time.perf_counter() - begun


def prepare(run: Run) -> Prepared:
    """All that a run needs, new or from its checkpoint. Raises ValueError and OSError."""
    args, augmentation = run.args, AUGMENTATION
    with run.flags.bad_input():  # one rank alone may lack its device
        device, amp = devices.setup_device(args)
    source = open_source(args, linear=False)
    for note in source.notes:
        distributed.log(f"{args.model_path}: {note}")
    images, name, root = images_of(args, source)
    if args.label_fraction < 1:
        number = max(1, round(args.label_fraction * len(images.train_labels)))
        images = images.subset(number, args.seed)
    if len(args.lr) > 1 and len(images.train_labels) < 10:
        raise ValueError(
            "--lr: of several the best is chosen on a tenth of the training images, and there are "
            f"{len(images.train_labels)}: give one"
        )
    if run.state:
        with error_prefix(run.from_path):
            augmentation = Augmentation.read(run.state["augmentation"])
    place = None if name == "textures" else utils.data_place(root)
    run.settle(data_name=name, data_root=place, split_names=split_names(args, source))
    how = vars(reading(args, source)).copy()
    del how["channels"]  # the encoder says how many
    run.settle(**how | {"exclude": (name in FOLDER_DATA and how["exclude"]) or None})
    of_images = {"images_crc": images_checksum(images.train_images), "classes": images.classes}
    run.same(**of_images, encoder=source.encoder, augmentation=vars(augmentation).copy())
    arch, size = source.encoder["arch"], source.encoder["image_size"]
    torch.manual_seed(args.seed)
    body = source.net.backbone
    if args.from_scratch:
        body = backbone(*checkpoint.backbone_args(source.encoder))[0]
    net = Classifier(body, source.net.features, len(images.classes))
    if run.state:
        resumed_encoder(run, net)
    protocol = {"linear": "Linear", "finetune": "Fine-tuned", "scratch": "From scratch"}[mode(args)]
    protocol += ", cached" * args.cached
    protocol += f", {100 * args.label_fraction:g}% of labels" * (args.label_fraction < 1)
    run.list_bad_images(images.unreadable)
    what, counts = f"{run.path}: {protocol}, {arch}", params_and_flops(net, size)
    if args.finetune:
        amp = devices.training_precision(device, args.amp, amp, counts[1])
    run.settle(amp=amp)
    result = utils.print_summary(what, net, counts, images, name, size, device, amp)
    result |= {"protocol": protocol, "data": utils.data_label(name, root), "arch": arch}
    net.to(device, memory_format=torch.channels_last)
    images = images.to(device)
    views = Views(size, source.views.mean, source.views.std, augmentation, 1, args.seed)
    autocast = devices.autocast(device, amp)
    encoder, task, test_features, extraction = fitted_to(args, net, images, views, autocast)
    heads = nn.ModuleList([net.fc])
    learning = net.backbone if args.finetune else None
    optimizer = make_optimizer(args, heads, [run.facts.get("lr", args.lr[0])], learning)
    loader, tally = task.loader(args), Meters(device, "top1", "top5")
    run.keep(net, optimizer, tally, len(loader), functools.partial(rate, run))
    history = source.state["history"] if source.state else [{}]
    knn = history[-1].get("test_acc@1")
    found = (net, encoder, task, images, test_features, optimizer, loader, tally)
    seen = len(task.labels) if task.keep_last else len(loader) * loader.batch_size
    return Prepared(*found, extraction, seen, knn, result)


def begin(run: Run, made: Prepared) -> None:
    """The baseline, and the choice among several lr; then a new run begins."""
    args, encoder = run.args, made.encoder
    run.facts |= {"lr": args.lr[0]}
    if not args.finetune:
        baseline = pixels_baseline(made.images, encoder.views, encoder.amp, args)
        distributed.log(f"baseline, a linear head on raw pixels: top-1 {baseline:.1f} %")
        run.facts |= {"baseline": baseline}
    lrs = usual_lrs(run, made)
    if len(lrs) > 1:
        if args.finetune:
            of_net = (made.net, encoder, made.task, args, len(made.images.classes))
            lr = best_of_tuned(*of_net)
        else:
            plain = None if args.cached else encoder.plain
            lr = best_on_held_out(made.net.fc, lrs, made.task, plain, args)
        run.facts["lr"] = lr
        made.optimizer.param_groups[0]["peak"] = rate(run, 0)
        if args.finetune and args.encoder_lr is None:
            made.optimizer.param_groups[1]["peak"] = rate(run, 0)
        distributed.log(f"chosen: --lr {lr:g}; fitted again on the whole training set")
    run.begin([], made.extraction)


def is_scored(epoch: int, args: Namespace, made: Prepared) -> bool:
    """Whether the test images are looked at after an epoch.

    A network that is tuned sees at least as many training images in between: with few labels an
    epoch is a few steps, and the test would take nearly all of the time.
    """
    tests, seen = len(made.images.test_images), made.seen
    passed = (epoch + 1) * seen // tests > epoch * seen // tests
    return not args.finetune or passed or epoch + 1 == args.epochs


def judge(run: Run, made: Prepared) -> None:
    """The epochs of a run, and its last files."""
    args, tally, said = run.args, made.tally, time.perf_counter()
    if run.state is None:
        begin(run, made)
    fitted = (nn.ModuleList([made.net.fc]), made.optimizer, made.loader, made.task.embed, tally)
    last, features = (args.epochs, args.label_smoothing), made.test_features
    for epoch in run.epochs():
        with progress_of(epoch, args, made.loader, run.step) as progress:
            for step in train(*fitted, epoch, run.step, *last):
                run.after_step(step, progress(step, tally))
        made.encoder.check()
        mean = tally.means(made.seen)
        row = {"train_loss": mean["loss"]}
        row |= {"train_acc@1": 100 * mean["top1"], "train_acc@5": 100 * mean["top5"]}
        if is_scored(epoch, args, made):
            with run.measuring() if args.finetune else contextlib.nullcontext():
                features = made.of_test()
            test = evaluate(made.net.fc, features, made.images.test_labels)
            row |= zip(("test_loss", "test_acc@1", "test_acc@5"), test, strict=True)
        row = run.after_epoch(row)
        # Cached epochs take a blink: not all of them are said.
        if epoch + 1 == args.epochs or time.perf_counter() - said > 1:
            said = time.perf_counter()
            distributed.log(
                f"epoch {epoch + 1}/{args.epochs} loss {row['train_loss']:.3f} "
                f"train {row['train_acc@1']:.2f} %"
                + (f" test {row['test_acc@1']:.2f} %" if "test_acc@1" in row else "")
            )
    last, knn, baseline = run.history[-1], made.knn, run.facts.get("baseline")
    with run.finishing():
        best = run.report(**made.result)
        if args.pictures:
            features = made.of_test() if features is None else features  # a run that was finished
            predicted, classes = made.net.fc(features).argmax(1), made.images.classes
            labels = made.images.test_labels
            matrix = metrics.confusion_matrix(labels, predicted, len(classes))
            draw_confusion(f"{run.path}_confusion.png", args.name, matrix, classes)
            with atomic_write(f"{run.path}_curves.png") as file:
                start = [{"epoch": 0, "raw_acc@1": baseline}] if baseline is not None else []
                figures.curves({args.name: [*start, *run.history]}, file)
    distributed.log(
        f"{made.result['protocol']}: top-1 {last['test_acc@1']:.2f} % (best epoch {best:.2f} %), "
        f"top-5 {last['test_acc@5']:.2f} %"
        + (f"; raw pixels {baseline:.2f} %" if baseline is not None else "")
        + (f"; kNN at the end of pre-training {knn:.2f} %" if knn is not None else "")
        + f"\nwrote {run.path}_model.pth and {run.path}_statistics.csv"
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    flags = make_flags()
    args, given = flags.read(argv)
    with utils.joined(args, flags), contextlib.ExitStack() as stack:
        if args.predict:
            predict(args, flags)
            return
        if args.evaluate_only:
            evaluate_only(args, flags)
            return
        with flags.bad_input():
            if args.name is None:
                name = run_name(args, open_source(args, linear=False))
                args = flags.complete(given | {"name": name})
            run = stack.enter_context(Run(args, given, flags, STATISTICS))
            made = prepare(run)
        judge(run, made)


if __name__ == "__main__":
    utils.run_command(main)
