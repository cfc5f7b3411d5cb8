"""tools.worth: its words by hand; a small study, its rows against the commands that they name."""

import types

import pandas
import pytest
from PIL import Image

import linear
import main
from tests import helpers
from tools import worth

DOOR = types.SimpleNamespace(main=worth.command)


def rows(method, **points):
    """Two seeds a point: a top-1 1 below and one 1 above."""
    return [
        {"method": method, "labels": int(labels[1:]), "seed": seed, "top1": top1 + 2 * seed - 1}
        for labels, top1 in points.items()
        for seed in (0, 1)
    ]


def test_how_many_labels_by_hand():
    means = {100: 20.0, 10_000: 60.0}
    assert worth.labels_for(means, 40.0) == pytest.approx(1000)  # half of the way, on a log scale
    assert worth.labels_for(means, 60.0) == pytest.approx(10_000)
    assert worth.labels_for(means, 15.0) == 100  # enough from the start
    assert worth.labels_for(means, 60.1) is None


def test_the_words_by_hand():
    found = rows(worth.LINEAR, _100=40.0, _1000=45.0, _10000=50.0)
    found += rows(worth.TUNED, _100=30.0, _1000=55.0, _10000=70.0)
    found += rows(worth.KNN, _100=35.0, _1000=40.0, _10000=45.0)
    found += rows(worth.SCRATCH, _100=20.0, _1000=40.0, _10000=70.0)
    assert worth.in_words(found) == [
        "with 10000 labels, pre-training gives 70.0 % (fine-tuned); from scratch is no worse: "
        "70.0 %",
        # 15 of the 30 points from 40 to 70: half of the way from 1,000 to 10,000.
        "with 1000 labels, pre-training gives 55.0 % (fine-tuned), from scratch 40.0 %, which "
        "needs about 3200 labels for that",
        "with 100 labels, pre-training gives 40.0 % (linear), from scratch 20.0 %, which needs "
        "about 1000 labels for that",
    ]
    never = rows(worth.KNN, _100=50.0) + rows(worth.SCRATCH, _100=20.0, _1000=49.0)
    assert worth.in_words(never + rows(worth.KNN, _1000=60.0))[-1] == (
        "with 100 labels, pre-training gives 50.0 % (kNN), from scratch 20.0 %, and less than that "
        "with all 1000"
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    flags = "--data_name textures --train_size 300 --width 4 --feature_dim 16 --epochs 1"
    main.main(f"{flags} --no-pictures --out {out} --name pre".split())
    return out / "pre_model.pth"


def test_a_study_is_what_its_commands_give_and_goes_on(pretrained, tmp_path, capsys, monkeypatch):
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
    # A row that is there is not made again, one that is not is made, a run that was cut goes on.
    kept = table.drop([worth.KNN, worth.SCRATCH])
    kept.loc[worth.LINEAR, "top1"] = 99.0
    kept.reset_index()[list(worth.COLUMNS)].to_csv(tmp_path / "worth.csv", index=False)
    (statistics,) = (tmp_path / "worth").glob("*_from-scratch_*_statistics.csv")
    name = statistics.name.removesuffix("_statistics.csv")
    own = ["--out", tmp_path / "worth", "--name", name, "--no-pictures", "--overwrite"]
    own += ["--checkpoint_minutes", 0]
    helpers.cut_in_epoch(linear, 1, [*words, *own])
    begun = pandas.read_csv(statistics)
    worth.command(["--model_path", str(pretrained), *flags])
    found = pandas.read_csv(tmp_path / "worth.csv").set_index("method")["top1"]
    assert found[worth.LINEAR] == 99
    assert found[worth.KNN] == pytest.approx(table.loc[worth.KNN, "top1"])
    gone_on = pandas.read_csv(statistics)
    assert gone_on["epoch"].tolist() == [1, 2]
    assert gone_on["seconds"][0] == begun["seconds"][0]
    assert found[worth.SCRATCH] == gone_on["test_acc@1"][1]


def test_another_encoder_beside_it(pretrained, tmp_path):
    """Its row is what the linear head of a study of its own is; it makes no other row another's."""
    other = tmp_path / "other_model.pth"
    flags = "--data_name textures --train_size 300 --width 8 --feature_dim 16 --epochs 1"
    main.main(f"{flags} --no-pictures --out {tmp_path} --name other".split())
    study = worth.parsed([*"--fractions 0.2 --seeds 3 --model_path".split(), str(pretrained)])[1]
    study.out, study.against = tmp_path / "both", str(other)
    both, numbers = worth.prepared(study)
    study.out.mkdir()
    name = f"linear, {other.name}"
    assert both.methods == [worth.KNN, worth.LINEAR, name, worth.TUNED, worth.SCRATCH, worth.PIXELS]
    row = both.run(name, 0.2, numbers[0.2], 3)
    assert row["encoder"] == str(other)
    own = worth.parsed([*"--fractions 0.2 --seeds 3 --model_path".split(), str(other)])[1]
    own.out = study.out
    alone = worth.prepared(own)[0].run(worth.LINEAR, 0.2, 60, 3)
    assert row["top1"] == alone["top1"]
    assert row["top1"] != both.run(worth.LINEAR, 0.2, 60, 3)["top1"]
    assert len(pandas.read_csv(study.out / "worth.csv")) == 3


def test_bad_input_is_one_line(pretrained, tmp_path, capsys):
    out = tmp_path / "out"

    def err(*flags):
        found = helpers.refused(capsys, DOOR, "--model_path", pretrained, "--out", out, *flags)
        assert not out.exists()
        return found

    assert "--fractions 0.01: gives class" in err("--fractions", 0.01, 1)
    assert "--fractions" in err("--fractions", 2)
    assert "nowhere.pth" in err("--against", tmp_path / "nowhere.pth")
    unlabelled = tmp_path / "images"
    unlabelled.mkdir()
    Image.new("RGB", (32, 32)).save(unlabelled / "a.png")
    wrong = err("--data_name", "folder", "--data_root", unlabelled)
    assert "has no labelled test images" in wrong
