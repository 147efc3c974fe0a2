"""Tables of images: CSV, JSON lines and Parquet, checked row by row."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vitrail.cli import run
from vitrail.data.datasets import table as tables
from vitrail.data.datasets.base import FileDataset
from vitrail.data.datasets.open import open_dataset, run_name, same_dataset


def put(path: Path, level: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (level, 20, 30)).save(path, "PNG")


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder with four images, of which one has a comma in its name."""
    for level, name in enumerate(("a.png", "b.png", "deep/c.png", "deep/d, e.png")):
        put(tmp_path / name, level)
    return tmp_path


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def opened(path: Path) -> FileDataset:
    dataset = open_dataset(str(path))
    assert isinstance(dataset, FileDataset)
    return dataset


def rows_of(dataset: FileDataset) -> list[tuple[str, str, str | None]]:
    splits = [None] * len(dataset.paths) if dataset.split is None else dataset.split.tolist()
    labels = [dataset.labels[target] for target in dataset.targets]
    return list(zip(dataset.paths, labels, splits, strict=True))


WANTED = [
    ("a.png", "cat", "train"),
    ("b.png", "10", "train"),
    ("deep/c.png", "cat", "val"),
    ("deep/d, e.png", "10", "test"),
]
CSV = (
    "path,label,split,group\r\n"
    "a.png,cat,train,x\r\n"
    "\r\n"
    '"./b.png", 10 ,Training,\r\n'
    "deep//c.png,cat,validation,y\r\n"
    '"deep/d, e.png","10",test,7\r\n'
)


def as_csv(folder: Path) -> Path:
    return write(folder / "t.csv", CSV, "utf-8-sig")


def as_jsonl(folder: Path) -> Path:
    rows = [
        {"path": "a.png", "label": "cat", "split": "train", "group": "x"},
        {"path": "b.png", "label": 10, "split": "train", "group": None},
        {"group": "y", "path": str(folder / "deep" / "c.png"), "label": "cat", "split": "valid"},
        {"path": "deep/d, e.png", "label": "10", "split": "test", "group": 7},
    ]
    return write(folder / "t.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in rows))


def as_parquet(folder: Path) -> Path:
    table = pyarrow.table(
        {
            "path": pyarrow.array([row[0] for row in WANTED]),
            "label": pyarrow.array([row[1] for row in WANTED]).dictionary_encode(),
            "split": [row[2] for row in WANTED],
            "group": ["x", None, "y", "7"],
        }
    )
    pyarrow.parquet.write_table(table, folder / "t.parquet", row_group_size=2)
    return folder / "t.parquet"


@pytest.mark.parametrize("form", [as_csv, as_jsonl, as_parquet])
def test_all_three_formats_give_the_same_dataset(images, form):
    dataset = opened(form(images))
    assert rows_of(dataset) == WANTED
    assert dataset.labels == ("10", "cat")  # sorted names, as folders have them
    assert dataset.groups is not None
    assert dataset.groups.tolist() == [0, -1, 1, 2]
    assert dataset.name == form(images).name
    assert [dataset.read(index, "RGB").getpixel((0, 0))[0] for index in range(4)] == [0, 1, 2, 3]
    assert dataset.location(2) == str(images / "deep" / "c.png")
    assert {problem.kind for problem in dataset.problems} == {"missing-class"}


def test_whole_numbers_are_labels_as_text(images):
    table = pyarrow.table({"path": ["a.png", "b.png"], "label": pyarrow.array([2, 10], pyarrow.int64())})
    pyarrow.parquet.write_table(table, images / "n.parquet")
    dataset = opened(images / "n.parquet")
    assert dataset.labels == ("10", "2")
    assert dataset.split is None
    assert dataset.groups is None
    assert dataset.problems == ()


def test_labels_that_look_like_numbers_or_nothing_stay_as_they_are_written(images):
    dataset = opened(write(images / "t.csv", "path,label\na.png,007\nb.png,NA\ndeep/c.png,2020-01-01\n"))
    assert dataset.labels == ("007", "2020-01-01", "NA")


def test_other_columns_are_named_in_one_line(images):
    dataset = opened(write(images / "t.csv", "mass,path,label,notes\n1,a.png,x,\n2,b.png,y,\n"))
    assert [(each.severity, each.kind, each.paths) for each in dataset.problems] == [
        ("warning", "name", ("mass", "notes"))
    ]
    assert "columns mass, notes: not read" in dataset.problems[0].message


def test_a_relative_table_is_read_from_anywhere(images, monkeypatch):
    monkeypatch.chdir(images)
    write(images / "deep" / "t.csv", f"path,label\nc.png,x\n{images / 'a.png'},y\n")
    dataset = opened(Path("deep/t.csv"))
    monkeypatch.chdir("/")
    assert list(dataset.paths) == ["c.png", str(images / "a.png")]
    assert dataset.read(1, "RGB").getpixel((0, 0))[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.csv: has no column 'path', but none"),
        ("path,label\n", "has no rows"),
        ("file,label\na.png,x\n", r"no column 'path', but 'file', 'label'; expected a first line such as path,label"),
        ("path;label\na.png;x\n", r"'path;label'; its columns seem to be separated by another sign than ','"),
        ("path,class\na.png,x\n", "no column 'label'"),
        ("path,path,label\na.png,a.png,x\n", "column 'path' twice"),
        ("path,label,weight,weight\na.png,x,1,5\n", "column 'weight' twice"),
        ("path,label\na.png,x\nb.png,\n", r"line 3: no label for 'b\.png'"),
        ("path,label\na.png,x\nb.png,  \n", "line 3: no label"),
        ("path,label\n,x\n", "line 2: no path"),
        ("path,label,split\na.png,x,tran\n", r"line 2: unknown split 'tran'; did you mean 'train'\?"),
        (
            "path,label,split\na.png,x,train\nb.png,x,\n",
            r"line 3: no split; write one of train, val, test in every row",
        ),
        ("path,label\na.png,x\n\nb.png,x\n./a.png,x\n", r"line 5: 'a\.png' is in line 2 already, with the same label"),
        ("path,label\na.png,x\na.png,y\n", r"line 3: .* line 2 already, with the label 'y', there 'x'; remove one"),
        ("path,label\na.png,x\ngone.png,y\n", r"line 3: 'gone\.png': no such file; paths are relative to"),
        ("path,label\ndeep\\c.png,x\n1.png,y\n", r"\(2 of 2 files are missing\).*folders are separated by /"),
        ("path,label\ndeep,x\n", r"'deep': is no file"),
        ("path,label\n../a.png,x\n", r"line 2: '\.\./a\.png' leads out of the table's folder .* absolute path"),
        ("path,label\ndeep/../../a.png,x\n", "leads out of the table's folder"),
        ("path,label\nhttps://x.org/a.png,x\n", "is an address"),
        ("path,label\na.png,x\ndeep/d, e.png,x\n", r"line 3: has 3 values, but there are 2 columns .* in quotes"),
        ('path,label\n"a.png,x\nb.png,y\n', r"line 3: unexpected end of data; a quoted value ends"),
        ("path,label,split\na.png,x,train\nb.png,y,val\n", r"line 3: unknown class 'y'.*Split val has it, but no row"),
    ],
)
def test_faults_are_named_by_file_and_line(images, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_dataset(str(write(images / "t.csv", text)))
    assert str(caught.value).startswith(str(images / "t.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a.png", "label": "x"}\n{"path": "b.png"\n', "line 2: is no JSON"),
        ('["a.png", "x"]\n', r"line 1: is no object; expected such as \{\"path\""),
        ('{"path": "a.png", "label": 1.5}\n', "line 1: label 1.5 is neither text nor a whole number"),
        ('{"path": 3, "label": "x"}\n', "line 1: path 3 is no text"),
        ('{"path": "a.png", "label": null}\n', "line 1: no label"),
        (
            '{"path": "a.png", "label": "x"}\n\n{"path": "b.png", "label": "x", "split": "val"}\n',
            "line 3: has split, which",
        ),
        ('{"path": "\\ud800.png", "label": "x"}\n', "line 1: the path .* is no Unicode text"),
        ('{"file": "a.png", "label": "x"}\n', "has no column 'path', but 'file', 'label'; rename the column"),
    ],
)
def test_faults_in_json_lines_are_named(images, text, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(str(write(images / "t.jsonl", text)))


def test_other_encodings_and_broken_parquet_are_refused(images):
    with pytest.raises(ValueError, match=r"t\.csv: is not UTF-8 .*0xe9.*; save it as UTF-8"):
        open_dataset(str(write(images / "t.csv", "path,label\na.png,café\n", "latin-1")))
    with pytest.raises(ValueError, match="is no readable Parquet file"):
        open_dataset(str(write(images / "t.parquet", "PAR1")))
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png", "b.png"], "label": [1.0, 2.0]}), images / "f.parquet")
    with pytest.raises(ValueError, match=r"f\.parquet, row 1: label 1\.0 is neither text nor a whole number"):
        open_dataset(str(images / "f.parquet"))


@pytest.mark.parametrize("form", [as_csv, as_jsonl, as_parquet])
def test_a_long_table_is_read_once_and_its_files_are_checked_each_time(images, form, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(tables, "MIN_CACHED_ROWS", 4)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VITRAIL_CACHE", str(cache))
    path = form(images)
    first = opened(path)
    (cached,) = cache.rglob("*.bin")
    stamp = cached.stat().st_mtime_ns

    def same(one: FileDataset, other: FileDataset) -> None:
        assert rows_of(one) == rows_of(other)
        assert (one.labels, one.problems, one.root, one.name) == (other.labels, other.problems, other.root, other.name)
        assert one.targets.dtype == other.targets.dtype
        assert one.groups is not None and other.groups is not None
        assert (one.groups == other.groups).all() and one.groups.dtype == other.groups.dtype

    same(first, opened(path))
    assert cached.stat().st_mtime_ns == stamp, "the index was to be read"
    cached.write_bytes(cached.read_bytes()[:-1])
    same(first, opened(path))
    assert cached.stat().st_mtime_ns != stamp, "a broken index was to be made anew"
    (images / "deep" / "c.png").rename(images / "c.png")
    with pytest.raises(ValueError, match=r"t\.\w+, (line [34567]|row 3): '.*c\.png': no such file"):
        opened(path)
    (images / "c.png").rename(images / "deep" / "c.png")
    if form is as_csv:
        write(path, CSV.replace("cat", "dog"), "utf-8-sig")
        assert opened(path).labels == ("10", "dog")


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"no such file; expected a table with the columns path and label"):
        open_dataset(str(tmp_path / "no.csv"))


def test_a_group_in_several_of_the_tables_splits_is_named(images):
    text = "path,label,split,group\na.png,x,train,p\nb.png,x,val,q\ndeep/c.png,x,val,p\n"
    problems = opened(write(images / "t.csv", text)).problems
    assert [(each.severity, each.kind, each.paths) for each in problems] == [("warning", "leak", ("p",))]
    assert "1 groups are in more than one split, for instance 'p' in train and val" in problems[0].message


def test_run_names_and_equal_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_name("some/photos.csv") == "photos"
    assert run_name("torchvision:CIFAR10") == "CIFAR10"
    assert run_name("digits") == "digits"
    assert same_dataset("photos.csv", str(tmp_path / "photos.csv"))
    assert same_dataset("digits.csv", "./digits.csv")
    assert not same_dataset("digits", "./digits")
    assert same_dataset("hf:beans/", "hf:./beans")
    assert same_dataset("torchvision:CIFAR10", "torchvision:cifar10")
    assert not same_dataset("torchvision:CIFAR10", "CIFAR10")


@pytest.mark.parametrize(
    ("name", "nearest"), [("torchvison:CIFAR10", "torchvision:"), ("fh:beans", "hf:"), ("digit", "digits")]
)
def test_unknown_names_suggest_the_nearest_known(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        open_dataset(name)


# --- the commands


def table_of(folder: Path, target: Path, *, split: bool) -> Path:
    """Write a table of a folder's images, three of a group."""
    rows = ["path,label,group" + ",split" * split]
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        split_name = ("train", "train", "train", "val", "test")[number % 5]
        rows.append(f"{path},{path.parent.name},g{number // 3}" + f",{split_name}" * split)
    return write(target, "\n".join(rows) + "\n")


def test_train_resume_eval_and_probe_on_a_table(make_folder, tmp_path, capsys, monkeypatch):
    data = make_folder(tmp_path / "shapes", count=15)
    table = table_of(data, tmp_path / "shapes.csv", split=False)
    monkeypatch.chdir(tmp_path)
    sizes = ["--model", "nano8", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    assert run(["train", str(table), *sizes, "--epochs", "2", "--batch-size", "16"]) == 0
    output = capsys.readouterr().out
    assert "shapes.csv: 3 classes; 36 train, 9 val (a stratified split of all images; 15 groups kept whole)" in output
    out = tmp_path / "runs" / "shapes"
    assert run(["train", "shapes.csv", "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert run(["eval", str(out), "shapes.csv", "--out", "e.json"]) == 0
    evaluated, own = json.loads(Path("e.json").read_text()), json.loads((out / "evaluation.json").read_text())["val"]
    assert evaluated["confusion"] == own["confusion"]
    assert evaluated["split"] == "val"
    split = json.loads((out / "split.json").read_text())
    assert evaluated["fingerprint"] == split["fingerprint"]
    # Without the run's split.json, the model file's rule makes the same split again.
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((out / "model.safetensors").read_bytes())
    assert run(["eval", str(alone), "shapes.csv", "--out", "e2.json"]) == 0
    assert json.loads(Path("e2.json").read_text())["fingerprint"] == split["fingerprint"]
    assert run(["probe", str(out), "shapes.csv", "--out", "p.json"]) == 0
    probed = json.loads(Path("p.json").read_text())
    assert probed["fingerprint"] == split["fingerprint"]
    assert probed["from_cache"] == 0
    assert run(["probe", str(out), "shapes.csv", "--out", "p.json"]) == 0
    assert json.loads(Path("p.json").read_text())["computed"] == 0


def test_a_tables_own_splits_are_used_and_test_never_chooses(make_folder, tmp_path, capsys):
    data = make_folder(tmp_path / "shapes", count=10)
    table = table_of(data, tmp_path / "splits.csv", split=True)
    sizes = ["--model", "nano8", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    out = tmp_path / "out"
    assert run(["train", str(table), "--out", str(out), *sizes, "--epochs", "1", "--batch-size", "16"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "18 train, 6 val, 6 test (the column split: train, val, test)" in output
    evaluated = json.loads((out / "evaluation.json").read_text())
    assert evaluated["test"]["num_images"] == evaluated["val"]["num_images"] == 6
    assert run(["train", str(table), "--out", str(tmp_path / "no"), "--data.val-fraction", "0.5"]) == 1
    assert "splits.csv has its own val split" in " ".join(capsys.readouterr().err.split())


def test_the_weight_column_is_the_loss_weight_of_an_image(images):
    write(images / "w.csv", 'path,label,weight\na.png,x,2\nb.png,x, 0.5\ndeep/c.png,y,1e-3\n"deep/d, e.png",y,"3"\n')
    rows = [{"path": "a.png", "label": "x", "weight": 2}, {"path": "b.png", "label": "y", "weight": 0.25}]
    write(images / "w.jsonl", "\n".join(json.dumps(row) for row in rows))
    table = pyarrow.table({"path": ["a.png", "b.png"], "label": ["x", "y"], "weight": [1.5, 3.0]})
    pyarrow.parquet.write_table(table, images / "w.parquet")
    for name, wanted in (("w.csv", [2, 0.5, 1e-3, 3]), ("w.jsonl", [2, 0.25]), ("w.parquet", [1.5, 3])):
        dataset = opened(images / name)
        assert dataset.weights is not None
        assert dataset.weights.tolist() == wanted
        assert dataset.problems == ()
    assert opened(write(images / "n.csv", "path,label\na.png,x\nb.png,y\n")).weights is None


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "heavy", "1e999"])
def test_a_weight_that_is_no_number_above_0_is_refused(images, value):
    path = write(images / "w.csv", f"path,label,weight\na.png,x,1\nb.png,y,{value}\n")
    with pytest.raises(ValueError, match=rf"w\.csv, line 3: weight '{value}' is no number above 0; write one"):
        opened(path)
    for value in ("null", "true", '"much"', "[1]"):
        path = write(images / "w.jsonl", f'{{"path": "a.png", "label": "x", "weight": {value}}}\n')
        with pytest.raises(ValueError, match=r"w\.jsonl, line 1: weight .* is no number above 0"):
            opened(path)
