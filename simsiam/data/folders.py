"""List the image files of folders and CSV lists with their classes; nothing is decoded here."""

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

from simsiam.data.decode import IMAGE_EXTENSIONS
from simsiam.runtime.files import printable

# Names of the splits of a folder, in any case. "val" is used if there is no labelled "test".
SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
# Files and folders of operating systems; names that begin with a dot are ignored as well.
SYSTEM_FILES = {"__macosx", "@eadir", "thumbs.db", "desktop.ini"}
# Where Kaggle's ImageNet has its train/ and val/, and the classes of the images in val/.
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
KAGGLE_SOLUTION, KAGGLE_VAL_PREFIX = "LOC_val_solution.csv", "ILSVRC2012_val"


class ImageList(NamedTuple):
    """Image files, the class of each or None, and the number of skipped files by kind."""

    files: list[Path]
    labels: list[str | None]
    skipped: collections.Counter


class FolderListing(NamedTuple):
    """Training images, test images if any, a line that summarizes them, and whether of splits."""

    train: ImageList
    test: ImageList | None
    summary: str
    has_splits: bool


# ---- one folder ---------------------------------------------------------------------------------


def list_folder(folder: Path, labelled: bool) -> ImageList:
    """List the images below `folder`, sorted; if `labelled`, their first folder is their class.

    Follows links, but reads no folder twice and none that contains `folder`. Raises
    FileNotFoundError if there are no images.
    """
    files, skipped = [], collections.Counter()
    visited = set(folder.resolve().parents)
    folders, links = [folder], []
    while folders or links:
        # Links come last, so that a folder is listed under its own path and not that of a link.
        place = folders.pop() if folders else links.pop(links.index(min(links)))
        if place.resolve() in visited:
            skipped["links to folders already read"] += 1
            continue
        visited.add(place.resolve())
        for entry in visible_entries(place):
            if is_folder(entry):
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            # A broken link counts as a file, and is reported when it is read.
            elif not is_file(entry) and os.path.exists(entry.path):
                skipped["pipes or devices"] += 1
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                files.append(Path(entry.path))
            else:
                end = os.path.splitext(entry.name)[1].lower()
                skipped[end if re.fullmatch(r"\.\w{1,8}", end) else "without extension"] += 1
    if not files:
        others = f"; it has {format_counts(skipped)}" if skipped else ""
        raise FileNotFoundError(f"{folder}: no images ({', '.join(IMAGE_EXTENSIONS)}){others}")
    files.sort()
    parts = [path.relative_to(folder).parts for path in files]
    labels = [printable(part[0]) if labelled and len(part) > 1 else None for part in parts]
    return ImageList(files, labels, skipped)


def visible_entries(folder: Path) -> Iterator[os.DirEntry]:
    """Iterate over a folder without hidden and system files."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name[0] != "." and entry.name.lower() not in SYSTEM_FILES:
                yield entry


def is_folder(entry: os.DirEntry) -> bool:
    """Return True for a folder or a link to one; False for a broken or circular link."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_file(entry: os.DirEntry) -> bool:
    """Return True for a file or a link to one."""
    return entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)


def drop_excluded(images: ImageList, root: Path, patterns: Sequence[str]) -> ImageList:
    """Drop the files whose path below `root`, or a name in it, matches a shell pattern.

    Ignores case; a * matches slashes, too. Raises FileNotFoundError if no file is left.
    """
    if not patterns:
        return images
    keep, patterns = [], [pattern.lower() for pattern in patterns]
    for path in images.files:
        inner = os.path.relpath(path, root).replace(os.sep, "/").lower()
        names = (inner, *inner.split("/"))
        keep.append(not any(fnmatch.fnmatchcase(n, p) for p in patterns for n in names))
    if not any(keep):
        raise FileNotFoundError(f"--exclude {' '.join(patterns)}: leaves no image of {root}")
    files, labels = (list(itertools.compress(column, keep)) for column in images[:2])
    excluded = collections.Counter(excluded=len(keep) - len(files))
    return ImageList(files, labels, images.skipped + excluded)


# ---- a CSV list ---------------------------------------------------------------------------------


def read_csv_rows(
    path: Path, default_columns: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Iterate over the rows of a CSV file with their line numbers; column names are lower case.

    A file whose first row begins with the name of an image has no header: its columns are the
    first of `default_columns`. Raises ValueError naming the file and the line.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8: save the file as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        is_image = bool(header) and header[0].endswith(IMAGE_EXTENSIONS)
        if is_image and len(header) <= len(default_columns):
            reader = csv.reader(io.StringIO(text, newline=""))
            header = list(default_columns[: len(header)])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have the same name")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} fields, but the header has "
                    f"{len(header)}: quote fields with commas"
                )
            if row:
                yield reader.line_num, dict(zip(header, map(str.strip, row), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error


def list_csv(path: Path) -> ImageList:
    """List the images of a CSV file with the columns `path` and, optionally, `label`.

    Paths are relative to the file. Raises ValueError naming the line.
    """
    files, labels = [], []
    for line, row in read_csv_rows(path, ("path", "label")):
        if "path" not in row:
            break
        if not row["path"]:
            raise ValueError(f"{path}, line {line}: empty path")
        files.append(path.parent / row["path"])
        labels.append(row.get("label") or None)
    if not files:
        raise ValueError(
            f"{path}: needs a header with a column `path`, commas between columns, and a row"
        )
    return ImageList(files, labels, collections.Counter())


# ---- splits -------------------------------------------------------------------------------------


def find_images(
    root: Path,
    split_names: Sequence[str] | None = None,
    scored: bool = True,
    exclude: Sequence[str] = (),
) -> FolderListing:
    """List the images of `root`; `datasets.load_folder` describes what it may be.

    Several roots, joined as for `split_roots`, are one data set; equal class names are one class.
    `split_names`: the folders or lists in `root` with training and, optionally, test images.
    With `scored`, test images need classes; without, the folders in a root without splits are its
    classes. `exclude`: see `drop_excluded`. Raises FileNotFoundError or ValueError, naming the
    file.
    """
    roots = [Path(one) for one in split_roots(root)]
    resolved = [one.resolve() for one in roots]
    for i, one in enumerate(roots):
        if resolved[i] in resolved[:i]:
            raise ValueError(f"--data_root: {one} is given twice")
    listings = [find_in_root(one, split_names, scored, exclude) for one in roots]
    trains, tests, summaries, has_splits = zip(*listings, strict=True)
    tests = [test for test in tests if test]
    return FolderListing(
        concatenate(trains),
        concatenate(tests) if tests else None,
        "; ".join(summaries),
        any(has_splits),
    )


def split_roots(root: str | Path) -> list[str]:
    """Split a --data_root at its colons, as in PATH, unless it exists as it is."""
    return [str(root)] if os.path.exists(root) else str(root).split(os.pathsep)


def concatenate(lists: Sequence[ImageList]) -> ImageList:
    """Join several lists of images."""
    files, labels, skipped = zip(*lists, strict=True)
    chain = itertools.chain.from_iterable
    return ImageList(list(chain(files)), list(chain(labels)), sum(skipped, collections.Counter()))


def find_in_root(
    root: Path, split_names: Sequence[str] | None, scored: bool, exclude: Sequence[str]
) -> FolderListing:
    """List the images of one folder or CSV list: `find_images` of a single root."""
    is_list = root.suffix.lower() == ".csv" and root.is_file()
    if not is_list and not root.is_dir():
        raise FileNotFoundError(f"--data_root {root}: no such folder or .csv list")
    folder, train, test = (root.parent, None, None) if is_list else find_splits(root, split_names)
    if train is None:
        images = list_csv(root) if is_list else list_folder(folder, labelled=not scored)
        splits = [("", drop_excluded(images, folder, exclude))]
    else:
        images = drop_excluded(list_split(train), folder, exclude)
        splits = [(split_label(folder, train), images)]
        if test and (any(images.labels) or not scored):
            images = drop_excluded(list_test_split(test, train, scored), folder, exclude)
            splits.append((split_label(folder, test), images))
    summary = summarize(root, splits)
    if not is_list and not split_names:
        subfolders = filter(is_folder, visible_entries(folder))
        names = {f"{printable(entry.name)}/" for entry in subfolders}
        unread = sorted(names - {name for name, _ in splits})
        if unread and train:
            summary += f"; not read: {', '.join(unread[:5])}" + ", ..." * (len(unread) > 5)
        elif unread and scored:
            summary += f"; its folders become classes if moved to {folder.name}/train/"
    test_images = splits[1][1] if len(splits) > 1 else None
    return FolderListing(splits[0][1], test_images, summary, train is not None)


def find_splits(
    root: Path, split_names: Sequence[str] | None
) -> tuple[Path, Path | None, Path | None]:
    """Return the folder with the splits, its training split and its test split, or None.

    The folder is `root`, or deeper in Kaggle's ImageNet.
    """
    if split_names:
        splits = [root / name for name in split_names]
        for split in splits:
            if not (split.is_dir() or (split.suffix.lower() == ".csv" and split.is_file())):
                raise FileNotFoundError(
                    f"--split_names {split.name}: no such folder or .csv list in {root}"
                )
        return root, splits[0], splits[1] if len(splits) > 1 else None
    train = find_split(root, "train")
    for inner in () if train else KAGGLE_FOLDERS:
        if (root / inner / "train").is_dir():
            root = root / inner
            train = root / "train"
            break
    test = None
    for kind in ("test", "val") if train else ():
        split = find_split(root, kind)
        test = split or test
        if split and has_classes(split):
            break
    return root, train, test


def find_split(root: Path, kind: str) -> Path | None:
    """Return the folder or CSV list of a split named as in SPLIT_NAMES.

    A folder with classes takes precedence over a list. Raises ValueError if several match.
    """
    names = {name + extension for name in SPLIT_NAMES[kind] for extension in ("", ".csv")}
    paths = [Path(entry.path) for entry in visible_entries(root) if entry.name.lower() in names]
    matches = sorted(path for path in paths if (path.is_file if path.suffix else path.is_dir)())
    folders = [path for path in matches if path.is_dir()]
    if len(folders) == 1 and has_classes(folders[0]):
        matches = folders
    if len(matches) > 1:
        labels = " and ".join(split_label(root, path) for path in matches)
        raise ValueError(
            f"--data_root {root}: {labels} may both be the {kind} split: choose with --split_names "
            f"TRAIN [TEST], such as --split_names {matches[0].name}"
        )
    return matches[0] if matches else None


def has_classes(split: Path) -> bool:
    """Return True for a list, a folder with subfolders, and ImageNet's val/ with its solution."""
    return (
        split.is_file()
        or any(map(is_folder, visible_entries(split)))
        or find_kaggle_solution(split) is not None
    )


def list_split(split: Path) -> ImageList:
    """List the images of a split with their classes."""
    return list_csv(split) if split.is_file() else list_folder(split, labelled=True)


def list_test_split(split: Path, train_split: Path, scored: bool) -> ImageList:
    """List the images of the test split. Raises ValueError if `scored` and they have no classes."""
    images = list_split(split)
    if any(images.labels):
        return images
    solution = find_kaggle_solution(split)
    if solution:
        return images._replace(labels=read_kaggle_labels(images.files, solution))
    if not scored:
        return images
    reason = "has no class folders:"
    if images.files[0].name.startswith(KAGGLE_VAL_PREFIX):
        reason = f"needs {KAGGLE_SOLUTION} of Kaggle's archive: put that file beside the folder,"
    raise ValueError(
        f"{split}: {reason} move each image to {split.name}/<class>/, or train without test "
        f"images: --split_names {train_split.name}"
    )


def find_kaggle_solution(split: Path) -> Path | None:
    """Return the table of classes of ImageNet's validation images, in the folder or above it."""
    entries = itertools.islice(visible_entries(split), 9) if split.is_dir() else ()
    if not any(entry.name.startswith(KAGGLE_VAL_PREFIX) for entry in entries):
        return None
    parents = (split, *list(split.resolve().parents)[:4])
    paths = (folder / KAGGLE_SOLUTION for folder in parents)
    return next((path for path in paths if path.is_file()), None)


def read_kaggle_labels(files: list[Path], solution: Path) -> list[str | None]:
    """Return the class (WordNet ID) of each of ImageNet's validation images."""
    classes = {}
    for line, row in read_csv_rows(solution):
        if not row.get("imageid") or not row.get("predictionstring"):
            raise ValueError(f"{solution}, line {line}: needs ImageId and PredictionString")
        classes[row["imageid"]] = row["predictionstring"].split()[0]
    return [classes.get(path.stem) for path in files]


# ---- the summary --------------------------------------------------------------------------------


def split_label(root: Path, split: Path) -> str:
    """Return the name of a split, with a slash after a folder's."""
    return printable(os.path.relpath(split, root)) + "/" * split.is_dir()


def summarize(root: Path, splits: list[tuple[str, ImageList]]) -> str:
    """Summarize a root in a line: classes, images per split (training, then test), skipped files.

    `splits`: name and images; a root without splits has one named "".
    """
    classes = len(set(splits[0][1].labels) - {None})
    parts = [f"{classes} class" if classes == 1 else f"{classes} classes"] * (classes > 0)
    skipped = collections.Counter()
    for kind, (name, images) in zip(("training", "test"), splits, strict=False):
        part = f"{len(images.files):,} " + (f"{kind} images in {name}" if name else "images")
        unlabelled = images.labels.count(None)
        if classes and unlabelled:
            part += f" ({unlabelled:,} without a class)"
        parts.append(part)
        skipped += images.skipped
    line = f"{printable(root.resolve().name)}: {', '.join(parts)}"
    number = skipped.total()
    if number:
        line += f"; skipped {number:,} file{'s' * (number > 1)}: {format_counts(skipped)}"
    return line


def format_counts(counts: collections.Counter) -> str:
    """Format such as "9 .gif, 3 without extension": the six most frequent kinds first."""
    kinds = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    text = ", ".join(f"{number:,} {kind}" for kind, number in kinds[:6])
    return text + ", ..." * (len(kinds) > 6)
