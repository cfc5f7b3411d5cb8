"""tools.worth: its summary by hand; a small study against the commands in its table."""

import pandas
import pytest
from PIL import Image

import linear
import main
from tests import helpers
from tools import worth


def rows(method, **points):
    """Two seeds per point, with a top-1 1 below and 1 above it."""
    return [
        {"method": method, "labels": int(labels[1:]), "seed": seed, "top1": top1 + 2 * seed - 1}
        for labels, top1 in points.items()
        for seed in (0, 1)
    ]


def test_summary_by_hand():
    table = rows(worth.LINEAR, _100=40.0, _1000=45.0, _10000=50.0)
    table += rows(worth.TUNED, _100=30.0, _1000=55.0, _10000=70.0)
    table += rows(worth.KNN, _100=35.0, _1000=40.0, _10000=45.0)
    table += rows(worth.SCRATCH, _100=20.0, _1000=40.0, _10000=70.0)
    most, middle, fewest = worth.summarize(table)
    assert all(words in most for words in ("10000 labels", "70.0 % (fine-tuned)", "no worse"))
    # 55 lies half-way between 40 and 70: half-way from 1,000 to 10,000.
    for words in ("1000 labels", "55.0 % (fine-tuned)", "scratch 40.0 %", "3200 labels"):
        assert words in middle
    for words in ("100 labels", "40.0 % (linear)", "scratch 20.0 %", "1000 labels"):
        assert words in fewest
    never = rows(worth.KNN, _100=50.0, _1000=60.0) + rows(worth.SCRATCH, _100=20.0, _1000=49.0)
    assert "all 1000" in worth.summarize(never)[-1]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    flags = "--data_name textures --train_size 300 --width 4 --feature_dim 16 --epochs 1"
    main.main(f"{flags} --no-pictures --out {out} --name pre".split())
    return out / "pre_model.pth"


def test_a_study_equals_its_commands_and_continues(pretrained, tmp_path, capsys):
    flags = f"--fractions 0.2 --seeds 3 --epochs 2 --steps 1 --out {tmp_path}".split()
    worth.command(["--model_path", str(pretrained), *flags])
    assert "with 60 labels, " in capsys.readouterr().out.splitlines()[-1]
    table = pandas.read_csv(tmp_path / "worth.csv").set_index("method")
    methods = [worth.KNN, worth.LINEAR, worth.TUNED, worth.SCRATCH, worth.PIXELS]
    assert table.index.tolist() == methods
    assert set(table["labels"]) == {60}  # of the 300 that the encoder was trained on
    assert table.loc[[worth.TUNED, worth.SCRATCH], "epochs"].tolist() == [2, 2]
    assert Image.open(tmp_path / "worth.png").size[0] > 800
    words = table.loc[worth.SCRATCH, "command"].split()[2:]
    linear.main([*words, "--out", str(tmp_path / "again"), "--name", "a", "--no-pictures"])
    again = pandas.read_csv(tmp_path / "again" / "a_statistics.csv")["test_acc@1"].iloc[-1]
    # Another process may have another number of threads, and so other last bits.
    assert table.loc[worth.SCRATCH, "top1"] == pytest.approx(again, abs=1)
    # A row in the table is kept, a missing one is added, an interrupted run is resumed.
    edited = table.drop([worth.KNN, worth.SCRATCH])
    edited.loc[worth.LINEAR, "top1"] = 99.0
    edited.reset_index()[list(worth.COLUMNS)].to_csv(tmp_path / "worth.csv", index=False)
    (statistics,) = (tmp_path / "worth").glob("*_from-scratch_*_statistics.csv")
    name = statistics.name.removesuffix("_statistics.csv")
    own = ["--out", tmp_path / "worth", "--name", name, "--no-pictures", "--overwrite"]
    argv = [*words, *own, "--checkpoint_minutes", 0]
    helpers.interrupt(linear, argv, epoch=1)
    interrupted = pandas.read_csv(statistics)
    worth.command(["--model_path", str(pretrained), *flags])
    top1 = pandas.read_csv(tmp_path / "worth.csv").set_index("method")["top1"]
    assert top1[worth.LINEAR] == 99
    assert top1[worth.KNN] == pytest.approx(table.loc[worth.KNN, "top1"])
    resumed = pandas.read_csv(statistics)
    assert resumed["epoch"].tolist() == [1, 2]
    assert resumed["seconds"][0] == interrupted["seconds"][0]
    assert top1[worth.SCRATCH] == resumed["test_acc@1"][1]


def test_against_another_encoder(pretrained, tmp_path):
    """Its row equals that of a study of its own, and leaves the other rows alone."""
    other, out = tmp_path / "other_model.pth", tmp_path / "both"
    flags = "--data_name textures --train_size 300 --width 8 --feature_dim 16 --epochs 1"
    main.main(f"{flags} --no-pictures --out {tmp_path} --name other".split())
    flags = f"--fractions 0.2 --seeds 3 --out {out} --model_path".split()
    both, numbers = worth.prepare(
        worth.parse([*flags, str(pretrained), "--against", str(other)])[1]
    )
    out.mkdir()
    name = f"linear, {other.name}"
    assert list(both.encoders)[2] == name
    row = both.run(name, 0.2, numbers[0.2], 3)
    assert row["encoder"] == str(other)
    alone = worth.prepare(worth.parse([*flags, str(other)])[1])[0].run(worth.LINEAR, 0.2, 60, 3)
    assert row["top1"] == alone["top1"]
    assert row["top1"] != both.run(worth.LINEAR, 0.2, 60, 3)["top1"]
    assert len(pandas.read_csv(out / "worth.csv")) == 3


def test_bad_input_is_one_line(pretrained, tmp_path, capsys):
    out, unlabelled = tmp_path / "out", tmp_path / "images"
    unlabelled.mkdir()
    Image.new("RGB", (32, 32)).save(unlabelled / "a.png")
    for flags, word in (
        (("--fractions", 0.01, 1), "--fractions 0.01"),
        (("--fractions", 2), "--fractions"),
        (("--against", tmp_path / "nowhere.pth"), "nowhere.pth"),
        (("--data_name", "folder", "--data_root", unlabelled), str(unlabelled)),
    ):
        flags = ("--model_path", pretrained, "--out", out, *flags)
        assert word in helpers.refused(capsys, worth.command, *flags)
        assert not out.exists()
