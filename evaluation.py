"""What linear.py opens: a checkpoint and its data set; and what it does with a linear model.

`evaluate_only` scores one that is there, `predict` tells the classes of images by it.
"""

import dataclasses
import os
import sys
from argparse import Namespace
from pathlib import Path

import pandas
import torch

import utils
from simsiam.data import folders
from simsiam.data.datasets import (
    DATA_NAMES,
    TORCHVISION_FILES,
    check_data_root,
    check_has_test,
    load_dataset,
)
from simsiam.data.decode import DecodeOptions, check_decode_options, decode_files
from simsiam.data.loader import Data
from simsiam.evaluation import metrics
from simsiam.evaluation.linear import evaluate
from simsiam.interop.weights import LoadedCheckpoint, Predictor
from simsiam.plots import curves as figures
from simsiam.runtime import devices, distributed
from simsiam.runtime.files import atomic_write, printable, write_csv
from simsiam.training.run import run_of


def open_source(args: Namespace, linear: bool) -> LoadedCheckpoint:
    """The checkpoint of --model_path. Raises ValueError if it is not, or is, a linear model."""
    path = f"--model_path {args.model_path}"
    more = {} if linear else utils.of_source(args)
    source = distributed.broadcast_from_rank0(
        lambda: LoadedCheckpoint.open(args.model_path, **more)
    )
    if linear and (source.state is None or not source.is_linear):
        raise ValueError(f"{path}: is not a linear model; make one with python linear.py {path}")
    if source.state is None and not args.data_name:
        raise ValueError(
            f"{path}: another project's checkpoint ({source.notes[0]}) names no data set: add "
            "--data_name, and --data_root"
        )
    if source.is_linear and not linear:
        if source.state:
            raise ValueError(
                f"{path}: is a linear model; give the pre-trained one, or add --evaluate_only or "
                "--predict"
            )
        source.notes.append("its classifier is not used: a new one is fitted")
    return source


def split_names(args: Namespace, source: LoadedCheckpoint) -> list[str] | None:
    """Those of the flags or, where they are silent and of the same data set, of a checkpoint."""
    saved = source.state["args"] if source.state else {}
    same = args.data_name in (None, saved.get("data_name"))
    return args.split_names or (saved.get("split_names") if same else None)


def reading(args: Namespace, source: LoadedCheckpoint) -> DecodeOptions:
    """How image files are read: as the flags say or, where they are silent, as in pre-training."""
    told = {"exif": args.exif, "background": args.background}
    told |= {name: vars(args)[name] and tuple(vars(args)[name]) for name in ("exclude", "levels")}
    return dataclasses.replace(
        source.decode, **{name: x for name, x in told.items() if x is not None}
    )


def images_of(
    args: Namespace, source: LoadedCheckpoint, test_only: bool = False
) -> tuple[Data, str, str]:
    """The data set of the flags or, where they are silent, of a checkpoint; its name and root.

    Without its training images if `test_only`, where they can be left alone.
    """
    saved = source.state["args"] if source.state else {"data_name": args.data_name, "seed": 0}
    kinds = {"data_name": str, "data_root": str | None, "seed": int, "train_size": int | None}
    kinds |= {"split_names": list | None}
    ours = all(isinstance(saved.get(name), kind) for name, kind in kinds.items())
    if not ours or saved["data_name"] not in DATA_NAMES:
        raise ValueError(f"--model_path {args.model_path}: its data set is not one of ours")
    name = args.data_name or saved["data_name"]
    check_decode_options({"exclude": args.exclude, "levels": args.levels}, name)
    if args.data_root and name == "textures":
        raise ValueError(utils.TEXTURES_HAVE_NO_ROOT)
    same = name == saved["data_name"]
    root = args.data_root or (same and saved.get("data_root")) or "data"
    if args.data_root and not args.data_name:
        check_data_root(name, root)
    elif not args.data_root and name in TORCHVISION_FILES and not os.path.isdir(root):
        root = "data"  # it was elsewhere, on another machine
    how = (source.encoder["image_size"], args.num_workers, args.bad_images, test_only)
    images = load_dataset(name, root, *how, reading(args, source), split_names(args, source))
    check_has_test(images.test_images, root)
    if same and saved.get("train_size") is not None and not test_only:
        images = images.subset(saved["train_size"], saved["seed"])
    return images.select(images.train_labels >= 0), name, root


# ---- a linear model that is there ---------------------------------------------------------------


def draw_confusion(path: str, name: str, matrix: list[list[int]], classes: list[str]) -> None:
    """The picture of a confusion matrix, on the first rank."""
    if distributed.rank() == 0:
        with atomic_write(path) as file:
            figures.confusion(matrix, classes, name, file)


def confusion_file(args: Namespace, source: LoadedCheckpoint, data_name: str, root: str) -> str:
    """Where --evaluate_only draws: over the run's own picture, if it is of the run's own data.

    Raises ValueError where a picture of other data would be replaced unasked.
    """
    saved = source.state["args"]
    run = args.name or run_of(args.model_path)[1]
    theirs = os.path.abspath(saved.get("data_root") or "data")
    own = (data_name, os.path.abspath(root)) == (saved["data_name"], theirs)
    if not own:
        run += "_on_" + utils.data_label(data_name, root).replace(":", "_")
    path = os.path.join(args.out, f"{run}_confusion.png")
    if args.pictures and (args.name or not own):
        utils.check_new("picture", path, args.overwrite)
    return path


def evaluate_only(args: Namespace, flags: utils.Flags) -> None:
    """Score a saved linear model: top-1, top-5, each class, a confusion matrix. Trains nothing."""
    with flags.bad_input():
        device, amp_name = devices.setup_device(args)
        source = open_source(args, linear=True)
        images, data_name, root = images_of(args, source, test_only=True)
        classes = source.classes
        strange = sorted(set(images.classes) - set(classes))
        if strange:
            raise ValueError(
                f"--data_root {root}: class {strange[0]} is not one of the linear model's"
            )
        os.makedirs(args.out, exist_ok=True)
        path = confusion_file(args, source, data_name, root)
    for line in filter(None, (images.summary, *images.unreadable)):
        distributed.log(line)
    order = torch.tensor([classes.index(name) for name in images.classes])
    labels = order[images.test_labels].to(device)  # numbered as in training
    net = source.to(device).net
    features = source.features(images.test_images, devices.autocast(device, amp_name))
    loss, top1, top5 = evaluate(net.fc, features, labels)
    matrix = metrics.confusion_matrix(labels, net.fc(features).argmax(1), len(classes))
    for i, (name, row) in enumerate(zip(classes, matrix, strict=True)):
        if sum(row):
            distributed.log(f"{name}: {100 * row[i] / sum(row):.1f} % of {sum(row)}")
    line = f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}"
    if args.pictures:
        title = os.path.basename(path).removesuffix("_confusion.png")
        draw_confusion(path, title, matrix, classes)
        line += f"; wrote {path}"
    distributed.log(line)


def predict(args: Namespace, flags: utils.Flags) -> None:
    """Classes and scores of image files."""
    with flags.bad_input():
        device, amp_name = devices.setup_device(args)
        if args.out_csv:
            utils.check_new("--out_csv", args.out_csv, args.overwrite)
        predictor = Predictor(open_source(args, linear=True).to(device))
        files = []
        for path in map(Path, args.predict):
            files += folders.list_folder(path, labelled=False).files if path.is_dir() else [path]
        cut = (predictor.size, args.num_workers, args.bad_images, predictor.resize)
        images, bad = decode_files(files, *cut, options=predictor.decode)
    for line in bad.values():
        print(line, file=sys.stderr)
    scores = predictor.scores(images, devices.autocast(device, amp_name))
    best = scores.topk(min(5, len(predictor.classes)))
    files = [path for i, path in enumerate(files) if i not in bad]
    rows = []
    for path, values, labels in zip(
        files, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        row = {"file": printable(str(path))}
        for i, (score, label) in enumerate(zip(values, labels, strict=True)):
            place = "" if i == 0 else f"_{i + 1}"
            row |= {f"class{place}": predictor.classes[label], f"score{place}": score}
        rows.append(row)
    table = pandas.DataFrame(rows)
    distributed.log(table.to_string(index=False, float_format="{:.3f}".format))
    if args.out_csv:
        with flags.bad_input():
            write_csv(args.out_csv, rows, tuple(table.columns))
