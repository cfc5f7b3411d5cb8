"""Images of other channels and depths: arrays, TIFF, 16 bits, from files to predictions."""

import io

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
from simsiam.models.simsiam import SimSiam
from simsiam.views import ops
from simsiam.views.augment import Augmentation, Batch, Views
from tests import helpers
from tools import convert, features, similar

FIVE = DecodeOptions(channels=5)


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
            adjusted = getattr(ops, name)(images.clone(), factors)
            assert torch.allclose(adjusted, getattr(T, name)(images, factor), atol=1 / 255)


def test_contrast_of_five_channels_moves_them_toward_their_mean():
    image = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]).view(1, 5, 1, 1)
    adjusted = ops.adjust_contrast(image, torch.full((1, 1, 1, 1), 0.5)).flatten()
    assert torch.allclose(adjusted, torch.tensor([0.2, 0.25, 0.3, 0.35, 0.4]))


def test_a_channel_of_a_view_does_not_depend_on_the_others():
    """All but contrast, which moves channels toward the mean of all."""
    images = torch.from_numpy(noise(6, 5, 20, 20))
    augmentation = Augmentation(
        jitter=(0.4, 0.0, 0.0, 0.0), gray_p=0.0, blur_p=0.5, vflip_p=0.5, rotate90_p=0.5
    )

    def make_views(images):
        channels = images.shape[1]
        views = Views(16, (0.5,) * channels, (0.25,) * channels, augmentation)
        return views(Batch.alone(images))

    for five, three in zip(make_views(images), make_views(images[:, 1:4]), strict=True):
        assert torch.equal(five[:, 1:4], three)


def test_saturation_and_hue_need_three_channels():
    views = Views(16, (0.5,) * 5, (0.25,) * 5)
    with pytest.raises(ValueError, match="three"):
        views(Batch.alone(torch.zeros(2, 5, 20, 20, dtype=torch.uint8)))


@pytest.mark.parametrize(
    "arch", ["resnet8", "resnet18", "timm:test_vit", "torchvision:mobilenet_v3_small"]
)
def test_networks_take_other_channels(arch):
    for stem in ("imagenet",) if ":" in arch else ("cifar", "imagenet")[: 1 + (arch != "resnet8")]:
        net = SimSiam(arch, stem, 16, channels=5).eval()
        assert net([torch.zeros(2, 5, 32, 32)] * 2).z.shape == (2, 16)
    if arch.startswith("timm"):
        reference = timm.create_model("test_vit", in_chans=5, num_classes=0)
        reference.load_state_dict(net.backbone.state_dict(), strict=True)


# ---- the commands -------------------------------------------------------------------------------


def write_folder(root, channels):
    """Write 12-bit noise of two classes, which differ in the last channel, as each kind of file."""
    for split, number in (("train", 24), ("test", 8)):
        for label, name in enumerate("ab"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                seed = 1000 * number + 100 * label + i
                pixels = noise(20, 24, channels, seed=seed, high=2000, dtype=np.uint16)
                pixels[..., -1] += 2000 * label
                first = np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
                if channels == 1 and i % 2:
                    Image.fromarray(pixels[..., 0]).save(folder / f"{i}.png")
                elif i % 3:
                    np.save(folder / f"{i}.npy", pixels if i % 3 == 1 else first)
                else:
                    tifffile.imwrite(folder / f"{i}.tif", first, photometric="minisblack")
    return root


SMALL = "--width 4 --feature_dim 8 --batch_size 16 --epochs 2 --lr 0.1 --k 3 "
SMALL += "--levels 0 4095 --num_workers 1 --no-pictures --recipe short"


@pytest.fixture(scope="module", params=[1, 5])
def run(request, tmp_path_factory):
    """Channels, images, results and flags of a run with its linear evaluation.

    Images of one channel are in memory; those of five are cropped by workers.
    """
    root, out = (tmp_path_factory.mktemp(name) for name in ("images", "results"))
    write_folder(root, request.param)
    flags = f"{SMALL} --data_root {root} --channels {request.param} --out {out} --data_name "
    flags += "folder" if request.param == 1 else "imagenet --image_size 20"
    main.main(f"{flags} --name a".split())
    linear.main(f"--model_path {out}/a_model.pth --cached --epochs 3 --out {out}".split())
    return request.param, root, out, flags


def test_a_run_is_normalised_by_measured_statistics(run):
    channels, _, out, _ = run
    mean = LoadedCheckpoint.open(out / "a_model.pth").encoder["mean"]
    assert len(mean) == channels
    # Values are uniform from 0 to 1999, of 4095; in the last channel, half of them are 2000 more.
    assert mean[-1] == pytest.approx(2000 / 4095, abs=0.01)
    assert channels == 1 or mean[0] == pytest.approx(1000 / 4095, abs=0.01)


def test_predictions_scores_and_finetuning(run, tmp_path, capsys):
    channels, root, out, _ = run
    model = f"--model_path {out}/a_linear_cached_model.pth"
    linear.main(f"{model} --predict {root}/test --out_csv {tmp_path}/p.csv".split())
    table = pandas.read_csv(tmp_path / "p.csv")
    assert len(table) == 16
    labels = [path.split("/")[-2] for path in table["file"]]
    accuracy = (table["class"] == labels).mean()
    linear.main(f"{model} --evaluate_only --no-pictures --out {tmp_path}".split())
    assert f"top-1 {100 * accuracy:.2f} %" in capsys.readouterr().out
    dark = f"--model_path {out}/a_model.pth --cached --epochs 1 --levels 0 65535 --name dark"
    linear.main(f"{dark} --out {tmp_path} --no-pictures".split())
    paths = (tmp_path / "dark_model.pth", out / "a_model.pth")
    dark, usual = (LoadedCheckpoint.open(path) for path in paths)
    file = next((root / "test" / "a").glob("1.*"))
    assert dark.preprocess(file).max() < 20 < usual.preprocess(file).max()  # 12 bits of 16
    scratch = f"--model_path {out}/a_model.pth --finetune --from_scratch --epochs 1 --no-pictures"
    linear.main([*scratch.split(), "--out", str(tmp_path)])
    weights = torch.load(tmp_path / "a_scratch_model.pth")["model"]
    assert weights["backbone.conv1.weight"].shape[1] == channels


def test_exports_tools_and_pictures(run, tmp_path):
    channels, root, out, flags = run
    source = LoadedCheckpoint.open(out / "a_model.pth")
    if channels == 5:  # an export takes seconds
        convert.command([f"{out}/a_model.pth", f"{tmp_path}/a.onnx", "--to", "onnx"])
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
        assert session.get_inputs()[0].shape[1] == channels
    files = sorted((root / "test" / "a").iterdir())
    tool = f"--model_path {out}/a_model.pth --data_root {root}/test"
    features.command(f"{tool} --out {tmp_path}/f.csv".split())
    table = pandas.read_csv(tmp_path / "f.csv").filter(regex=r"^f\d+$").to_numpy()
    assert np.allclose(table[: len(files)], source(files), atol=1e-4)
    pixels = np.stack([np.asarray(read_image(file, source.decode)) for file in files])
    assert torch.equal(source(pixels), source(files))
    similar.command(f"{tool} --query {files[0]} --out {tmp_path}/s.png".split())
    main.main(f"{flags} --out {tmp_path} --name seen --show_views".split())
    for name in ("s.png", "seen_views.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_a_checkpoint_of_another_project_with_five_channels(tmp_path):
    net = SimSiam("resnet8", "cifar", 8, width=4, channels=5).eval()
    path = tmp_path / "other.pth"
    torch.save(net.backbone.state_dict(), path)
    source = LoadedCheckpoint.open(path, mean=[0.1] * 5, std=[0.2] * 5)
    image = noise(32, 32, 5)
    x = (torch.from_numpy(image).permute(2, 0, 1)[None] / 255 - 0.1) / 0.2
    with torch.no_grad():
        assert torch.allclose(source(image), net.backbone(x), atol=1e-4)
    with pytest.raises(ValueError, match="--mean"):
        LoadedCheckpoint.open(path, mean=[0.1] * 3, std=[0.2] * 3)


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--data_name textures --channels 5", "--data_name textures"),
        ("--channels 0", "--channels"),
        ("--channels 5 --levels 7 7", "--levels"),
        ("--data_name textures --levels 0 9", "--levels"),
        ("--channels 4", "0.npy"),
        ("", "0.tif"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, part):
    (tmp_path / "images").mkdir()
    if flags:
        np.save(tmp_path / "images" / "0.npy", noise(20, 24, 5))
    else:  # PIL reads no such TIFF
        first = noise(5, 20, 24)
        tifffile.imwrite(tmp_path / "images" / "0.tif", first, planarconfig="separate")
    folder = f"--data_name folder --data_root {tmp_path}/images" * ("textures" not in flags)
    error = helpers.refused(capsys, main, *f"{folder} --out {tmp_path}/out {flags}".split())
    assert part in error


def test_a_file_with_other_channels_is_named(run, tmp_path, capsys):
    channels, _, out, flags = run
    root = write_folder(tmp_path / "images", channels)
    file = root / "train" / "a" / "7.npy"
    np.save(file, noise(20, 24, 4))
    flags = [*flags.split(), "--data_name", "folder", "--data_root", root, "--name", "b"]
    error = helpers.refused(capsys, main, *flags)
    assert "train/a/7.npy" in error
    model = f"--model_path {out}/a_linear_cached_model.pth --predict"
    error = helpers.refused(capsys, linear, *model.split(), file)
    assert f"--channels is {channels}" in error
