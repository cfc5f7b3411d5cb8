"""Scores without labels: by hand, against plain loops, numpy and lightly; and what they leave."""

import math

import numpy as np
import pytest
import torch
from lightly.loss.hypersphere_loss import HypersphereLoss
from PIL import Image
from torch import nn

from simsiam.data.loader import ImageFiles
from simsiam.evaluation import metrics, scores
from simsiam.models.simsiam import SimSiam
from simsiam.views.augment import Augmentation, Views
from tests.helpers import Large

OFF = torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)
BF16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=True)
# The whole image, as it is.
STILL = Augmentation((1.0, 1.0), (1.0, 1.0), jitter_p=0.0, gray_p=0.0, flip_p=0.0)
ALWAYS = Augmentation(jitter_p=1.0, gray_p=0.0)


def make_views(augmentation=ALWAYS, **more):
    return Views(8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), augmentation, **more)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(n, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def rotation(d):
    return torch.linalg.qr(random(d, d, seed=9).double()).Q


# ---- LiDAR --------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [1, 2, 5])
def test_lidar_counts_the_directions_of_equal_views(directions):
    """Images at + and - each axis, all of their views alike: so many equal eigenvalues."""
    axes = torch.eye(7)[:directions]
    views = torch.cat([axes, -axes])[:, None].expand(-1, 3, -1)
    assert scores.lidar(views) == pytest.approx(directions, rel=2e-5)  # epsilon's
    assert scores.lidar(views + 100) == pytest.approx(directions, rel=2e-5)  # a mean counts not


def test_lidar_by_hand():
    """Along two axes the scatter of means is 9/2 and 4/2, that of views 2/2 and 3/2; delta 1/2.

    The eigenvalues are 4.5 / (1 + 0.5) = 3 and 2 / (1.5 + 0.5) = 1, of a sum of 4.
    """
    means = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    root2, root3 = 2**0.5, 3**0.5
    around = torch.tensor([[root2, 0.0], [-root2, 0.0], [0.0, root3], [0.0, -root3]])
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    found = scores.lidar(means[:, None] + around, delta=0.5)
    assert found == pytest.approx(math.exp(entropy), rel=1e-5)


def naive_lidar(x, delta, epsilon):
    """The paper's formulas, one after the other, an image and a view at a time."""
    n, q, d = x.shape
    means = x.mean(1)
    between, within = np.zeros((d, d)), np.zeros((d, d))
    for i in range(n):
        between += np.outer(means[i] - means.mean(0), means[i] - means.mean(0)) / n
        for j in range(q):
            within += np.outer(x[i, j] - means[i], x[i, j] - means[i]) / (n * q)
    values, vectors = np.linalg.eigh(within + delta * np.eye(d))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    spectrum = np.linalg.eigh(root @ between @ root)[0].clip(0)
    p = spectrum / spectrum.sum() + epsilon
    return math.exp(-(p * np.log(p)).sum())


@pytest.mark.parametrize(("n", "q", "d"), [(300, 3, 6), (40, 5, 8), (6, 2, 20)])  # 300: two chunks
def test_lidar_equals_the_paper_s_formulas(n, q, d):
    scale = torch.linspace(0.1, 3, d)
    x = random(n, 1, d) * scale + random(n, q, d, seed=1) * scale.flip(0) * 0.3
    expected = naive_lidar(x.double().numpy(), 1e-4, 1e-7)
    assert scores.lidar(x) == pytest.approx(expected, rel=1e-9)
    expected = naive_lidar(x.double().numpy(), 0.1, 1e-7)
    assert scores.lidar(x, delta=0.1) == pytest.approx(expected, rel=1e-9)


def test_lidar_knows_no_order_and_no_axes():
    x = random(30, 1, 6) * torch.arange(1, 7) + random(30, 4, 6, seed=1)
    found = scores.lidar(x)
    order = torch.from_numpy(np.random.default_rng(0).permutation(30))
    for other in (x[order], x.flip(1), x.double() @ rotation(6), x - 5):
        assert scores.lidar(other) == pytest.approx(found, rel=1e-5)
    mixed = x.flatten(0, 1)[torch.from_numpy(np.random.default_rng(0).permutation(120))]
    assert abs(scores.lidar(mixed.view(30, 4, 6)) - found) > 0.1  # which image's a view is, counts


def test_lidar_does_not_count_what_tells_no_images_apart():
    """Two directions are the images', four the views' alone: RankMe counts all six."""
    x = torch.zeros(500, 10, 6)
    x[..., :2] = random(500, 1, 2)
    x[..., 2:] = random(500, 10, 4, seed=1)
    x[..., :2] += 0.05 * random(500, 10, 2, seed=2)
    assert scores.lidar(x) < 2.1
    assert metrics.effective_rank(x.flatten(0, 1)) > 5.9


def test_lidar_refuses_what_has_no_scatter():
    for shape in ((1, 5, 3), (5, 1, 3)):
        with pytest.raises(ValueError, match=f"{shape[0]} images in {shape[1]} views"):
            scores.lidar(torch.ones(shape))
    with pytest.raises(ValueError, match="a delta of 0: must be above 0"):
        scores.lidar(random(5, 3, 2), delta=0)
    assert math.isnan(scores.lidar(torch.ones(4, 3, 2)))


# ---- alpha-ReQ ----------------------------------------------------------------------------------


def with_spectrum(values, n=400):
    """Features whose covariance has these eigenvalues, around some mean, along no axes."""
    d = len(values)
    columns = random(n, d).double()
    columns = torch.linalg.qr(columns - columns.mean(0)).Q * n**0.5  # covariance: the identity
    return columns * values.double().sqrt() @ rotation(d) + 3


@pytest.mark.parametrize("alpha", [0.5, 1.5])
def test_alpha_of_a_power_law(alpha):
    spectrum = torch.arange(1, 131).double() ** -alpha
    assert scores.alpha_req(with_spectrum(spectrum)) == pytest.approx(alpha, rel=1e-6)
    assert scores.alpha_req(with_spectrum(7 * spectrum)) == pytest.approx(alpha, rel=1e-6)
    assert scores.alpha_req(with_spectrum(spectrum[:20])) == pytest.approx(alpha, rel=1e-6)


def test_alpha_is_of_eigenvalues_4_to_100():
    spectrum = torch.arange(1, 131).double() ** -1.5
    spectrum[:3] *= 100
    spectrum[100:] *= 0.1
    assert scores.alpha_req(with_spectrum(spectrum)) == pytest.approx(1.5, rel=1e-6)
    for i, factor in ((3, 2), (99, 0.9)):  # these count
        changed = spectrum.clone()
        changed[i] *= factor
        assert abs(scores.alpha_req(with_spectrum(changed)) - 1.5) > 1e-4


def test_alpha_equals_numpy_s_weighted_fit():
    spectrum = torch.exp(-(torch.linspace(0, 2, 120).double() ** 2))  # no line in log-log
    i = np.arange(4, 101)
    # polyfit squares its weights.
    slope = np.polyfit(np.log(i), spectrum[3:100].log().numpy(), 1, w=i**-0.5)[0]
    assert scores.alpha_req(with_spectrum(spectrum)) == pytest.approx(-slope, rel=1e-6)


def test_alpha_leaves_out_rounding_errors():
    """Dead channels, and fewer images than channels, have eigenvalues near 0 of any size."""
    x = with_spectrum(torch.arange(1, 31).double() ** -1.5)
    dead = torch.cat([x, torch.full((400, 40), 1 / 3)], dim=1)
    assert scores.alpha_req(dead) == pytest.approx(1.5, rel=1e-6)
    few = torch.cat([x, x, x], dim=1)  # of rank 30 still, by none that is exactly 0
    assert scores.alpha_req(few) == pytest.approx(1.5, rel=1e-6)
    assert math.isnan(scores.alpha_req(x[:5]))  # 4 eigenvalues: one to fit to
    assert math.isfinite(scores.alpha_req(x[:6]))
    assert math.isnan(scores.alpha_req(torch.ones(9, 7)))


# ---- alignment and uniformity -------------------------------------------------------------------


def test_alignment_by_hand():
    x, y = torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, -3.0]])
    assert scores.alignment(x, y) == pytest.approx((0 + 4) / 2)
    assert scores.alignment(x, y, alpha=1) == pytest.approx((0 + 2) / 2)
    assert scores.alignment(x, y.flip(0)) == pytest.approx(2)  # right angles
    with pytest.raises(ValueError, match="must be pairs"):
        scores.alignment(x, y[:1])


def test_uniformity_by_hand():
    ends = torch.tensor([[3.0, 0.0], [-0.5, 0.0]])
    assert scores.uniformity(ends) == pytest.approx(-8)  # t |a - b|^2 = 2 * 4
    assert scores.uniformity(torch.eye(3)) == pytest.approx(-4)  # 2 * 2, for each pair
    assert scores.uniformity(torch.eye(3), t=0.5) == pytest.approx(-1)
    cross = torch.cat([torch.eye(2), -torch.eye(2)])  # 2 pairs of ends, 4 right angles
    expected = math.log((2 * math.exp(-8) + 4 * math.exp(-4)) / 6)
    assert scores.uniformity(cross) == pytest.approx(expected)
    assert scores.uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-12)
    assert scores.uniformity(ends, t=1000) == pytest.approx(-4000)  # exp(-4000) is 0 in fp64
    with pytest.raises(ValueError, match="of 1 features"):
        scores.uniformity(ends[:1])


def test_uniformity_equals_a_double_loop_whatever_the_tile():
    x = random(23, 4)
    unit = (x.double() / x.double().norm(dim=1, keepdim=True)).numpy()
    pairs = [
        math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i in range(23) for j in range(i + 1, 23)
    ]
    for tile in (1, 2, 7, 22, 23, 1024):
        found = scores.uniformity(x, tile=tile)
        assert found == pytest.approx(math.log(np.mean(pairs)), rel=1e-12)
    assert scores.uniformity(x.flip(0)) == pytest.approx(found, rel=1e-12)


def test_both_equal_lightly_s():
    x, y = random(50, 6), random(50, 6, seed=1)
    for t, alpha in ((2.0, 2.0), (1.0, 3.0)):
        theirs = HypersphereLoss(t, lam=1.0, alpha=alpha)(x.double(), y.double()).item()
        uniform = (scores.uniformity(x, t) + scores.uniformity(y, t)) / 2
        assert scores.alignment(x, y, alpha) + uniform == pytest.approx(theirs, rel=1e-9)


def test_uniformity_s_memory_is_bounded():
    """All pairs of 2,000 features at once would be 32 MB."""
    x = random(2000, 4)
    with Large(1_000_000) as large:
        scores.uniformity(x, tile=256)
    assert not large.seen


# ---- features of views --------------------------------------------------------------------------


def tiny(training=False, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5)).train(training)


def test_features_of_views_without_chance_are_those_of_the_images():
    net, images = tiny(), pixels(9)
    views = make_views(STILL)
    plain = metrics.features(net, views.eval_transform, images, OFF, normalise=False)
    found = scores.view_features(net, views, images, OFF, q=3)
    assert found.shape == (9, 3, 5)
    for j in range(3):
        torch.testing.assert_close(found[:, j], plain)
    projector = tiny(seed=1)[1:].append(nn.ReLU())
    projector[0] = nn.Linear(5, 5)
    z = scores.view_features(net, views, images, OFF, q=3, projector=projector)
    with torch.no_grad():
        torch.testing.assert_close(z[:, 1], projector(plain))


@pytest.mark.parametrize("training", [True, False])
def test_views_change_nothing_and_are_functions_of_the_seed(training):
    net, projector, images = tiny(training), nn.BatchNorm1d(5).train(training), pixels(9)
    before = {k: v.clone() for part in (net, projector) for k, v in part.state_dict().items()}
    chance = torch.get_rng_state()
    found, again, other = (
        scores.view_features(net, views, images, OFF, 2, seed, projector)
        for views, seed in (
            (make_views(), 3),
            (make_views(number=4, seed=8, size_schedule=[4]), 3),
            (make_views(), 4),
        )
    )
    assert torch.equal(found, again)
    assert not found.requires_grad
    assert (found - other).abs().min() > 0
    assert torch.equal(torch.get_rng_state(), chance)
    assert net.training == net[2].training == projector.training == training
    after = {k: v for part in (net, projector) for k, v in part.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_each_view_of_each_image_is_drawn_for_itself():
    """Of one image over and over, in two chunks of a size: no two of all the views are equal."""
    n = 2 * scores.CHUNK
    images = pixels(1).expand(n, -1, -1, -1)
    found = scores.view_features(tiny(), make_views(), images, OFF, q=2)
    assert found.shape == (n, 2, 5)
    assert len(found.flatten(0, 1).unique(dim=0)) == 2 * n


def test_views_under_amp_are_of_bf16():
    net = tiny()[:2]
    found = scores.view_features(net, make_views(), pixels(4), BF16, q=2)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    exact = scores.view_features(net, make_views(), pixels(4), OFF, q=2)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


# ---- all of them --------------------------------------------------------------------------------


def small_net(training=False):
    torch.manual_seed(0)
    net = SimSiam("resnet8", feature_dim=16, width=4).train()
    with torch.no_grad():
        for module in net.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1)  # untrained, blocks end in 0, and so do most channels
        net(*(random(8, 3, 8, 8, seed=i) for i in range(2)))  # moves BN's statistics
    return net.train(training)


NUMBERS = {"most": 30, "viewed": 12, "q": 3}


@pytest.mark.parametrize("training", [True, False])
def test_scores_are_those_of_the_parts_and_change_nothing(training):
    net, views, images = small_net(training), make_views(), pixels(12)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = scores.unlabelled_scores(net, views, images, OFF, seed=4, **NUMBERS)
    assert all(module.training == training for module in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    encoder = nn.Sequential(net.backbone, net.projector).eval()
    bank, z = (
        metrics.features(part, views.eval_transform, images, OFF, False)
        for part in (net.backbone, encoder)
    )
    seen = scores.view_features(net.backbone, views, images, OFF, q=3, seed=4)
    assert found == {
        "rankme": metrics.effective_rank(nn.functional.normalize(bank, dim=1)),
        "rankme_z": pytest.approx(metrics.effective_rank(nn.functional.normalize(z, dim=1))),
        "lidar": scores.lidar(seen),
        "alpha_req": scores.alpha_req(bank),
        "uniformity": scores.uniformity(seen[:, 0]),
        "alignment": pytest.approx(
            (scores.alignment(seen[:, 0], seen[:, 1]) + scores.alignment(seen[:, 1], seen[:, 2]))
            / 2
        ),
    }
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.values())


def test_scores_look_at_so_many_images_drawn_by_the_seed():
    net, images, seen = small_net(), pixels(60), []
    net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    of = lambda seed: scores.unlabelled_scores(net, make_views(), images, OFF, seed, **NUMBERS)  # noqa: E731
    found = of(5)
    plain, drawn = make_views().eval_transform(images), seen[0]
    assert [len(x) for x in seen] == [30, 12, 12, 12]
    places = [int((plain == x).flatten(1).all(1).nonzero()) for x in drawn]
    assert places == sorted(set(places))
    assert places[-1] > 30  # from all over
    assert of(5) == found  # to the bit
    assert all(of(6)[name] != value for name, value in found.items())
    seen.clear()
    scores.unlabelled_scores(net, make_views(), images[:5], OFF, q=2)
    assert [len(x) for x in seen] == [5, 5, 5]


def test_scores_of_files_are_those_of_their_images(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for path, image in zip(paths, pixels(6, size=12), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    files = ImageFiles(paths, 8, workers=0)
    images = torch.cat(list(files.split(6)))
    in_files, in_memory = (
        scores.unlabelled_scores(small_net(), make_views(), of, OFF, **NUMBERS)
        for of in (files, images)
    )
    assert in_files == in_memory


def test_scores_of_features_that_are_not_finite_are_refused():
    net = small_net()
    net.projector[0].weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        scores.unlabelled_scores(net, make_views(), pixels(5), OFF, **NUMBERS)
