"""A checkpoint, ours or another project's, in the format of another one.

python -m tools.convert results/..._model.pth encoder.pth --to torchvision
"""

import io
import pickle
from pathlib import Path

import torch
from torch import nn

import data
import linear
import main
import model
import utils

FORMATS = (*model.EXPORTS, "safetensors", "onnx")


def ours(path: str) -> dict | None:
    """The content of a checkpoint of ours, None if it is another project's. FileNotFoundError."""
    try:
        return utils.load_checkpoint(path)
    except ValueError:
        return None


def metadata(state: dict | None) -> dict[str, str]:
    """Where a checkpoint of ours comes from, as text."""
    if state is None:
        return {}
    args, command = state["args"], linear if "encoder" in state["args"] else main
    parser = command.parse_args([])[1]
    words = ["python", f"{command.__name__}.py", *parser.as_argv(args)]
    source = args.get("encoder", args)
    found = {name: source[name] for name in ("arch", "stem", "image_size", "mean", "std")}
    found |= {"data": args["data_name"], "epochs": len(state["history"]) - (command is main)}
    return {name: str(value) for name, value in (found | {"command": " ".join(words)}).items()}


def onnx_bytes(net: nn.Module, size: int, about: dict[str, str]) -> bytes:
    """The encoder's features, or a linear model's logits: images (N x 3 x size x size) -> output.

    Raises ValueError where onnx is not installed, or its runtime finds other numbers.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("--to onnx: pip install onnx onnxruntime onnxscript") from error
    network = net if isinstance(net, model.Classifier) else net.backbone
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        network.eval(),
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
        ours = network(images)
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if not torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4):
        raise ValueError(f"onnxruntime's output is {(ours - theirs).abs().max():.2g} off")
    return content


def convert(source: str, to: str) -> tuple[bytes, list[str]]:
    """The content of a file in the format `to`, and what to know of its source.

    Raises FileNotFoundError or ValueError.
    """
    state = ours(source)
    net, args, notes = model.load_any(source, state)
    about, content = metadata(state), io.BytesIO()
    if to == "onnx":
        size = (data.usual_input(args["stem"]) | args)["image_size"]
        return onnx_bytes(net, size, about), notes
    if to == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ValueError("--to safetensors: pip install safetensors") from error
        weights = {name: value.contiguous() for name, value in net.state_dict().items()}
        return save(weights, {"format": "pt"} | about), notes
    weights = model.exported(net, args, to)
    if to == "detectron2":
        arrays = {name: value.numpy() for name, value in weights.items()}
        whole = {"model": arrays, "__author__": "SimSiam", "matching_heuristics": True}
        return pickle.dumps(whole), notes
    if to == "authors":
        epoch = int(about.get("epochs", 0))
        weights = {"epoch": epoch, "arch": args["arch"], "state_dict": weights, "meta": about}
    elif to == "mmpretrain":
        weights = {"meta": about, "state_dict": weights}
    torch.save(weights, content)
    return content.getvalue(), notes


def command(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = utils.Parser("tools.convert", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("source", metavar="IN", help="a checkpoint")
    parser.add_argument("target", metavar="OUT", help="a file that is not there yet")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format of OUT")
    args = parser.parse_args(argv)
    with parser.bad_input():
        if Path(args.target).exists():
            raise ValueError(f"{args.target} exists: choose another name")
        with utils.about(args.source):
            content, notes = convert(args.source, args.to)
        with utils.whole_file(args.target) as file:
            file.write(content)
    for note in notes:
        utils.say(f"{args.source}: {note}")
    utils.say(f"wrote {args.target}, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    command()
