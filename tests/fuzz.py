"""Break files of every format that is read, and see what the commands make of them.

python -m tests.fuzz --files 2000

Each file is a good one, or one with a program in it, that is broken in some places; then the
checksums of half of them are mended, so that the damage gets further. A command reads it in a child
process of bounded memory and time, which must end well, or with one line on stderr and exit code 1
or 2. An audit hook ends a child that calls a program, unpickles by name, compiles a text, opens a
connection, or writes outside of its --out; no other file may appear. A file that
ends otherwise is copied to fuzzed/.
"""

import argparse
import io
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import webdataset  # noqa: F401  before the audit hook
from PIL import Image

import linear
import main
import utils
from simsiam.data.textures import make_textures
from simsiam.models.classifier import Classifier
from simsiam.models.simsiam import SimSiam
from tests.hostile import Call, as_bytes, limit, torch_file
from tools import features

FORMATS = "zip legacy pdparams safetensors tar csv png jpg".split()
MEMORY, SECONDS = 2 * 2**30, 20  # what a child may take more than its parent has; of CPU time
TINY = (
    "--recipe short --arch resnet8 --stem cifar --width 4 --feature_dim 16 --image_size 16 --k 2 "
    "--batch_size 4 --epochs 1 --no-pictures --num_workers 0 --device cpu --out out --name new"
).split()

# ---- good files, and broken ones ----------------------------------------------------------------


def good_files() -> dict[str, list[bytes]]:
    """Some of each format; runs' own checkpoints among them, and some with a program in them."""
    images = [Image.fromarray(i) for i in make_textures(8, seed=0)[0].permute(0, 2, 3, 1).numpy()]
    os.mkdir("pictures")
    for i, image in enumerate(images):
        image.save(f"pictures/{i}.png")
        Path(f"pictures/{i}.cls").write_text("ab"[i % 2])
    main.main([*TINY, *"--data_name textures --train_size 8 --bank_size 8".split()])
    flags = "--model_path out/new_model.pth --cached --epochs 1 --no-pictures --batch_size 4"
    linear.main([*flags.split(), "--out", "out", "--name", "lin"])
    shutil.copy("out/new_model.pth", "good_model.pth")
    net = SimSiam("resnet8", "cifar", 16, width=4)
    states = [net.state_dict(), Classifier(net.backbone, net.features, 3).state_dict()]
    calls = Call(os.system, "touch ran"), Call(eval, "open('ran', 'w')"), Call(os.mkdir, "ran")
    states += [states[0] | {"evil": call} for call in calls]
    arrays = [{k: v if isinstance(v, Call) else v.numpy() for k, v in s.items()} for s in states]
    rows = "".join(f"../pictures/{i}.png,{'ab'[i % 2]}\n" for i in range(8))
    return {
        "zip": [Path(f"out/{name}_model.pth").read_bytes() for name in ("new", "lin")]
        + [torch_file({"state_dict": state}) for state in states],
        "legacy": [torch_file(state, is_zip=False) for state in states],
        "pdparams": [pickle.dumps(state, i) for state in arrays for i in (2, 4)],
        "safetensors": [safetensors.torch.save(state) for state in states[:2]],
        "tar": [Path(shutil.make_archive("shard", "tar", "pictures")).read_bytes()],
        "csv": [("path,label\n" + rows).encode(), ("\ufeff" + "path,label\n" + rows).encode()],
        "png": [as_bytes(partial(i.save, format="png")) for i in (images[0], images[0].quantize())],
        "jpg": [as_bytes(partial(i.save, format="jpeg")) for i in images[:3]],
    }


WORDS = [
    *(struct.pack(kind, number) for kind in ("<I", ">I", "<Q") for number in (0, 1, 2**31 - 1)),
    *(b"\xff" * number for number in (1, 2, 4, 8)),
    *(b"cos\nsystem\n(X\x09\0\0\0touch rantR", b"\x8c\x02os\x8c\x05mkdir\x93\x8c\x03ran\x85R"),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cnumpy\nndarray\n", b"(", b"t", b"R", b"b", b"Q."),
    *(b"\n", b",", b'"', b"../", b"\0", b"pipe:touch ran", b"9" * 30, b"{", b"\xff\xe1", b"eXIf"),
]


def broken(content: bytes, rng: random.Random) -> bytes:
    """A copy that differs in one to four places, mostly near its ends, where the structure is."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        at = rng.choice((at, at % 400, max(0, len(data) - at % 400)))
        part = data[at : at + rng.choice((1, 1, 2, 8, 100))]
        flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in part)
        new = rng.choice((flipped, flipped, bytes(len(part)), part[::-1], rng.choice(WORDS)))
        end = rng.choice((at, at + len(part), at + len(new), at + len(new), at + len(new)))
        data[at:end] = new
        if rng.random() < 0.03:
            del data[at:]
    return bytes(data)


def mended(name: str, good: bytes, rng: random.Random) -> bytes:
    """A broken file whose checksums are right; of a zip, one part is broken."""
    if name == "zip":
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(file, "w") as target:
            names = source.namelist()
            hit = rng.choice([name for name in names if name.endswith("data.pkl")] * 20 + names)
            for part in names:
                content = source.read(part)
                target.writestr(part, broken(content, rng) if part == hit else content)
        return file.getvalue()
    data = bytearray(broken(good, rng))
    for at in range(0, len(data) - 511, 512) if name == "tar" else ():
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    at = 8 if name == "png" else len(data)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


# ---- children -----------------------------------------------------------------------------------


def command(turn: int, name: str, path: str) -> Callable[[], None]:
    """The command that reads a file: those that read its format take turns."""
    few, net = ["--num_workers", "0", "--device", "cpu"], ["--model_path", path]
    table = ["--out", "out/new.csv", *few]
    places = {"tar": path, "csv": path, "png": ".", "jpg": "."}
    images = ["--data_root", places.get(name, "pictures")]
    if name in places:
        kind = ["--data_name", "webdataset" if name == "tar" else "folder"]
        bad = ["--bad_images", ("error", "skip")[turn // 2 % 2]]
        if turn % 2 or name == "tar":
            return lambda: main.main([*TINY, *kind, *images, *bad])
        return lambda: features.command(["--model_path", "good_model.pth", *images, *table])
    if turn % 4 == 3 or (turn % 4 and name != "zip"):
        return lambda: main.main([*TINY, "--data_name", "folder", *images, "--init", path])
    return (
        lambda: features.command([*net, *images, *table]),
        lambda: linear.main([*net, "--predict", "pictures/0.png", *few]),
        lambda: main.main(["--resume", path]),
    )[turn % 4]


def watch(event: str, args: tuple) -> None:
    """Ends the process at what no file may bring about."""
    bad = event.startswith(("subprocess.", "pty.", "socket.", "os.exec", "os.spawn", "os.fork"))
    bad |= event in ("os.system", "os.posix_spawn", "pickle.find_class")
    bad |= event == "compile" and args[1] == "<string>"
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    if event == "open":
        names = [args[0]] if args[2] & writes else []
    else:
        verbs = "mkdir rename remove rmdir link symlink truncate chmod chown utime"
        names = args[:2] if event in [f"os.{verb}" for verb in verbs.split()] else []
    for name in names:
        if isinstance(name, str | bytes | os.PathLike) and os.fsdecode(name) != os.devnull:
            bad |= not Path(os.fsdecode(name)).absolute().is_relative_to(Path("out").absolute())
    if bad:
        os.write(2, f"CAUGHT {event} {args}\n".encode(errors="replace"))
        os._exit(77)


def child(run: Callable[[], None]) -> None:
    """Run a command within the limits; its output goes to two files."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    try:
        limit(MEMORY, SECONDS)
        signal.alarm(6 * SECONDS)
        sys.addaudithook(watch)
        utils.run_command(run)
        sys.exit()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        code = 70
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def verdict(status: int) -> str:
    """Return `read`, `refused`, or the error."""
    code, text = os.waitstatus_to_exitcode(status), Path("stderr").read_text(errors="replace")
    new = set(os.listdir()) - {"out", "pictures", "shard.tar", "good_model.pth", "stdout", "stderr"}
    if code == 0 and not text and not new:
        return "read"
    is_refused = code in (1, 2) and text.count("\n") == 1 and text.endswith("\n") and not new
    return "refused" if is_refused else f"exit code {code}, files {new or 'none'}: {text[-2000:]}"


def fuzz(number: int, seed: int, keep: Path) -> int:
    """Return how many files ended badly; keep them in `keep`, and print their errors."""
    torch.set_num_threads(1)  # children are forked: OpenMP's threads would not be there
    Image.init()  # its plugins, before the audit hook
    counts = Counter()
    rng, good = random.Random(seed), good_files()
    for i in range(number):
        name = FORMATS[i % len(FORMATS)]
        file = rng.choice(good[name])
        content = mended(name, file, rng) if rng.random() < 0.5 else broken(file, rng)
        shutil.rmtree("out")
        path = Path(f"out/case.{name.replace('zip', 'pth')}")
        path.parent.mkdir()
        path.write_bytes(content)
        if not (pid := os.fork()):
            child(command(i // len(FORMATS), name, str(path)))
        result = verdict(os.waitpid(pid, 0)[1])
        if result not in ("read", "refused"):
            keep.mkdir(exist_ok=True)
            (keep / f"{seed}_{i}.{name}").write_bytes(content)
            print(f"{seed}_{i}.{name}: {result}", flush=True)
            result = "wrong"
        counts[name, result] += 1
        counts["all", result] += 1
    print("format           read  refused    wrong")
    for name in (*FORMATS, "all"):
        print(f"{name:12}", *(f"{counts[name, how]:8}" for how in ("read", "refused", "wrong")))
    return counts["all", "wrong"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000, help="how many (2000)")
    parser.add_argument("--seed", type=int, default=0, help="breaks them differently (0)")
    args = parser.parse_args()
    folder = Path("fuzzed").absolute()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        sys.exit(fuzz(args.files, args.seed, folder) > 0)
