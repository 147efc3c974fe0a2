"""The command line. Heavy imports stand inside each command: `vitrail --help` needs no PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from tyro.conf import Positional, arg

import vitrail
from vitrail.config import UNEVEN, AugmentConfig, DataConfig, RunConfig
from vitrail.config_schema import field_types
from vitrail.console import Talk, printable
from vitrail.lookup import unknown
from vitrail.models.config import ViTConfig

OK, USER_ERROR, USAGE_ERROR = 0, 1, 2


def main() -> None:
    """Entry point of the `vitrail` command."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = OK
    sys.exit(code)


def run(words: list[str]) -> int:
    """Carry out a command line; returns the exit code (0 done, 1 the user can mend it, 2 wrong usage)."""
    if not words or words[0] in ("-h", "--help", "help"):
        Talk().out.print(overview())
        return OK if words else USAGE_ERROR
    if words[0] in ("-V", "--version", "version"):
        Talk().say(f"vitrail {vitrail.__version__}")
        return OK
    if words[0] not in COMMANDS:
        return fail(f"{unknown('command', words[0], COMMANDS)}. See vitrail --help", USAGE_ERROR)
    command = COMMANDS[words[0]]
    try:
        options = tyro.cli(
            command.options(),
            prog=f"vitrail {words[0]}",
            description=command.help,
            args=words[1:],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except SystemExit as stop:
        return OK if stop.code in (0, None) else USAGE_ERROR
    return guarded(command.do, options)


def guarded(do: Callable[[Any], int], options: Any) -> int:
    """Carry out a command; what the user can mend becomes one message and no traceback."""
    try:
        return do(options)
    except KeyboardInterrupt:
        return fail("stopped", 130)
    except ValueError as error:
        if os.environ.get("VITRAIL_TRACEBACK"):
            raise
        return fail(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        if os.environ.get("VITRAIL_TRACEBACK"):
            raise
        place = f"{error.filename}: " if error.filename else ""
        return fail(f"{place}{error.strerror or error}")


def fail(message: str, code: int = USER_ERROR) -> int:
    """Say on standard error what is wrong."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    console.print(f"[bold red]error:[/] {printable(message)}")
    return code


_IMAGE_SIZE = "side of the square that pictures are brought to (the model's own)"
_PATCH_SIZE = "side of a patch, for models trained with several by --model.patch-sizes (the model's own)"
_RESIZE = "crop, squash, or aspect: whole pictures in their own aspect ratio (the model's own)"
_MODEL = "run folder, model or weights file, folder of transformers or timm, hf:NAME, timm:NAME, torchvision:NAME"
_DATA = (
    "a folder of class folders; a table .csv, .jsonl or .parquet with columns path,label[,split][,group][,weight]; tar "
    "shards: a folder of them, 'train-{000..123}.tar', s3://…, https://…; torchvision:NAME; hf:NAME-or-folder; or digits"
)
_NOT_OF_CHECK = ("source", "memory_bytes", "sampling", "folds", "fold", "decode", "cache_side", "cache_bytes")
_START = f"variant, such as nano4, ti16, s16-concat; or trained weights to start from: {_MODEL}"
MODELS = ("micro4", "s16", "s16-local7")  # small pictures, photographs, large pictures with local attention


@dataclass(frozen=True)
class Predict:
    """Options of `vitrail predict`."""

    model: Annotated[Positional[str], arg(help=_MODEL, metavar="MODEL")]
    paths: Annotated[Positional[tuple[str, ...]], arg(help="pictures, folders, globs", metavar="PATH…")]
    out: Annotated[str | None, arg(help="write a table: .csv, .jsonl or .parquet", metavar="FILE")] = None
    top: Annotated[
        int | None, arg(help="labels to rank per picture (5 in a table, 1 on the terminal)", metavar="K")
    ] = None
    device: Annotated[str, arg(help="auto, cpu or cuda")] = "auto"
    image_size: Annotated[int | None, arg(help=_IMAGE_SIZE, metavar="PIXELS")] = None
    patch_size: Annotated[int | None, arg(help=_PATCH_SIZE, metavar="PIXELS")] = None
    resize: Annotated[str | None, arg(help=_RESIZE, metavar="HOW")] = None


@dataclass(frozen=True)
class Eval:
    """Options of `vitrail eval`."""

    model: Annotated[Positional[str], arg(help=_MODEL, metavar="MODEL")]
    data: Annotated[Positional[str], arg(help=_DATA, metavar="DATA")]
    split: Annotated[str | None, arg(help="test, val, train or all; the first there is", metavar="NAME")] = None
    out: Annotated[str | None, arg(help="write all figures as JSON", metavar="FILE")] = None
    device: Annotated[str, arg(help="auto, cpu or cuda")] = "auto"
    image_size: Annotated[int | None, arg(help=_IMAGE_SIZE, metavar="PIXELS")] = None
    patch_size: Annotated[int | None, arg(help=_PATCH_SIZE, metavar="PIXELS")] = None
    resize: Annotated[str | None, arg(help=_RESIZE, metavar="HOW")] = None
    damaged: Annotated[str, arg(help="broken files: stop, drop or keep", name="data.damaged")] = "stop"


@dataclass(frozen=True)
class Probe:
    """Options of `vitrail probe`."""

    model: Annotated[Positional[str], arg(help=f"{_MODEL}; or a variant for random weights", metavar="MODEL")]
    data: Annotated[Positional[str], arg(help=_DATA, metavar="DATA")]
    out: Annotated[str | None, arg(help="write all figures as JSON", metavar="FILE")] = None
    save: Annotated[
        str | None,
        arg(help="write a model file, .safetensors, whose head is the logistic regression", metavar="FILE"),
    ] = None
    device: Annotated[str, arg(help="auto, cpu or cuda")] = "auto"
    image_size: Annotated[int | None, arg(help=_IMAGE_SIZE, metavar="PIXELS")] = None
    damaged: Annotated[str, arg(help="broken files: stop, drop or keep", name="data.damaged")] = "stop"
    fresh: Annotated[bool, arg(help="compute the features again, also those that are kept on disk")] = False


@dataclass(frozen=True)
class Shard:
    """Options of `vitrail shard`."""

    data: Annotated[Positional[str], arg(help=_DATA, metavar="DATA")]
    out: Annotated[Positional[str], arg(help="folder to write; it must be new or empty", metavar="OUT")]
    size: Annotated[int, arg(help="pictures in a shard", metavar="N")] = 3000
    bytes: Annotated[int | None, arg(help="begin a new shard before it exceeds this many bytes, too", metavar="N")] = (
        None
    )
    seed: Annotated[
        int, arg(help="of the order: pictures of each part are shuffled, so that readers in order get mixed classes")
    ] = 0
    damaged: Annotated[str, arg(help="broken files: stop, drop or keep", name="data.damaged")] = "stop"


@dataclass(frozen=True)
class Report:
    """Options of `vitrail report`."""

    run: Annotated[Positional[str], arg(help="run folder", metavar="RUN")]


@dataclass(frozen=True)
class Models:
    """Options of `vitrail models`."""

    name: Annotated[
        Positional[str | None], arg(help="draw this one: size + patch + suffixes, such as s16-resnet50", metavar="NAME")
    ] = None


@dataclass(frozen=True)
class Doctor:
    """Options of `vitrail doctor`."""

    models: Annotated[
        Positional[tuple[str, ...]], arg(help="variants whose attention is measured", metavar="NAME…")
    ] = MODELS
    fresh: Annotated[bool, arg(help="measure again what was measured before")] = False
    out: Annotated[str | None, arg(help="write all lines as JSON", metavar="FILE")] = None


@dataclass(frozen=True)
class Export:
    """Options of `vitrail export`."""

    model: Annotated[
        Positional[str],
        arg(help=_MODEL, metavar="MODEL"),
    ]
    to: Annotated[
        str, arg(help="hf or timm: a folder that it opens; vitrail: one self-describing model file", metavar="FORMAT")
    ]
    out: Annotated[str | None, arg(help="where to (default: beside the model)", metavar="PATH")] = None
    describe: Annotated[
        tuple[str, ...],
        arg(help="what the model's files do not say: mean=0.5 resize=squash labels=names.txt", metavar="KEY=VALUE…"),
    ] = ()


def train_options() -> type:
    """Return the options of `vitrail train`: its own, and every setting of `RunConfig` as `--section.field`.

    Every setting is None unless it is given, so that a recipe can tell what the user has fixed.
    """
    own = [
        ("data_source", Annotated[Positional[str], arg(help=_DATA, metavar="DATA")]),
        ("out", Annotated[str | None, arg(help="folder of the run (default: runs/NAME)", metavar="RUN")], None),
        (
            "model_name",
            Annotated[str | None, arg(name="model", help=_START, metavar="MODEL")],
            None,
        ),
        (
            "recipe",
            Annotated[
                str | None, arg(help="auto (the default), article, or an earlier run's config.json", metavar="NAME")
            ],
            None,
        ),
        ("resume", Annotated[bool, arg(help="go on with the run in --out, exactly")], False),
    ]
    return dataclasses.make_dataclass(
        "Train", [*own, *settings_of(RunConfig, skip=("recipe", "variant", "pretrained"))], frozen=True
    )


def settings_of(kind: type, *, skip: tuple[str, ...] = (), otherwise: str = ", or the recipe's") -> list[Any]:
    """Return a configuration class's fields, each optional, for `make_dataclass`.

    Args:
        otherwise: what `--help` says after the default.
    """
    made: list[Any] = []
    kinds = field_types(kind)
    for field in dataclasses.fields(kind):
        if field.name in skip:
            continue
        inner = kinds[field.name]
        if dataclasses.is_dataclass(inner):
            hidden = ("source",) if field.name == "data" else ("num_classes",) if inner is ViTConfig else ()
            fields = settings_of(cast(type, inner), skip=hidden)
            nested = dataclasses.make_dataclass(field.name, fields, frozen=True)
            made.append((field.name, nested, dataclasses.field(default_factory=nested)))
        else:
            default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
            several = typing.get_origin(inner) is tuple
            name = (typing.get_args(inner)[0] if several else inner).__name__.upper() + "…" * several
            hint = arg(help=field.metadata["help"], help_behavior_hint=f"(default: {default}{otherwise})", metavar=name)
            made.append((field.name, Annotated[inner | None, hint], None))
    return made


def given_settings(options: Any, where: str = "") -> dict[str, Any]:
    """Return the settings that stand on the command line, by dotted name."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            found |= given_settings(value, f"{field.name}.")
        elif value is not None and (
            where or field.name not in ("data_source", "out", "model_name", "recipe", "resume")
        ):
            found[where + field.name] = value
    return found


def check_options() -> type:
    """Return the options of `vitrail check`: its own, and the settings of data and augmentation, as `vitrail train`'s."""
    data = dataclasses.make_dataclass(
        "data",
        settings_of(DataConfig, skip=_NOT_OF_CHECK, otherwise=""),
        frozen=True,
    )
    augment = dataclasses.make_dataclass("augment", settings_of(AugmentConfig), frozen=True)
    own = [
        ("data_source", Annotated[Positional[str], arg(help=_DATA, metavar="DATA")]),
        ("out", Annotated[str | None, arg(help="write all findings as JSON", metavar="FILE")], None),
        ("html", Annotated[str | None, arg(help="write a page with the pictures in question", metavar="FILE")], None),
        ("quick", Annotated[bool, arg(help="read headers and compare bytes, but decode nothing")], False),
        (
            "show_augmentation",
            Annotated[bool, arg(help="write a contact sheet of what training would see, with what was drawn")],
            False,
        ),
        ("out_sheet", Annotated[str | None, arg(help="its place (default: augmentation.png)", metavar="FILE")], None),
        (
            "recipe",
            Annotated[
                str | None,
                arg(help="its settings: auto (the default), article, or an earlier run's config.json", metavar="NAME"),
            ],
            None,
        ),
        ("data", data, dataclasses.field(default_factory=data)),
        ("augment", augment, dataclasses.field(default_factory=augment)),
    ]
    return dataclasses.make_dataclass("Check", own, frozen=True)


def do_check(options: Any) -> int:
    """Look for all that is known to spoil a training; print a summary, write all of it."""
    from vitrail.data.check.check import check_source
    from vitrail.files import write_text
    from vitrail.report.check_page import summary, write_page

    places = (("--out", options.out), ("--html", options.html), ("--out-sheet", options.out_sheet))
    for name, path in places:
        if path is not None and not Path(path).parent.is_dir():
            raise ValueError(f"{name} {path}: there is no folder {Path(path).parent}")
    refuse_sheetless(options)
    talk = Talk()
    config = DataConfig(source=options.data_source, **given_settings(options.data))
    checked = check_source(config, quick=options.quick, bar=talk.bar)
    for line in summary(checked):
        talk.say(line)
    if options.out is not None:
        write_text(Path(options.out), json.dumps(checked.to_dict(), indent=2) + "\n")
        talk.say(f"all findings: {options.out}")
    if options.html is not None:
        write_page(checked, options.data_source, Path(options.html))
        talk.say(f"page: {options.html}")
    data = shlex.quote(options.data_source)
    if not checked.ok:
        number = sum(problem.severity == "error" for problem in checked.problems)
        if options.html is None and checked.source is not None:
            talk.say(f"next:    vitrail check {data} --html check.html   (a page with the pictures in question)")
        return fail(f"{number:,} errors; mend them first" if number > 1 else "1 error; mend it first")
    if options.show_augmentation:
        from vitrail.report.contact_sheet import write_sheet

        place = options.out_sheet or "augmentation.png"
        given = given_settings(options.augment, "augment.")
        write_sheet(config, Path(place), recipe=options.recipe or "auto", given=given)
        talk.say(f"what training would see: {place}")
    talk.good("no errors" + ("" if checked.problems else ", and nothing to warn of"))
    talk.say(f"next:    vitrail train {data}")
    return OK


def refuse_sheetless(options: Any) -> None:
    """Raise a ValueError when something is set that only the contact sheet heeds, and none is asked for."""
    given = {
        f"--{name.replace('_', '-')}": value for name, value in given_settings(options.augment, "augment.").items()
    }
    given |= {"--out-sheet": options.out_sheet, "--recipe": options.recipe}
    for name, value in given.items():
        if value is not None and not options.show_augmentation:
            raise ValueError(f"{name} {value} is for the contact sheet; add --show-augmentation, or leave it out")


def do_train(options: Any) -> int:
    """Train, then say what came out and what to type next."""
    from vitrail import distributed
    from vitrail.api import train
    from vitrail.training.signals import Stopped

    talk = Talk(quiet=os.environ.get("RANK", "0") != "0")
    try:
        result = train(
            options.data_source,
            out=options.out,
            model=options.model_name,
            recipe=options.recipe,
            resume=options.resume,
            talk=talk,
            **given_settings(options),
        )
    except Stopped as stop:
        talk.say(f"{stop}; everything is saved. Go on with:\n  {stop.command}")
        return 128 + stop.number
    finally:
        distributed.leave()
    for part, judged in result.evaluation.items():
        name = {"val": "validation", "test": "test"}[part]
        right = round(judged["top1"] * judged["num_images"])
        talk.good(f"{name} accuracy {judged['top1']:.2%} ({right:,} of {judged['num_images']:,}){recall_note(judged)}")
    run_folder = result.folder
    if result.folds:
        talk.say(f"folds:   {result.folder / 'folds.json'}")
        run_folder = result.folder / "fold-0"
    talk.say(f"report:  {run_folder / 'report.html'}")
    talk.say(f"model:   {run_folder / 'model.safetensors'}")
    talk.say(f"next:    vitrail predict {shlex.quote(str(run_folder))} PICTURE…")
    return OK


def recall_note(judged: Mapping[str, Any]) -> str:
    """Return the mean recall of the classes, as an addition to the accuracy, where that says little since classes are uneven."""
    counts = [row["count"] for row in judged["per_class"].values() if row["count"]]
    if "balanced_accuracy" not in judged or max(counts) < UNEVEN * min(counts):
        return ""
    return f"; mean recall of the classes {judged['balanced_accuracy']:.2%}, since they are uneven"


def do_predict(options: Predict) -> int:
    """Predict, and print or write a row per picture."""
    from vitrail.device import pick_device
    from vitrail.evaluation.classifier import load
    from vitrail.evaluation.evaluate import tell_of_weights, warn_of_patches
    from vitrail.evaluation.prediction_tables import check_ending, find_pictures, write_table

    if options.out is not None:
        check_ending(Path(options.out))
    if not options.paths:
        return fail("predict needs at least one picture, folder or glob after MODEL", USAGE_ERROR)
    classifier = load(options.model).to(pick_device(options.device))
    classifier = classifier.at(image_size=options.image_size, patch_size=options.patch_size, resize=options.resize)
    tell_of_weights(classifier, Talk())
    warn_of_patches(classifier, Talk())
    classifier = classifier.tuned(measuring=False)
    rows = classifier.predict(find_pictures(options.paths), top=5 if options.top is None else options.top)
    talk = Talk()
    if options.out is not None:
        write_table(Path(options.out), rows)
    else:
        for row in rows:
            ranked = list(zip(row.top_labels, row.top_probabilities, strict=True))[: options.top or 1]
            named = "  ".join(f"{label}  {probability:.1%}" for label, probability in ranked)
            talk.say(f"{row.path}  {named if row.error is None else f'ERROR {row.error}'}")
    failed = sum(row.error is not None for row in rows)
    if options.out is not None:
        talk.say(f"{len(rows):,} rows in {options.out}" + (f", {failed:,} with an error" if failed else ""))
    return OK if failed < len(rows) else fail(f"none of the {len(rows)} pictures could be read")


def do_eval(options: Eval) -> int:
    """Judge, print the headline, write all of it."""
    from vitrail.device import pick_device
    from vitrail.evaluation.evaluate import evaluate
    from vitrail.files import write_text

    if options.out is not None and not Path(options.out).parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {Path(options.out).parent}")
    talk = Talk()
    data = DataConfig(damaged=options.damaged)
    result = evaluate(
        options.model,
        options.data,
        split=options.split,
        device=pick_device(options.device),
        talk=talk,
        data=data,
        image_size=options.image_size,
        patch_size=options.patch_size,
        resize=options.resize,
    )
    talk.good(
        f"accuracy {result['top1']:.2%} of {result['num_images']:,} pictures ({result['split']}){recall_note(result)}"
    )
    talk.say(
        f"top-5 {result['top5']:.2%}  loss {result['loss']:.4f}  calibration error {result['ece']:.2%} (calibrated, as predict: {result['calibrated']['ece']:.2%})"
    )
    worst = sorted((row["recall"], label) for label, row in result["per_class"].items() if row["recall"] is not None)[
        :3
    ]
    talk.say("hardest classes: " + ", ".join(f"{label} ({recall:.1%} found)" for recall, label in worst))
    if options.out is not None:
        write_text(Path(options.out), json.dumps(result, indent=2) + "\n")
        talk.say(f"all figures: {options.out}")
    return OK


def do_export(options: Export) -> int:
    """Write a model in another format, and say what became of it."""
    from vitrail.export.formats import export
    from vitrail.weights.user_spec import parse_described

    talk = Talk()
    made = export(options.model, options.to, out=options.out, described=parse_described(options.describe))
    for note in made.notes:
        talk.say(note)
    talk.good(f"written: {made.path}")
    return OK


def do_probe(options: Probe) -> int:
    """Probe, print each accuracy with its seconds, write all of it."""
    from vitrail.device import pick_device
    from vitrail.evaluation.probe import probe
    from vitrail.files import write_text

    if options.out is not None and not Path(options.out).parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {Path(options.out).parent}")
    talk = Talk()
    found = probe(
        options.model,
        options.data,
        device=pick_device(options.device),
        talk=talk,
        data=DataConfig(damaged=options.damaged),
        image_size=options.image_size,
        save=None if options.save is None else Path(options.save),
        fresh=options.fresh,
    )
    took = found["seconds_each"]
    counts = f"{found['computed']:,} pictures computed, {found['from_cache']:,} from the cache"
    talk.say(f"fitted to {found['num_train']:,} pictures (train), judged on {found['num_images']:,} ({found['split']})")
    talk.say(f"features  {counts}, {found['num_features']} numbers each  {took['features']:.2f} s")
    for name, title, how in (
        ("knn", "k-NN", f"k = {found['k']}"),
        ("ridge", "ridge", f"λ = {found['lambda']:.3g}, chosen by leave-one-out"),
        ("logistic", "logistic", f"α = {found['alpha']:.3g}, {found['steps']} steps"),
    ):
        talk.good(f"{title:<9} accuracy {found[name]:.2%}  {took[name]:.2f} s  ({how})")
    talk.say(f"all of it took {found['seconds']:.1f} s, of it the look at the data {took['data']:.1f} s")
    talk.say(f"features kept in {found['cache']} ({found['cache_bytes'] / 1e6:.1f} MB)")
    if not found["converged"]:
        talk.warn("the logistic regression has not converged; its accuracy may still change a little")
    if options.out is not None:
        write_text(Path(options.out), json.dumps(found, indent=2) + "\n")
        talk.say(f"all figures: {options.out}")
    model, data = shlex.quote(options.model), shlex.quote(options.data)
    if options.save is None:
        size = "" if options.image_size is None else f" --image-size {options.image_size}"
        talk.say(f"next:    vitrail probe {model} {data}{size} --save probe.safetensors")
    else:
        talk.say(f"model:   {options.save}")
        talk.say(f"next:    vitrail eval {shlex.quote(options.save)} {data}")
    return OK


def do_shard(options: Shard) -> int:
    """Write shards, and say what is in them."""
    from vitrail.data.datasets.write_shards import write_shards

    talk = Talk()
    config = DataConfig(source=options.data, damaged=options.damaged)
    written = write_shards(
        config, Path(options.out), size=options.size, limit_bytes=options.bytes, seed=options.seed, bar=talk.bar
    )
    for problem in written.problems:
        talk.warn(problem.message)
    parts = ", ".join(f"{count:,} {part}" for part, count in written.counts.items())
    left_out = f"; {written.num_left_out:,} broken ones left out" if written.num_left_out else ""
    talk.good(f"{parts} in {len(written.names):,} shards, {written.num_bytes / 1e6:,.1f} MB{left_out}")
    for part in written.counts:
        names = [name for name in written.names if name.startswith(f"{part}-")]
        number = names[-1].removeprefix(f"{part}-").removesuffix(".tar")
        talk.say(f"{part + ':':<10}{options.out}/{part}-{{{'0' * len(number)}..{number}}}.tar")
    talk.say(f"next:     vitrail train {shlex.quote(options.out)}")
    return OK


def do_report(options: Report) -> int:
    """Rebuild the page of a run."""
    from vitrail.report.run_page import build_report

    Talk().say(str(build_report(Path(options.run))))
    return OK


def do_models(options: Models) -> int:
    """List the variants with their size, or draw one."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from vitrail.models.cost import num_macs, num_parameters
    from vitrail.models.drawing import draw
    from vitrail.models.kernel_choice import remark_on_window
    from vitrail.models.variants import LISTED, SUFFIXES, variant_config

    if options.name is not None:
        config = variant_config(options.name)
        Talk().say(f"{options.name}: {draw(config)}")
        if remark := remark_on_window(config):
            Talk().say(remark)
        return OK
    table = Table(
        "name",
        "picture",
        "tokens",
        "width",
        "depth",
        "heads",
        "parameters",
        "multiply-adds",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in LISTED:
        config = variant_config(name)
        tokens = config.num_prefix + config.grid[0] * config.grid[1]
        figures = (config.image_size, tokens, config.embed_dim, config.depth, config.num_heads)
        cost = (f"{num_parameters(config) / 1e6:.2f} M", f"{num_macs(config) / 1e9:.2f} G")
        table.add_row(name, *map(str, figures), *cost)
    talk = Talk()
    talk.out.print(table)
    talk.say("Any size and patch can be combined (s8, ti14, …).")
    talk.say(f"Suffixes: {', '.join('-' + suffix for suffix in SUFFIXES)}, -local7 (any odd window),")
    talk.say("and timm's CNNs as encoder, such as -resnet50, -efficientnet_b0; several combine: s16-resnet50-concat.")
    talk.say("One as a picture of its data flow: vitrail models NAME")
    return OK


def do_doctor(options: Doctor) -> int:
    """Say what this machine can do."""
    from vitrail.doctor import examine
    from vitrail.files import write_text

    if options.out is not None and not Path(options.out).parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no folder {Path(options.out).parent}")
    talk, topic, width = Talk(), "", 0
    findings = examine(options.models, fresh=options.fresh)
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            width = 2 + max(len(each.name) for each in findings if each.topic == topic)
            talk.out.print(f"[bold]{topic}[/]")
        talk.say(f"  {finding.name:<{width}}{finding.value}")
        if finding.advice:
            talk.warn(finding.advice)
    if options.out is not None:
        write_text(Path(options.out), json.dumps([dataclasses.asdict(each) for each in findings], indent=2) + "\n")
    return OK


@dataclass(frozen=True)
class Command:
    """A command: what it does, its options, the function."""

    help: str
    options: Callable[[], Any]
    do: Callable[[Any], int]


COMMANDS = {
    "train": Command(
        "Check the data, train, judge, and leave a run folder with weights and a report.", train_options, do_train
    ),
    "check": Command(
        "Look for all that spoils a training: broken files, leaks, wrong labels, odd pictures.", check_options, do_check
    ),
    "eval": Command(
        "Judge a model on labelled pictures: accuracy, loss, calibration, confusion.", lambda: Eval, do_eval
    ),
    "predict": Command(
        "Name what is on pictures; a broken file gets an error in its row.", lambda: Predict, do_predict
    ),
    "export": Command(
        "Write a model for transformers or timm, or a foreign model as a model file of Vitrail.",
        lambda: Export,
        do_export,
    ),
    "probe": Command(
        "Say in seconds what a model's features are worth on your pictures: k-NN, ridge, logistic regression.",
        lambda: Probe,
        do_probe,
    ),
    "shard": Command(
        "Write pictures into WebDataset tar shards, as they are, for network disks, object stores and other readers.",
        lambda: Shard,
        do_shard,
    ),
    "report": Command("Rebuild the HTML page of a run.", lambda: Report, do_report),
    "doctor": Command(
        "Say what this machine can do: processors, number formats, decoders, attention kernels.",
        lambda: Doctor,
        do_doctor,
    ),
    "models": Command("List the architectures with their parameters and cost, or draw one.", lambda: Models, do_models),
}


def overview() -> str:
    """Return what `vitrail --help` shows."""
    lines = [f"  [bold]{name:<9}[/]{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"[bold]vitrail {vitrail.__version__}[/]: train, judge and use Vision Transformers on your own pictures.\n",
            "usage: vitrail COMMAND …\n",
            *lines,
            "\nStart with:  vitrail train digits",
            "Then:        vitrail train photos/   (photos/<class>/*.jpg, or photos/{train,val,test}/<class>/*.jpg)",
            "More:        vitrail COMMAND --help",
        ]
    )
