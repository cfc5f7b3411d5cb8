"""`import simsiam`: light, global to nothing, and as docs/library.md shows it."""

import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import simsiam
from simsiam.data import datasets, decode
from simsiam.evaluation.knn import knn
from simsiam.interop import weights
from simsiam.models.simsiam import SimSiam
from simsiam.views import augment
from tests.helpers import ROOT, hardly_trained

NAMES = {
    "SimSiam": SimSiam,
    "Views": augment.Views,
    "Augmentation": augment.Augmentation,
    "load_dataset": datasets.load_dataset,
    "knn": knn,
    "open_encoder": weights.open_encoder,
}

PROGRAM = """
import os, random, signal, sys, warnings
state = lambda: (list(warnings.filters), dict(os.environ), os.getcwd(), random.getstate(),
                 signal.getsignal(signal.SIGINT), list(sys.path), sys.excepthook)
before = state()
import simsiam
assert state() == before
assert set({names}) <= set(dir(simsiam))
heavy = {{"torch", "numpy", "pandas", "PIL", "matplotlib", "sklearn"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint under the name that docs/library.md gives it."""
    path = hardly_trained(tmp_path_factory.mktemp("library") / "results")
    return path.rename(path.with_name("textures_model.pth"))


def test_the_import_is_light_and_changes_nothing_global():
    program = PROGRAM.format(names=sorted(NAMES))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_documented():
    assert sorted(simsiam.__all__) == sorted(NAMES)
    threads, kind, state = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    for name, own in NAMES.items():
        assert getattr(simsiam, name) == own
        assert own.__doc__
        assert f"`{name}(" in (ROOT / "docs" / "library.md").read_text()
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, kind)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AttributeError, match="no attribute 'Simsiam'"):
        _ = simsiam.Simsiam


def test_an_encoder_turns_images_of_any_kind_into_features(checkpoint, tmp_path):
    encoder = simsiam.open_encoder(checkpoint)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    cut = decode.decode_files([file], 32, resize_size=encoder.resize)[0]
    with torch.no_grad():
        expected = encoder.net.backbone(encoder.views.eval_transform(cut))
    for image in (file, str(file), Image.open(file), pixels, pixels / 255, tensor, tensor / 255):
        torch.testing.assert_close(encoder(image), expected)
    some = encoder([file, tensor], normalise=True)
    assert some.shape == (2, expected.shape[1])
    assert some.dtype == torch.float32
    assert not some.requires_grad
    torch.testing.assert_close(some.norm(dim=1), torch.ones(2))
    for many in (tensor[None].expand(3, -1, -1, -1), pixels[None].repeat(3, 0), [file] * 3):
        torch.testing.assert_close(encoder(many), expected.expand(3, -1))
    assert encoder([]).shape == (0, expected.shape[1])
    assert len(repr(encoder)) < 500  # what a notebook shows
    for wrong, named in [
        ([file, tmp_path / "none.png"], r"none\.png"),
        (tensor[:1], r"torch\.uint8 of shape"),
        (pixels.transpose(2, 0, 1), "uint8 of shape"),
        (pixels.astype(np.int64), "int64 of shape"),
        (pixels.astype(np.float32), "float32 of shape"),  # from 0 to 255
        (7, "int"),
        (None, "NoneType"),
    ]:
        with pytest.raises(ValueError, match=named):
            encoder(wrong)


def test_many_images_are_taken_in_parts(checkpoint):
    """More than are decoded at once: each row is its own image's."""
    encoder = simsiam.open_encoder(checkpoint)
    many = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    rows = torch.arange(515) % 5
    torch.testing.assert_close(encoder(many[rows]), encoder(many)[rows])


def test_the_code_of_the_document_runs(checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent.parent)
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 3
    space = {}
    for block in blocks:
        exec(compile(block, "docs/library.md", "exec"), space)
    names = types.SimpleNamespace(**space)
    assert names.loss.isfinite()
    assert names.z.shape == (64, 64)
    assert names.features.shape == (3, names.bank.shape[1])
    torch.testing.assert_close(names.features[0], names.features[1])
    assert names.classes.shape == (200, 5)
    assert names.similarity.shape == names.place.shape == (200, 3)
    assert "kNN top-1: " in capsys.readouterr().out
