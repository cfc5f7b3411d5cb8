"""Pre-train SimSiam: recipes, flags, the loop.

python main.py --data_name textures          # minutes on a laptop CPU, no download
python main.py --batch_size 256 --epochs 800 # CIFAR-10, ResNet-18, one GPU
"""

import argparse
import os
import sys
import time

import torch

import data
import figures
import model
import utils
from utils import number

CIFAR = {  # paper, App. D
    "arch": "resnet18",
    "stem": "cifar",
    "image_size": None,  # the data set's own
    "feature_dim": 2048,
    "projector_layers": 2,
    "batch_size": 512,
    "epochs": 800,
    "lr": 0.03,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "warmup_epochs": 0,
    "fix_pred_lr": False,
    "blur_p": 0.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
IMAGENET = CIFAR | {  # paper, sec. 3 and 4; authors' code
    "arch": "resnet50",
    "stem": "imagenet",
    "image_size": 224,
    "projector_layers": 3,
    "epochs": 100,
    "lr": 0.05,
    "weight_decay": 1e-4,
    "blur_p": 0.5,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
# Ours, for minutes to hours on a CPU: see the README's results.
SHORT = CIFAR | {
    "arch": "resnet8",
    "feature_dim": 512,
    "batch_size": 64,
    "epochs": 20,
    "lr": 1.0,
    "fix_pred_lr": True,
}
RECIPES = {"cifar": CIFAR, "imagenet": IMAGENET, "short": SHORT}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, utils.Parser]:
    """The flags, filled up from the recipe."""
    parser = utils.Parser(
        prog="main.py",
        description=__doc__.split("\n")[0],
        epilog=f"(by recipe: ...): the defaults of {', '.join(RECIPES)}, in this order.",
        allow_abbrev=False,
    )

    def flag(group, name: str, kind, help: str, default=None, **more) -> None:
        if name in CIFAR:
            values = [str(recipe[name]) for recipe in RECIPES.values()]
            help += (
                f" (by recipe: {', '.join(values)})" if len(set(values)) > 1 else f" ({values[0]})"
            )
        elif default is not None:
            help += f" ({default})"
        group.add_argument(f"--{name}", type=kind, default=default, help=help, **more)

    count, positive = number(int, 1), number(float, 1e-12)
    group = parser.add_argument_group("data")
    flag(group, "data_name", str, "one of " + ", ".join(data.DATA_NAMES), "cifar10")
    flag(group, "data_root", str, "downloads go here; the images of `folder` are here", "data")
    flag(group, "train_size", count, "train on a class-balanced, seeded subset of this size")
    flag(group, "image_size", number(int, 8), "side of the views, in pixels; None: as the images")
    group = parser.add_argument_group("network")
    flag(group, "arch", str, f"{', '.join(model.IMAGENET_ARCHS)}, or resnet8, resnet14, ... (6n+2)")
    flag(group, "stem", str, "first layers of resnet18 to resnet152: cifar or imagenet")
    flag(group, "width", count, "channels of the first stage of resnet8, resnet14, ... (16)")
    flag(group, "feature_dim", number(int, 4), "d, the width of projector and output z")
    flag(group, "projector_layers", count, "linear layers of the projector")
    group = parser.add_argument_group("optimization")
    flag(
        group, "recipe", str, "defaults: cifar, imagenet or short (textures: short, others: cifar)"
    )
    flag(group, "batch_size", number(int, 2), "images a step")
    flag(group, "epochs", count, "sweeps over the training set")
    flag(group, "lr", positive, "base learning rate: lr = base * batch_size / 256")
    flag(group, "momentum", number(float, 0, 1), "of SGD")
    flag(group, "weight_decay", number(float, 0), "of SGD, on all parameters")
    flag(group, "warmup_epochs", number(float, 0), "epochs of linear warm-up")
    group.add_argument(
        "--fix_pred_lr",
        action=argparse.BooleanOptionalAction,
        help="keep the predictor's lr constant (by recipe: False, False, True)",
    )
    group = parser.add_argument_group("monitor")
    flag(group, "k", count, "neighbours that vote in the kNN", 200)
    flag(group, "temperature", positive, "of the kNN's vote", 0.1)
    flag(group, "knn_every", count, "epochs from one kNN to the next; the last epoch has one", 1)
    utils.run_flags(parser)

    args = parser.parse_args(argv)
    if args.data_name not in data.DATA_NAMES:
        parser.error(f"--data_name {args.data_name}: choose one of {', '.join(data.DATA_NAMES)}")
    args.recipe = args.recipe or ("short" if args.data_name == "textures" else "cifar")
    if args.recipe not in RECIPES:
        parser.error(f"--recipe {args.recipe}: choose one of {', '.join(RECIPES)}")
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup_epochs {args.warmup_epochs:g}: must be below --epochs {args.epochs}"
        )
    if args.name is None:
        args.name = f"{args.feature_dim}_{args.k}_{args.batch_size}_{args.epochs}"
        if (args.data_name, args.arch) != ("cifar10", "resnet18"):
            args.name = f"{args.data_name}_{args.arch}_{args.name}"
    return args, parser


def train(net, optimizer, loader, views, epoch, args, amp, progress):
    """One epoch (paper, Algorithm 1). Returns the mean loss and the mean std of z."""
    net.train()
    sums = torch.zeros(2, device=loader.device)  # they stay there: no sync a step
    peak = args.lr * args.batch_size / 256
    for step, (images,) in loader.epoch(epoch):
        views.seed(epoch, step)
        x1, x2 = views(images), views(images)  # the same pixels, two looks
        lr = peak * utils.schedule(epoch + step / len(loader), args.epochs, args.warmup_epochs)
        for group in optimizer.param_groups:
            group["lr"] = peak if group["fix_lr"] else lr
        with amp:
            loss, z = net(x1, x2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums += torch.stack([loss.detach(), utils.collapse_std(z)])
        progress(step, sums)
    return (sums / len(loader)).tolist()


def monitor(net, views, images: data.Data, args, amp) -> dict:
    """Columns of the statistics: effective rank of the bank and, with labels, kNN accuracy."""
    bank = utils.features(net.backbone, views.plain, images.train_images, amp)
    row = {"rank": utils.effective_rank(bank)}
    if images.test_images is not None:
        queries = utils.features(net.backbone, views.plain, images.test_images, amp)
        row["test_acc@1"], row["test_acc@5"] = knn_accuracy(bank, queries, images, args)
    return row


def knn_accuracy(bank, queries, images: data.Data, args) -> tuple[float, float]:
    """The bank is the whole training set, and all test images are scored."""
    voters = images.train_labels >= 0  # STL-10's unlabelled images cannot vote
    ranking = utils.knn(
        bank[voters], images.train_labels[voters], queries, args.k, args.temperature
    )
    return utils.accuracy(ranking, images.test_labels)


def raw_pixels_accuracy(views, images: data.Data, args, amp) -> float:
    """kNN top-1 without any encoder."""
    pixels = utils.raw_pixels(args.image_size)
    parts = (images.train_images, images.test_images)
    bank, queries = (utils.features(pixels, views.plain, part, amp) for part in parts)
    return knn_accuracy(bank, queries, images, args)[0]


COLLAPSED_STD = 0.3
COLLAPSE_ADVICE = (
    "warning: std of z is {std:.2f}: about 1 is healthy, 0 is collapse (every image gets the same "
    "output, and the loss goes to -1). Try a lower --lr, a larger --batch_size, --warmup_epochs "
    "10, and see that the images differ from one another."
)


def main(argv: list[str] | None = None) -> None:
    args, parser = parse_args(argv)
    run = os.path.join(args.out, args.name)
    with parser.bad_input():
        device = utils.pick_device(args.device)
        amp = utils.autocast(device, args.amp)
        checkpoint = utils.earlier(run, args)
        torch.manual_seed(args.seed)
        net = model.SimSiam(
            args.arch, args.stem, args.feature_dim, args.projector_layers, args.width
        )
        images = data.load(args.data_name, args.data_root, args.image_size, args.num_workers)
        if args.train_size is not None:
            images = images.subset(args.train_size, args.seed)
        images = images.to(device)
        loader = data.Loader([images.train_images], args.batch_size, args.seed)
        os.makedirs(args.out, exist_ok=True)
    args.image_size = args.image_size or images.train_images.shape[-1]
    views = data.Views(args.image_size, args.mean, args.std, blur_p=args.blur_p, seed=args.seed)
    params, flops = model.params_and_flops(net, args.image_size)
    net.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [
            {"params": net.encoder_parameters(), "fix_lr": False},
            {"params": net.predictor.parameters(), "fix_lr": args.fix_pred_lr},
        ],
        lr=args.lr * args.batch_size / 256,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )
    utils.say(
        f"{run}: SimSiam {args.arch}, d = {args.feature_dim}: {params / 1e6:.2f}M parameters, "
        f"{flops / 1e6:.2f}M multiply-adds an image (thop's FLOPs), on {device}\n"
        f"{args.data_name}: {len(images.train_images)} training images, "
        f"{0 if images.test_images is None else len(images.test_images)} test images, "
        f"{len(images.classes)} classes, {args.image_size} pixels"
    )

    if checkpoint:
        net.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        history = checkpoint["history"]
        utils.say(f"resumed after epoch {checkpoint['epoch']} of {args.epochs}")
    else:
        history = [{"epoch": 0} | monitor(net, views, images, args, amp)]
        if images.test_images is None:
            utils.say("no labelled test images: no kNN; std and rank are watched")
        else:
            raw = history[0]["raw_acc@1"] = raw_pixels_accuracy(views, images, args, amp)
            utils.say(
                f"kNN top-1 before training: raw pixels {raw:.1f} %, "
                f"untrained encoder {history[0]['test_acc@1']:.1f} %"
            )

    smaller = (
        f"python main.py --data_name {args.data_name} --data_root {args.data_root} --recipe short"
        " --epochs 5"
    )
    trained = torch.compile(net) if args.compile else net  # shares net's parameters
    for epoch in range(len(history) - 1, args.epochs):
        begun = time.perf_counter()
        with utils.Progress(epoch, args, len(loader), ("loss", "std"), smaller) as progress:
            loss, std = train(trained, optimizer, loader, views, epoch, args, amp, progress)
        seconds = time.perf_counter() - begun
        row = {
            "epoch": epoch + 1,
            "lr": optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "std": std,
            "images_per_sec": len(loader) * args.batch_size / seconds,
        }
        if (epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs:
            row |= monitor(net, views, images, args, amp)
        row["seconds"] = time.perf_counter() - begun
        history.append(row)
        utils.save_checkpoint(
            f"{run}_model.pth",
            model=net.state_dict(),
            optimizer=optimizer.state_dict(),
            epoch=epoch + 1,
            step=0,
            history=history,
            args=vars(args),
        )
        utils.write_csv(f"{run}_statistics.csv", history, utils.STATISTICS)
        utils.say(
            f"epoch {epoch + 1}/{args.epochs} loss {loss:.3f} std {std:.2f}"
            + (f" rank {row['rank']:.1f}" if "rank" in row else "")
            + (f" kNN top-1 {row['test_acc@1']:.1f} %" if "test_acc@1" in row else "")
            + f" ({row['images_per_sec']:.0f} images/s, {row['seconds']:.0f} s)"
        )
        if std < COLLAPSED_STD:
            utils.say(COLLAPSE_ADVICE.format(std=std))

    scored = [row["test_acc@1"] for row in history[1:] if "test_acc@1" in row]
    if scored:
        utils.add_result(
            os.path.join(args.out, "results.csv"),
            {
                "protocol": "KNN",
                "data": utils.data_label(args),
                "arch": args.arch,
                "params_m": params / 1e6,
                "flops_g": flops / 1e9,
                "feature_dim": args.feature_dim,
                "batch_size": args.batch_size,
                "epochs": args.epochs,
                "k": args.k,
                "top1": history[-1]["test_acc@1"],
                "top5": history[-1]["test_acc@5"],
                "best_top1": max(scored),
                "seconds": sum(row["seconds"] for row in history[1:]),
                "device": device.type,
                "run": args.name,
            },
        )
        utils.say(
            f"kNN top-1 {scored[-1]:.1f} % (best {max(scored):.1f} %), untrained encoder "
            f"{history[0]['test_acc@1']:.1f} %, raw pixels {history[0]['raw_acc@1']:.1f} %"
        )
    with utils.whole_file(f"{run}_curves.png") as file:
        figures.curves(history, args.name, file)
    utils.say(f"wrote {run}_model.pth, {run}_statistics.csv and {run}_curves.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; go on after the last finished epoch with the same command and --resume")
