"""Image files in folders and CSV lists: which there are, of which classes, and a line that says so.

Nothing is decoded here.
"""

import collections
import csv
import fnmatch
import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from simsiam.runtime.files import printable
from simsiam.data.decode import IMAGE_EXTENSIONS

# Names of a folder's parts, in any case. Test images are scored with, or else validation images.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
# What systems leave in folders, besides files whose names begin with a dot.
SYSTEM_FILES = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}
# Where Kaggle's ImageNet has its train/ and val/, and the classes of the latter.
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
KAGGLE_SOLUTION, KAGGLE_VAL_PREFIX = "LOC_val_solution.csv", "ILSVRC2012_val"
NO_CLASSES_ADVICE = (
    "has no class folders: put each image into {place}/<class>/, or train without a test: "
    "--split_names {train}"
)
NO_SOLUTION_ADVICE = (
    f"are ImageNet's, whose classes are in {KAGGLE_SOLUTION} of Kaggle's archive: put that file beside "
    "the folder, or each image into {place}/<class>/, or train without a test: "
    "--split_names {train}"
)


class ImageList(NamedTuple):
    """Image files, each with its class or None; and how many files were left out, by kind."""

    files: list[Path]
    labels: list[str | None]
    skipped: collections.Counter


# ---- one folder ---------------------------------------------------------------------------------


def is_excluded(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    """Whether a pattern is of a file: of its path below `root`, or of a name in that, in any case.

    Patterns are the shell's, with *, ? and [], where * may stand for slashes, too.
    """
    inner = os.path.relpath(path, root).replace(os.sep, "/").lower()
    names = (inner, *inner.split("/"))
    return any(fnmatch.fnmatchcase(name, one.lower()) for one in patterns for name in names)


def drop_excluded(listing: ImageList, root: Path, patterns: Sequence[str]) -> ImageList:
    """A listing without the files that are `is_excluded`. Raises FileNotFoundError if none is left."""
    if not patterns:
        return listing
    left = [not is_excluded(path, root, patterns) for path in listing.files]
    if not any(left):
        raise FileNotFoundError(f"--exclude: leaves no image of {root}")
    files, labels = (list(itertools.compress(part, left)) for part in listing[:2])
    number = len(left) - len(files)
    return ImageList(files, labels, listing.skipped + collections.Counter(excluded=number))


def list_folder(folder: Path, labelled: bool) -> ImageList:
    """Image files below `folder`, sorted, each with its class: the first folder's name, or None.

    Links are followed, but no folder is read twice, and none that `folder` lies in. Raises
    FileNotFoundError where there are no images.
    """
    files, skipped = [], collections.Counter()
    seen = {inode(above) for above in folder.resolve().parents}
    waiting, links = [folder], []
    while waiting or links:
        # Links last: a folder is read where it lies, not where a link to it does.
        place = waiting.pop() if waiting else links.pop(links.index(min(links)))
        if inode(place) in seen:
            skipped["links to folders that are read already"] += 1
            continue
        seen.add(inode(place))
        for entry in visible_entries(place):
            if is_folder(entry):
                (links if entry.is_symlink() else waiting).append(Path(entry.path))
            elif is_special(entry):
                skipped["pipes or devices"] += 1
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                files.append(Path(entry.path))
            else:
                end = os.path.splitext(entry.name)[1].lower()
                skipped[end if re.fullmatch(r"\.\w{1,8}", end) else "without an ending"] += 1
    if not files:
        found = f"; there are {format_counts(skipped)}" if skipped else ""
        raise FileNotFoundError(f"{folder}: there are no images ({', '.join(IMAGE_EXTENSIONS)}){found}")
    files.sort()
    parts = [path.relative_to(folder).parts for path in files]
    labels = [printable(part[0]) if labelled and len(part) > 1 else None for part in parts]
    return ImageList(files, labels, skipped)


def visible_entries(folder: Path) -> Iterator[os.DirEntry]:
    """The entries of a folder, but for what systems hide there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.name.lower() not in SYSTEM_FILES:
                yield entry


def is_folder(entry: os.DirEntry) -> bool:
    """Whether it is one, or a link to one; a link that leads nowhere, or round, is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_special(entry: os.DirEntry) -> bool:
    """Whether it is a FIFO, a socket or a device, that nobody should open."""
    if entry.is_symlink():
        return os.path.exists(entry.path) and not os.path.isfile(entry.path)
    return not entry.is_file()


def inode(folder: Path) -> tuple[int, int]:
    """What a folder has in common with the links to it."""
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def format_counts(skipped: collections.Counter) -> str:
    """Such as "9 .gif, 3 without an ending": the most common first, at most six kinds."""
    kinds = sorted(skipped.items(), key=lambda kind: (-kind[1], kind[0]))
    told = [f"{number:,} {what}" for what, number in kinds[:6]]
    rest = sum(number for _, number in kinds[6:])
    return ", ".join(told + [f"{rest:,} others"] * (rest > 0))


# ---- a CSV list ---------------------------------------------------------------------------------


def read_csv_rows(path: Path, usual: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row of a CSV table, and the number of its last line. Names of columns are lower case.

    Where the first row begins with the name of an image, there is no header: the columns are the
    `usual` ones, as many as there are. Raises ValueError, naming the file and the line, for what is
    no such table.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: is not in UTF-8: save the list in it") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        if usual and header and header[0].endswith(IMAGE_EXTENSIONS) and len(header) <= len(usual):
            reader = csv.reader(io.StringIO(text, newline=""))
            header = list(usual[: len(header)])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have one name")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: has {len(row)} fields, and the header "
                    f"{len(header)}: quote a field that has a comma"
                )
            if row:
                yield reader.line_num, dict(zip(header, map(str.strip, row), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def list_csv(path: Path) -> ImageList:
    """The files and labels of a CSV list (columns `path`, optional `label`; or without a header).

    Raises FileNotFoundError, or ValueError that names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--data_root {path}: there is no such list")
    files, labels = [], []
    for line, row in read_csv_rows(path, ("path", "label")):
        if "path" not in row:
            break
        if not row["path"]:
            raise ValueError(f"{path}, line {line}: has no path")
        files.append(path.parent / row["path"])
        labels.append(row.get("label") or None)
    if not files:
        raise ValueError(
            f"{path}: needs a header with a column `path`, and at least one row; commas between "
            "the columns"
        )
    return ImageList(files, labels, collections.Counter())


# ---- a folder's parts ---------------------------------------------------------------------------


class FolderListing(NamedTuple):
    """The images to train on and those to score with, if there are; and a line that says so."""

    train: ImageList
    test: ImageList | None
    summary: str
    has_splits: bool  # whether these are parts of a folder


def find_images(
    root: Path,
    split_names: list[str] | None = None,
    scored: bool = True,
    exclude: Sequence[str] = (),
) -> FolderListing:
    """The images of `root`, a folder or a CSV list; `datasets.load_folder` says which there may be.

    `split_names`: the folder or list within `root` of the images to train on and, if there are two,
    of those to score with. Where nothing is to be `scored`, these need no classes, and a folder
    without parts has the folders in it for classes. Several places, joined as by `split_roots`, are one
    data set, whose classes of one name are one. What is `is_excluded` is left out. Raises
    FileNotFoundError or ValueError, naming the file.
    """
    roots = split_roots(root)
    if len(roots) > 1:
        return find_in_roots([Path(one) for one in roots], split_names, scored, exclude)
    if root.suffix.lower() == ".csv" and not root.is_dir():
        listing = drop_excluded(list_csv(root), root.parent, exclude)
        return FolderListing(listing, None, summarize(root, [("", listing)]), False)
    if not root.is_dir():
        raise FileNotFoundError(f"--data_root {root}: there is no such folder or .csv list")
    name = root
    root, (train, *tests) = find_splits(root, split_names)
    if train is None:
        listing = drop_excluded(list_folder(root, labelled=not scored), root, exclude)
        line = summarize(name, [("", listing)]) + (explain_no_classes(root) if scored else "")
        return FolderListing(listing, None, line, False)
    listing, test = drop_excluded(list_split(train), root, exclude), None
    parts = [(display_name(root, train), listing)]
    if tests and (any(listing.labels) or not scored):
        test = drop_excluded(list_test_split(tests[0], train, scored), root, exclude)
        parts.append((display_name(root, tests[0]), test))
    line = summarize(name, parts)
    read = [place for place, _ in parts]
    unread = [f"{printable(entry.name)}/" for entry in visible_entries(root) if is_folder(entry)]
    unread = sorted(set(unread) - set(read))
    if unread and split_names is None:
        line += f"; not read: {', '.join(unread[:5])}" + ", ..." * (len(unread) > 5)
    return FolderListing(listing, test, line, True)


def split_roots(root: str | Path) -> list[str]:
    """The places that a --data_root is of: what is between the colons (as in PATH), or itself."""
    return [str(root)] if os.path.exists(root) else str(root).split(os.pathsep)


def find_in_roots(
    roots: list[Path], split_names: list[str] | None, scored: bool, exclude: Sequence[str]
) -> FolderListing:
    """What `find_images` finds in several places, together."""
    twice = [root for i, root in enumerate(roots) if root.resolve() in map(Path.resolve, roots[:i])]
    if twice:
        raise ValueError(f"--data_root: {twice[0]} is named twice")
    parts = [find_images(root, split_names, scored, exclude) for root in roots]
    tests = [part.test for part in parts if part.test]
    line = "; ".join(part.summary for part in parts)
    train = concatenate([part.train for part in parts])
    return FolderListing(train, concatenate(tests) if tests else None, line, any(p.has_splits for p in parts))


def concatenate(listings: list[ImageList]) -> ImageList:
    """Several listings as one."""
    files, labels, skipped = zip(*listings, strict=True)
    one = itertools.chain.from_iterable
    return ImageList(list(one(files)), list(one(labels)), sum(skipped, collections.Counter()))


def find_splits(root: Path, split_names: list[str] | None) -> tuple[Path, list[Path | None]]:
    """The folder of the parts, which Kaggle's ImageNet has deeper within, and the parts.

    Of the latter the first is None where there is none to train on.
    """
    if split_names:
        parts = [root / name for name in split_names]
        for place in parts:
            if not (place.is_dir() or (place.suffix.lower() == ".csv" and place.is_file())):
                raise FileNotFoundError(
                    f"--split_names {place.name}: {root} has no such folder or .csv list"
                )
        return root, parts
    train = find_split(root, "train")
    for inner in () if train else KAGGLE_FOLDERS:
        if (root / inner / "train").is_dir():
            root = root / inner
            train = root / "train"
            break
    tests = []
    for kind in ("test", "val") if train else ():
        place = find_split(root, kind)
        if place:
            tests = [place]
            if has_classes(place):
                break
    return root, [train, *tests]


def find_split(root: Path, kind: str) -> Path | None:
    """The folder or list of a part, one of SPLITS; a folder of classes rather than a list.

    Raises ValueError where two might be meant.
    """
    found = [Path(entry.path) for entry in visible_entries(root)]
    folders = [path for path in found if path.is_dir() and path.name.lower() in SPLIT_NAMES[kind]]
    lists = [
        path
        for path in found
        if path.suffix.lower() == ".csv" and path.stem.lower() in SPLIT_NAMES[kind] and path.is_file()
    ]
    fitting = folders if len(folders) == 1 and has_classes(folders[0]) else sorted(folders + lists)
    if len(fitting) > 1:
        names = " and ".join(display_name(root, path) for path in fitting)
        raise ValueError(
            f"--data_root {root}: {names} may both be meant: say which by --split_names TRAIN "
            "[TEST], such as --split_names " + fitting[0].name
        )
    return fitting[0] if fitting else None


def has_classes(place: Path) -> bool:
    """Whether a part has labels: a list, a folder with folders in it, or one of ImageNet's."""
    return place.is_file() or any(map(is_folder, visible_entries(place))) or find_kaggle_solution(place) is not None


def find_kaggle_solution(val: Path) -> Path | None:
    """The table of the classes of ImageNet's validation images, if it lies by their folder."""
    some = (entry.name for entry in itertools.islice(visible_entries(val), 9))
    if not any(name.startswith(KAGGLE_VAL_PREFIX) for name in some):
        return None
    above = (val, *list(val.resolve().parents)[:4])
    return next((folder / KAGGLE_SOLUTION for folder in above if (folder / KAGGLE_SOLUTION).is_file()), None)


def list_split(place: Path) -> ImageList:
    """The files of a part, with their classes."""
    return list_csv(place) if place.is_file() else list_folder(place, labelled=True)


def list_test_split(place: Path, train: Path, scored: bool) -> ImageList:
    """The files of a part to score with: if `scored`, ValueError where they have no classes."""
    listing = list_split(place)
    if any(listing.labels):
        return listing
    classes = find_kaggle_solution(place)
    if classes:
        return listing._replace(labels=read_kaggle_labels(listing.files, classes))
    if not scored:
        return listing
    imagenet = listing.files[0].name.startswith(KAGGLE_VAL_PREFIX)
    advice = f"{place}: its images " + NO_SOLUTION_ADVICE if imagenet else f"{place}: " + NO_CLASSES_ADVICE
    raise ValueError(advice.format(place=place.name, train=train.name))


def read_kaggle_labels(files: list[Path], classes: Path) -> list[str | None]:
    """The class (wnid) of each of ImageNet's validation images, by the table of Kaggle's."""
    known = {}
    for line, row in read_csv_rows(classes):
        if not row.get("imageid") or not row.get("predictionstring"):
            raise ValueError(f"{classes}, line {line}: needs an ImageId and a PredictionString")
        known[row["imageid"]] = row["predictionstring"].split()[0]
    return [known.get(path.stem) for path in files]


def has_images(root: Path) -> bool:
    """Whether `root` is a list, or there are images or lists in it, among its first files."""
    if root.is_file():
        return root.suffix.lower() == ".csv"
    names = (name for _, _, names in os.walk(root) for name in names)
    wanted = (*IMAGE_EXTENSIONS, ".csv")
    return any(name.lower().endswith(wanted) for name in itertools.islice(names, 1000))


# ---- the line -----------------------------------------------------------------------------------


def display_name(root: Path, place: Path) -> str:
    """A part's name, a slash after a folder's."""
    return printable(os.path.relpath(place, root)) + "/" * place.is_dir()


def summarize(root: Path, parts: list[tuple[str, ImageList]]) -> str:
    """What was found in the parts, each with its name: to train on and, if two, to score with."""
    classes = len(set(parts[0][1].labels) - {None})
    noun = "class" if classes == 1 else "classes"
    told = [f"{printable(root.resolve().name)}: {classes or 'no'} {noun}"]
    skipped = collections.Counter()
    for kind, (place, listing) in zip(("training", "test"), parts, strict=False):
        told.append(f"{len(listing.files):,} {f'{kind} images in {place}' if place else 'images'}")
        without = listing.labels.count(None)
        if classes and without:
            told[-1] += f" ({without:,} without a class)"
        skipped += listing.skipped
    number = skipped.total()
    noun = "file" if number == 1 else "files"
    return ", ".join(told) + f"; left out {number:,} {noun}: {format_counts(skipped)}" * (number > 0)


def explain_no_classes(root: Path) -> str:
    """Why a folder's images have no classes, as the end of a line."""
    folders = sum(map(is_folder, visible_entries(root)))
    if folders:
        return f"; its folders are no classes, unless they are moved to {root.name}/train/"
    return "; classes would be folders in train/"
