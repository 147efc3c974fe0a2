"""The public contract, frozen by name: commands, flags, Python names, files and JSON keys, a line each.

`public_contract.txt` beside this file has the lines. A line that is gone breaks what somebody relies on; a new one is a growth,
and that is a decision. Everything is reached as users reach it, by commands, by the names that `import vitrail` gives and by
the files that commands leave, so that no renaming inside touches this test. To write the file again:

    python tests/test_public_contract.py --write [--allow-removal]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shutil
import sys
import tarfile
import tempfile
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

FILE = Path(__file__).with_name("public_contract.txt")
HEAD = """\
# What users can rely on, a name a line: read by tests/test_public_contract.py, which says how to write it again.
# VALUE and VALUE… are what a flag takes. In signatures, = is a default, and * an argument that goes by its name only.
# In JSON keys, * is a label, a number or another free name, and [] each entry of a list.
"""
MAY_GROW = ("recipes",)
NOBODY = "xyzzy"  # the name of nothing
LABELS = ("eaves", "leaf", "petal", "sky")


# Quick: commands, settings and Python names


def commands() -> Iterator[str]:
    """Yield every command, its positional arguments and its flags."""
    for name in known(command(NOBODY, code=2)):
        yield name
        for line in command(name, "--help").splitlines():
            # An argument stands one space behind the frame; its help text is further to the right.
            argument = re.match(r"[│|] (\S+(?:, -\S+)*)(?: (\S+(?: \S+)*))?(?:  |$)", line.rstrip("│| "))
            if argument and not argument[1].startswith("-h,"):
                value = argument[2] or ""
                several = "…" if "…" in value or "[" in value else ""
                taken = f" VALUE{several}" if value else ""
                yield from (f"{name} {spelling}{taken}" for spelling in argument[1].split(", "))


def choices_of_settings() -> Iterator[str]:
    """Yield every name that a setting with a closed list takes."""
    import vitrail

    for name, owner, kind in leaves(vitrail.RunConfig()):
        wrong = {str: NOBODY, tuple[str, ...]: (NOBODY,)}.get(kind)
        if wrong is not None:
            try:
                dataclasses.replace(owner, **{name.rpartition(".")[2]: wrong})
            except ValueError as error:
                yield from (f"{name}: {choice}" for choice in known(str(error)))


def choices_of_flags() -> Iterator[str]:
    """Yield every name that a command's own flag with a closed list takes, and every data set of torchvision."""
    wrong = {"--out": f"table.{NOBODY}", "--describe": f"{NOBODY}=1"}
    for use, flags in {
        "check digits": ("--data.damaged",),
        "eval nano4 digits": ("--data.damaged", "--device", "--resize", "--split"),
        "export nano4": ("--to",),
        "export nano4 --to vitrail": ("--describe",),
        "predict nano4 image.jpg": ("--device", "--out", "--resize"),
        "probe nano4 digits": ("--data.damaged", "--device"),
        "shard digits shards": ("--data.damaged",),
    }.items():
        for flag in flags:
            names = known(command(*use.split(), flag, wrong.get(flag, NOBODY), code=1))
            yield from (f"{use.split()[0]} {flag}: {name}" for name in names)
    yield from (f"DATA torchvision:{name}" for name in known(command("train", f"torchvision:{NOBODY}", code=1)))


def variants() -> Iterator[str]:
    """Yield the variants that are listed, and what their names can be made of."""
    listed = [line.split() for line in command("models").splitlines()]
    yield from (words[0] for words in listed if words and re.fullmatch(r"[a-z]+\d+", words[0]))
    yield from (f"size {name}" for name in known(command("models", f"{NOBODY}16", code=1), "unknown model size"))
    yield from (f"suffix -{name}" for name in known(command("models", f"b16-{NOBODY}", code=1)))


def recipes() -> Iterator[str]:
    """Yield the names that `--recipe` takes."""
    yield from known(command("train", "digits", "--recipe", NOBODY, code=1))


def python_names() -> Iterator[str]:
    """Yield what `import vitrail` gives: names, fields, attributes, parameters."""
    import torch
    from torch import nn

    import vitrail

    yield from (f"vitrail.{name}" for name in vitrail.__all__)
    yield from (f"ViTConfig.{field.name}" for field in dataclasses.fields(vitrail.ViTConfig))
    yield from (f"RunConfig.{name}" for name, _, _ in leaves(vitrail.RunConfig()))
    yield from (f"Classifier.{name}" for name in attributes(vitrail.Classifier))
    yield from (f"Prediction.{name}" for name in attributes(vitrail.Prediction))
    yield from parameters("load", vitrail.load)
    yield from parameters("train", vitrail.train)
    for name in ("at", "logits", "predict", "stream", "to"):
        yield from parameters(f"Classifier.{name}", getattr(vitrail.Classifier, name))
    model = vitrail.ViT(vitrail.ViTConfig(image_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)).eval()
    own = {*attributes(vitrail.ViT), *vars(model), *dict(model.named_children())} - {*dir(nn.Module())}
    yield from (f"ViT.{name}" for name in own)
    yield from parameters("ViT.features", vitrail.ViT.features)
    yield from parameters("ViT.forward", vitrail.ViT.forward)
    yield from (f"ViT.features: {name}" for name in model.features(torch.zeros(1, 3, 8, 8)))


def exit_codes() -> Iterator[str]:
    """Yield command lines with their exit code: 0 done, 1 the user can fix it, 2 wrong usage."""
    for line in (
        "--help",
        "--version",
        "train --help",
        "models",
        "",
        "tran digits",
        "train",
        "train digits --optim.lrr 1",
        "train digits --epochs many",
        "train no-such-folder",
        "train digits --epochs 0",
        "train digits --schedule.decay cosin",
        "eval no-such-run digits",
        "predict no-such-run image.jpg",
        "report no-such-run",
    ):
        code, _ = outcome(line.split())
        yield f"vitrail {line}".strip() + f": {code}"


QUICK: dict[str, Callable[[], Iterable[str]]] = {
    "commands and flags": commands,
    "choices of settings": choices_of_settings,
    "choices of flags": choices_of_flags,
    "variants": variants,
    "recipes": recipes,
    "Python": python_names,
    "exit codes": exit_codes,
}


# Slow: what commands write


def written(work: Path) -> dict[str, Iterable[str]]:
    """Run every command that writes on a few small images, and return the lines of every file, by heading.

    Args:
        work: an empty folder.
    """
    photos, table = make_photos(work / "photos"), work / "photos.csv"
    run, folds, tuned = work / "run", work / "folds", work / "tuned"
    model = "--model nano8 --model.depth 1 --model.decoder token --model.class-token True --model.positions learned"
    short = "--epochs 1 --batch-size 4 --seed 0 --device cpu --optim.lr 1e-6 --log.every 1steps"
    settings = f"{model} {short}".split()
    command("train", photos, "--out", run, *settings, "--data.test-fraction", "0.2")
    command("train", photos, "--out", folds, *settings, "--data.folds", "2")
    result = fine_tune(photos, run, tuned)
    lines: dict[str, Iterable[str]] = {
        "what vitrail.train returns": attributes(type(result)),
        "files of a run": files(run),
        "files of a cross-validation": files(folds),
        "run.json": keys(read(run / "run.json"), free=("kernels",)),
        "run.json of a fine-tuning": keys(read(tuned / "run.json"), free=("kernels",)),
        "config.json": keys(read(run / "config.json")),
        "split.json": keys(read(run / "split.json")),
        "evaluation.json": keys(read(run / "evaluation.json")),
        "metrics.jsonl": keys([json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]),
        "folds.json": keys(read(folds / "folds.json")),
        "header of model.safetensors": keys(header(run / "model.safetensors")),
        "header of last/state.safetensors": header(run / "last" / "state.safetensors"),
    }
    lines["eval --out"] = reply("eval", run, photos, "--device", "cpu", out=work / "eval.json")
    lines["probe --out"] = reply("probe", run, photos, "--device", "cpu", out=work / "probe.json")
    lines["doctor --out"] = reply("doctor", "nano8", out=work / "doctor.json")
    lines["check --out"] = reply("check", photos, out=work / "check.json", free=("formats", "modes"))
    lines["kinds of problems in check --out"] = kinds_of_problems(photos, work)
    lines["predict --out"] = predict_columns(run, photos, work)
    lines["shard"] = [*shards(photos, work / "shards"), *shards(table, work / "table-shards")]
    lines["export"] = exports(run)
    return lines


def make_photos(folder: Path) -> Path:
    """Write crops of two photographs in four class folders, with one duplicate, and a table of them beside the folder."""
    from sklearn.datasets import load_sample_image

    whole = [PIL.Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    rows = []
    for label, name in enumerate(LABELS):
        (folder / name).mkdir(parents=True)
        for number in range(7):
            left, top = 40 * number, 213 * (label // 2)
            path = folder / name / f"{number}.png"
            whole[label % 2].crop((left, top, left + 300, top + 200)).resize((60, 40)).save(path)
            rows.append(
                (path.relative_to(folder.parent), name, "val" if number == 6 else "train", f"{name}-{number}", 1)
            )
    shutil.copy(folder / LABELS[0] / "0.png", folder / LABELS[0] / "again.png")
    with open(folder.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "split", "group", "weight"), *rows])
    return folder


def fine_tune(photos: Path, run: Path, out: Path) -> Any:
    """Fine-tune a run by the Python function, with settings that add keys to `run.json`; return what it returns."""
    import vitrail

    settings = {"optim.class_weights": "inverse", "lora.rank": 2, "epochs": 1.0, "batch_size": 4, "device": "cpu"}
    with quiet(), contextlib.chdir(photos.parent):
        return vitrail.train(photos, out=out, model=str(run), **settings)


def kinds_of_problems(photos: Path, work: Path) -> Iterator[str]:
    """Check a folder where much is wrong; yield the severity and kind of each finding."""
    bad = work / "bad"
    for part, numbers in (("train", range(6)), ("val", range(5, 7))):  # number 5 is in both
        for label in LABELS[:3]:
            (bad / part / label).mkdir(parents=True)
            for number in numbers:
                shutil.copy(photos / label / f"{number}.png", bad / part / label)
    with PIL.Image.open(photos / "sky" / "0.png") as image:
        exif = PIL.Image.Exif()
        exif[274] = 6
        image.save(bad / "train" / "leaf" / "turned.jpg", exif=exif)
        image.convert("CMYK").save(bad / "train" / "leaf" / "print.jpg", quality=30)
        image.resize((400, 400)).convert("1").save(bad / "train" / "leaf" / "large.png")
        image.transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM).save(bad / "train" / "petal" / "named.jpg", "PNG")
    (bad / "train" / "sky").mkdir()
    for number in range(60):
        gradient = PIL.Image.linear_gradient("L").rotate(3 * number).crop((60, 60, 190, 190)).resize((24 + number, 32))
        gradient.save(bad / "train" / "sky" / f"{number}.png")
    whole = (photos / "sky" / "1.png").read_bytes()
    (bad / "train" / "eaves" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (bad / "train" / "eaves" / "text.jpg").write_text("no image")
    shutil.copy(photos / "petal" / "2.png", bad / "train" / "petal" / "again.png")
    with PIL.Image.open(photos / "petal" / "3.png") as image:
        image.save(bad / "train" / "petal" / "smaller.jpg", quality=50)
    shutil.copy(photos / "petal" / "1.png", bad / "train" / "leaf" / "conflict.png")
    command("check", bad, "--out", work / "bad.json", "--data.limit-pixels", "100000", code=1)
    for problem in read(work / "bad.json")["problems"]:
        yield f"{problem['severity']}: {problem['kind']}"


def predict_columns(run: Path, photos: Path, work: Path) -> Iterator[str]:
    """Yield the columns of the tables that `vitrail predict` writes."""
    import pyarrow.parquet

    for ending in ("csv", "jsonl", "parquet"):
        out = work / f"predictions.{ending}"
        command("predict", run, photos / "sky", "--out", out, "--device", "cpu")
        if ending == "csv":
            columns = next(csv.reader(io.StringIO(out.read_text("utf-8"))))
        elif ending == "jsonl":
            columns = list(json.loads(out.read_text("utf-8").splitlines()[0]))
        else:
            columns = pyarrow.parquet.read_schema(out).names
        yield from (f".{ending}: {column}" for column in columns)


def shards(source: Path, out: Path) -> Iterator[str]:
    """Yield the files that `vitrail shard` leaves, those in them, and their keys."""
    command("shard", source, out, "--size", "4")
    yield from re.findall(r"^\w+-0+\.tar$|^\w+\.json$", "\n".join(files(out)), re.MULTILINE)
    yield from (f"classes.json: {key}" for key in keys(read(out / "classes.json")))
    for path in out.glob("*.tar"):
        with tarfile.open(path) as archive:
            for member in archive:
                yield f"*{Path(member.name).suffix} in a shard"
                if member.name.endswith(".json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield from (f"*.json in a shard: {key}" for key in keys(json.loads(content.read())))


def exports(run: Path) -> Iterator[str]:
    """Yield the files that `vitrail export` leaves beside a run."""
    for to in ("hf", "timm", "vitrail"):
        before = {*run.parent.iterdir()}
        command("export", run, "--to", to)
        (made,) = {*run.parent.iterdir()} - before
        place = made.name.replace(run.name, "RUN")
        names = [f"/{name}" for name in files(made)] if made.is_dir() else [""]
        yield from (f"--to {to}: {place}{name}" for name in names)


# How names are read


def outcome(words: Sequence[Any], columns: int = 80) -> tuple[int, str]:
    """Run `python -m vitrail WORDS…` in this process, in a folder of its own; return its exit code and what it said."""
    code: Any = 0
    with (
        quiet() as said,
        tempfile.TemporaryDirectory() as here,
        contextlib.chdir(here),
        pytest.MonkeyPatch.context() as to,
    ):
        to.setattr(sys, "argv", ["vitrail", *map(str, words)])
        to.setenv("COLUMNS", str(columns))
        try:
            runpy.run_module("vitrail", run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code or 0
        sys.stdout.flush()
        text = said.getvalue().decode()
    return code, re.sub(r"\x1b\[[\d;]*m", "", text)


def command(*words: Any, code: int = 0) -> str:
    """Run a command that must end with an exit code; return what it said."""
    ended, said = outcome(words)
    assert ended == code, f"vitrail {' '.join(map(str, words))}: exit code {ended}, expected {code}\n{said}"
    return said


@contextlib.contextmanager
def quiet() -> Iterator[io.BytesIO]:
    """Take what is said on both outputs."""
    said = io.BytesIO()
    text = io.TextIOWrapper(said, encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield said
        text.detach()


def known(message: str, about: str = "unknown") -> list[str]:
    """Return the names that an error message lists as known; none where it lists none."""
    listed = re.search(rf"{about}\b[^\n]*{re.escape(NOBODY)}[^\n]*?(?:Known: |expected one of )([^\n]*)", message)
    names = []
    for entry in listed[1].split(", ") if listed else ():
        name = re.match(r"\.?\w[\w.-]*\w|\w", entry)
        assert name is not None, message
        names.append(name[0])
        if name[0] != entry:  # prose follows the last name
            break
    return names


def leaves(config: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name, the section and the type of every setting."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{where}{field.name}.")
        else:
            yield where + field.name, config, hints[field.name]


def attributes(kind: type) -> set[str]:
    """Return the fields, properties and methods of a class that are public, and whether it can stand for a path."""
    fields = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    return {name for name in [*fields, *dir(kind)] if not name.startswith("_") or name == "__fspath__"}


def parameters(name: str, function: Callable[..., Any]) -> Iterator[str]:
    """Yield the parameters of a function."""
    for parameter in inspect.signature(function).parameters.values():
        mark = {parameter.KEYWORD_ONLY: "*", parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        default = "" if parameter.default is parameter.empty else "="
        if parameter.name != "self":
            yield f"{name}({mark.get(parameter.kind, '')}{parameter.name}{default})"


def keys(value: Any, where: str = "", *, free: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the dotted paths of all keys in JSON values.

    Args:
        free: paths whose keys are free, such as names of file formats; labels and numbers always are.
    """
    if isinstance(value, list):
        for each in value:
            yield from keys(each, f"{where}[]" if where else "", free=free)
    elif isinstance(value, dict):
        for key, inner in value.items():
            name = "*" if where in free or key in LABELS or key.isdigit() else key
            path = f"{where}.{name}" if where else name
            yield path
            yield from keys(inner, path, free=free)


def read(path: Path) -> Any:
    """Return the JSON in a file."""
    return json.loads(path.read_text("utf-8"))


def reply(*words: Any, out: Path, free: tuple[str, ...] = ()) -> list[str]:
    """Run a command with `--out`; return the keys of what it wrote."""
    command(*words, "--out", out)
    return list(keys(read(out), free=free))


def header(path: Path) -> dict[str, Any]:
    """Return the metadata of a `.safetensors` file, what is JSON in it opened."""
    with open(path, "rb") as file:
        metadata = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
    return {key: json.loads(value) if value.startswith("{") else value for key, value in metadata.items()}


def files(folder: Path) -> list[str]:
    """Return the paths of all files in a folder; of numbered folders, as `fold-0`, the number is free."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [re.sub(r"-\d+/", "-*/", name) for name in found]


# Comparing and writing


def parse(text: str) -> dict[str, list[str]]:
    """Return the lines under every heading of a contract."""
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("[") and line.endswith("]"):
            found = lines.setdefault(line[1:-1], [])
        elif line and not line.startswith("#"):
            found.append(line)
    return lines


def render(lines: Mapping[str, Iterable[str]]) -> str:
    """Return the text of a contract: `parse` reads it back."""
    return HEAD + "".join(
        f"\n[{heading}]\n" + "".join(f"{line}\n" for line in sorted({*found})) for heading, found in lines.items()
    )


def changes(frozen: Mapping[str, Iterable[str]], found: Mapping[str, Iterable[str]]) -> tuple[list[str], list[str]]:
    """Return the lines that are gone and the lines that are new, each group under its heading."""
    gone, new = [], []
    for heading, lines in found.items():
        before, now = {*frozen.get(heading, ())}, {*lines}
        gone += [f"[{heading}]", *sorted(before - now)] if before - now else []
        new += [f"[{heading}]", *sorted(now - before)] if now - before else []
    return gone, new


def explain(gone: Sequence[str], new: Sequence[str]) -> str:
    """Say what differs and what to do; nothing where nothing does."""
    said = []
    if gone:
        said += [
            "The public contract is broken: tests/public_contract.txt has these lines, and what they name is gone:",
            *gone,
            "Bring it back. If that is impossible, say why in docs/decisions.md and CHANGELOG.md, then",
            "python tests/test_public_contract.py --write --allow-removal",
        ]
    if new:
        said += [
            "The public contract has grown; a growth is a decision: write it into docs/decisions.md and add the line to "
            "tests/public_contract.txt. New:",
            *new,
        ]
    return "\n".join(said)


def compare(found: Mapping[str, Iterable[str]]) -> None:
    """Fail with what differs from the frozen lines, if anything does."""
    frozen = parse(FILE.read_text("utf-8"))
    gone, _ = changes(frozen, found)
    _, new = changes(frozen, {heading: lines for heading, lines in found.items() if heading not in MAY_GROW})
    if gone or new:
        pytest.fail(explain(gone, new), pytrace=False)


@pytest.mark.parametrize("heading", QUICK)
def test_names_change_only_by_decision(heading):
    compare({heading: list(QUICK[heading]())})


@pytest.mark.slow
def test_written_names_change_only_by_decision(tmp_path):
    found = {heading: list(lines) for heading, lines in written(tmp_path).items()}
    compare(found)
    assert [*parse(FILE.read_text("utf-8"))] == [*QUICK, *found]


def test_the_installed_command_is_there():
    project = tomllib.loads((FILE.parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, function = project["scripts"]["vitrail"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_frozen_lines_are_in_order():
    text = FILE.read_text("utf-8")
    assert render(parse(text)) == text


def test_what_differs_is_named_with_its_remedy():
    gone, new = changes({"a": ["one", "two"], "b": ["three"]}, {"a": ["two", "six", "six"], "b": ["three"]})
    assert (gone, new) == (["[a]", "one"], ["[a]", "six"])
    said = explain(gone, new)
    assert "\n[a]\none\n" in said and "--allow-removal" in said
    assert "docs/decisions.md" in said and said.endswith("tests/public_contract.txt. New:\n[a]\nsix")
    assert explain([], []) == ""


def test_no_line_is_removed_silently(tmp_path, capsys):
    path = tmp_path / "contract.txt"
    path.write_text(render({"a": ["one", "two"]}), "utf-8")
    before = path.read_text("utf-8")
    assert write(path, {"a": ["two", "six"]}, allow_removal=False) == 1
    assert path.read_text("utf-8") == before
    assert "gone:\n[a]\none\n" in capsys.readouterr().out
    assert write(path, {"a": ["two", "six"]}, allow_removal=True) == 0
    assert "gone:\n[a]\none\n" in capsys.readouterr().out
    assert parse(path.read_text("utf-8")) == {"a": ["six", "two"]}
    assert write(path, {"a": ["two", "six", "ten"]}, allow_removal=False) == 0
    assert "new:\n[a]\nten\n" in capsys.readouterr().out


def write(path: Path, found: Mapping[str, Iterable[str]], *, allow_removal: bool) -> int:
    """Write the contract, and print what goes and what comes; returns 1 where lines would go that may not."""
    frozen = parse(path.read_text("utf-8")) if path.exists() else {}
    gone, new = changes(frozen, {**dict.fromkeys(frozen, ()), **found})
    for word, lines in (("gone", gone), ("new", new)):
        if lines:
            print(f"{word}:", *lines, sep="\n")
    if gone and not allow_removal:
        print("nothing is written; --allow-removal writes it without the lines that are gone")
        return 1
    path.write_text(render(found), "utf-8")
    return 0


def main() -> int:
    """Find every name, and write the contract."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", required=True, help="write public_contract.txt again")
    parser.add_argument(
        "--allow-removal", action="store_true", help="also when lines are gone: a break of the contract"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["VITRAIL_CACHE"] = str(Path(folder) / "cache")
        (work := Path(folder).resolve() / "work").mkdir()
        found = {heading: list(find()) for heading, find in QUICK.items()}
        found |= {heading: list(lines) for heading, lines in written(work).items()}
    return write(FILE, found, allow_removal=args.allow_removal)


if __name__ == "__main__":
    sys.exit(main())
