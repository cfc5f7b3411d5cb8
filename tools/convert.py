"""Convert a checkpoint of any known project to another format.

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
from simsiam.interop.export import EXPORTS, export_notes, export_weights
from simsiam.interop.weights import SINGLE_START, LoadedCheckpoint, select_part
from simsiam.runtime import distributed, files
from tools.common import open_source

FORMATS = (*EXPORTS, "safetensors", "onnx")


def metadata(state: dict | None) -> dict[str, str]:
    """Return a checkpoint's encoder, data and command as text; nothing for another project's."""
    if state is None:
        return {}
    names = ("arch", "stem", "image_size", "mean", "std")
    entries = {name: state["encoder"][name] for name in names}
    config = state["config"]
    words = ["python", state["command"], *config.command_line(leave_out=SINGLE_START)]
    entries |= {"data": config.data_name, "epochs": state["epoch"], "command": shlex.join(words)}
    return {name: str(value) for name, value in entries.items()}


def onnx_bytes(source: LoadedCheckpoint, net: nn.Module, meta: dict[str, str]) -> bytes:
    """Export `net` to ONNX: images, N x C x size x size -> features or logits.

    Raises ValueError where onnx is not installed, or onnxruntime's output differs.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError("--to onnx: pip install onnx onnxruntime onnxscript") from error
    shape = source.net.channels, source.encoder["image_size"], source.encoder["image_size"]
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    program = torch.onnx.export(
        net,
        (images,),
        input_names=["images"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    onnx.helper.set_model_props(proto, meta)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = torch.cat([images, images.flip(3)[:1]])  # not the batch size of the export
    with torch.no_grad():
        expected = net(images)
    output = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    if not torch.allclose(expected, output, atol=1e-4, rtol=1e-4):
        raise ValueError(f"onnxruntime's output is {(expected - output).abs().max():.2g} off")
    return content


def linear_evaluation(source: LoadedCheckpoint) -> dict:
    """Return what facebookresearch/simsiam's main_lincls --resume reads besides the weights."""
    history = source.state["history"] if source.state else []
    best = max((row.get("test_acc@1", 0.0) for row in history), default=0.0)
    sgd = torch.optim.SGD(source.net.fc.parameters(), lr=0.1, momentum=0.9)
    return {"best_acc1": torch.tensor(best), "optimizer": sgd.state_dict()}


def convert(source: LoadedCheckpoint, to: str, encoder_only: bool = False) -> bytes:
    """Return the content of a file in the format `to`, one of FORMATS.

    Raises ValueError where the format has no such network; it does not name the source's file.
    """
    meta, content = metadata(source.state), io.BytesIO()
    if to == "onnx":
        has_logits = source.is_linear and not encoder_only
        return onnx_bytes(source, source.net if has_logits else source.net.backbone, meta)
    if to == "safetensors":
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ValueError("--to safetensors: pip install safetensors") from error
        weights = {name: value.contiguous() for name, value in source.net.state_dict().items()}
        if encoder_only:
            weights = select_part(weights, "backbone")
        return save(weights, {"format": "pt"} | meta)
    weights = export_weights(source.net, source.encoder, to, encoder_only)
    if to == "detectron2":
        arrays = {name: value.numpy() for name, value in weights.items()}
        return pickle.dumps({"model": arrays, "__author__": "SimSiam", "matching_heuristics": True})
    if to == "authors":
        epoch, arch = int(meta.get("epochs", 0)), source.encoder["arch"]
        weights = {"epoch": epoch, "arch": arch, "state_dict": weights, "meta": meta}
        if source.is_linear and not encoder_only:
            weights |= linear_evaluation(source)
    elif to == "mmpretrain":
        weights = {"meta": meta, "state_dict": weights}
    torch.save(weights, content)
    return content.getvalue()


def command(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = utils.Parser(prog="tools.convert", description=__doc__)
    add = parser.add_argument
    add("model_path", metavar="IN", help="a checkpoint")
    add("target", metavar="OUT", help="a new file")
    add("--to", required=True, choices=FORMATS, help="the format of OUT")
    add("--encoder_only", action="store_true", help="leave out heads and classifier")
    utils.add_source_options(parser)
    args = parser.parse_args(argv)
    with parser.bad_input():
        if Path(args.target).exists():
            raise ValueError(f"{args.target} exists: choose another name")
        source = open_source(args)
        with files.error_prefix(args.model_path):
            content = convert(source, args.to, args.encoder_only)
        with files.atomic_write(args.target) as file:
            file.write(content)
    for note in export_notes(source.net, source.encoder, args.to, args.encoder_only):
        distributed.log(f"{args.model_path}: {note}")
    distributed.log(f"wrote {args.target}, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    command()
