"""Evaluate a pre-trained encoder: a linear head on its frozen features; fine-tune; predict.

python linear.py --model_path results/2048_200_512_800_model.pth
python linear.py --model_path results/2048_200_512_800_model.pth --finetune
python linear.py --model_path results/..._linear_model.pth --evaluate_only
python linear.py --model_path results/..._linear_model.pth --predict a.jpg my_images/
torchrun --nproc_per_node 8 linear.py --ddp --model_path results/..._model.pth --optimizer lars
"""

import contextlib
import copy
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from simsiam.data import folders
from simsiam.data.datasets import (
    TORCHVISION,
    check_data_root,
    check_has_test,
    load_dataset,
)
from simsiam.data.decode import (
    FOLDER_DATA,
    DecodeOptions,
    check_decode_options,
    decode_files,
)
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
from simsiam.interop.weights import LoadedCheckpoint, Predictor
from simsiam.models.backbones import build_backbone
from simsiam.models.classifier import Classifier, linear_head
from simsiam.models.flops import params_and_flops
from simsiam.plots.curves import plot_confusion, plot_curves
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import atomic_write, error_prefix, printable, write_csv
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training import checkpoint
from simsiam.training.meters import Meters
from simsiam.training.progress import Progress
from simsiam.training.recipes import (
    TEXTURES_HAVE_NO_ROOT,
    LinearConfig,
    PretrainConfig,
    absolute_root,
    run_of,
)
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Augmentation, Views

# An lr of 30 is for features that are small numbers. Where the mean of their squared norms is above
# this, as it is after Muon, the default is one of these parts of it, chosen on held-out images. SGD
# on textures gives 5; after Muon it was 17 there, and about 200 on CIFAR-10.
LARGE_NORM, LR_PARTS = 10.0, (1.0, 0.1, 0.01, 0.001)
# The training transform: random resized crop and flip.
AUGMENTATION = Augmentation(crop_scale=(0.08, 1.0), jitter_p=0.0, gray_p=0.0)
STATISTICS = tuple(
    "epoch lr train_loss train_acc@1 train_acc@5 test_loss test_acc@1 test_acc@5 seconds".split()
)


# ---- the checkpoint and its data set ------------------------------------------------------------


def open_checkpoint(config: LinearConfig, is_linear: bool) -> LoadedCheckpoint:
    """Return the checkpoint at --model_path. Raises ValueError if it is of the other kind."""
    path = f"--model_path {config.model_path}"
    overrides = {} if is_linear else utils.source_settings(config)
    source = distributed.broadcast_from_rank0(
        lambda: LoadedCheckpoint.open(config.model_path, **overrides)
    )
    if is_linear and (source.config is None or not source.is_linear):
        raise ValueError(f"{path}: is not a linear model; make one with python linear.py {path}")
    if source.config is None and not config.data_name:
        raise ValueError(
            f"{path}: another project's checkpoint ({source.notes[0]}) names no data set: add "
            "--data_name, and --data_root"
        )
    if source.is_linear and not is_linear:
        if source.config is not None:
            raise ValueError(
                f"{path}: is a linear model; give the pre-trained one, or add --evaluate_only or "
                "--predict"
            )
        source.notes.append("its classifier is not used: a new one is fitted")
    return source


def split_names_of(config: LinearConfig, source: LoadedCheckpoint) -> tuple[str, ...] | None:
    """Return --split_names or, for the data set of the checkpoint, those of the checkpoint."""
    saved = source.config
    same = saved is not None and config.data_name in (None, saved.data_name)
    return config.split_names or (saved.split_names if same else None)


def decode_options_of(config: LinearConfig, source: LoadedCheckpoint) -> DecodeOptions:
    """Return how image files are decoded: as the flags say, else as in pre-training."""
    names = ("exif", "background", "exclude", "levels")
    flags = {name: getattr(config, name) for name in names}
    return dataclasses.replace(source.decode, **{k: v for k, v in flags.items() if v is not None})


def load_images(
    config: LinearConfig, source: LoadedCheckpoint, test_only: bool = False
) -> tuple[Data, str, str]:
    """Return the data set of the flags, else of the checkpoint; its name and root.

    Images without a label are left out. `test_only`: training images need not be read.
    """
    saved = source.config
    name = config.data_name or saved.data_name
    same = saved is not None and name == saved.data_name
    check_decode_options({"exclude": config.exclude, "levels": config.levels}, name)
    if config.data_root and name == "textures":
        raise ValueError(TEXTURES_HAVE_NO_ROOT)
    root = config.data_root or (same and saved.data_root) or "data"
    if config.data_root and not config.data_name:
        check_data_root(name, root)
    elif not config.data_root and name in TORCHVISION and not os.path.isdir(root):
        root = "data"  # pre-training ran on another machine
    images = load_dataset(
        name,
        root,
        source.encoder["image_size"],
        config.num_workers,
        config.bad_images,
        test_only,
        decode_options_of(config, source),
        split_names_of(config, source),
    )
    check_has_test(images.test_images, root)
    if isinstance(saved, PretrainConfig) and same and saved.train_size and not test_only:
        images = images.subset(saved.train_size, saved.seed)
    return images.select(images.train_labels >= 0), name, root


# ---- fitting ------------------------------------------------------------------------------------


def train(
    state: TrainState, feature_fn: FeatureFn, epoch: int, config: LinearConfig, start: int = 0
) -> Iterator[int]:
    """Train an epoch of all heads side by side, from step `start` on; yield each step.

    `state.model`: the heads. They do not touch one another: the gradient of the sum of their losses
    is for each head that of its own loss. If `feature_fn` lets gradients through, the encoder
    learns too. The meters sum, image by image, the first head's loss, top-1 and top-5.
    """
    for batch in state.loader.epoch(epoch, start):
        features, targets = feature_fn(batch)
        factor = cosine_schedule(epoch + batch.step / len(state.loader), config.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        logits = [head(features) for head in state.model]
        losses = [
            F.cross_entropy(scores, targets, label_smoothing=config.label_smoothing)
            for scores in logits
        ]
        state.optimizer.zero_grad()
        sum(losses).backward()
        state.optimizer.step()
        top1, top5 = topk_correct(logits[0].detach(), batch.labels)
        n = batch.size
        state.meters.add(loss=n * losses[0].detach(), top1=n * top1, top5=n * top5)
        yield batch.step


def epoch_progress(epoch: int, config: LinearConfig, loader: Loader, start: int = 0) -> Progress:
    """Return the progress bar of an epoch."""
    labels, smaller = {"loss": "loss", "top1": "acc"}, "the same command with --cached"
    return Progress(epoch, config, len(loader), labels, smaller, start, loader.batch_size)


def fit(
    head: nn.Linear,
    lrs: tuple[float, ...],
    task: Task,
    config: LinearConfig,
    backbone: nn.Module | None = None,
) -> nn.ModuleList:
    """Return a copy of `head` per lr, trained from the start to the end; a `backbone` with one."""
    heads = nn.ModuleList(copy.deepcopy(head) for _ in lrs)
    state = TrainState(
        net=heads,
        model=heads,
        optimizer=make_optimizer(config, heads, lrs, backbone),
        loader=task.loader(config),
        meters=Meters(task.labels.device, "top1", "top5"),
        lr_at=lambda progress: 0.0,
    )
    for epoch in range(config.epochs):
        state.meters.clear()
        with epoch_progress(epoch, config, state.loader) as progress:
            for step in train(state, task.embed, epoch, config):
                progress(step, state.meters)
    return heads


def held_out(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split the training images to choose an lr: indices of nine tenths, and a mask of a tenth."""
    size = len(labels) - max(1, len(labels) // 10)
    rest = balanced_subset(labels.cpu(), size, seed).to(labels.device)
    mask = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    mask[rest] = False
    return rest, mask


def best_lr_for_head(
    head: nn.Linear,
    lrs: tuple[float, ...],
    task: Task,
    extract: Callable[[Tensor | ImageFiles], Tensor] | None,
    config: LinearConfig,
) -> float:
    """Return the lr whose head is best on a held-out tenth of the training set.

    `extract` gives the features of held-out images; None if the task's inputs are features.
    """
    rest, mask = held_out(task.labels, config.seed)
    heads = fit(head, lrs, task.chosen(rest), config)
    features = extract(task.inputs[mask]) if extract else task.inputs[mask]
    return best_lr(lrs, [evaluate(head, features, task.labels[mask])[1] for head in heads])


def best_lr_for_network(
    net: Classifier, encoder: FinetunedEncoder, task: Task, config: LinearConfig, classes: int
) -> float:
    """Return the best lr as `best_lr_for_head`, training a copy of the whole network per lr."""
    rest, mask = held_out(task.labels, config.seed)
    scores = []
    for lr in config.lr:
        copied = copy.deepcopy(net)
        tuned = FinetunedEncoder(
            copied.backbone, encoder.views, encoder.amp, config.compile, classes, config.mixup
        )
        subset = task.chosen(rest)._replace(embed=tuned.augmented)
        (head,) = fit(copied.fc, (lr,), subset, config, copied.backbone)
        features = tuned.plain(task.inputs[mask])
        scores.append(evaluate(head, features, task.labels[mask])[1])
    return best_lr(config.lr, scores)


def best_lr(lrs: tuple[float, ...], scores: list[float]) -> float:
    """Return the lr with the best score, and log all of them."""
    for lr, score in zip(lrs, scores, strict=True):
        distributed.log(f"--lr {lr:g}: {score:.2f} % of the held-out tenth of the training set")
    return lrs[scores.index(max(scores))]


def pixels_baseline(images: Data, views: Views, amp: torch.autocast, config: LinearConfig) -> float:
    """Return the test top-1 of a linear head on raw pixels: the same fit, at the best of four lr.

    The best on the test set, which favours the baseline: pixels have another scale than features.
    """
    pixels = metrics.raw_pixels(views.size)
    images = images.limit(metrics.MAX_RAW_PIXEL_IMAGES, config.seed)
    inputs, test = (
        metrics.extract_features(pixels, views.eval_transform, part, amp, False)
        for part in (images.train_images, images.test_images)
    )
    lrs = tuple(config.lr[0] * part for part in LR_PARTS)
    head = linear_head(inputs.shape[1], len(images.classes)).to(inputs.device)
    heads = fit(head, lrs, Task(inputs, images.train_labels, identity_features), config)
    return max(evaluate(head, test, images.test_labels)[1] for head in heads)


# ---- a run --------------------------------------------------------------------------------------


def default_name(config: LinearConfig, source: LoadedCheckpoint) -> str:
    """Return the name of a run: that of --model_path's run, and what is not the default."""
    saved = source.config
    parts = [run_of(config.model_path)[1] if saved else Path(config.model_path).stem, config.mode]
    parts += ["cached"] if config.cached else []
    parts += [config.optimizer] if config.optimizer != "sgd" else []
    parts += [config.data_name] if saved and config.data_name not in (None, saved.data_name) else []
    parts += [f"{config.label_fraction:g}"] if config.label_fraction < 1 else []
    return "_".join(parts)


class LinearTask(NamedTuple):
    """What a run fits and evaluates besides its TrainState.

    `test_features`: of a frozen encoder, the same in all epochs. `extraction_seconds`: of the
    training images' features. `images_per_epoch`: training images that an epoch sees. `knn`: top-1
    at the end of pre-training. `result`: columns of results.csv.
    """

    encoder: FrozenEncoder
    task: Task
    images: Data
    test_features: Tensor | None
    extraction_seconds: float
    images_per_epoch: int
    knn: float | None
    result: dict

    def extract_test(self) -> Tensor:
        """Return the features of the test images, N x d."""
        if self.test_features is not None:
            return self.test_features
        return self.encoder.plain(self.images.test_images)


def load_run_weights(run: Run, net: Classifier) -> None:
    """Load a checkpoint's weights into `net`. Raises ValueError if it has another backbone."""
    before = net.backbone.state_dict(prefix="backbone.")
    saved = run.checkpoint["model"]
    with error_prefix(run.checkpoint_path):
        checkpoint.load_strictly(net, saved)
        if run.extra.get("lr", 0) <= 0 or not (run.config.finetune or "baseline" in run.extra):
            raise ValueError("is damaged, or not a checkpoint of linear.py")
    if not run.config.finetune and not all(
        torch.equal(saved[name], value) for name, value in before.items()
    ):
        path = run.config.model_path
        raise ValueError(f"--model_path {path}: not the encoder of {run.checkpoint_path}")


def prepare(run: Run, parser: utils.Parser) -> tuple[TrainState, LinearTask]:
    """Return the state of a run, new or from its checkpoint, and its task.

    Raises ValueError and OSError for what the user is to mend.
    """
    config = run.config
    with parser.bad_input():  # one rank alone may lack its device
        device, amp = devices.setup_device(config)
    source = open_checkpoint(config, is_linear=False)
    for note in source.notes:
        distributed.log(f"{config.model_path}: {note}")
    images, data_name, root = load_images(config, source)
    if config.label_fraction < 1:
        size = max(1, round(config.label_fraction * len(images.train_labels)))
        images = images.subset(size, config.seed)
    if len(config.lr) > 1 and len(images.train_labels) < 10:
        raise ValueError(
            "--lr: of several the best is chosen on a tenth of the training images, and there are "
            f"{len(images.train_labels)}: give one"
        )
    arch, size = source.encoder["arch"], source.encoder["image_size"]
    torch.manual_seed(config.seed)
    body = source.net.backbone
    if config.from_scratch:
        body = build_backbone(*checkpoint.backbone_args(source.encoder))[0]
    net = Classifier(body, source.net.features, len(images.classes))
    counts = params_and_flops(net, size)
    if config.finetune:
        amp = devices.training_precision(device, config.amp, amp, counts[1])
    decode = decode_options_of(config, source)
    run.set_config(
        amp=amp,
        data_name=data_name,
        data_root=None if data_name == "textures" else absolute_root(root),
        split_names=split_names_of(config, source),
        exif=decode.exif,
        background=decode.background,
        exclude=(data_name in FOLDER_DATA and decode.exclude) or None,
        levels=decode.levels,
    )
    run.check_unchanged(
        images_checksum=images_checksum(images.train_images),
        classes=images.classes,
        encoder=source.encoder,
    )
    if run.checkpoint:
        load_run_weights(run, net)
    config = run.config
    protocol = {"linear": "Linear", "finetune": "Fine-tuned", "scratch": "From scratch"}
    protocol = protocol[config.mode] + ", cached" * config.cached
    if config.label_fraction < 1:
        protocol += f", {100 * config.label_fraction:g}% of labels"
    run.list_bad_images(images.unreadable)
    title = f"{run.path}: {protocol}, {arch}"
    result = utils.print_summary(title, net, counts, images, data_name, size, device, amp)
    result |= {"protocol": protocol, "data": utils.data_label(data_name, root), "arch": arch}
    net.to(device, memory_format=torch.channels_last)
    images = images.to(device)
    views = Views(size, source.views.mean, source.views.std, AUGMENTATION, 1, config.seed)
    autocast = devices.autocast(device, amp)
    test_features, seconds = None, 0.0
    if config.finetune:
        encoder = FinetunedEncoder(
            net.backbone, views, autocast, config.compile, len(images.classes), config.mixup
        )
        distributed.log("training the whole network with BN in train mode; evaluation: eval mode")
        task = Task(images.train_images, images.train_labels, encoder.augmented, views, False)
    else:
        encoder = FrozenEncoder(net.backbone, views, autocast, config.compile)
        test_features = encoder.plain(images.test_images)
        task = Task(images.train_images, images.train_labels, encoder.augmented, views)
        begin = time.perf_counter()
        if config.cached:
            features = encoder.plain(images.train_images)
            task = Task(features, images.train_labels, identity_features)
        seconds = time.perf_counter() - begin
    heads, loader = nn.ModuleList([net.fc]), task.loader(config)
    trained = net.backbone if config.finetune else None
    state = TrainState(
        net=net,
        model=heads,
        optimizer=make_optimizer(config, heads, [run.extra.get("lr", config.lr[0])], trained),
        loader=loader,
        meters=Meters(device, "top1", "top5"),
        lr_at=lambda progress: lr_at(run, progress),
    )
    per_epoch = len(task.labels) if task.keep_last else len(loader) * loader.batch_size
    knn = source.state["history"][-1].get("test_acc@1") if source.state else None
    return state, LinearTask(encoder, task, images, test_features, seconds, per_epoch, knn, result)


def lr_at(run: Run, progress: float) -> float:
    """Return the learning rate `progress` epochs into the run."""
    peak = run.extra["lr"] * run.config.batch_size / 256
    return peak * cosine_schedule(progress, run.config.epochs)


def usual_lrs(run: Run, work: LinearTask) -> tuple[float, ...]:
    """Return --lr; if it is not given and the features are large, parts of the default."""
    config, images = run.config, work.images.train_images
    if config.finetune or config.optimizer != "sgd" or "lr" in run.overrides or len(images) < 10:
        return config.lr
    sample = images[evenly_spaced(len(images), 1000)]
    norm = work.encoder.plain(sample).square().sum(1).mean().item()
    if norm <= LARGE_NORM:
        return config.lr
    lrs = tuple(config.lr[0] * part for part in LR_PARTS)
    distributed.log(
        f"the features are large (mean squared norm {norm:.0f}; --lr {config.lr[0]:g} is for "
        f"{LARGE_NORM:g} at most): choosing the best of --lr {' '.join(f'{lr:g}' for lr in lrs)}"
    )
    return lrs


def start(run: Run, state: TrainState, work: LinearTask) -> None:
    """Start a new run with its baseline and, of several lr, the best one."""
    config, encoder = run.config, work.encoder
    run.extra["lr"] = config.lr[0]
    if not config.finetune:
        baseline = pixels_baseline(work.images, encoder.views, encoder.amp, config)
        distributed.log(f"baseline, a linear head on raw pixels: top-1 {baseline:.1f} %")
        run.extra["baseline"] = baseline
    lrs = usual_lrs(run, work)
    if len(lrs) > 1:
        if config.finetune:
            classes = len(work.images.classes)
            lr = best_lr_for_network(state.net, encoder, work.task, config, classes)
        else:
            extract = None if config.cached else encoder.plain
            lr = best_lr_for_head(state.net.fc, lrs, work.task, extract, config)
        run.extra["lr"] = lr
        state.optimizer.param_groups[0]["peak"] = lr_at(run, 0)
        if config.finetune and config.encoder_lr is None:
            state.optimizer.param_groups[1]["peak"] = lr_at(run, 0)
        distributed.log(f"chosen: --lr {lr:g}; fitting again on the whole training set")
    run.start(state, [], work.extraction_seconds)


def is_evaluated(epoch: int, config: LinearConfig, work: LinearTask) -> bool:
    """Return whether the test images are evaluated after an epoch.

    A network that is trained whole sees at least as many training images in between: with few
    labels an epoch is a few steps, and the test would take nearly all of the time.
    """
    tests, seen = len(work.images.test_images), work.images_per_epoch
    passed = (epoch + 1) * seen // tests > epoch * seen // tests
    return not config.finetune or passed or epoch + 1 == config.epochs


def fit_and_evaluate(
    run: Run,
    state: TrainState,
    work: LinearTask,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Train the epochs of a run that are left, evaluate them, and write the last files."""
    config, meters, last_log = run.config, state.meters, time.perf_counter()
    if run.checkpoint is None:
        start(run, state, work)
    features = work.test_features
    for epoch in run.epochs():
        with epoch_progress(epoch, config, state.loader, state.step) as progress:
            for step in train(state, work.task.embed, epoch, config, state.step):
                if on_step is not None:
                    on_step(epoch, step)
                run.after_step(step, progress(step, meters))
        work.encoder.check()
        means = meters.means(work.images_per_epoch)
        row = {"train_loss": means["loss"]}
        row |= {"train_acc@1": 100 * means["top1"], "train_acc@5": 100 * means["top5"]}
        if is_evaluated(epoch, config, work):
            with run.evaluation_phase() if config.finetune else contextlib.nullcontext():
                features = work.extract_test()
            test = evaluate(state.net.fc, features, work.images.test_labels)
            row |= zip(("test_loss", "test_acc@1", "test_acc@5"), test, strict=True)
        row = run.after_epoch(row)
        # Epochs on cached features take milliseconds: at most one line per second.
        if epoch + 1 == config.epochs or time.perf_counter() - last_log > 1:
            last_log = time.perf_counter()
            distributed.log(
                f"epoch {epoch + 1}/{config.epochs} loss {row['train_loss']:.3f} "
                f"train {row['train_acc@1']:.2f} %"
                + (f" test {row['test_acc@1']:.2f} %" if "test_acc@1" in row else "")
            )
    last, baseline = run.history[-1], run.extra.get("baseline")
    with run.finalize():
        best = run.write_result(**work.result)
        if config.pictures:
            features = work.extract_test() if features is None else features  # a finished run
            predicted, classes = state.net.fc(features).argmax(1), work.images.classes
            matrix = metrics.confusion_matrix(work.images.test_labels, predicted, len(classes))
            draw_confusion(f"{run.path}_confusion.png", config.name, matrix, classes)
            with atomic_write(f"{run.path}_curves.png") as file:
                first = [{"epoch": 0, "raw_acc@1": baseline}] if baseline is not None else []
                plot_curves({config.name: [*first, *run.history]}, file)
    distributed.log(
        f"{work.result['protocol']}: top-1 {last['test_acc@1']:.2f} % (best epoch {best:.2f} %), "
        f"top-5 {last['test_acc@5']:.2f} %"
        + (f"; raw pixels {baseline:.2f} %" if baseline is not None else "")
        + (f"; kNN at the end of pre-training {work.knn:.2f} %" if work.knn is not None else "")
        + f"\nwrote {run.path}_model.pth and {run.path}_statistics.csv"
    )


# ---- a linear model that is there ---------------------------------------------------------------


def draw_confusion(path: str, name: str, matrix: list[list[int]], classes: list[str]) -> None:
    """Draw a confusion matrix, on rank 0."""
    if distributed.rank() == 0:
        with atomic_write(path) as file:
            plot_confusion(matrix, classes, name, file)


def confusion_path(
    config: LinearConfig, source: LoadedCheckpoint, data_name: str, root: str
) -> str:
    """Return where --evaluate_only draws: over the run's own picture, if on the run's own data.

    Raises ValueError if a picture of other data would be replaced unasked.
    """
    saved = source.config
    name = config.name or run_of(config.model_path)[1]
    saved_root = os.path.abspath(saved.data_root or "data")
    is_own = (data_name, os.path.abspath(root)) == (saved.data_name, saved_root)
    if not is_own:
        name += "_on_" + utils.data_label(data_name, root).replace(":", "_")
    path = os.path.join(config.out, f"{name}_confusion.png")
    if config.pictures and (config.name or not is_own):
        utils.check_new("picture", path, config.overwrite)
    return path


def evaluate_only(config: LinearConfig, parser: utils.Parser) -> None:
    """Score a saved linear model: top-1, top-5, each class, a confusion matrix. Trains nothing."""
    with parser.bad_input():
        device, amp = devices.setup_device(config)
        source = open_checkpoint(config, is_linear=True)
        images, data_name, root = load_images(config, source, test_only=True)
        classes = source.classes
        unknown = sorted(set(images.classes) - set(classes))
        if unknown:
            raise ValueError(
                f"--data_root {root}: class {unknown[0]} is not one of the linear model's"
            )
        os.makedirs(config.out, exist_ok=True)
        path = confusion_path(config, source, data_name, root)
    for line in filter(None, (images.summary, *images.unreadable)):
        distributed.log(line)
    order = torch.tensor([classes.index(name) for name in images.classes])
    labels = order[images.test_labels].to(device)  # numbered as in training
    net = source.to(device).net
    features = source.features(images.test_images, devices.autocast(device, amp))
    loss, top1, top5 = evaluate(net.fc, features, labels)
    matrix = metrics.confusion_matrix(labels, net.fc(features).argmax(1), len(classes))
    for i, (name, row) in enumerate(zip(classes, matrix, strict=True)):
        if sum(row):
            distributed.log(f"{name}: {100 * row[i] / sum(row):.1f} % of {sum(row)}")
    line = f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}"
    if config.pictures:
        title = os.path.basename(path).removesuffix("_confusion.png")
        draw_confusion(path, title, matrix, classes)
        line += f"; wrote {path}"
    distributed.log(line)


def predict(config: LinearConfig, parser: utils.Parser) -> None:
    """Print the five likeliest classes, with scores, of image files and of folders of them."""
    with parser.bad_input():
        device, amp = devices.setup_device(config)
        if config.out_csv:
            utils.check_new("--out_csv", config.out_csv, config.overwrite)
        predictor = Predictor(open_checkpoint(config, is_linear=True).to(device))
        files = []
        for path in map(Path, config.predict):
            files += folders.list_folder(path, labelled=False).files if path.is_dir() else [path]
        images, unreadable = decode_files(
            files,
            predictor.size,
            config.num_workers,
            config.bad_images,
            predictor.resize,
            options=predictor.decode,
        )
    for line in unreadable.values():
        print(line, file=sys.stderr)
    scores = predictor.scores(images, devices.autocast(device, amp))
    best = scores.topk(min(5, len(predictor.classes)))
    files = [path for i, path in enumerate(files) if i not in unreadable]
    rows = []
    for path, values, labels in zip(
        files, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        row = {"file": printable(str(path))}
        for i, (score, label) in enumerate(zip(values, labels, strict=True)):
            suffix = "" if i == 0 else f"_{i + 1}"
            row |= {f"class{suffix}": predictor.classes[label], f"score{suffix}": score}
        rows.append(row)
    table = pandas.DataFrame(rows)
    distributed.log(table.to_string(index=False, float_format="{:.3f}".format))
    if config.out_csv:
        with parser.bad_input():
            write_csv(config.out_csv, rows, tuple(table.columns))


def main(argv: list[str] | None = None, on_step: Callable[[int, int], None] | None = None) -> None:
    """Run the command. `on_step(epoch, step)` is called after each step, before it is counted."""
    parser = utils.ConfigParser("linear.py", __doc__, LinearConfig)
    config, overrides = parser.read(argv)
    with utils.on_ranks(config, parser), contextlib.ExitStack() as stack:
        if config.predict:
            predict(config, parser)
            return
        if config.evaluate_only:
            evaluate_only(config, parser)
            return
        with parser.bad_input():
            if config.name is None:
                name = default_name(config, open_checkpoint(config, is_linear=False))
                config = dataclasses.replace(config, name=name)
            run = stack.enter_context(Run("linear.py", config, overrides, STATISTICS))
            state, work = prepare(run, parser)
            if run.checkpoint:
                run.resume(state)
        fit_and_evaluate(run, state, work, on_step)


if __name__ == "__main__":
    utils.run_command(main)
