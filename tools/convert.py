"""A checkpoint, ours or another project's, in the format of another one.

python -m tools.convert results/..._model.pth encoder.pth --to torchvision
"""

import io
import pickle
import shlex
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python tools/convert.py`

import utils
from simsiam import files, ranks
from simsiam.layouts import EXPORTS, exported
from simsiam.weights import Source

FORMATS = (*EXPORTS, "safetensors", "onnx")


def metadata(state: dict | None) -> dict[str, str]:
    """Where a checkpoint of this program comes from, as text; nothing of another project's."""
    if state is None:
        return {}
    names = ("arch", "stem", "image_size", "mean", "std")
    found = {name: state["encoder"][name] for name in names}
    found |= {"data": state["args"].get("data_name"), "epochs": state["epoch"]}
    words = ["python", state["command"], *as_argv(state["args"])]
    return {name: str(value) for name, value in (found | {"command": shlex.join(words)}).items()}


# Flags that can be said with --no- before them, and those that are of one start of a run only.
OF_TWO_FORMS = ("fix_pred_lr", "pictures", "stop_on_collapse")
OF_ONE_START = ("resume", "overwrite", "ddp")


def as_argv(args: dict) -> list[str]:
    """The flags that give the values of `args`, a checkpoint's."""
    told = (
        name
        for name, value in args.items()
        if name not in OF_ONE_START and (value is not False or name in OF_TWO_FORMS)
    )
    return [word for name in told for word in utils.words(name, args[name])]


def onnx_bytes(source: Source, about: dict[str, str]) -> bytes:
    """The encoder's features, or a linear model's logits: images (N x 3 x size x size) -> output.

    Raises ValueError where onnx is not installed, or its runtime finds other numbers.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("--to onnx: pip install onnx onnxruntime onnxscript") from error
    net: nn.Module = source.net if source.is_linear else source.net.backbone
    size = source.encoder["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        net,
        (images,),
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        dynamo=True,
        verbose=False,
    )
    made = program.model_proto
    onnx.helper.set_model_props(made, about)
    content = made.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = torch.cat([images, images.flip(3)[:1]])  # another number than that of the export
    with torch.no_grad():
        expected = net(images)
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if not torch.allclose(expected, found, atol=1e-4, rtol=1e-4):
        raise ValueError(f"onnxruntime's output is {(expected - found).abs().max():.2g} off")
    return content


def convert(source: Source, to: str) -> bytes:
    """The content of a file in the format `to`, one of FORMATS. Raises ValueError if it has none.

    The message does not name the source's file.
    """
    about, content = metadata(source.state), io.BytesIO()
    if to == "onnx":
        return onnx_bytes(source, about)
    if to == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ValueError("--to safetensors: pip install safetensors") from error
        weights = {name: value.contiguous() for name, value in source.net.state_dict().items()}
        return save(weights, {"format": "pt"} | about)
    weights = exported(source.net, source.encoder, to)
    if to == "detectron2":
        arrays = {name: value.numpy() for name, value in weights.items()}
        whole = {"model": arrays, "__author__": "SimSiam", "matching_heuristics": True}
        return pickle.dumps(whole)
    if to == "authors":
        epoch, arch = int(about.get("epochs", 0)), source.encoder["arch"]
        weights = {"epoch": epoch, "arch": arch, "state_dict": weights, "meta": about}
    elif to == "mmpretrain":
        weights = {"meta": about, "state_dict": weights}
    torch.save(weights, content)
    return content.getvalue()


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser(prog="tools.convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="IN", help="a checkpoint")
    parser.add_argument("target", metavar="OUT", help="a file that is not there yet")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format of OUT")
    args = parser.parse_args(argv)
    with parser.bad_input():
        if Path(args.target).exists():
            raise ValueError(f"{args.target} exists: choose another name")
        source = Source.open(args.source)
        with files.about(args.source):
            content = convert(source, args.to)
        with files.whole_file(args.target) as file:
            file.write(content)
    for note in source.notes:
        ranks.say(f"{args.source}: {note}")
    ranks.say(f"wrote {args.target}, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    command()
