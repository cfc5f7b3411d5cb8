"""Pre-train SimSiam: recipes, flags, the loop.

python main.py --data_name textures          # minutes on a laptop CPU, no download
python main.py --batch_size 256 --epochs 800 # CIFAR-10, ResNet-18, one GPU
torchrun --nproc_per_node 8 main.py --ddp --data_name imagenet --data_root DIR
"""

import argparse
import contextlib
import importlib.util
import os
import time
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

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
    "mean": data.NORMALISATION["cifar"][0],
    "std": data.NORMALISATION["cifar"][1],
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
    "mean": data.NORMALISATION["imagenet"][0],
    "std": data.NORMALISATION["imagenet"][1],
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


def parse_args(
    argv: list[str] | None = None, prog: str = "main.py"
) -> tuple[argparse.Namespace, utils.Parser, dict]:
    """The flags, filled up from the recipe; their parser; and those that `argv` gives."""
    parser = utils.Parser(
        prog=prog,
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

    count, positive = number(int, 1, 2**31), number(float, 1e-12)
    group = parser.add_argument_group("data")
    flag(group, "data_name", str, "one of " + ", ".join(data.DATA_NAMES), "cifar10")
    flag(group, "data_root", str, "of downloads, and of images of one's own", "data")
    flag(group, "train_size", count, "train on a class-balanced, seeded subset of this size")
    flag(
        group,
        "image_size",
        number(int, 8, 1024),
        "side of the views, in pixels; None: as the images",
    )
    group = parser.add_argument_group("network")
    flag(group, "arch", str, f"{', '.join(model.IMAGENET_ARCHS)}, or resnet8, resnet14, ... (6n+2)")
    flag(group, "stem", str, f"first layers of resnet18 to resnet152: {', '.join(model.STEMS)}")
    width = number(int, 1, 1024)
    flag(group, "width", width, "channels of the first stage of resnet8, resnet14, ... (16)")
    flag(group, "feature_dim", number(int, 4, 16384), "d, the width of projector and output z")
    flag(group, "projector_layers", number(int, 1, 8), "linear layers of the projector")
    flag(group, "init", utils.file_path, "start from a checkpoint's weights, ours or others'")
    group = parser.add_argument_group("the paper's ablations")
    for name, values, help in (
        ("stop_grad", ("on", "off"), "stop the gradient through z (sec. 4.1)"),
        ("predictor", model.PREDICTORS, "none: p = z; fixed: as it starts (sec. 4.2)"),
        ("bn", model.BN, "BN in the heads: on no, hidden or all layers (sec. 4.4)"),
        ("similarity", tuple(model.SIMILARITIES), "of p and z (sec. 4.5)"),
        ("loss", tuple(model.PAIRS), "one way or both; 2x: of two pairs (sec. 4.6)"),
    ):
        flag(group, name, str, help, values[0], choices=values)
    group = parser.add_argument_group("optimization")
    flag(
        group,
        "recipe",
        str,
        "defaults: cifar, imagenet or short (imagenet and webdataset: imagenet; textures: short; "
        "others: cifar)",
    )
    flag(group, "batch_size", number(int, 2), "images a step, of all ranks together")
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
    flag(
        group, "bank_size", count, "images of the kNN's bank, class-balanced and seeded; None: all"
    )
    flag(group, "knn_every", count, "epochs from one kNN to the next; the last epoch has one", 1)
    group.add_argument(
        "--stop_on_collapse",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="end the run where it warns of a collapse (no)",
    )
    group.add_argument(
        "--profile", action="store_true", help="say at the end where the time of the epochs went"
    )
    group.add_argument(
        "--show_views", action="store_true", help="draw what the network would see, and exit"
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="statistics, pictures and features for it too"
    )
    utils.run_flags(parser)

    args, given = parser.parse(argv)
    if args.data_name not in data.DATA_NAMES:
        parser.error(f"--data_name {args.data_name}: choose one of {', '.join(data.DATA_NAMES)}")
    usual = {"textures": "short", "imagenet": "imagenet", "webdataset": "imagenet"}
    args.recipe = args.recipe or usual.get(args.data_name, "cifar")
    if args.recipe not in RECIPES:
        parser.error(f"--recipe {args.recipe}: choose one of {', '.join(RECIPES)}")
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.warmup_epochs >= args.epochs:
        parser.error(
            f"--warmup_epochs {args.warmup_epochs:g}: must be below --epochs {args.epochs}"
        )
    if args.show_views and args.resume:
        parser.error("--show_views: draws no run, but what its flags say: leave out --resume")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard: needs a package: pip install tensorboard")
    if args.resume and args.resume is not True:
        folder, name = utils.run_of(args.resume)
        args.out, args.name = given.get("out", folder), given.get("name", name)
    elif args.name is None:
        args.name = f"{args.feature_dim}_{args.k}_{args.batch_size}_{args.epochs}"
        if (args.data_name, args.arch) != ("cifar10", "resnet18"):
            args.name = f"{args.data_name}_{args.arch}_{args.name}"
    return args, parser, given


def rate(args, progress: float) -> float:
    """The learning rate `progress` epochs into the run."""
    peak = args.lr * args.batch_size / 256
    return peak * utils.schedule(progress, args.epochs, args.warmup_epochs)


def optimizer_of(net: model.SimSiam, args) -> torch.optim.SGD:
    """SGD over two groups, of which the predictor's may keep its learning rate."""
    return torch.optim.SGD(
        [
            {"params": net.encoder_parameters(), "fix_lr": False},
            {
                "params": [p for p in net.predictor.parameters() if p.requires_grad],
                "fix_lr": args.fix_pred_lr,
            },
        ],
        lr=args.lr * args.batch_size / 256,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )


def train(net, optimizer, loader, views, epoch, start, sums, args, amp, after, mark=utils.unmarked):
    """One epoch (paper, Algorithm 1) from step `start` on; `after(step)` each step.

    Adds to `sums`: the loss, the std of z (of each rank's images), 1 a step while all losses were
    finite, and the std again, for who watches shorter times than an epoch.
    `mark` is told what was just done, for --profile.
    """
    net.train()
    peak = args.lr * args.batch_size / 256
    for step, (images,) in loader.epoch(epoch, start):
        mark("loading")
        views.seed(epoch, step, loader.number(step))
        looks = [views(images) for _ in range(loader.looks)]  # the same pixels, two looks
        mark("views")
        lr = rate(args, epoch + step / len(loader))
        for group in optimizer.param_groups:
            group["lr"] = peak if group["fix_lr"] else lr
        with amp:
            loss, z = net(*looks)
        mark("forward")
        optimizer.zero_grad()
        loss.backward()
        mark("backward")
        both = torch.stack([loss.detach(), utils.collapse_std(z)])
        utils.mean_of_ranks(both)
        sums[:2] += both  # stays on the device: no sync a step
        sums[3] += both[1]
        finite = sums[0].isfinite().float()
        sums[2] += finite
        optimizer.found_inf = 1 - finite  # the fused step leaves a loss that is not finite out
        optimizer.step()
        mark("optimizer")
        after(step)


def monitor(net, views, images: data.Data, args, amp) -> dict:
    """Columns of the statistics: effective rank of the bank and, with labels, kNN accuracy."""
    utils.buffers_of_first(net)
    bank = utils.features(net.backbone, views.plain, images.train_images, amp)
    row = {"rank": utils.effective_rank(bank)}
    if images.test_images is not None:
        queries = utils.features(net.backbone, views.plain, images.test_images, amp)
        row["test_acc@1"], row["test_acc@5"] = knn_accuracy(bank, queries, images, args)
    return row


def knn_accuracy(bank, queries, images: data.Data, args) -> tuple[float, float]:
    """The bank is the training set, or --bank_size of it; all test images are scored."""
    return utils.accuracy(vote(bank, queries, images, args), images.test_labels)


def vote(bank, queries, images: data.Data, args) -> torch.Tensor:
    """The kNN's ranking of classes for each of the queries, int64, M x (up to 5)."""
    voters = images.train_labels >= 0  # STL-10's unlabelled images cannot vote
    bank, labels = bank[voters], images.train_labels[voters]
    mine = queries[utils.share(len(queries))]
    ranking = utils.knn(bank, labels, mine, args.k, args.temperature)
    return utils.gathered(ranking, len(queries))


def raw_pixels_accuracy(views, images: data.Data, args, amp) -> float:
    """kNN top-1 without any encoder."""
    pixels = utils.raw_pixels(args.image_size)
    images = images.at_most(utils.PIXELS_OF, args.seed)
    parts = (images.train_images, images.test_images)
    bank, queries = (utils.features(pixels, views.plain, part, amp) for part in parts)
    return knn_accuracy(bank, queries, images, args)[0]


def main(argv: list[str] | None = None) -> None:
    args, parser, given = parse_args(argv)
    with utils.joined(args, parser):
        if args.show_views:
            show_views(args, parser)
        else:
            with utils.one_writer(os.path.join(args.out, args.name), parser):
                pretrain(args, parser, given)


def load_images(args) -> data.Data:
    """The data set of a run. Sets --image_size where the images give it. Raises as `data.load`."""
    load = (args.data_name, args.data_root, args.image_size, args.num_workers, args.bad_images)
    images = utils.from_first(lambda: data.load(*load))
    if args.train_size is not None:
        images = images.subset(args.train_size, args.seed)
    args.image_size = args.image_size or images.train_images.shape[-1]
    return images


def make_views(args) -> data.Views:
    """The views of a run."""
    return data.Views(
        args.image_size,
        args.mean,
        args.std,
        blur_p=args.blur_p,
        seed=args.seed,
        share=utils.share,
    )


def show_views(args, parser: utils.Parser) -> None:
    """`<run>_views.png`: two views of a few images, as the network gets them; trains nothing."""
    picture = os.path.join(args.out, f"{args.name}_views.png")
    with parser.bad_input():
        os.makedirs(args.out, exist_ok=True)
        images, views = load_images(args).train_images, make_views(args)
        views.share = data.whole  # also of ranks, whose first one draws
        images = images[spread(len(images), 8)]
        places = torch.arange(len(images))
        loader = data.Loader([images, places], len(images), args.seed, views=views)
        _, (batch, places) = next(loader.epoch(0))
        shown = [torch.cat(list(images.split(512)))[places]]
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (views.mean, views.std))
        shown += [(views(batch) * std + mean).mul(255).round().byte() for _ in range(2)]
        with utils.whole_file(picture) as file:
            title = f"{utils.data_label(args)}: what the network sees of each image"
            figures.sheet(tiles(shown), ("image", "view 1", "view 2"), title, file)
    utils.say(f"wrote {picture}")


def spread(number: int, most: int) -> torch.Tensor:
    """The places of at most `most` out of `number`, evenly apart."""
    return torch.linspace(0, number - 1, min(number, most)).long()


def tiles(columns: list[torch.Tensor]) -> np.ndarray:
    """Columns of images, N x 3 x H x W of uint8 each -> N x columns x H x W x 3, for `figures`."""
    return torch.stack(columns, 1).permute(0, 1, 3, 4, 2).cpu().numpy()


def draw(run: str, history: list[dict], net, views, images: data.Data, args, amp, board=None):
    """Pictures of a run and of what its encoder has learned.

    `<run>_curves.png`, `<run>_neighbours.png`, `<run>_embedding.png` and, with test labels,
    `<run>_confusion.png` (of the kNN). Queries are test images; without them, training images.
    `board`: a SummaryWriter that gets them too, or None.
    """
    bank = utils.features(net.backbone, views.plain, images.train_images, amp)
    scored = images.test_images is not None
    asked, labels = images.test_images, images.test_labels
    queries = utils.features(net.backbone, views.plain, asked, amp) if scored else bank
    if not scored:
        asked, labels = images.train_images, images.train_labels
    ranking = vote(bank, queries, images, args) if scored else None
    if utils.rank() > 0:
        return
    known = bool((labels >= 0).all())

    @contextlib.contextmanager
    def picture(name: str) -> Iterator[IO[bytes]]:
        with utils.whole_file(f"{run}_{name}.png") as file:
            yield file
        if board:
            pixels = np.asarray(Image.open(f"{run}_{name}.png").convert("RGB"))
            board.add_image(name, pixels, len(history) - 1, dataformats="HWC")

    with picture("curves") as file:
        figures.curves({args.name: history}, file)

    chosen = spread(len(queries), 8).to(bank.device)
    similarity = queries[chosen] @ bank.T
    if not scored:
        similarity[torch.arange(len(chosen), device=bank.device), chosen] = -2  # itself
    similarity, nearest = similarity.topk(min(8, len(bank) - (not scored)))
    shown = [asked[chosen], *(images.train_images[column] for column in nearest.T)]
    shown = [torch.cat(list(part.split(512))) for part in shown]
    right = (images.train_labels[nearest] == labels[chosen][:, None]).cpu().numpy()
    with picture("neighbours") as file:
        figures.neighbours(
            tiles(shown),
            similarity.cpu().numpy(),
            right if known else None,
            [images.classes[i] if known else "" for i in labels[chosen].tolist()],
            f"{args.name}: nearest neighbours",
            file,
        )

    chosen = spread(len(queries), 2000).to(bank.device)
    names = [images.classes[i] for i in labels[chosen].tolist()] if known else None
    with picture("embedding") as file:
        title = f"{args.name}: t-SNE of {len(chosen)} {'test' if scored else 'training'} images"
        figures.embedding(queries[chosen].cpu().numpy(), names, images.classes, title, file)
    if board:
        small = min(64, args.image_size)  # TensorBoard shows them all in one image of 8192 pixels
        thumbnails = [F.adaptive_avg_pool2d(x / 255, small) for x in asked[chosen].split(512)]
        board.add_embedding(queries[chosen], names, torch.cat(thumbnails), len(history) - 1)
    if scored:
        matrix = utils.confusion_matrix(labels, ranking[:, 0], len(images.classes))
        with picture("confusion") as file:
            figures.confusion(matrix, images.classes, f"{args.name}: kNN", file)


def pretrain(args: argparse.Namespace, parser: utils.Parser, given: dict) -> None:
    """A run from its set-up to its last file."""
    run = os.path.join(args.out, args.name)
    with parser.bad_input():
        found = utils.from_first(lambda: utils.earlier(run, args))
        if found:
            path, checkpoint = found
            args = resumed(path, checkpoint, args, parser, given)
        each, rest = divmod(args.batch_size, utils.ranks())
        if rest or each < 2:
            raise ValueError(
                f"--batch_size {args.batch_size}: is cut among {utils.ranks()} ranks: give a "
                "multiple of it, of two images a rank at least"
            )
        device, amp = utils.set_up(args)
        if found:
            with utils.about(path):
                net = model.pretrained(checkpoint)
        else:
            torch.manual_seed(args.seed)
            net = model.simsiam(vars(args))
            if args.init:
                with utils.about(f"--init {args.init}"):
                    for note in model.initialise(net, args.init):
                        utils.say(f"{args.init}: {note}")
        images = load_images(args)
        images_crc = data.crc(images.train_images)
        if found and checkpoint.get("images_crc", images_crc) != images_crc:
            raise ValueError(f"--data_root {args.data_root}: not the images that {path} began with")
        images, views = images.to(device), make_views(args)
        loader = data.Loader(
            [images.train_images], args.batch_size, args.seed, False, views, net.looks, utils.share
        )
        watched = images
        if args.bank_size is not None:
            watched = images.subset(args.bank_size, args.seed, "--bank_size")
        params, flops = model.params_and_flops(net, args.image_size)
        net.to(device, memory_format=torch.channels_last)
        optimizer = optimizer_of(net, args)
        if found:
            with utils.about(path):
                utils.restore(optimizer, checkpoint, net)
        utils.list_bad_images(run, images.bad)
    utils.say(
        f"{run}: SimSiam {args.arch}, d = {args.feature_dim}: {params / 1e6:.2f}M parameters, "
        f"{flops / 1e6:.2f}M multiply-adds an image (thop's FLOPs), on {device}\n"
        f"{args.data_name}: {len(images.train_images)} training images, "
        f"{0 if images.test_images is None else len(images.test_images)} test images, "
        f"{len(images.classes)} classes, {args.image_size} pixels"
    )
    if args.ddp:
        utils.say(
            f"ranks: {utils.ranks()}, {each} images each a step; whatever their number, lr is "
            f"{args.lr:g} x {args.batch_size} / 256 = {rate(args, args.warmup_epochs):g}"
        )

    def collapsed(epoch: int, step: int, std: float, rank: float | None = None) -> bool:
        """Whether a collapse is seen for the first time in the run; says so, and what to try."""
        least = utils.least_std(args.bn, each)
        found = utils.collapse(least, std, rank, history[0]["rank"], net.features)
        if found is None or sums[4] or any("collapse" in row for row in history):
            return False
        few = watched.train_images[spread(len(watched.train_images), 256)]
        few = torch.cat(list(few.split(256)))
        causes = utils.likely_causes(args, RECIPES[args.recipe]["lr"], few)
        what, advice = found
        if causes:
            advice = f"Likely: {'; '.join(causes)}"
        utils.say(f"warning: collapse in epoch {epoch + 1}, step {step}: {what}. {advice}.")
        return True

    def stop_on_collapse() -> None:
        if args.stop_on_collapse and (sums[4] or any("collapse" in row for row in history)):
            raise utils.RunError(
                f"--stop_on_collapse: ended, and {run}_model.pth is from here. To go on all the "
                "same: --resume --no-stop_on_collapse"
            )

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
        )
        keeper.kept()

    def after(step: int) -> None:
        seen = progress(step, sums[:2])
        due = keeper.due()
        if (seen or due or step + 1 == len(loader)) and not sums[0].isfinite():
            at = int(sums[2])
            raise utils.RunError(
                f"the loss is not finite in epoch {epoch + 1}, step {at + 1}, at lr "
                f"{rate(args, epoch + at / len(loader)):.3g}; that step was not applied, and "
                f"{run}_model.pth is from before. {utils.DIVERGED}"
            )
        if (step + 1) % utils.WINDOW == 0 or step + 1 == len(loader):
            std = sums[3].item() / (step % utils.WINDOW + 1)
            sums[3] = 0
            if collapsed(epoch, step + 1, std):
                sums[4] = step + 1
                due = due or args.stop_on_collapse
        if due:
            save(epoch, step + 1)
            mark("checkpoint")
            stop_on_collapse()

    smaller = (
        f"python main.py --data_name {args.data_name} --data_root {args.data_root} --recipe short"
        " --epochs 5"
    )
    trained = utils.for_training(net, args.compile, args.image_size)
    keeper = utils.Keeper(args.checkpoint_minutes, good=found and path == f"{run}_model.pth")
    sums, begun, start = torch.zeros(5, device=device), time.perf_counter(), 0
    if found:
        history, start = checkpoint["history"], checkpoint["step"]
        if start:
            saved = checkpoint["sums"]  # of before there were five: three
            sums[: len(saved)], begun = saved, begun - checkpoint["seconds"]
        utils.say(
            f"resumed after epoch {len(history) - 1} of {args.epochs}"
            + f" and step {start} of {len(loader)}" * (start > 0)
            + ": the run is finished" * (len(history) > args.epochs)
        )
    else:
        history = [{"epoch": 0} | monitor(net, views, watched, args, amp)]
        if images.test_images is None:
            utils.say("no labelled test images: no kNN; std and rank are watched")
        else:
            raw = history[0]["raw_acc@1"] = raw_pixels_accuracy(views, watched, args, amp)
            utils.say(
                f"kNN top-1 before training: raw pixels {raw:.1f} %, "
                f"untrained encoder {history[0]['test_acc@1']:.1f} %"
            )
        save(0)
        utils.remove(f"{run}_model.prev.pth")  # --overwrite: another run's
        begun = time.perf_counter()
    mark = utils.Marks(device) if args.profile else utils.unmarked
    board = None
    if args.tensorboard and utils.rank() == 0:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(f"{run}_tensorboard", purge_step=len(history))
    with keeper:
        for epoch in range(len(history) - 1, args.epochs):
            stop_on_collapse()
            with utils.Progress(
                epoch, args, len(loader), ("loss", "std"), smaller, start
            ) as progress:
                train(trained, optimizer, loader, views, epoch, start, sums, args, amp, after, mark)
            seconds = time.perf_counter() - begun
            loss, std = (sums[:2] / len(loader)).tolist()
            row = {
                "epoch": epoch + 1,
                "lr": rate(args, epoch + 1 - 1 / len(loader)),
                "train_loss": loss,
                "std": std,
                "images_per_sec": len(loader) * args.batch_size / seconds,
            }
            if (epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs:
                with keeper.breaking_off(save, epoch, len(loader)):
                    row |= monitor(net, views, watched, args, amp)
                mark("monitor")
            row["seconds"] = time.perf_counter() - begun
            if sums[4] or collapsed(epoch, len(loader), std, row.get("rank")):
                row["collapse"] = epoch * len(loader) + (int(sums[4]) or len(loader))
            history.append(row)
            for name in utils.STATISTICS if board else ():
                if name in row:
                    board.add_scalar(name, row[name], epoch + 1)
                    board.flush()
            sums, begun, start = torch.zeros_like(sums), time.perf_counter(), 0
            with utils.tried_again():
                utils.write_csv(f"{run}_statistics.csv", history, utils.STATISTICS)
            save(epoch + 1)
            mark("checkpoint")
            utils.say(
                f"epoch {epoch + 1}/{args.epochs} loss {loss:.3f} std {std:.2f}"
                + (f" rank {row['rank']:.1f}" if "rank" in row else "")
                + (f" kNN top-1 {row['test_acc@1']:.1f} %" if "test_acc@1" in row else "")
                + f" ({row['images_per_sec']:.0f} images/s, {row['seconds']:.0f} s)"
            )
    if args.profile:
        utils.say(mark.table())
    with utils.last_try():
        if args.pictures:
            draw(run, history, net, views, watched, args, amp, board)
        report(run, args, history, params, flops, device)
        if board:
            board.close()
        utils.remove(f"{run}_model.prev.pth")  # the run is complete


def resumed(path: str, checkpoint: dict, args, parser, given: dict) -> argparse.Namespace:
    """The arguments of a checkpoint, looked through as the command line is, and what is new.

    Raises ValueError where they, or the command's, cannot be gone on with.
    """
    saved = parse_args(parser.as_argv(checkpoint["args"]), prog=f"main.py: {path}")[0]
    with utils.about(path):
        model.encoder_arguments(checkpoint["args"])
    for name in ("mean", "std", "blur_p"):
        if checkpoint["args"].get(name) != getattr(saved, name):
            raise ValueError(f"{path}: its {name} is not that of the recipe {saved.recipe}")
    step, sums = checkpoint["step"], checkpoint.get("sums")
    sums_fit = utils.is_tensor(sums) and sums.shape in ((3,), (5,)) and bool(sums.isfinite().all())
    if (
        checkpoint["epoch"] != len(checkpoint["history"]) - 1
        or (step > 0 and not sums_fit)
        or type(checkpoint.get("seconds", 0.0)) is not float
    ):
        raise ValueError(f"{path}: is damaged, or not a checkpoint of this program")
    warming = checkpoint["epoch"] + (step > 0) <= saved.warmup_epochs or (
        checkpoint["epoch"] == step == 0
    )
    merged = utils.merged(saved, args, given, path, warming)
    if merged.epochs <= merged.warmup_epochs:
        raise ValueError(
            f"--epochs {merged.epochs}: must be above --warmup_epochs {merged.warmup_epochs:g}"
        )
    return merged


def report(run: str, args, history: list[dict], params: int, flops: int, device) -> None:
    """What a run leaves for people: the table, a row among the results."""
    utils.write_csv(f"{run}_statistics.csv", history, utils.STATISTICS)
    scored = [row["test_acc@1"] for row in history[1:] if "test_acc@1" in row]
    if scored:
        utils.add_result(
            os.path.join(args.out, "results.csv"),
            {
                "protocol": "KNN" + (f", bank of {args.bank_size}" if args.bank_size else ""),
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
    pictures = " and pictures" if args.pictures else ""
    utils.say(f"wrote {run}_model.pth, {run}_statistics.csv{pictures}")


if __name__ == "__main__":
    utils.run_command(main, data.BadImage)
