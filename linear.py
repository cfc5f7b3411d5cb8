"""Evaluate a pre-trained encoder: a linear head on its frozen features; fine-tune; predict.

python linear.py --model_path results/2048_200_512_800_model.pth
python linear.py --model_path results/2048_200_512_800_model.pth --finetune
python linear.py --model_path results/..._linear_model.pth --evaluate_only
python linear.py --model_path results/..._linear_model.pth --predict a.jpg my_images/
torchrun --nproc_per_node 8 linear.py --ddp --model_path results/..._model.pth --optimizer lars
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from torch import Tensor, nn

import utils
from simsiam.data import folders
from simsiam.data.datasets import TORCHVISION, check_data_root, check_has_test, load_dataset
from simsiam.data.decode import FOLDER_DATA, check_decode_options, decode_files
from simsiam.data.loader import Data, evenly_spaced, images_checksum
from simsiam.evaluation import metrics
from simsiam.interop.weights import LoadedCheckpoint, Predictor
from simsiam.models.backbones import build_backbone
from simsiam.models.classifier import Classifier
from simsiam.models.flops import params_and_flops
from simsiam.plots.curves import plot_confusion, plot_curves
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import atomic_write, error_prefix, printable, write_csv
from simsiam.runtime.schedule import cosine_schedule
from simsiam.training import checkpoint
from simsiam.training.heads import (
    AUGMENTATION,
    LR_PARTS,
    FinetunedEncoder,
    FrozenEncoder,
    HeadTask,
    choose_lr,
    epoch_progress,
    evaluate,
    make_optimizer,
    raw_pixel_baseline,
    train,
)
from simsiam.training.meters import Meters
from simsiam.training.recipes import (
    TEXTURES_HAVE_NO_ROOT,
    LinearConfig,
    PretrainConfig,
    absolute_root,
    run_of,
)
from simsiam.training.run import Run
from simsiam.training.state import TrainState
from simsiam.views.augment import Views

# The default lr of 30 suits features with a mean squared norm up to this one. SGD on textures gives
# 5; Muon gives 17 there and about 200 on CIFAR-10, where the best of a few parts of it is taken.
LARGE_NORM = 10.0
PROTOCOLS = {"linear": "Linear", "finetune": "Fine-tuned", "scratch": "From scratch"}
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


def load_images(
    config: LinearConfig, source: LoadedCheckpoint, test_only: bool = False
) -> tuple[Data, dict]:
    """Return the labelled images of the flags, else of the checkpoint's data set.

    And the config fields that define them, as resolved here. `test_only`: training images may be
    missing.
    """
    saved = source.config
    name = config.data_name or saved.data_name
    is_same = saved is not None and name == saved.data_name
    check_decode_options({"exclude": config.exclude, "levels": config.levels}, name)
    if config.data_root and name == "textures":
        raise ValueError(TEXTURES_HAVE_NO_ROOT)
    root = config.data_root or (is_same and saved.data_root) or "data"
    if config.data_root and not config.data_name:
        check_data_root(name, root)
    elif not config.data_root and name in TORCHVISION and not os.path.isdir(root):
        root = "data"  # pre-training ran on another machine
    flags = {key: getattr(config, key) for key in ("exif", "background", "exclude", "levels")}
    flags = {key: value for key, value in flags.items() if value is not None}
    decode = dataclasses.replace(source.decode, **flags)
    split_names = config.split_names or (saved.split_names if is_same else None)
    images = load_dataset(
        name,
        root,
        source.encoder["image_size"],
        config.num_workers,
        config.bad_images,
        test_only,
        decode,
        split_names,
    )
    check_has_test(images.test_images, root)
    if isinstance(saved, PretrainConfig) and is_same and saved.train_size and not test_only:
        images = images.subset(saved.train_size, saved.seed)
    settings = {
        "data_name": name,
        "data_root": None if name == "textures" else absolute_root(root),
        "split_names": split_names,
        "exif": decode.exif,
        "background": decode.background,
        "exclude": (name in FOLDER_DATA and decode.exclude) or None,
        "levels": decode.levels,
    }
    return images.select(images.train_labels >= 0), settings


# ---- a run --------------------------------------------------------------------------------------


class Evaluation(NamedTuple):
    """The encoder, task and images of a run, which its TrainState does not hold.

    `test_features`: N x d, of a frozen encoder; None where each epoch changes them. `seconds`: time
    to extract the training features. `knn`: top-1 at the end of pre-training, percent, if known.
    `result`: columns of results.csv.
    """

    encoder: FrozenEncoder
    task: HeadTask
    images: Data
    test_features: Tensor | None
    seconds: float
    knn: float | None
    result: dict

    def extract_test(self) -> Tensor:
        """Return the features of the test images, N x d."""
        if self.test_features is not None:
            return self.test_features
        return self.encoder.extract(self.images.test_images)


def default_name(config: LinearConfig, source: LoadedCheckpoint) -> str:
    """Return the name of a run: that of --model_path's run, and the settings that set it apart."""
    saved = source.config
    parts = [run_of(config.model_path)[1] if saved else Path(config.model_path).stem, config.mode]
    parts += ["cached"] if config.cached else []
    parts += [config.optimizer] if config.optimizer != "sgd" else []
    parts += [config.data_name] if saved and config.data_name not in (None, saved.data_name) else []
    parts += [f"{config.label_fraction:g}"] if config.label_fraction < 1 else []
    return "_".join(parts)


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


def prepare(
    run: Run, parser: utils.Parser, source: LoadedCheckpoint | None = None
) -> tuple[TrainState, Evaluation]:
    """Return the state of a run, new or from its checkpoint, and what it evaluates.

    `source`: the checkpoint at --model_path, if it is open already.
    Raises ValueError and OSError for what the user is to mend.
    """
    with parser.bad_input():  # one rank alone may lack its device
        device, amp = devices.setup_device(run.config)
    if source is None or run.checkpoint:  # a resumed run may name another one, or other flags of it
        source = open_checkpoint(run.config, is_linear=False)
    for note in source.notes:
        distributed.log(f"{run.config.model_path}: {note}")
    images, settings = load_images(run.config, source)
    run.set_config(**settings)
    config = run.config
    if config.label_fraction < 1:
        number = max(1, round(config.label_fraction * len(images.train_labels)))
        images = images.subset(number, config.seed)
    if len(config.lr) > 1 and len(images.train_labels) < 10:
        raise ValueError(
            "--lr: of several the best is chosen on a tenth of the training images, and there are "
            f"{len(images.train_labels)}: give one"
        )
    arch, size = source.encoder["arch"], source.encoder["image_size"]
    torch.manual_seed(config.seed)
    backbone = source.net.backbone
    if config.from_scratch:
        backbone = build_backbone(*checkpoint.backbone_args(source.encoder))[0]
    net = Classifier(backbone, source.net.features, len(images.classes))
    counts = params_and_flops(net, size)
    if config.finetune:
        amp = devices.training_precision(device, config.amp, amp, counts[1])
    run.set_config(amp=amp)
    run.check_unchanged(
        images_checksum=images_checksum(images.train_images),
        classes=images.classes,
        encoder=source.encoder,
    )
    if run.checkpoint:
        load_run_weights(run, net)
    protocol = PROTOCOLS[config.mode] + ", cached" * config.cached
    if config.label_fraction < 1:
        protocol += f", {100 * config.label_fraction:g}% of labels"
    run.list_bad_images(images.unreadable)
    title = f"{run.path}: {protocol}, {arch}"
    result = utils.print_summary(title, net, counts, images, source.encoder, config, device)
    result["protocol"] = protocol
    net.to(device, memory_format=torch.channels_last)
    images = images.to(device)
    views = Views(size, source.views.mean, source.views.std, AUGMENTATION, 1, config.seed)
    autocast = devices.autocast(device, amp)
    test_features, seconds = None, 0.0
    if config.finetune:
        encoder = FinetunedEncoder(
            backbone, views, autocast, config.compile, len(images.classes), config.mixup
        )
        distributed.log("training the whole network with BN in train mode; evaluation: eval mode")
    else:
        encoder = FrozenEncoder(backbone, views, autocast, config.compile)
        test_features = encoder.extract(images.test_images)
    if config.cached:
        begin = time.perf_counter()
        task = HeadTask(encoder.extract(images.train_images), images.train_labels)
        seconds = time.perf_counter() - begin
    else:
        task = HeadTask(
            images.train_images,
            images.train_labels,
            encoder.augmented_features,
            encoder.extract,
            views,
            keep_last=not config.finetune,
        )
    heads, lr = nn.ModuleList([net.fc]), run.extra.get("lr", config.lr[0])
    state = TrainState(
        net=net,
        model=heads,
        optimizer=make_optimizer(config, heads, (lr,), backbone if config.finetune else None),
        loader=task.loader(config),
        meters=Meters(device, "top1", "top5"),
        lr_at=lambda progress: (
            run.extra["lr"] * config.batch_size / 256 * cosine_schedule(progress, config.epochs)
        ),
    )
    knn = source.state["history"][-1].get("test_acc@1") if source.state else None
    return state, Evaluation(encoder, task, images, test_features, seconds, knn, result)


def candidate_lrs(run: Run, evaluation: Evaluation) -> tuple[float, ...]:
    """Return --lr or, if it is not given and the features are large, parts of the default."""
    config, images = run.config, evaluation.images.train_images
    if config.finetune or config.optimizer != "sgd" or "lr" in run.overrides or len(images) < 10:
        return config.lr
    sample = images[evenly_spaced(len(images), 1000)]
    norm = evaluation.encoder.extract(sample).square().sum(1).mean().item()
    if norm <= LARGE_NORM:
        return config.lr
    lrs = tuple(config.lr[0] * part for part in LR_PARTS)
    distributed.log(
        f"the features are large (mean squared norm {norm:.0f}; --lr {config.lr[0]:g} is for "
        f"{LARGE_NORM:g} at most): choosing the best of --lr {' '.join(f'{lr:g}' for lr in lrs)}"
    )
    return lrs


def start(run: Run, state: TrainState, evaluation: Evaluation) -> None:
    """Start a new run: score the baseline on raw pixels, and choose the best of several lr."""
    config, encoder = run.config, evaluation.encoder
    run.extra["lr"] = config.lr[0]
    if not config.finetune:
        baseline = raw_pixel_baseline(evaluation.images, encoder, config)
        distributed.log(f"baseline, a linear head on raw pixels: top-1 {baseline:.1f} %")
        run.extra["baseline"] = baseline
    lrs = candidate_lrs(run, evaluation)
    if len(lrs) > 1:
        tuned = encoder if config.finetune else None
        lr = run.extra["lr"] = choose_lr(lrs, state.net.fc, evaluation.task, config, tuned)
        groups = state.optimizer.param_groups  # of the head and, fine-tuned, of the encoder
        for group in groups if config.encoder_lr is None else groups[:1]:
            group["peak"] = lr * config.batch_size / 256
        distributed.log(f"chosen: --lr {lr:g}; fitting again on the whole training set")
    run.start(state, [], evaluation.seconds)


def fit_and_evaluate(
    run: Run,
    state: TrainState,
    evaluation: Evaluation,
    on_step: Callable[[int, int], None] | None = None,
) -> None:
    """Train the epochs of a run that are left, evaluate them, and write the last files."""
    if run.checkpoint is None:
        start(run, state, evaluation)
    config, images, loader = run.config, evaluation.images, state.loader
    tests, last_log, features = len(images.test_images), time.perf_counter(), None
    per_epoch = min(len(images.train_labels), len(loader) * loader.batch_size)
    for epoch in run.epochs():
        with epoch_progress(epoch, config, loader, state.step) as progress:
            for step in train(state, evaluation.task.feature_fn, epoch, config, state.step):
                if on_step is not None:
                    on_step(epoch, step)
                run.after_step(step, progress(step, state.meters))
        evaluation.encoder.check_frozen()
        means = state.meters.means(per_epoch)
        row = {"train_loss": means["loss"]}
        row |= {"train_acc@1": 100 * means["top1"], "train_acc@5": 100 * means["top5"]}
        # With few labels an epoch of fine-tuning is a few steps. Between two evaluations it trains
        # on as many images as the test set has: else evaluation would take most of the time.
        is_due = (epoch + 1) * per_epoch // tests > epoch * per_epoch // tests
        is_last = epoch + 1 == config.epochs
        if not config.finetune or is_due or is_last:
            with run.evaluation_phase() if config.finetune else contextlib.nullcontext():
                features = evaluation.extract_test()
            test = evaluate(state.net.fc, features, images.test_labels)
            row |= zip(("test_loss", "test_acc@1", "test_acc@5"), test, strict=True)
        row = run.after_epoch(row)
        # Epochs on cached features take milliseconds: at most one line per second.
        if is_last or time.perf_counter() - last_log > 1:
            last_log = time.perf_counter()
            distributed.log(
                f"epoch {epoch + 1}/{config.epochs} loss {row['train_loss']:.3f} "
                f"train {row['train_acc@1']:.2f} %"
                + (f" test {row['test_acc@1']:.2f} %" if "test_acc@1" in row else "")
            )
    last, baseline = run.history[-1], run.extra.get("baseline")
    with run.finalize():
        best = run.write_result(**evaluation.result)
        if config.pictures:
            features = evaluation.extract_test() if features is None else features
            predicted = state.net.fc(features).argmax(1)
            matrix = metrics.confusion_matrix(images.test_labels, predicted, len(images.classes))
            draw_confusion(f"{run.path}_confusion.png", config.name, matrix, images.classes)
            with atomic_write(f"{run.path}_curves.png") as file:
                first = [{"epoch": 0, "raw_acc@1": baseline}] if baseline is not None else []
                plot_curves({config.name: [*first, *run.history]}, file)
    distributed.log(
        f"{evaluation.result['protocol']}: top-1 {last['test_acc@1']:.2f} % (best epoch "
        f"{best:.2f} %), top-5 {last['test_acc@5']:.2f} %"
        + (f"; raw pixels {baseline:.2f} %" if baseline is not None else "")
        + (
            ""
            if evaluation.knn is None
            else f"; kNN at the end of pre-training {evaluation.knn:.2f} %"
        )
        + f"\nwrote {run.path}_model.pth and {run.path}_statistics.csv"
    )


def draw_confusion(path: str, title: str, matrix: list[list[int]], classes: list[str]) -> None:
    """Draw a confusion matrix, on rank 0."""
    if distributed.rank() == 0:
        with atomic_write(path) as file:
            plot_confusion(matrix, classes, title, file)


# ---- modes without training ---------------------------------------------------------------------


def evaluate_only(config: LinearConfig, parser: utils.Parser) -> None:
    """Score a linear model: top-1, top-5, accuracy per class, a confusion matrix."""
    with parser.bad_input():
        device, amp = devices.setup_device(config)
        source = open_checkpoint(config, is_linear=True)
        images, settings = load_images(config, source, test_only=True)
        saved, classes = source.config, source.classes
        label = utils.data_label(settings["data_name"], settings["data_root"])
        unknown = sorted(set(images.classes) - set(classes))
        if unknown:
            raise ValueError(
                f"--model_path {config.model_path}: has no class {unknown[0]}, which {label} has"
            )
        root, saved_root = settings["data_root"] or "data", saved.data_root or "data"
        is_own = settings["data_name"] == saved.data_name
        is_own = is_own and os.path.abspath(root) == os.path.abspath(saved_root)
        title = config.name or run_of(config.model_path)[1]
        title += "" if is_own else "_on_" + label.replace(":", "_")
        path = os.path.join(config.out, f"{title}_confusion.png")
        os.makedirs(config.out, exist_ok=True)
        if config.pictures and (config.name or not is_own):  # else the run's own picture, again
            utils.check_new("picture", path, config.overwrite)
    for line in filter(None, (images.summary, *images.unreadable)):
        distributed.log(line)
    order = torch.tensor([classes.index(name) for name in images.classes])
    labels = order[images.test_labels].to(device)  # numbered as in training
    head = source.to(device).net.fc
    features = source.features(images.test_images, devices.autocast(device, amp))
    loss, top1, top5 = evaluate(head, features, labels)
    matrix = metrics.confusion_matrix(labels, head(features).argmax(1), len(classes))
    for i, (name, row) in enumerate(zip(classes, matrix, strict=True)):
        if sum(row):
            distributed.log(f"{name}: {100 * row[i] / sum(row):.1f} % of {sum(row)}")
    line = f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}"
    if config.pictures:
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
            source = None
            if config.name is None:
                source = open_checkpoint(config, is_linear=False)
                config = dataclasses.replace(config, name=default_name(config, source))
            run = stack.enter_context(Run("linear.py", config, overrides, STATISTICS))
            state, evaluation = prepare(run, parser, source)
            if run.checkpoint:
                run.resume(state)
        fit_and_evaluate(run, state, evaluation, on_step)


if __name__ == "__main__":
    utils.run_command(main)
