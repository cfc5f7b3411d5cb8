"""Judge a pre-trained encoder: a linear head on its frozen features; evaluate; predict.

python linear.py --model_path results/2048_200_512_800_model.pth
python linear.py --model_path results/..._linear_model.pth --evaluate_only
python linear.py --model_path results/..._linear_model.pth --predict a.jpg my_images/
torchrun --nproc_per_node 8 linear.py --ddp --model_path results/..._model.pth --optimizer lars
"""

import argparse
import copy
import math
import os
import sys
import time
from pathlib import Path

import pandas
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import figures
import model
import utils
from utils import number

# lr is per 256 images. sgd: after MoCo; paper, App. D. lars: the authors' code, for ImageNet.
RECIPES = {
    "sgd": {"lr": [30.0], "batch_size": 256},
    "lars": {"lr": [0.1], "batch_size": 4096},
}
STATISTICS = (
    "epoch",
    "lr",
    "train_loss",
    "train_acc@1",
    "train_acc@5",
    "test_loss",
    "test_acc@1",
    "test_acc@5",
    "seconds",
)


def parse_args(
    argv: list[str] | None = None, prog: str = "linear.py"
) -> tuple[argparse.Namespace, utils.Parser, dict]:
    """The flags, filled up from the optimizer's recipe; their parser; and those that `argv` gives.

    Without --name, the name of a run that trains is None: it is made of its --model_path's.
    """
    parser = utils.Parser(prog=prog, description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument_group("what").add_argument
    add(
        "--model_path",
        default="results/2048_200_512_800_model.pth",
        help="a checkpoint of main.py, or another project's (see the README); with "
        "--evaluate_only and --predict, one of linear.py",
    )
    add(
        "--evaluate_only",
        action="store_true",
        help="score a linear model's test set, train nothing",
    )
    add("--predict", nargs="+", metavar="FILE", help="classes of images, and of folders of them")
    add("--out_csv", help="write what --predict finds to this file too")
    add = parser.add_argument_group("another project's encoder").add_argument
    add("--stem", choices=model.STEMS, help="its first layers (what its layout suggests)")
    add(
        "--image_size",
        type=number(int, 8, 1024),
        help="side of the images that it sees (by its stem: 32 or 224)",
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data_name",
        help="judge on another data set than the pre-training's: " + ", ".join(data.DATA_NAMES),
    )
    add(
        "--data_root", help="where it is (as in pre-training; data where that was another data set)"
    )
    add(
        "--label_fraction",
        type=number(float, 1e-9, 1),
        default=1.0,
        help="use a class-balanced, seeded fraction of the labels (1)",
    )
    add = parser.add_argument_group("protocol").add_argument
    add("--cached", action="store_true", help="no augmentation: extract the features once")
    add("--optimizer", default="sgd", choices=list(RECIPES), help="sgd or lars (sgd)")
    add("--batch_size", type=number(int, 1, 2**31), help="images a step (sgd: 256, lars: 4096)")
    add(
        "--epochs", type=number(int, 1, 2**31), default=90, help="sweeps over the training set (90)"
    )
    add(
        "--lr",
        type=number(float, 1e-12),
        nargs="+",
        help="base learning rate, per 256 images (sgd: 30, lars: 0.1); of several, the best on a "
        "held-out tenth of the training set",
    )
    utils.run_flags(parser)

    args, given = parser.parse(argv)
    for name, value in RECIPES[args.optimizer].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.evaluate_only and args.predict:
        parser.error("--evaluate_only and --predict: choose one")
    if args.out_csv and not args.predict:
        parser.error("--out_csv: goes with --predict")
    fitting = ("model_path", "device", "amp", "deterministic", "num_workers", "bad_images")
    for mode, also in [
        ("evaluate_only", ("data_name", "data_root", "out", "name", "ddp")),
        ("predict", ("out_csv",)),
    ]:
        for name in given.keys() - {mode, *fitting, *also} if getattr(args, mode) else ():
            parser.error(f"--{name}: does not go with --{mode}")
    if args.data_name is not None and args.data_name not in data.DATA_NAMES:
        parser.error(f"--data_name {args.data_name}: choose one of {', '.join(data.DATA_NAMES)}")
    if args.resume and args.resume is not True:
        folder, name = utils.run_of(args.resume)
        args.out, args.name = given.get("out", folder), given.get("name", name)
    return args, parser, given


# ---- fitting ------------------------------------------------------------------------------------


def make_optimizer(args, heads: nn.ModuleList, lrs: list[float]) -> torch.optim.Optimizer:
    """One parameter group a head, each with its own base lr (per 256 images); no weight decay."""
    groups = [
        {"params": list(head.parameters()), "peak": lr * args.batch_size / 256, "lr": lr}
        for head, lr in zip(heads, lrs, strict=True)
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    try:
        from timm.optim import Lars
    except ImportError as error:
        raise ValueError("--optimizer lars: needs timm: pip install timm") from error
    # Without weight decay timm's LARS adapts only if told to; apex's, the authors', always does.
    return Lars(groups, momentum=0.9, trust_coeff=0.001, eps=1e-8, always_adapt=True)


def train(heads, optimizer, loader, embed, epoch, start, sums, epochs, after):
    """One epoch of all heads side by side, from step `start` on; `after(step, means)` each step.

    `embed(images, epoch, step, N)` gives the frozen features, N x features, also where ranks share
    the images: each rank fits the heads to all of a batch's features. The heads do not touch one
    another: the sum of their losses has for each head the gradient of its own.
    Adds to `sums` (heads x 3), image by image: loss, top-1 and top-5.
    """
    for step, (inputs, labels) in loader.epoch(epoch, start):
        features = embed(inputs, epoch, step, len(labels))
        share = utils.schedule(epoch + step / len(loader), epochs)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        logits = [head(features) for head in heads]
        losses = [F.cross_entropy(scores, labels) for scores in logits]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        with torch.no_grad():
            for i, scores in enumerate(logits):
                sums[i] += len(labels) * torch.stack([losses[i], *hits(scores, labels)])
        after(step, sums[0, :2] / loader.batch_size)  # of the first head: for the eye


def hits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of right classes and of right classes among the best five (or all, if fewer)."""
    right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    return right[:, 0].float().mean(), right.any(1).float().mean()


@torch.no_grad()
def evaluate(head: nn.Module, features: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Loss, top-1 and top-5 (percent) of a head on features."""
    logits = head(features)
    top1, top5 = hits(logits, labels)
    return F.cross_entropy(logits, labels).item(), 100 * top1.item(), 100 * top5.item()


def fit(heads, optimizer, loader, embed, args) -> None:
    """Trains from the start to the end."""
    for epoch in range(args.epochs):
        sums = torch.zeros(len(heads), 3, device=loader.device)
        with utils.Progress(epoch, args, len(loader), *SHOWN) as progress:
            train(heads, optimizer, loader, embed, epoch, 0, sums, args.epochs, progress)


SHOWN = ("loss", "acc"), "the same command with --cached"


def best_on_held_out(lrs, head, inputs, labels, embed, plain_features, args, views) -> float:
    """The lr whose head does best on a held-out tenth of the training set, trained on the rest."""
    kept = data.subset(labels.cpu(), len(labels) - max(1, len(labels) // 10), args.seed)
    kept = kept.to(labels.device)
    out = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    out[kept] = False
    heads = nn.ModuleList(copy.deepcopy(head) for _ in lrs)
    optimizer = make_optimizer(args, heads, lrs)
    loader = make_loader(inputs[kept], labels[kept], args, views)
    fit(heads, optimizer, loader, embed, args)
    features = plain_features(inputs[out])
    scores = [evaluate(head, features, labels[out])[1] for head in heads]
    for lr, score in zip(lrs, scores, strict=True):
        utils.say(f"--lr {lr:g}: {score:.2f} % of the held-out tenth of the training set")
    return lrs[scores.index(max(scores))]


def pixels_baseline(images: data.Data, views, amp, args) -> float:
    """Test top-1 of a linear head on raw pixels: the same fit, at the best of four lr.

    The best on the test set, which favours the baseline: pixels have another scale than features.
    """
    pixels = utils.raw_pixels(views.size)
    images = images.at_most(utils.PIXELS_OF, args.seed)
    parts = (images.train_images, images.test_images)
    inputs, test = (utils.features(pixels, views.plain, part, amp, False) for part in parts)
    lrs = [args.lr[0] * share for share in (1, 0.1, 0.01, 0.001)]
    head = model.linear_head(inputs.shape[1], len(images.classes)).to(inputs.device)
    heads = nn.ModuleList(copy.deepcopy(head) for _ in lrs)
    loader = make_loader(inputs, images.train_labels, args)
    fit(heads, make_optimizer(args, heads, lrs), loader, lambda x, *when: x, args)
    return max(evaluate(head, test, images.test_labels)[1] for head in heads)


def make_loader(inputs: Tensor | data.Files, labels: Tensor, args, views=None) -> data.Loader:
    """Of images a rank gets its share; features are at hand on every rank, and stay whole."""
    batch_size = min(args.batch_size, len(labels))
    share = utils.share if len(inputs.shape) == 4 else data.whole
    return data.Loader([inputs, labels], batch_size, args.seed, True, views, 1, share)


# ---- the frozen encoder -------------------------------------------------------------------------


class Frozen:
    """The proof that an encoder stays as it was: every parameter and buffer, bit for bit."""

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder.eval().requires_grad_(False)
        self.before = {name: value.clone() for name, value in encoder.state_dict().items()}

    def check(self) -> None:
        """Raises RuntimeError that names what changed."""
        for name, value in self.encoder.state_dict().items():
            if not torch.equal(value, self.before[name]):
                raise RuntimeError(f"the encoder is not frozen: {name} changed")


# ---- the commands -------------------------------------------------------------------------------


def load_images(args, source: dict, test_only: bool = False) -> data.Data:
    """The data set of the flags or, where they are silent, of a checkpoint's arguments.

    Without its training images if `test_only`, where they can be left alone.
    """
    if (
        any(type(source.get(name)) is not str for name in ("data_name", "data_root"))
        or type(source.get("seed")) is not int
        or not isinstance(source.get("train_size"), int | None)
    ):
        raise ValueError(f"--model_path {args.model_path}: its data set is not one of ours")
    same = args.data_name in (None, source["data_name"])
    if args.data_root is None:
        args.data_root = source["data_root"] if same else "data"
    args.data_name = args.data_name or source["data_name"]
    size, rest = source["encoder"]["image_size"], (args.num_workers, args.bad_images, test_only)
    images = utils.from_first(lambda: data.load(args.data_name, args.data_root, size, *rest))
    if images.test_images is None:
        raise ValueError(f"--data_root {args.data_root}: has no labelled test images to score with")
    if same and source.get("train_size") is not None and not test_only:
        images = images.subset(source["train_size"], source["seed"])
    labelled = images.train_labels >= 0
    images.train_images = images.train_images[labelled]
    images.train_labels = images.train_labels[labelled]
    return images


def make_views(encoder: dict, seed: int = 0) -> data.Views:
    """Random resized crop (scale 0.08 to 1) and flip; `plain` is the test transform."""
    return data.Views(
        encoder["image_size"],
        encoder["mean"],
        encoder["std"],
        crop_scale=(0.08, 1.0),
        jitter_p=0,
        gray_p=0,
        seed=seed,
        share=utils.share,
    )


def load_pretrained(args) -> dict:
    """The checkpoint in --model_path, its arguments with the encoder's own added.

    It is of main.py, or has the network of another project's as its `net`.
    """
    pretrained = utils.from_first(lambda: ours_or_others(args))
    if "net" in pretrained:
        return pretrained
    if "encoder" in pretrained["args"]:
        raise ValueError(
            f"--model_path {args.model_path}: is a linear model; give the pre-trained one, or "
            "add --evaluate_only or --predict"
        )
    with utils.about(f"--model_path {args.model_path}"):
        pretrained["args"]["encoder"] = model.encoder_arguments(pretrained["args"])
    if not pretrained["history"]:
        raise ValueError(f"--model_path {args.model_path}: has no history")
    return pretrained


def ours_or_others(args) -> dict:
    """What is in --model_path. Raises FileNotFoundError or ValueError."""
    try:
        found = utils.load_checkpoint(args.model_path)
    except ValueError as error:
        found = None
        try:
            net, encoder, notes = model.foreign(args.model_path, args.stem)
        except ValueError as others:
            raise ValueError(f"{error}; nor one of another that is known: {others}") from others
    if found is not None:
        for name in ("stem", "image_size"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name}: {args.model_path} is ours, and has its own")
        return {key: value for key, value in found.items() if key not in ("net", "notes")}
    if args.data_name is None:
        raise ValueError(
            f"--model_path {args.model_path}: another project's checkpoint ({notes[0]}) names no "
            "data set: add --data_name, and --data_root"
        )
    encoder |= data.usual_input(encoder["stem"])
    encoder["image_size"] = args.image_size or encoder["image_size"]
    if isinstance(net, model.Classifier):
        notes.append("its classifier is not used: a new one is fitted")
    notes.append(
        f"taken to see {encoder['image_size']} pixels, normalised by its stem's mean and std"
    )
    source = {"name": Path(args.model_path).stem, "data_name": args.data_name, "data_root": "data"}
    source |= {"seed": 0, "train_size": None, "encoder": encoder}
    return {"args": source, "history": [{}], "net": net, "notes": notes}


def run_name(args, source: dict) -> str:
    """The name of a run: its --model_path's, and what is not the default."""
    parts = [str(source.get("name")), "linear"]
    parts += ["cached"] if args.cached else []
    parts += [args.optimizer] if args.optimizer != "sgd" else []
    parts += [args.data_name] if args.data_name not in (None, source.get("data_name")) else []
    parts += [f"{args.label_fraction:g}"] if args.label_fraction < 1 else []
    return "_".join(parts)


def resumed(path: str, checkpoint: dict, args, parser, given: dict) -> argparse.Namespace:
    """The arguments of a linear checkpoint, looked through as the command line is, and what is new.

    Raises ValueError where they, or the command's, cannot be gone on with.
    """
    saved = parse_args(parser.as_argv(checkpoint["args"]), prog=f"linear.py: {path}")[0]
    sums = checkpoint.get("sums")
    if (
        checkpoint["epoch"] != len(checkpoint["history"])
        or not (utils.is_tensor(sums) and sums.shape == (1, 3) and bool(sums.isfinite().all()))
        or any(type(checkpoint.get(key)) is not float for key in ("lr", "baseline", "seconds"))
        or (saved.evaluate_only or saved.predict)
    ):
        raise ValueError(f"{path}: is damaged, or not a checkpoint of linear.py")
    return utils.merged(saved, args, given, path, checkpoint["epoch"] == checkpoint["step"] == 0)


def linear_evaluation(args, parser, given: dict) -> None:
    """Fit a linear head on the frozen encoder of --model_path."""
    run = os.path.join(args.out, args.name)
    with parser.bad_input():
        found = utils.from_first(lambda: utils.earlier(run, args))
        if found:
            path, checkpoint = found
            args = resumed(path, checkpoint, args, parser, given)
        device, amp = utils.set_up(args)
        pretrained = load_pretrained(args)
        source = pretrained["args"]
        args.encoder = source["encoder"]
        with utils.about(f"--model_path {args.model_path}"):
            simsiam = pretrained.get("net") or model.pretrained(pretrained)
        for note in pretrained.get("notes", ()):
            utils.say(f"{args.model_path}: {note}")
        images = load_images(args, source)
        if args.label_fraction < 1:
            number = max(1, round(args.label_fraction * len(images.train_labels)))
            images = images.subset(number, args.seed)
        images_crc = data.crc(images.train_images)
        torch.manual_seed(args.seed)
        net = model.Classifier(simsiam.backbone, simsiam.features, len(images.classes))
        if found:
            same = (checkpoint.get("images_crc"), checkpoint.get("classes"))
            if same != (images_crc, images.classes):
                raise ValueError(f"--data_root {args.data_root}: not the images of {path}")
            weights = net.backbone.state_dict(prefix="backbone.")
            with utils.about(path):
                model.load_strictly(net, checkpoint["model"])
            if checkpoint["args"].get("encoder") != args.encoder or not all(
                torch.equal(checkpoint["model"][name], value) for name, value in weights.items()
            ):
                raise ValueError(f"--model_path {args.model_path}: not the encoder of {path}")
        images = images.to(device)
        views = make_views(args.encoder, args.seed)
        params, flops = model.params_and_flops(net, views.size)
        net.to(device, memory_format=torch.channels_last)
        lr = checkpoint["lr"] if found else args.lr[0]
        heads = nn.ModuleList([net.fc])
        optimizer = make_optimizer(args, heads, [lr])
        if found:
            with utils.about(path):
                utils.restore(optimizer, checkpoint, net)
        utils.list_bad_images(run, images.bad)
    frozen = Frozen(net.backbone)
    protocol = "Linear, cached" if args.cached else "Linear"
    if args.label_fraction < 1:
        protocol += f", {100 * args.label_fraction:g}% of labels"
    utils.say(
        f"{run}: {protocol}, {args.encoder['arch']}: {params / 1e6:.2f}M parameters, "
        f"{flops / 1e6:.2f}M multiply-adds an image (thop's FLOPs), on {device}\n"
        f"{args.data_name}: {len(images.train_images)} training images, "
        f"{len(images.test_images)} test images, {len(images.classes)} classes, {views.size} pixels"
    )

    def plain_features(part: Tensor) -> Tensor:
        return utils.features(net.backbone, views.plain, part, amp, False)

    encoder = torch.compile(net.backbone) if args.compile else net.backbone

    @torch.no_grad()
    def augmented_features(part: Tensor, epoch: int, step: int, number: int) -> Tensor:
        views.seed(epoch, step, number)
        x = views(part)
        with amp:
            mine = encoder(x).float()
        return utils.gathered(mine, number)

    test_features = plain_features(images.test_images)  # of a frozen encoder: once for all epochs
    inputs, embed, held_out_features = images.train_images, augmented_features, plain_features
    extraction = time.perf_counter()
    if args.cached:
        inputs = plain_features(images.train_images)
        embed, held_out_features = (lambda x, *when: x), (lambda x: x)
    extraction = time.perf_counter() - extraction  # the first epoch's seconds include it
    loader = make_loader(inputs, images.train_labels, args, views)
    keeper = utils.Keeper(args.checkpoint_minutes, good=found and path == f"{run}_model.pth")

    def save(epoch: int, step: int = 0) -> None:
        utils.save_checkpoint(
            run,
            net,
            optimizer,
            keeper.good,
            epoch=epoch,
            step=step,
            sums=sums.cpu(),
            seconds=time.perf_counter() - begun,
            history=history,
            args=vars(args),
            images_crc=images_crc,
            classes=images.classes,
            lr=lr,
            baseline=baseline,
        )
        keeper.kept()

    def after(step: int, means: Tensor) -> None:
        progress(step, means)
        if keeper.due():
            save(epoch, step + 1)

    sums, begun, start = torch.zeros(1, 3, device=device), time.perf_counter(), 0
    if found:
        baseline, history, start = (checkpoint[key] for key in ("baseline", "history", "step"))
        sums, begun = checkpoint["sums"].to(device), begun - checkpoint["seconds"]
        utils.say(
            f"resumed after epoch {len(history)} of {args.epochs}"
            + f" and step {start} of {len(loader)}" * (start > 0)
            + ": the run is finished" * (len(history) == args.epochs)
        )
    else:
        history = []
        baseline = pixels_baseline(images, views, amp, args)
        utils.say(f"baseline, a linear head on raw pixels: top-1 {baseline:.1f} %")
        if len(args.lr) > 1:
            lr = best_on_held_out(
                args.lr, net.fc, inputs, images.train_labels, embed, held_out_features, args, views
            )
            optimizer = make_optimizer(args, heads, [lr])
            utils.say(f"chosen: --lr {lr:g}; fitted again on the whole training set")
        begun = time.perf_counter() - extraction
        save(0)
        utils.remove(f"{run}_model.prev.pth")  # --overwrite: another run's

    peak = lr * args.batch_size / 256
    said = time.perf_counter()
    with keeper:
        for epoch in range(len(history), args.epochs):
            with utils.Progress(epoch, args, len(loader), *SHOWN, start) as progress:
                train(heads, optimizer, loader, embed, epoch, start, sums, args.epochs, after)
            frozen.check()
            loss, top1, top5 = (sums[0] / len(loader.tensors[0])).tolist()
            if not math.isfinite(loss):
                raise utils.RunError(
                    f"the loss is not finite in epoch {epoch + 1}, at --lr {lr:g}; {run}_model.pth "
                    f"is from before. {utils.DIVERGED}"
                )
            test = evaluate(net.fc, test_features, images.test_labels)
            now = time.perf_counter()
            history.append(
                {
                    "epoch": epoch + 1,
                    "lr": peak * utils.schedule(epoch + 1 - 1 / len(loader), args.epochs),
                    "train_loss": loss,
                    "train_acc@1": 100 * top1,
                    "train_acc@5": 100 * top5,
                    "test_loss": test[0],
                    "test_acc@1": test[1],
                    "test_acc@5": test[2],
                    "seconds": now - begun,
                }
            )
            sums, begun, start = torch.zeros_like(sums), now, 0
            last = epoch + 1 == args.epochs
            if last or now - said > 1:  # cached epochs take a blink: not all of them are said
                said = now
                utils.say(
                    f"epoch {epoch + 1}/{args.epochs} loss {loss:.3f} train {100 * top1:.2f} % "
                    f"test {test[1]:.2f} %"
                )
            if keeper.due(10) or last:  # nor saved
                with utils.tried_again():
                    utils.write_csv(f"{run}_statistics.csv", history, STATISTICS)
                save(epoch + 1)
    with utils.last_try():
        utils.write_csv(f"{run}_statistics.csv", history, STATISTICS)
        best = max(row["test_acc@1"] for row in history)
        utils.add_result(
            os.path.join(args.out, "results.csv"),
            {
                "protocol": protocol,
                "data": utils.data_label(args),
                "arch": args.encoder["arch"],
                "params_m": params / 1e6,
                "flops_g": flops / 1e9,
                "batch_size": args.batch_size,
                "epochs": args.epochs,
                "top1": history[-1]["test_acc@1"],
                "top5": history[-1]["test_acc@5"],
                "best_top1": best,
                "seconds": sum(row["seconds"] for row in history),
                "device": device.type,
                "run": args.name,
            },
        )
        if args.pictures and utils.rank() == 0:
            predicted = net.fc(test_features).argmax(1)
            matrix = utils.confusion_matrix(images.test_labels, predicted, len(images.classes))
            with utils.whole_file(f"{run}_confusion.png") as file:
                figures.confusion(matrix, images.classes, args.name, file)
            with utils.whole_file(f"{run}_curves.png") as file:
                start = {"epoch": 0, "raw_acc@1": baseline}
                figures.curves({args.name: [start, *history]}, file)
        utils.remove(f"{run}_model.prev.pth")  # the run is complete
    knn = pretrained["history"][-1].get("test_acc@1")
    utils.say(
        f"linear top-1 {history[-1]['test_acc@1']:.2f} % (best epoch {best:.2f} %), top-5 "
        f"{history[-1]['test_acc@5']:.2f} %; raw pixels {baseline:.2f} %"
        + (f"; kNN at the end of pre-training {knn:.2f} %" if knn is not None else "")
        + f"\nwrote {run}_model.pth and {run}_statistics.csv"
    )


def load_linear_model(args, device) -> tuple[model.Classifier, dict]:
    """The classifier in --model_path, on the device in eval mode, and the checkpoint's content."""
    state = utils.from_first(lambda: utils.load_checkpoint(args.model_path))
    if "encoder" not in state["args"]:
        raise ValueError(
            f"--model_path {args.model_path}: is not a linear model; make one with "
            f"python linear.py --model_path {args.model_path}"
        )
    with utils.about(f"--model_path {args.model_path}"):
        net = model.classifier(state)
    return net.to(device, memory_format=torch.channels_last).eval(), state


def evaluate_only(args, parser) -> None:
    """Score a saved linear model: top-1, top-5, each class, a confusion matrix. Trains nothing."""
    with parser.bad_input():
        device, amp = utils.set_up(args)
        net, state = load_linear_model(args, device)
        images = load_images(args, state["args"], test_only=True)
        classes = state["classes"]
        strange = sorted(set(images.classes) - set(classes))
        if strange:
            raise ValueError(
                f"--data_root {args.data_root}: class {strange[0]} is not one of the linear model's"
            )
        os.makedirs(args.out, exist_ok=True)
    for line in images.bad:
        utils.say(line)
    order = torch.tensor([classes.index(name) for name in images.classes])
    labels = order[images.test_labels].to(device)  # numbered as in training
    encoder = state["args"]["encoder"]
    features = utils.features(
        net.backbone, make_views(encoder).plain, images.test_images.to(device), amp, False
    )
    loss, top1, top5 = evaluate(net.fc, features, labels)
    predicted = net.fc(features).argmax(1)
    matrix = utils.confusion_matrix(labels, predicted, len(classes))
    for i, (name, row) in enumerate(zip(classes, matrix, strict=True)):
        if sum(row):
            utils.say(f"{name}: {100 * row[i] / sum(row):.1f} % of {sum(row)}")
    name = args.name or state["args"]["name"]
    picture = os.path.join(args.out, f"{name}_confusion.png")
    if args.pictures and utils.rank() == 0:
        with utils.whole_file(picture) as file:
            figures.confusion(matrix, classes, name, file)
    utils.say(
        f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f}"
        + f"; wrote {picture}" * args.pictures
    )


@torch.no_grad()
def predict(args, parser) -> None:
    """Classes and scores of image files."""
    with parser.bad_input():
        device, amp = utils.set_up(args)
        net, state = load_linear_model(args, device)
        files = []
        for path in map(Path, args.predict):
            files += data.list_folder(path, labelled=False)[0] if path.is_dir() else [path]
        encoder, classes = state["args"]["encoder"], state["classes"]
        size = encoder["image_size"]
        shorter = data.shorter_side(state["args"].get("data_name"), size)
        images, bad = data.decode(files, size, args.num_workers, args.bad_images, shorter)
        files = [path for i, path in enumerate(files) if i not in bad]
    for line in bad.values():
        print(line, file=sys.stderr)
    features = utils.features(
        net.backbone, make_views(encoder).plain, images.to(device), amp, False
    )
    best = net.fc(features).softmax(1).topk(min(5, len(classes)))
    rows = []
    for path, scores, numbers in zip(
        files, best.values.tolist(), best.indices.tolist(), strict=True
    ):
        row = {"file": str(path)}
        for i, (score, label) in enumerate(zip(scores, numbers, strict=True)):
            place = "" if i == 0 else f"_{i + 1}"
            row |= {f"class{place}": classes[label], f"score{place}": score}
        rows.append(row)
    table = pandas.DataFrame(rows)
    utils.say(table.to_string(index=False, float_format=lambda score: f"{score:.3f}"))
    if args.out_csv:
        with parser.bad_input():
            utils.write_csv(args.out_csv, rows, tuple(table.columns))


def main(argv: list[str] | None = None) -> None:
    args, parser, given = parse_args(argv)
    with utils.joined(args, parser):
        if args.predict:
            predict(args, parser)
        elif args.evaluate_only:
            evaluate_only(args, parser)
        else:
            if args.name is None:
                with parser.bad_input():
                    args.name = utils.file_name(run_name(args, load_pretrained(args)["args"]))
            with utils.one_writer(os.path.join(args.out, args.name), parser):
                linear_evaluation(args, parser, given)


if __name__ == "__main__":
    utils.run_command(main, data.BadImage)
