"""The command line as people use it: exit codes, clear messages, no tracebacks."""

import csv
import dataclasses
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import pytest
import tyro
from conftest import draw_image

from vitrail.cli import COMMANDS, run, train
from vitrail.cli.options import given_settings, options_of


def printed(capsys) -> str:
    out, error = capsys.readouterr()
    return " ".join((out + error).split())


def test_help_and_import_are_light():
    program = """
import sys, time
started = time.perf_counter()
import vitrail
import vitrail.cli
code = vitrail.cli.run(["--help"])
assert code == 0
assert vitrail.cli.run(["train", "--help"]) == 0
heavy = {"torch", "torchvision", "timm", "sklearn", "scipy", "matplotlib", "pandas", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Start with:  vitrail train digits" in done.stdout


def test_command_files_have_one_shape():
    for name, command in COMMANDS.items():
        assert command.__name__ == f"vitrail.cli.{name}"
        assert command.HELP.endswith(".")
        assert "\n" not in command.HELP
        assert dataclasses.is_dataclass(options_of(command))
        assert list(inspect.signature(command.run).parameters) == ["options"]


def test_settings_that_are_given_have_their_dotted_names():
    arguments = ["photos", "--out", "run", "--model", "s16", "--seed", "0", "--optim.lr", "0.1", "--model.depth", "2"]
    options = tyro.cli(options_of(train), args=arguments)
    given = given_settings(options, own=train.OwnOptions)
    assert given == {"seed": 0, "optim.lr": 0.1, "model.depth": 2}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, ""),
        (["tran", "digits"], 2, "did you mean 'train'"),
        (["train"], 2, "DATA"),
        (["train", "digits", "--optim.lrr", "1"], 2, "--optim.lr"),
        (["train", "digits", "--epochs", "many"], 2, "--epochs"),
        (["train", "digit"], 1, "did you mean 'digits'"),
        (["train", "/no/such/folder"], 1, "/no/such/folder: no such folder"),
        (["train", "digits", "--model", "tii4"], 1, "did you mean 'ti'"),
        (["train", "digits", "--model", "ti4-concta"], 1, "did you mean 'concat'"),
        (["train", "digits", "--recipe", "autos"], 1, "did you mean 'auto'"),
        (["train", "digits", "--model.decoder", "tokens"], 1, "did you mean 'token'"),
        (["train", "digits", "--schedule.warmup", "5 parsecs"], 1, "'2 epochs' or '5 %'"),
        (["train", "digits", "--batch-size", "0"], 1, "batch_size is 0"),
        (["train", "digits", "--epochs", "0"], 1, "epochs is 0"),
        (["train", "digits", "--model.patch-size", "0"], 1, "model.patch_size is 0"),
        (["train", "digits", "--seed", "99999999999999999999999"], 1, "seed is"),
        (["train", "digits", "--device", "cuda"], 1, "--device cpu"),
        (["predict", "nano4", "a.jpg", "--device", "gpu"], 1, "unknown device 'gpu'"),
        (["eval", "nano4", "digits", "--device", "gpu"], 1, "unknown device 'gpu'"),
        (["train", "digits", "--optim.accumulate", "7"], 1, "not a multiple of optim.accumulate 7"),
        (["eval", "/no/such/run", "digits"], 1, "/no/such/run: no such run"),
        (["predict", "/no/such/model.safetensors", "a.jpg"], 1, "no such run folder or model file"),
        (["report", "/tmp"], 1, "is not a run folder"),
    ],
)
def test_wrong_arguments_get_one_clear_message(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    text = printed(capsys)
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists(), "a refused command left a run behind"


def folder(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            PIL.Image.new("RGB", (16, 16), (number * 9 % 256, len(name) * 40, 77)).save(root / name / f"{number}.jpg")
    return root


def break_image(root: Path) -> Path:
    path = root / "cat" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return path


@pytest.mark.parametrize(
    ("counts", "spoil", "message"),
    [
        ({"cat": 5, "dog": 0}, None, "class 'dog' has no images"),
        ({"cat": 5}, None, "only one class ('cat')"),
        ({}, None, "no class folders found"),
        ({"cat": 5, "dog": 5}, "truncated", "cat/0.jpg: "),
        ({"cat": 5, "dog": 5}, "text", "cat/0.jpg: unreadable"),
        ({"cat": 5, "dog": 5}, "empty", "cat/0.jpg: unreadable"),
        ({"cat": 1, "dog": 1}, None, "no images for validation"),
    ],
)
def test_bad_data_gets_one_clear_message(counts, spoil, message, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    folder(data, **counts)
    if spoil == "truncated":
        break_image(data)
    elif spoil:
        (data / "cat" / "0.jpg").write_bytes(b"I am a text" if spoil == "text" else b"")
    assert run(["train", str(data), "--out", str(tmp_path / "run")]) == 1
    text = printed(capsys)
    assert message in text
    assert "Traceback" not in text
    assert "--data.damaged drop" in text or not spoil
    assert not (tmp_path / "run").exists()


def test_broken_images_can_be_left_out_or_kept(make_folder, tmp_path, capsys):
    data = make_folder(tmp_path / "data")
    path = data / "flat" / "004.png"
    path.write_bytes(path.read_bytes()[:-30])
    (data / "steep" / "notes.txt").write_text("not an image")
    arguments = ["train", str(data), "--model", "nano8", "--model.depth", "1", "--epochs", "1"]
    assert run([*arguments, "--out", str(tmp_path / "drop"), "--data.damaged", "drop"]) == 0
    text = printed(capsys)
    assert "flat/004.png" in text
    assert "notes.txt" in text or "1 files that are not images" in text
    split = json.loads((tmp_path / "drop" / "split.json").read_text())
    assert "flat/004.png" not in split["splits"]["train"] + split["splits"]["val"]
    assert run([*arguments, "--out", str(tmp_path / "keep"), "--data.damaged", "keep"]) == 0
    split = json.loads((tmp_path / "keep" / "split.json").read_text())
    assert "flat/004.png" in split["splits"]["train"] + split["splits"]["val"]


def test_a_run_is_never_overwritten(tiny_run, capsys):
    done, data = tiny_run
    before = (done / "model.safetensors").read_bytes()
    assert run(["train", str(data), "--out", str(done)]) == 1
    assert "holds a run already" in printed(capsys)
    assert (done / "model.safetensors").read_bytes() == before


def test_eval_repeats_the_runs_own_evaluation(tiny_run, tmp_path, capsys):
    done, data = tiny_run
    own = json.loads((done / "evaluation.json").read_text())["val"]
    assert run(["eval", str(done), str(data), "--out", str(tmp_path / "e.json")]) == 0
    again = json.loads((tmp_path / "e.json").read_text())
    keys = ("top1", "top5", "loss", "ece", "num_images", "labels", "per_class", "confusion", "split", "fingerprint")
    assert {key: again[key] for key in keys} == {key: own[key] for key in keys}
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert again["loss"] in [line.get("eval/loss") for line in lines], "training evaluated by the same numbers"
    # The model file alone makes the same split again.
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((done / "model.safetensors").read_bytes())
    assert run(["eval", str(alone), str(data), "--out", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())["fingerprint"] == own["fingerprint"]
    assert run(["eval", str(done), str(data), "--split", "tset"]) == 1
    assert "did you mean 'test'" in printed(capsys)


def test_eval_never_takes_training_images_for_unseen_ones(tiny_run, tmp_path, capsys):
    done, data = tiny_run
    copy = shutil.copytree(data, tmp_path / data.name)
    gone = json.loads((done / "split.json").read_text())["splits"]["train"][0]
    (copy / gone).unlink()
    assert run(["eval", str(done), str(copy)]) == 1
    assert "--split all" in printed(capsys)
    alone = tmp_path / "model.safetensors"
    shutil.copy(done / "model.safetensors", alone)
    assert run(["eval", str(alone), str(copy)]) == 1
    assert "--split all" in printed(capsys)
    assert run(["eval", str(alone), str(copy), "--split", "all", "--out", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["num_images"] == 59


def test_eval_counts_the_broken_files_it_leaves_out(tiny_run, make_folder, tmp_path, capsys):
    done, _ = tiny_run
    other = make_folder(tmp_path / "other", count=4)
    (other / "flat" / "001.png").write_bytes(b"no image")
    assert run(["eval", str(done), str(other)]) == 1
    assert "flat/001.png" in printed(capsys)
    arguments = ["--data.damaged", "drop", "--out", str(tmp_path / "e.json")]
    assert run(["eval", str(done), str(other), *arguments]) == 0
    assert "flat/001.png" in printed(capsys)
    result = json.loads((tmp_path / "e.json").read_text())
    assert (result["num_images"], result["num_left_out"]) == (11, 1)


def test_eval_maps_labels_by_name_and_refuses_unknown_ones(tiny_run, make_folder, tmp_path, capsys):
    done, _ = tiny_run
    other = make_folder(tmp_path / "other", classes=("flat", "steep"), count=5)
    assert run(["eval", str(done), str(other), "--out", str(tmp_path / "e.json")]) == 0
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["labels"] == ["flat", "slant", "steep"]
    assert [sum(row) for row in result["confusion"]] == [5, 0, 5]
    assert result["split"] == "all"
    assert "no image here: slant" in printed(capsys)
    (other / "steep").rename(other / "steeep")
    assert run(["eval", str(done), str(other)]) == 1
    assert "did you mean 'steep'" in printed(capsys)


def test_predict_writes_a_row_for_every_path_in_order(tiny_run, tmp_path, capsys):
    done, data = tiny_run
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    paths = [str(data / "steep" / "001.png"), str(bad), str(tmp_path / "gone.jpg"), str(data / "flat" / "002.png")]
    for ending in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"p.{ending}"
        assert run(["predict", str(done), *paths, "--out", str(out), "--top", "2"]) == 0
        rows = {
            "csv": lambda out=out: list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8")))),
            "jsonl": lambda out=out: [json.loads(line) for line in out.read_text().splitlines()],
            "parquet": lambda out=out: pq.read_table(out).to_pylist(),
        }[ending]()
        assert list(rows[0]) == ["path", "label", "probability", "top_labels", "top_probabilities", "error"]
        assert [row["path"] for row in rows] == paths
        assert [bool(row["error"]) for row in rows] == [False, True, True, False]
        top = rows[0]["top_labels"]
        top = json.loads(top) if isinstance(top, str) else top
        assert len(top) == 2
        assert top[0] == rows[0]["label"]
        assert 0 < float(rows[0]["probability"]) <= 1
    assert "2 with an error" in printed(capsys)
    assert run(["predict", str(done), str(data), "--out", str(tmp_path / "all.csv")]) == 0
    assert run(["predict", str(done), str(data / "*" / "00*.png")]) == 0
    assert run(["predict", str(done), str(bad)]) == 1
    assert run(["predict", str(done), str(data), "--out", str(tmp_path / "x.xlsx")]) == 1
    assert run(["predict", str(done), str(tmp_path / "nothing*.png")]) == 1
    assert run(["predict", str(done)]) == 2


def test_models_and_report(tiny_run, capsys):
    done, _ = tiny_run
    assert run(["models"]) == 0
    assert "86.57 M" in printed(capsys)
    (done / "report.html").unlink()
    assert run(["report", str(done)]) == 0
    assert (done / "report.html").stat().st_size > 10_000


def test_the_terminal_ranks_as_many_labels_as_asked_for(tiny_run, capsys):
    done, data = tiny_run
    image = str(next(data.rglob("*.png")))
    assert run(["predict", str(done), image]) == 0
    assert capsys.readouterr().out.count("%") == 1
    assert run(["predict", str(done), image, "--top", "3"]) == 0
    assert capsys.readouterr().out.count("%") == 3


def test_a_figure_that_flatters_says_so(tiny_run, make_folder, tmp_path, capsys):
    done, data = tiny_run
    for split in ("train", "all"):
        assert run(["eval", str(done), str(data), "--split", split]) == 0
        assert "was trained on" in printed(capsys)
    assert run(["eval", str(done), str(data)]) == 0
    assert "was trained on" not in printed(capsys)
    more = shutil.copytree(data, tmp_path / data.name)
    draw_image(1, 999).save(more / "steep" / "999.png")
    assert run(["eval", str(done), str(more)]) == 0
    assert "came after the split that the model was trained with: 1" in printed(capsys)


def test_what_a_run_leaves_can_be_read_by_others(tiny_run):
    mask = os.umask(0)
    os.umask(mask)
    for name in ("model.safetensors", "last/state.safetensors", "config.json"):
        assert (tiny_run[0] / name).stat().st_mode & 0o777 == 0o666 & ~mask
