"""Images of other channels and depths: arrays, TIFF, 16 bits, from files to predictions."""

import io
import types

import numpy as np
import onnxruntime
import pandas
import pytest
import tifffile
import timm
import torch
import torchvision.transforms.v2.functional as T
from PIL import Image

import linear
import main
from simsiam.data import arrays
from simsiam.data.decode import DecodeOptions, read_header, read_image, resize_center_crop
from simsiam.interop.weights import LoadedCheckpoint
from simsiam.models import backbones
from simsiam.models.simsiam import SimSiam
from simsiam.views import ops
from simsiam.views.augment import Augmentation, Batch, Views
from tests import helpers
from tools import convert, features, similar

FIVE = DecodeOptions(channels=5)
MAIN = types.SimpleNamespace(main=main.main)


def noise(*shape, seed=0, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


# ---- conversion to uint8 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "levels", "expected"),
    [
        (np.uint8([0, 7, 255]), None, [0, 7, 255]),
        (np.uint16([0, 255, 256, 65535]), None, [0, 0, 1, 255]),
        (np.array([256, 65535], ">u2"), None, [1, 255]),
        (np.array([False, True]), None, [0, 255]),
        (np.float32([0, 0.5, 1]), None, [0, 128, 255]),
        (np.float64([0, 7, 255]), None, [0, 7, 255]),
        (np.uint16([0, 100, 150, 200, 999]), (100, 200), [0, 0, 128, 255, 255]),
        (np.int32([-10, 0, 10]), (-10, 10), [0, 128, 255]),
        (np.uint8([0, 51]), (0, 51), [0, 255]),
    ],
)
def test_conversion_by_hand(values, levels, expected):
    pixels = arrays.to_uint8(values, levels)
    assert (pixels.dtype, pixels.tolist()) == (np.uint8, expected)


@pytest.mark.parametrize(
    ("values", "levels", "reason"),
    [
        (np.int32([-3, 9]), None, "--levels -3 9"),
        (np.float32([0, 300]), None, "--levels LOW HIGH"),
        (np.float32([0, np.nan]), None, "nan"),
        (np.float32([0, np.nan]), (0, 1), "not finite"),
        (np.array([1j]), None, "complex128"),
        (np.zeros(0), None, "shape"),
    ],
)
def test_values_of_unknown_range_are_an_error(values, levels, reason):
    with pytest.raises(ValueError, match=reason):
        arrays.to_uint8(values, levels)


# ---- files --------------------------------------------------------------------------------------


def test_arrays_in_either_order_and_tiff_files_by_their_axes(tmp_path):
    pixels = noise(20, 24, 5)
    np.save(tmp_path / "last.npy", pixels)
    np.save(tmp_path / "first.npy", np.moveaxis(pixels, 2, 0))
    first = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    gray = {"photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "pages.tif", first, metadata={"axes": "CYX"}, **gray)
    tifffile.imwrite(tmp_path / "planar.tif", first, planarconfig="separate", **gray)
    tifffile.imwrite(tmp_path / "samples.tiff", pixels, planarconfig="contig", **gray)
    tifffile.imwrite(tmp_path / "packed.tif", first, compression="zlib", **gray)
    for name in "last.npy first.npy pages.tif planar.tif samples.tiff packed.tif".split():
        assert read_header(tmp_path / name, FIVE) == ((24, 20), "uint8 x 5"), name
        assert (np.asarray(read_image(tmp_path / name, FIVE)) == pixels).all(), name


def test_gray_and_rgb_are_converted_into_each_other(tmp_path):
    pixels = noise(20, 24, 3)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.convert("L").save(tmp_path / "gray.png")
    np.save(tmp_path / "a.npy", pixels)
    np.save(tmp_path / "gray.npy", np.asarray(image.convert("L")))
    luma = np.asarray(image.convert("L"))[..., None]
    for name in ("a.png", "a.npy", "gray.png", "gray.npy"):
        assert np.array_equal(read_image(tmp_path / name, DecodeOptions(channels=1)), luma), name
    assert (np.asarray(read_image(tmp_path / "a.npy")) == pixels).all()
    assert (np.asarray(read_image(tmp_path / "gray.npy")) == luma.repeat(3, 2)).all()


def test_stored_bands_and_16_bits_with_levels(tmp_path):
    pixels = noise(20, 24, 4)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert (np.asarray(read_image(tmp_path / "a.png", DecodeOptions(channels=4))) == pixels).all()
    deep = noise(20, 24, high=4096, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = (deep / 4095 * 255).round()
    options = DecodeOptions(channels=1, levels=(0, 4095))
    pixels = np.asarray(read_image(tmp_path / "deep.png", options))[..., 0]
    assert np.abs(pixels - expected).max() <= 1
    assert len(np.unique(pixels)) > 200
    dark = np.asarray(read_image(tmp_path / "deep.png", DecodeOptions(channels=1)))[..., 0]
    assert (dark == deep // 256).all()


def test_every_channel_is_cropped_like_an_image():
    pixels = noise(40, 33, 5)
    crop = resize_center_crop(arrays.image_from_array(pixels, 5, None), 20, 24)
    for i in range(5):
        band = Image.fromarray(np.ascontiguousarray(pixels[..., i]))
        assert (crop[..., i] == resize_center_crop(band, 20, 24)).all()


class InMemory:
    """A file in memory, as in a tar file, whose name has no extension."""

    def __init__(self, path):
        self.path = path

    def __str__(self):
        return "shard.tar/7"

    def open(self):
        return io.BytesIO(self.path.read_bytes())


def test_files_in_memory_are_known_by_their_first_bytes(tmp_path):
    pixels = noise(20, 24, 5)
    np.save(tmp_path / "a.npy", pixels)
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(pixels, 2, 0), photometric="minisblack")
    for name in ("a.npy", "a.tif"):
        assert (np.asarray(read_image(InMemory(tmp_path / name), FIVE)) == pixels).all()


@pytest.mark.parametrize(
    ("name", "values", "channels", "reason"),
    [
        ("a.npy", noise(20, 24, 4), 5, "--channels is 5"),
        ("a.npy", noise(20, 24), 5, "--channels is 5"),
        ("a.npy", noise(512), 3, r"--exclude '\*.npy'"),
        ("a.npy", np.array([{}]), 5, "object"),
        ("a.tif", noise(4, 20, 24), 5, "--channels is 5"),
    ],
)
def test_arrays_that_are_no_such_image_are_named(tmp_path, name, values, channels, reason):
    path = tmp_path / name
    if name == "a.tif":
        tifffile.imwrite(path, values, photometric="minisblack")
    else:
        np.save(path, values, allow_pickle=True)
    with pytest.raises(ValueError, match=f"{path}.*{reason}"):
        read_image(path, DecodeOptions(channels=channels))


def test_nothing_is_allocated_for_an_array_larger_than_its_file(tmp_path):
    head = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 5)}
    np.lib.format.write_array_header_1_0(head, shape)
    (tmp_path / "a.npy").write_bytes(head.getvalue() + b"junk")
    for file in (tmp_path / "a.npy", InMemory(tmp_path / "a.npy")):
        with pytest.raises(ValueError, match="7|a.npy"):
            read_image(file, FIVE)


# ---- views and networks -------------------------------------------------------------------------


def test_contrast_and_brightness_of_one_channel_equal_torchvision():
    images = torch.from_numpy(noise(8, 1, 16, 16)).div(255)
    for factor in (0.6, 1.3):
        factors = torch.full((8, 1, 1, 1), factor)
        for name in ("adjust_contrast", "adjust_brightness"):
            adjusted = getattr(ops, name)(images, factors)
            assert torch.allclose(adjusted, getattr(T, name)(images, factor), atol=1 / 255)


def test_contrast_of_five_channels_goes_toward_the_mean_of_all():
    image = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(1, 5, 1, 1)  # their mean is 0.3
    found = ops.adjust_contrast(image, torch.full((1, 1, 1, 1), 0.5)).flatten()
    assert torch.allclose(found, torch.tensor([0.2, 0.25, 0.3, 0.35, 0.4]))


def test_what_is_done_to_one_channel_does_not_depend_on_the_others():
    """All but contrast, which goes toward the mean of all channels."""
    images = torch.from_numpy(noise(6, 5, 20, 20))
    augmentation = Augmentation(
        jitter=(0.4, 0.0, 0.0, 0.0), gray_p=0.0, blur_p=0.5, vflip_p=0.5, rotate90_p=0.5
    )
    found = []
    for part in (images, images[:, 1:4]):
        channels = part.shape[1]
        views = Views(16, (0.5,) * channels, (0.25,) * channels, augmentation)
        found.append(views(Batch.alone(part)))
    for five, three in zip(*found, strict=True):
        assert torch.equal(five[:, 1:4], three)


def test_colours_of_five_channels_are_no_views():
    views = Views(16, (0.5,) * 5, (0.25,) * 5)
    with pytest.raises(ValueError, match="other channels than three"):
        views(Batch.alone(torch.zeros(2, 5, 20, 20, dtype=torch.uint8)))


@pytest.mark.parametrize("arch", ["resnet8", "resnet18", "resnet50"])
@pytest.mark.parametrize("channels", [1, 5])
def test_the_first_layer_of_the_paper_s_networks(arch, channels):
    with torch.device("meta"):
        net, _ = backbones.build_backbone(arch, "cifar", channels=channels)
        assert net.conv1.weight.shape[1] == channels
        if arch != "resnet8":
            net, _ = backbones.build_backbone(arch, "imagenet", channels=channels)
            assert net.conv1.weight.shape == (64, channels, 7, 7)


@pytest.mark.parametrize("arch", ["timm:test_vit", "torchvision:mobilenet_v3_small"])
def test_the_libraries_networks_take_other_channels(arch):
    net = SimSiam(arch, "imagenet", 16, channels=5).eval()
    assert net([torch.zeros(2, 5, 32, 32)] * 2).z.shape == (2, 16)
    if arch.startswith("timm"):
        theirs = timm.create_model("test_vit", in_chans=5, num_classes=0)
        theirs.load_state_dict(net.backbone.state_dict(), strict=True)


# ---- from end to end ----------------------------------------------------------------------------


def folder_of(place, channels):
    """Two classes of noise that one channel tells, 12 bits a value, in files of each kind."""
    for part, each in (("train", 24), ("test", 8)):
        for label, name in enumerate("ab"):
            folder = place / part / name
            folder.mkdir(parents=True)
            for i in range(each):
                seed = 1000 * each + 100 * label + i
                pixels = noise(20, 24, channels, seed=seed, high=2000, dtype=np.uint16)
                pixels[..., -1] += 2000 * label
                first = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
                if channels == 1 and i % 2:
                    Image.fromarray(pixels[..., 0]).save(folder / f"{i}.png")
                elif i % 3:
                    np.save(folder / f"{i}.npy", pixels if i % 3 == 1 else first)
                else:
                    tifffile.imwrite(folder / f"{i}.tif", first, photometric="minisblack")
    return place


SMALL = "--data_name folder --width 4 --feature_dim 8 --batch_size 16 --epochs 2 --lr 0.1 --k 3 "
SMALL += "--levels 0 4095 --num_workers 1 --no-pictures"


@pytest.fixture(scope="module", params=[1, 5])
def run(request, tmp_path_factory):
    """A run on images of so many channels: the number, their folder, the results' folder."""
    place, out = (tmp_path_factory.mktemp(name) for name in ("images", "results"))
    folder_of(place, request.param)
    flags = f"{SMALL} --data_root {place} --channels {request.param} --out {out}"
    main.main(f"{flags} --recipe short --name a".split())
    linear.main(f"--model_path {out}/a_model.pth --cached --epochs 3 --out {out}".split())
    return request.param, place, out, flags


def test_a_run_normalises_by_what_it_measured(run):
    channels, _, out, _ = run
    encoder = torch.load(out / "a_model.pth")["encoder"]
    assert len(encoder["mean"]) == channels
    # The first values are even from 0 to 1999, of 4095; of the last half are 2000 more.
    assert encoder["mean"][-1] == pytest.approx(2000 / 4095, abs=0.01)
    if channels == 5:
        assert encoder["mean"][0] == pytest.approx(1000 / 4095, abs=0.01)
    args = torch.load(out / "a_model.pth")["args"]
    assert (args["jitter"], args["gray_p"]) == ((0.4, 0.4, 0.0, 0.0), 0.0)


def test_a_cut_run_ends_at_the_same_bits(run, monkeypatch):
    *_, out, flags = run
    flags = f"{flags} --recipe short --name cut".split()
    helpers.cut_in_epoch(monkeypatch, main, 1, flags)
    main.main([*flags, "--resume"])
    whole, cut = (torch.load(out / f"{name}_model.pth")["model"] for name in ("a", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_classes_are_predicted_scored_and_tuned(run, tmp_path, capsys):
    channels, place, out, _ = run
    model = f"--model_path {out}/a_linear_cached_model.pth"
    linear.main(f"{model} --predict {place}/test --out_csv {tmp_path}/found.csv".split())
    table = pandas.read_csv(tmp_path / "found.csv")
    assert len(table) == 16
    wanted = [path.split("/")[-2] for path in table["file"]]
    right = (table["class"] == wanted).mean()
    linear.main(f"{model} --evaluate_only --no-pictures --out {tmp_path}".split())
    assert f"top-1 {100 * right:.2f} %" in capsys.readouterr().out  # the same pixels
    darker = f"--model_path {out}/a_model.pth --cached --epochs 1 --levels 0 65535 --name dark"
    linear.main(f"{darker} --out {tmp_path} --no-pictures".split())
    dark, usual = (
        LoadedCheckpoint.open(path) for path in (tmp_path / "dark_model.pth", out / "a_model.pth")
    )
    file = place / "test" / "a" / "1.npy"
    file = file if file.exists() else file.with_suffix(".png")
    assert dark.preprocess(file).max() < 20 < usual.preprocess(file).max()  # 12 bits of 16
    for how in ("--finetune", "--finetune --from_scratch"):
        flags = f"--model_path {out}/a_model.pth {how} --epochs 1 --out {tmp_path} --no-pictures"
        linear.main(flags.split())
    predictor = torch.load(tmp_path / "a_scratch_model.pth")["model"]
    assert predictor["backbone.conv1.weight"].shape[1] == channels


def test_exports_and_tools_carry_the_channels(run, tmp_path):
    channels, place, out, _ = run
    source = LoadedCheckpoint.open(out / "a_model.pth")
    convert.command([f"{out}/a_model.pth", f"{tmp_path}/a.onnx", "--to", "onnx"])
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.get_inputs()[0].shape[1] == channels
    files = sorted((place / "test" / "a").iterdir())
    tool = f"--model_path {out}/a_model.pth --data_root {place}/test"
    features.command(f"{tool} --out {tmp_path}/f.csv".split())
    rows = pandas.read_csv(tmp_path / "f.csv").filter(regex=r"^\d+$|^f\d+$|^feature").to_numpy()
    found = source(files)
    assert np.allclose(rows[: len(files)], found, atol=1e-4)
    similar.command(f"{tool} --query {files[0]} --out {tmp_path}/s.png".split())
    assert (tmp_path / "s.png").stat().st_size > 1000
    pixels = np.stack([np.asarray(read_image(file, source.decode)) for file in files])
    assert torch.equal(source(pixels), found)


def test_pictures_of_other_channels_are_drawn(run, tmp_path):
    flags = f"{run[-1]} --recipe short --out {tmp_path} --name seen"
    main.main(f"{flags} --show_views".split())
    assert (tmp_path / "seen_views.png").stat().st_size > 1000


def test_crops_of_files_have_the_channels(run, tmp_path):
    """As of ImageNet: files that workers cut."""
    channels, _, _, flags = run
    flags = flags.replace("--data_name folder", "--data_name imagenet --image_size 16")
    main.main(f"{flags} --recipe short --epochs 1 --out {tmp_path} --name a".split())
    assert len(torch.load(tmp_path / "a_model.pth")["encoder"]["std"]) == channels


def test_another_project_s_file_of_five_channels_takes_five_means(tmp_path):
    net = SimSiam("resnet8", "cifar", 8, width=4, channels=5).eval()
    torch.save(net.backbone.state_dict(), tmp_path / "theirs.pth")
    source = LoadedCheckpoint.open(tmp_path / "theirs.pth", mean=[0.1] * 5, std=[0.2] * 5)
    image = noise(32, 32, 5)
    x = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.1) / 0.2
    with torch.no_grad():
        assert torch.allclose(source(image), net.backbone(x), atol=1e-4)
    with pytest.raises(ValueError, match="--mean: must be 5 numbers"):
        LoadedCheckpoint.open(tmp_path / "theirs.pth", mean=[0.1] * 3, std=[0.2] * 3)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_name textures --channels 5", "--data_name textures: its images have 3 channels"),
        ("--channels 0", "--channels: must be from 1 to 32"),
        ("--channels 5 --levels 7 7", "--levels: must rise"),
        ("--channels 5 --levels 0 nan", "--levels: must be two numbers"),
        ("--data_name textures --levels 0 9", "--levels: goes with --data_name folder"),
        ("--channels 5 --jitter 0.4 0.4 0.4 0.1", "--jitter: saturation, hue and grayscale need"),
        ("--channels 1 --gray_p 0.2", "--gray_p: saturation, hue and grayscale need three"),
        ("--channels 5 --mean 0.5 0.5 0.5", "--mean: must be auto, or 5 numbers"),
        ("--channels 4", "0.npy: cannot be read (it has shape"),
        ("", "0.tif: cannot be read (not an image, or of other --channels than 1 and 3)"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, words):
    (tmp_path / "images").mkdir()
    if flags:
        np.save(tmp_path / "images" / "0.npy", noise(20, 24, 5))
    else:  # PIL takes no such TIFF
        first = noise(5, 20, 24)
        tifffile.imwrite(tmp_path / "images" / "0.tif", first, planarconfig="separate")
    usual = f"--data_name folder --data_root {tmp_path}/images --out {tmp_path}/out"
    usual = usual if "textures" not in flags else f"--out {tmp_path}/out"
    err = helpers.refused(capsys, MAIN, *f"{usual} {flags}".split())
    assert words in err


def test_a_file_of_other_channels_among_them_is_named(run, tmp_path, capsys):
    channels, _, out, flags = run
    folder_of(tmp_path / "images", channels)
    np.save(tmp_path / "images" / "train" / "a" / "7.npy", noise(20, 24, 4))
    flags = flags.replace("--data_root", "--recipe short --name b --data_root").split()
    flags[flags.index("--data_root") + 1] = str(tmp_path / "images")
    err = helpers.refused(capsys, MAIN, *flags)
    assert "train/a/7.npy: cannot be read" in err
    model = f"--model_path {out}/a_linear_cached_model.pth --predict"
    file = tmp_path / "images" / "train" / "a" / "7.npy"
    err = helpers.refused(capsys, linear, *model.split(), file)
    assert f"--channels is {channels}" in err
