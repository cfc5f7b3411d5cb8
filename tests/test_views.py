"""The views against torchvision, and their chance; what an Augmentation may be."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from simsiam.views import ops as ours
from simsiam.views.augment import Augmentation, Batch, Views, crop_boxes

PIXEL = 1 / 255


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.rand(6, 3, 9, 9, generator=generator)
    x = torch.nn.functional.interpolate(smooth, (40, 48), mode="bilinear")
    x[4] = x[4, :1]  # one gray image: no chroma, the edge case of hue
    x[5] = torch.rand(3, 40, 48, generator=generator).round()  # saturated colours
    return x


@pytest.mark.parametrize("size", [32, 20, 64])  # 20: the antialiased way; 64: upsampling
def test_crop_resize_flip_equals_torchvision(images, size):
    boxes = [(0, 0, 40, 48), (3, 5, 30, 31), (10, 20, 17, 9), (0, 1, 1, 2), (39, 0, 1, 48)]
    boxes.append((7, 7, size if size < 33 else 33, 32))
    top, left, height, width = torch.tensor(boxes).float().T
    rows = ours.resize_weights(top, height, 40, size)
    columns = ours.resize_weights(left, width, 48, size)
    found = ours.resample(images, rows, columns)
    flipped = ours.resample(images, rows, columns.flip(1))
    for i, box in enumerate(boxes):
        theirs = T.resized_crop(images[i], *box, [size, size], antialias=True)
        assert (found[i] - theirs).abs().max() < PIXEL
        assert (flipped[i] - T.horizontal_flip(theirs)).abs().max() < PIXEL


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_equal_torchvision(images, name):
    factors = [0.6, 0.85, 1.0, 1.15, 1.4, 0.0] if name != "hue" else [-0.5, -0.1, 0, 0.03, 0.1, 0.5]
    found = getattr(ours, f"adjust_{name}")(images, torch.tensor(factors).view(-1, 1, 1, 1))
    for x, y, factor in zip(images, found, factors, strict=True):
        theirs = getattr(T, f"adjust_{name}")(x, factor)
        assert (y - theirs).abs().max() < PIXEL
    same = factors.index(0 if name == "hue" else 1.0)
    assert (found[same] - images[same]).abs().max() < 1e-6


def test_grayscale_equals_torchvision(images):
    gray = ours.adjust_saturation(images, torch.zeros(6, 1, 1, 1))
    assert (gray - T.rgb_to_grayscale(images, num_output_channels=3)).abs().max() < PIXEL


@pytest.mark.parametrize("taps", [3, 11, 23])
def test_blur_equals_torchvision(images, taps):
    x = images[..., :40]
    sigma = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 1e-3])
    weights = ours.blur_weights(sigma, 40, taps)
    found = ours.resample(x, weights, weights)
    for i in range(6):
        theirs = T.gaussian_blur(x[i], [taps, taps], [sigma[i].item()] * 2)
        assert (found[i] - theirs).abs().max() < PIXEL
    assert torch.equal(found[5], x[5])  # not blurred at all


def test_solarize_and_exchanged_axes_equal_torchvision(images):
    which = torch.tensor([True, False, True, True, True, True])
    found = ours.solarize(images, which.view(-1, 1, 1, 1))
    square = images[..., :40]
    turned = ours.exchange_axes(square, which.view(-1, 1, 1)).flip(-2)  # a turn by 90 degrees
    for i in range(6):
        theirs = T.solarize(images[i], 0.5) if which[i] else images[i]
        assert (found[i] - theirs).abs().max() < PIXEL
        theirs = T.rotate(square[i], 90) if which[i] else T.vertical_flip(square[i])
        assert (turned[i] - theirs).abs().max() < PIXEL


@pytest.mark.parametrize(("height", "width"), [(32, 32), (10, 90), (90, 10)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.9, 2.5)])
def test_crop_boxes_have_torchvisions_distribution(height, width, ratio):
    # 10 x 90: most tries fail and the fallback (central, ratio clamped) is common.
    n = 4000
    crop = v2.RandomResizedCrop(8, scale=(0.2, 1), ratio=ratio)
    torch.manual_seed(0)
    blank = torch.zeros(3, height, width)
    params = [crop.make_params([blank]) for _ in range(n)]
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in params])
    found = crop_boxes(np.random.default_rng(0), n, height, width, (0.2, 1), ratio)
    pairs = list(zip(found.T, theirs.T, strict=True))
    pairs.append((found[:, 2] * found[:, 3], theirs[:, 2] * theirs[:, 3]))
    pairs.append((found[:, 3] / found[:, 2], theirs[:, 3] / theirs[:, 2]))
    for one, other in pairs:
        assert ks_2samp(one, other, method="asymp").pvalue > 1e-3
    assert (found[:, :2] >= 0).all()
    assert (found[:, :2] + found[:, 2:] <= (height, width)).all()


# ---- Views --------------------------------------------------------------------------------------

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
# Without chance, but for the crop.
STILL = {"crop_scale": (1.0, 1.0), "jitter_p": 0.0, "gray_p": 0.0, "flip_p": 0.0}


def make_views(number=2, seed=7, **changes):
    return Views(16, MEAN, STD, Augmentation(**changes), number, seed)


def bytes_of(n=64, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def test_views_are_a_function_of_seed_epoch_and_step():
    images = bytes_of()
    first, second = make_views(blur_p=0.5)(Batch.alone(images, 3, 5))
    torch.rand(10)  # the global generators have no part in it
    np.random.rand(10)
    views = make_views(blur_p=0.5)
    views(Batch.alone(images, 2, 1))  # nor has what was asked for before
    for again in (views, make_views(blur_p=0.5)):
        found = again(Batch.alone(images, 3, 5))
        assert len(found) == 2
        assert torch.equal(found[0], first)
        assert torch.equal(found[1], second)
    assert not torch.equal(first, second)
    for epoch, step in [(3, 4), (3, 6), (2, 5), (4, 5), (5, 3)]:
        found = views(Batch.alone(images, epoch, step))
        assert not any(torch.equal(x, y) for x in found for y in (first, second))
    found = make_views(seed=8, blur_p=0.5)(Batch.alone(images, 3, 5))
    assert not any(torch.equal(x, y) for x in found for y in (first, second))


@pytest.mark.parametrize(
    "part",
    "crop_scale jitter_p gray_p blur_p flip_p vflip_p rotate90_p solarize_p".split(),
    ids=lambda name: name[:4],
)
def test_each_part_of_chance_is_a_view_s_own(part):
    """One part switched on alone, of the same pixels: views, steps, epochs and images differ."""
    on = STILL | {part: (0.2, 1.0) if part == "crop_scale" else 0.5}
    images = bytes_of(1, size=40).expand(64, -1, -1, -1)
    if part != "crop_scale":  # crops that are cut already, both the same
        images = images[:, None].expand(-1, 2, -1, -1, -1)
    views = Views(40, MEAN, STD, Augmentation(**on), seed=7)
    found = [views(Batch.alone(images, *when)) for when in [(3, 5), (3, 4), (2, 5), (5, 3)]]
    found = [view for pair in found for view in pair]
    assert not any(torch.equal(found[i], found[j]) for i in range(8) for j in range(i))
    for view in found:
        kinds = len({image.numpy().tobytes() for image in view})
        # As it is and flipped, gray or inverted; as it is and turned by three angles.
        few = {"flip_p": 2, "gray_p": 2, "vflip_p": 2, "solarize_p": 2, "rotate90_p": 4}
        assert kinds == few[part] if part in few else kinds > 20


NEWER = {"vflip_p": 0.4, "rotate90_p": 0.4, "solarize_p": 0.4}


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_flips_turns_and_solarize_are_those_that_were_drawn(cut):
    """Each image by torchvision, from what `chance` says of it; the images are not square."""
    images = bytes_of(200) if cut else bytes_of(200, size=24)[:, :, 3:19]
    views = make_views(**STILL | {"flip_p": 0.5} | NEWER)
    batch = Batch.alone(images[:, None].expand(-1, 2, -1, -1, -1) if cut else images, 1, 2)
    seen = set()
    for view, chance in zip(views(batch), views.sample(batch), strict=True):
        assert (chance.boxes is None) == cut
        for i, x in enumerate(images.float() / 255):
            if not cut:
                x = T.resized_crop(x, *chance.boxes[i].tolist(), [16, 16], antialias=True)
            x = T.horizontal_flip(x) if chance.flip[i] else x
            x = T.vertical_flip(x) if chance.vflip[i] else x
            x = T.rotate(x, 90.0 * chance.turns[i])
            x = T.solarize(x, 0.5) if chance.solarize[i] else x
            assert (view[i] - T.normalize(x, MEAN, STD)).abs().max() < PIXEL / min(STD)
            seen.add((chance.flip[i], chance.vflip[i], chance.turns[i]))
    assert len(seen) == 16  # 2 x 2 flips and 4 angles


def test_the_newer_parts_change_nothing_of_the_others():
    """What is drawn besides is as without them, whichever of them are on: older runs go on."""
    batch = Batch.alone(bytes_of(32), 3, 1)
    usual = make_views(blur_p=0.5).sample(batch)
    assert not any(chance.vflip.any() or chance.turns.any() for chance in usual)
    every = make_views(blur_p=0.5, **NEWER).sample(batch)
    for name, p in NEWER.items():
        for one, all_, plain in zip(
            make_views(blur_p=0.5, **{name: p}).sample(batch), every, usual, strict=True
        ):
            for part in ("boxes", "factors", "order", "flip", "gray", "sigma"):
                assert np.array_equal(getattr(one, part), getattr(plain, part))
            part = {"vflip_p": "vflip", "rotate90_p": "turns", "solarize_p": "solarize"}[name]
            assert np.array_equal(getattr(one, part), getattr(all_, part))
            assert getattr(one, part).any()
    assert not np.array_equal(every[0].turns, every[1].turns)


FIRST = [
    [0.0436, -0.0149, 0.0284, 0.0713, -0.0418, 0.0138],
    [-0.0333, 0.0086, -0.0224, 0.0348, -0.0137, -0.0372],
]


def test_default_views_are_those_of_the_first_checkpoints():
    """Slopes from left to right of the first images' views, as made before there were flags."""
    ramp = torch.linspace(-1, 1, 16)
    views = make_views(blur_p=0.5)(Batch.alone(bytes_of(16), 2, 5))
    found = [(x * ramp).mean((1, 2, 3))[:6] for x in views]
    torch.testing.assert_close(torch.stack(found), torch.tensor(FIRST), atol=2e-4, rtol=0)


def test_what_happened_is_told_in_words():
    chance = make_views(1, blur_p=1.0, jitter_p=1.0, gray_p=1.0, **dict.fromkeys(NEWER, 1.0))
    (drawn,) = chance.sample(Batch.alone(bytes_of(3)))
    drawn = drawn._replace(
        boxes=np.array([[0, 0, 8, 12]] * 3),
        factors=np.array([[1.25, 0.8, 1, -0.051]] * 3),
        order=np.array([3, 0, 2, 1]),
        flip=np.array([True, False, False]),
        vflip=np.array([True, True, False]),
        turns=np.array([3, 0, 1]),
        sigma=np.array([1.26, 0.0, 0.5]),
    )
    colour = ["hue -0.05", "brightness x 1.25", "contrast x 0.80"]
    first = ["crop 38%: 12 x 8", "flip left-right", "flip up-down", "turn 270 degrees"]
    assert drawn.describe(0, 256) == [*first, *colour, "gray", "blur 1.3 px", "solarize"]
    middle = ["crop 38%: 12 x 8", "flip up-down", *colour, "gray", "solarize"]
    assert drawn.describe(1, 256) == middle
    still, batch = make_views(1, **STILL), Batch.alone(bytes_of(3))
    (drawn,) = still.sample(batch)
    assert drawn._replace(boxes=None).describe(0, 256) == []


@pytest.mark.parametrize("number", [1, 2, 4])
def test_there_are_as_many_views_as_asked_for_and_the_first_are_the_same(number):
    batch = Batch.alone(bytes_of(8), 1, 2)
    found, four = make_views(number)(batch), make_views(4)(batch)
    assert len(found) == number
    assert all(torch.equal(x, y) for x, y in zip(found, four[:number], strict=True))
    assert not any(torch.equal(four[i], four[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("cut", [False, True])
def test_a_rank_s_rows_are_those_of_the_whole_batch(cut):
    """Chance is drawn for the global batch; a rank holds the images of its rows alone."""
    images, views = bytes_of(12), make_views(blur_p=0.5)
    if cut:  # crops that workers made: n x views x 3 x size x size
        images = torch.stack([images, bytes_of(12, seed=1)], dim=1)
    whole = views(Batch.alone(images, 2, 9))
    for rows in (slice(0, 4), slice(4, 8), slice(5, 12), slice(11, 12)):
        mine = views(Batch(2, 9, images[rows], None, 12, rows))
        for x, every in zip(mine, whole, strict=True):
            assert torch.equal(x, every[rows])
    other = views(Batch(2, 9, images[4:8], None, 4, slice(0, 4)))  # as a batch of its own
    assert not torch.equal(other[0], whole[0][4:8])


def test_a_view_is_composed_in_the_papers_order():
    """Everything switched on for certain, one parameter each: the composition by torchvision."""
    images = bytes_of(8)
    certain = {"jitter_p": 1.0, "gray_p": 1.0, "blur_p": 1.0, "flip_p": 1.0}
    none, sigma = (0.0, 0.0, 0.0, 0.0), (0.8, 0.8)
    views = Views(
        16, MEAN, STD, Augmentation((1.0, 1.0), jitter=none, blur_sigma=sigma, **certain), 1, seed=7
    )
    boxes = crop_boxes(np.random.default_rng([7, 0, 0]), 8, 16, 16, (1, 1))
    kept = (boxes == (0, 0, 16, 16)).all(1)
    assert kept.any()
    x = T.rgb_to_grayscale(T.horizontal_flip(images.float() / 255), num_output_channels=3)
    x = T.gaussian_blur(x, [1, 1], [0.8, 0.8])  # a tenth of 16 pixels, odd
    x = T.normalize(x, MEAN, STD)
    (view,) = views(Batch.alone(images))
    assert (view[kept] - x[kept]).abs().max() < PIXEL / min(STD)


def test_a_larger_view_is_blurred_by_a_tenth_of_it():
    """At 40 pixels the kernel has 2 * (40 // 20) + 1 = 5 taps, so that a blur is one."""
    images = bytes_of(8, size=40)
    blurred = Augmentation(**STILL, blur_p=1.0, blur_sigma=(0.8, 0.8))
    (view,) = Views(40, MEAN, STD, blurred, 1, seed=7)(Batch.alone(images))
    kept = crop_boxes(np.random.default_rng([7, 0, 0]), 8, 40, 40, (1, 1))[:, 2:].min(1) == 40
    assert kept.any()
    x = T.normalize(T.gaussian_blur(images.float() / 255, [5, 5], [0.8, 0.8]), MEAN, STD)
    assert (view[kept] - x[kept]).abs().max() < PIXEL / min(STD)


def test_shares_of_the_random_operations():
    n = 4000
    images = bytes_of(1).expand(n, -1, -1, -1)
    plain = make_views().eval_transform(images[:1])

    def share(**switched_on):
        views = make_views(1, **(STILL | switched_on))
        boxes = crop_boxes(np.random.default_rng([7, 0, 0]), n, 16, 16, (1, 1))
        whole = torch.from_numpy((boxes == (0, 0, 16, 16)).all(1))
        (view,) = views(Batch.alone(images))
        changed = (view[whole] - plain).abs().amax((1, 2, 3)) > 1e-5
        return changed.float().mean().item()

    assert share() == 0
    assert share(flip_p=0.5) == pytest.approx(0.5, abs=0.05)
    assert share(gray_p=0.2) == pytest.approx(0.2, abs=0.04)
    assert share(vflip_p=0.3) == pytest.approx(0.3, abs=0.05)
    assert share(rotate90_p=0.6) == pytest.approx(0.6, abs=0.05)
    assert share(solarize_p=0.2) == pytest.approx(0.2, abs=0.04)
    assert share(jitter_p=0.8) == pytest.approx(0.8, abs=0.04)
    assert share(jitter_p=0.8, jitter=(0.0, 0.0, 0.0, 0.1)) == pytest.approx(0.8, abs=0.04)


def test_plain_is_normalised_and_channels_last():
    images, views = bytes_of(4), make_views()
    x = views.eval_transform(images)
    torch.testing.assert_close(x, T.normalize(images.float() / 255, MEAN, STD))
    assert x.is_contiguous(memory_format=torch.channels_last)
    resized = views.eval_transform(bytes_of(4, size=24))
    theirs = T.resize(bytes_of(4, size=24).float() / 255, [16, 16], antialias=True)
    torch.testing.assert_close(resized, T.normalize(theirs, MEAN, STD))


def test_views_of_crops_take_one_crop_after_the_other():
    crops = torch.stack([bytes_of(8, seed=1), bytes_of(8, seed=2)], dim=1)
    still, views = STILL | {"crop_scale": (0.2, 0.5)}, make_views()  # they are not cut again
    for step in range(2):  # each step anew
        found = make_views(**still)(Batch.alone(crops, 0, step))
        for i in range(2):
            assert torch.equal(found[i], views.eval_transform(crops[:, i]))
    found = make_views(**(still | {"flip_p": 1.0}))(Batch.alone(crops))
    assert torch.equal(found[0], views.eval_transform(crops[:, 0].flip(-1)))


# ---- Augmentation -------------------------------------------------------------------------------


def test_an_augmentation_is_read_from_its_own_dict():
    for some in (Augmentation(), Augmentation(crop_scale=(0.08, 1.0), blur_p=0.5, flip_p=0.0)):
        saved = dataclasses.asdict(some)
        assert Augmentation.read(saved) == some
        assert Augmentation.read(dict(reversed(saved.items()))) == some
        file = io.BytesIO()
        torch.save({"augmentation": vars(some).copy()}, file)
        file.seek(0)
        assert Augmentation.read(torch.load(file, weights_only=True)["augmentation"]) == some
        lists = {k: list(v) if isinstance(v, tuple) else v for k, v in saved.items()}
        found = Augmentation.read(lists)
        assert found == some
        assert isinstance(found.jitter, tuple)
    whole = {"crop_scale": (1, 1), "flip_p": 1, "jitter_p": 0}  # whole numbers are numbers
    assert Augmentation.read(saved | whole) == Augmentation(**{**saved, **whole})
    with pytest.raises(dataclasses.FrozenInstanceError):
        some.flip_p = 0.5


@pytest.mark.parametrize(
    "change",
    [
        {"crop_scale": (0.2,)},
        {"crop_scale": (0.2, 0.5, 1.0)},
        {"crop_scale": 0.2},
        {"crop_scale": (0.2, math.nan)},
        {"crop_ratio": (0.75, math.inf)},
        {"crop_ratio": (0.75, "1.3")},
        {"crop_ratio": None},
        {"jitter": (0.4, 0.4, 0.4)},
        {"jitter": (0.4, 0.4, 0.4, -0.1)},
        {"jitter": {0.4, 0.3, 0.2, 0.1}},
        {"jitter_p": math.nan},
        {"gray_p": (0.2,)},
        {"gray_p": [0.2]},
        {"blur_p": None},
        {"blur_p": True},
        {"blur_sigma": ()},
        {"blur_sigma": torch.tensor([0.1, 2.0])},
        {"flip_p": "0.5"},
        {"flip_p": -0.5},
        {"flip_p": 1.5},
        {"crop_ratio": (0.0, 1.0)},
        {"crop_scale": (0.0, 1.0)},
        {"crop_scale": (0.2, 1.1)},
        {"crop_scale": (0.9, 0.2)},
        {"blur_sigma": (0.0, 2.0)},
        {"posterize_p": 0.2},
        {"solarize_p": 1.2},
        {"vflip_p": None},
        {"rotate90_p": (0.5,)},
    ],
)
def test_an_augmentation_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="augmentation") as error:
        Augmentation.read(dataclasses.asdict(Augmentation()) | change)
    (name,) = change
    assert "posterize" in name or re.search(rf"augmentation's .*{name}", str(error.value))
    if "posterize" not in name and not isinstance(change[name], list):
        with pytest.raises(ValueError, match="augmentation"):
            Augmentation(**change)


def test_an_augmentation_is_read_whole():
    saved = dataclasses.asdict(Augmentation())
    for some in (None, [], "flip", list(saved.items()), {}, *({k: saved[k]} for k in saved)):
        with pytest.raises(ValueError, match="its augmentation is not one of this program"):
            Augmentation.read(some)
    for name in saved:
        fewer = {k: v for k, v in saved.items() if k != name}
        with pytest.raises(ValueError, match="its augmentation is not one of this program"):
            Augmentation.read(fewer)


def test_compiled_colours_equal_the_others():
    """In every order of the four operations; within 1e-5 of the range from 0 to 1."""
    images = torch.randint(0, 256, (16, 3, 24, 24), dtype=torch.uint8)
    unit = ((0.0,) * 3, (1.0,) * 3)
    augmentation = Augmentation(jitter_p=1.0, gray_p=0.5, blur_p=0.5)
    eager, compiled = (Views(24, *unit, augmentation, compiled=kind) for kind in (False, True))
    for step in range(12):
        batch = Batch.alone(images, 0, step)
        for mine, theirs in zip(compiled(batch), eager(batch), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_views_grow_with_the_epochs():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    growing = Views(32, MEAN, STD, size_schedule=(12, 20, 32))
    for epoch, side in enumerate((12, 20, 32)):
        whole = Views(side, MEAN, STD)
        batch = Batch.alone(images, epoch)
        for mine, theirs in zip(growing(batch), whole(batch), strict=True):
            assert mine.shape == (8, 3, side, side)
            assert torch.equal(mine, theirs)
    assert growing.eval_transform(images).shape == (8, 3, 32, 32)
