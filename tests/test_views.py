"""The views against torchvision, their random draws, and the bounds of an Augmentation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from simsiam.views import ops
from simsiam.views.augment import Batch, Views
from simsiam.views.ops import Augmentation, Operation, crop_boxes

PIXEL = 1 / 255
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
# Nothing random but the crop.
STILL = {"crop_scale": (1.0, 1.0), "jitter_p": 0.0, "gray_p": 0.0, "hflip_p": 0.0}
SECOND = {"vflip_p": 0.4, "rotate90_p": 0.4, "solarize_p": 0.4}  # of the second random stream


def make_views(number=2, seed=7, size=16, **changes):
    return Views(size, MEAN, STD, Augmentation(**changes), number, seed)


def random_bytes(n=64, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


# ---- operations ---------------------------------------------------------------------------------


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(6, 3, 9, 9, generator=generator)
    x = torch.nn.functional.interpolate(smooth, (40, 48), mode="bilinear")
    x[4] = x[4, :1]  # one gray image: no chroma, the edge case of hue
    x[5] = torch.rand(3, 40, 48, generator=generator).round()  # saturated colours
    return x


@pytest.mark.parametrize("size", [32, 20, 64])  # 20: antialiasing; 64: upsampling
def test_crop_and_resize_equal_torchvision(images, size):
    images = images.mul(255).byte()
    boxes = [(0, 0, 40, 48), (3, 5, 30, 31), (10, 20, 17, 9), (0, 1, 1, 2), (39, 0, 1, 48)]
    boxes.append((7, 7, min(size, 33), 32))
    geometry = ops.Geometry(images, size)
    ops.Crop().apply(geometry, {"box": torch.tensor(boxes).float()})
    for x, resized, box in zip(images, geometry.compute(), boxes, strict=True):
        expected = T.resized_crop(x / 255, *box, [size, size], antialias=True)
        assert (resized - expected).abs().max() < PIXEL


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_equal_torchvision(images, name):
    factors = [0.6, 0.85, 1.0, 1.15, 1.4, 0.0] if name != "hue" else [-0.5, -0.1, 0, 0.03, 0.1, 0.5]
    function = getattr(ops, f"adjust_{name}")
    changed = function(images.clone(), torch.tensor(factors).view(-1, 1, 1, 1))
    for x, y, factor in zip(images, changed, factors, strict=True):
        assert (y - getattr(T, f"adjust_{name}")(x, factor)).abs().max() < PIXEL
    neutral = factors.index(0 if name == "hue" else 1.0)
    assert (changed[neutral] - images[neutral]).abs().max() < 1e-6


@pytest.mark.parametrize("size", [22, 40, 64])  # kernels of 3, 5 and 7 pixels
def test_blur_equals_torchvision(size):
    images = random_bytes(6, size) / 255
    sigma, on = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 2.0]), torch.arange(6) < 5
    blurred, taps = ops.Blur().apply(images, {"sigma": sigma, "on": on}), size // 20 * 2 + 1
    for i in range(5):
        expected = T.gaussian_blur(images[i], [taps, taps], [sigma[i].item()] * 2)
        assert (blurred[i] - expected).abs().max() < PIXEL
    assert torch.equal(blurred[5], images[5])


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(32, 32, (3 / 4, 4 / 3)), (10, 90, (0.9, 2.5)), (90, 10, (3 / 4, 4 / 3))],
)
def test_crop_boxes_have_torchvisions_distribution(height, width, ratio):
    # 10 x 90: most tries do not fit, and the fallback (central, ratio clamped) is common.
    n = 4000
    crop = v2.RandomResizedCrop(8, scale=(0.2, 1), ratio=ratio)
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    params = [crop.make_params([blank]) for _ in range(n)]
    expected = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in params])
    boxes = crop_boxes(np.random.default_rng(0), n, height, width, (0.2, 1), ratio)
    pairs = list(zip(boxes.T, expected.T, strict=True))
    pairs.append((boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3]))
    pairs.append((boxes[:, 3] / boxes[:, 2], expected[:, 3] / expected[:, 2]))
    for one, other in pairs:
        assert ks_2samp(one, other, method="asymp").pvalue > 1e-3
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all()


# ---- views --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_cropped", [False, True], ids=["whole", "cropped"])
def test_a_view_is_torchvisions_from_the_sampled_parameters(is_cropped):
    """All operations, one image at a time, in the paper's order; the images are not square."""
    views = make_views(size=40, blur_p=0.5, **SECOND)
    images = random_bytes(100, 40) if is_cropped else random_bytes(100, 56)[:, :, 3:51]
    crops = images[:, None].expand(-1, 2, -1, -1, -1)
    batch = Batch.alone(crops if is_cropped else images, 1, 2)
    adjust = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)
    orientations = set()
    for view, sampled in zip(views(batch), views.sample(batch), strict=True):
        applied = {op.name: sampled[op.name]["on"] for op in views.operations}
        for i, x in enumerate(images / 255):
            if not is_cropped:
                box = sampled["Crop"]["box"][i].tolist()
                x = T.resized_crop(x, *box, [40, 40], antialias=True)
            x = T.horizontal_flip(x) if applied["FlipLeftRight"][i] else x
            x = T.vertical_flip(x) if applied["FlipUpDown"][i] else x
            quarters = sampled["Turn"]["quarters"][i] * applied["Turn"][i]
            x = T.rotate(x, 90.0 * quarters)
            for k in sampled["Jitter"]["order"] if applied["Jitter"][i] else ():
                x = adjust[k](x, sampled["Jitter"]["factors"][i, k])
            x = T.rgb_to_grayscale(x, num_output_channels=3) if applied["Grayscale"][i] else x
            if applied["Blur"][i]:
                x = T.gaussian_blur(x, [5, 5], [sampled["Blur"]["sigma"][i]] * 2)
            x = T.solarize(x, 0.5) if applied["Solarize"][i] else x
            assert (view[i] - T.normalize(x, MEAN, STD)).abs().max() < PIXEL / min(STD)
            flips = applied["FlipLeftRight"][i], applied["FlipUpDown"][i]
            orientations.add((*flips, quarters))
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert len({tuple(on) for on in zip(*applied.values(), strict=True)}) > 30
    assert len(orientations) == 16  # 2 x 2 flips and 4 angles


@pytest.mark.parametrize("changes", [{"blur_p": 0.5}, STILL | SECOND], ids=["first", "second"])
def test_views_are_a_function_of_seed_epoch_and_step(changes):
    images = random_bytes()
    first, second = make_views(**changes)(Batch.alone(images, 3, 5))
    torch.rand(10)  # the global generators have no part in it
    np.random.rand(10)
    views = make_views(**changes)
    views(Batch.alone(images, 2, 1))  # nor has an earlier batch
    for again in (views, make_views(**changes)):
        assert all(map(torch.equal, again(Batch.alone(images, 3, 5)), (first, second)))
    assert not torch.equal(first, second)
    others = [views(Batch.alone(images, *at)) for at in [(3, 4), (3, 6), (2, 5), (4, 5), (5, 3)]]
    others.append(make_views(seed=8, **changes)(Batch.alone(images, 3, 5)))
    assert not any(torch.equal(x, y) for pair in others for x in pair for y in (first, second))


def test_operations_of_the_second_stream_change_no_other_draw():
    """What is drawn for one operation does not depend on which of the others are on."""
    batch = Batch.alone(random_bytes(32), 3, 1)
    without = make_views(blur_p=0.5).sample(batch)
    every = make_views(blur_p=0.5, **SECOND).sample(batch)
    names = {"vflip_p": "FlipUpDown", "rotate90_p": "Turn", "solarize_p": "Solarize"}
    for flag, name in names.items():
        alone = make_views(blur_p=0.5, **{flag: SECOND[flag]}).sample(batch)
        for one, all_, none in zip(alone, every, without, strict=True):
            np.testing.assert_equal(one[name], all_[name])
            assert one[name]["on"].any()
            for other in ("Crop", "FlipLeftRight", "Jitter", "Grayscale", "Blur"):
                np.testing.assert_equal(one[other], none[other])
    assert not np.array_equal(every[0]["Turn"]["quarters"], every[1]["Turn"]["quarters"])


FIRST = [
    [0.0436, -0.0149, 0.0284, 0.0713, -0.0418, 0.0138],
    [-0.0333, 0.0086, -0.0224, 0.0348, -0.0137, -0.0372],
]


def test_a_seed_gives_the_same_views_in_every_version():
    """Slopes from left to right of the first images' views, as the first version made them."""
    ramp = torch.linspace(-1, 1, 16)
    views = make_views(blur_p=0.5)(Batch.alone(random_bytes(16), 2, 5))
    slopes = [(x * ramp).mean((1, 2, 3))[:6] for x in views]
    torch.testing.assert_close(torch.stack(slopes), torch.tensor(FIRST), atol=2e-4, rtol=0)


def test_sampled_parameters_are_described_in_words():
    certain = dict.fromkeys(("blur_p", "jitter_p", "gray_p", "hflip_p", *SECOND), 1.0)
    (sampled,) = make_views(1, **certain).sample(Batch.alone(random_bytes(2)))
    sampled["Crop"]["box"][:] = 0, 0, 8, 12
    sampled["Turn"]["quarters"][:] = 3
    sampled["Jitter"]["factors"][:] = 1.25, 0.8, 1, -0.051
    sampled["Jitter"]["order"] = 3, 0, 2, 1
    sampled["Blur"]["sigma"][:] = 1.26
    for name in ("FlipLeftRight", "Turn", "Blur"):
        sampled[name]["on"][1] = False
    assert sampled.describe(0) == [
        "crop 38%: 12 x 8",
        "flip left-right",
        "flip up-down",
        "turn 270 degrees",
        "hue -0.05",
        "brightness x 1.25",
        "contrast x 0.80",
        "grayscale",
        "blur 1.3 px",
        "solarize",
    ]
    left_out = {"flip left-right", "turn 270 degrees", "blur 1.3 px"}
    assert sampled.describe(1) == [line for line in sampled.describe(0) if line not in left_out]
    cropped = Batch.alone(random_bytes(2)[:, None])
    assert make_views(**STILL).sample(cropped)[0].describe(0) == []


def test_the_first_views_do_not_depend_on_their_number():
    batch = Batch.alone(random_bytes(8), 1, 2)
    two, four = make_views(2)(batch), make_views(4)(batch)
    assert len(two) == 2
    assert all(map(torch.equal, two, four))
    assert not any(torch.equal(four[i], four[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("is_cropped", [False, True])
def test_a_ranks_views_are_rows_of_the_global_batchs(is_cropped):
    images, views = random_bytes(12), make_views(blur_p=0.5, **SECOND)
    if is_cropped:  # by the loader's workers: n x views x 3 x size x size
        images = torch.stack([images, random_bytes(12, seed=1)], dim=1)
    whole = views(Batch.alone(images, 2, 9))
    for rows in (slice(0, 4), slice(4, 8), slice(5, 12), slice(11, 12)):
        own = views(Batch(2, 9, images[rows], None, 12, rows))
        assert all(torch.equal(x, every[rows]) for x, every in zip(own, whole, strict=True))
    other = views(Batch(2, 9, images[4:8], None, 4, slice(0, 4)))  # as a global batch
    assert not torch.equal(other[0], whole[0][4:8])


def test_operations_apply_with_their_probability():
    batch = Batch.alone(random_bytes(1).expand(4000, -1, -1, -1))
    p = {"jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.5, "hflip_p": 0.5, "vflip_p": 0.3}
    views = make_views(1, **p, rotate90_p=0.6, solarize_p=0.2)
    (sampled,) = views.sample(batch)
    for operation in views.operations:
        assert sampled[operation.name]["on"].mean() == pytest.approx(operation.p, abs=0.04)


def test_eval_transform_resizes_and_normalises():
    images, views = random_bytes(4), make_views()
    x = views.eval_transform(images)
    torch.testing.assert_close(x, T.normalize(images.float() / 255, MEAN, STD))
    assert x.is_contiguous(memory_format=torch.channels_last)
    larger = random_bytes(4, size=24)
    expected = T.normalize(T.resize(larger / 255, [16, 16], antialias=True), MEAN, STD)
    torch.testing.assert_close(views.eval_transform(larger), expected)


def test_crops_from_workers_are_not_cropped_again():
    crops = torch.stack([random_bytes(8, seed=1), random_bytes(8, seed=2)], dim=1)
    views = make_views(**STILL | {"crop_scale": (0.2, 0.5)})
    for step in range(2):
        for i, view in enumerate(views(Batch.alone(crops, 0, step))):
            assert torch.equal(view, views.eval_transform(crops[:, i]))


def test_compiled_colours_equal_the_others():
    """Within 1e-5 of the range from 0 to 1."""
    images = random_bytes(16, size=24)
    unit = ((0.0,) * 3, (1.0,) * 3)
    augmentation = Augmentation(jitter_p=1.0, gray_p=0.5, blur_p=0.5)
    eager, compiled = (Views(24, *unit, augmentation, compiled=kind) for kind in (False, True))
    for step in range(3):
        batch = Batch.alone(images, 0, step)
        for x, expected in zip(compiled(batch), eager(batch), strict=True):
            torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_views_grow_with_the_epochs():
    images = random_bytes(8, size=32)
    growing = Views(32, MEAN, STD, size_schedule=(12, 20, 32))
    for epoch, size in enumerate((12, 20, 32)):
        batch = Batch.alone(images, epoch)
        assert growing.size_in(epoch) == size
        assert all(map(torch.equal, growing(batch), Views(size, MEAN, STD)(batch)))
    assert growing.eval_transform(images).shape == (8, 3, 32, 32)
    assert growing.remaining_work(0, 3) == pytest.approx((20**2 + 32**2) / 12**2)
    assert growing.remaining_work(2, 3) == 0


# ---- an operation from outside ------------------------------------------------------------------


class Posterize(Operation):
    """Keep the highest bits of each byte."""

    def sample(self, rng, n):
        return {"bits": rng.integers(2, 5, n)}

    def apply(self, images, params):
        step = 2 ** (8 - ops.per_image(params["bits"]))
        changed = ((images * 255).round() / step).floor() * step / 255
        return changed.where(ops.per_image(params["on"]), images)

    def describe(self, params):
        return [f"posterize to {params['bits']} bits"]


def test_an_operation_can_be_added_from_outside():
    crops = random_bytes(64)[:, None].expand(-1, 2, -1, -1, -1)
    usual = Augmentation(**STILL | {"gray_p": 0.3})
    views = Views(16, MEAN, STD, usual, operations=[Posterize(0.5)])
    batch = Batch.alone(crops, 1, 2)
    without = Views(16, MEAN, STD, usual).sample(batch)
    for view, sampled, same in zip(views(batch), views.sample(batch), without, strict=True):
        np.testing.assert_equal(sampled["Grayscale"], same["Grayscale"])
        on, bits = sampled["Posterize"]["on"], sampled["Posterize"]["bits"]
        assert 16 < on.sum() < 48
        assert set(bits[on]) == {2, 3, 4}
        for i in np.flatnonzero(~sampled["Grayscale"]["on"]):
            x = T.posterize(crops[i, 0], int(bits[i])) / 255 if on[i] else crops[i, 0] / 255
            torch.testing.assert_close(view[i], T.normalize(x, MEAN, STD))
            assert sampled.describe(i) == [f"posterize to {bits[i]} bits"] * bool(on[i])
    with pytest.raises(ValueError, match="name"):
        Views(16, MEAN, STD, operations=[Posterize(), Posterize(0.5)])


# ---- Augmentation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.2,)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.2, 1.1)},
        {"crop_scale": (0.9, 0.2)},
        {"crop_ratio": (0.75, math.inf)},
        {"crop_ratio": (0.0, 1.0)},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, 0.6)},
        {"blur_sigma": (0.0, 2.0)},
        {"blur_sigma": torch.tensor([0.1, 2.0])},
        {"hflip_p": "0.5"},
        {"hflip_p": 1.5},
        {"gray_p": math.nan},
        {"posterize_p": 0.2},
    ],
)
def test_an_invalid_augmentation_is_refused(change):
    (name,) = change
    with pytest.raises(ValueError, match=name):
        Augmentation.from_dict(dataclasses.asdict(Augmentation()) | change)


def test_an_augmentation_is_restored_from_its_dict():
    augmentation = Augmentation(crop_scale=(0.08, 1.0), blur_p=0.5, hflip_p=0)
    saved = dataclasses.asdict(augmentation)
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in saved.items()}
    assert Augmentation.from_dict(saved) == Augmentation.from_dict(lists) == augmentation
