"""The loop: learning, exact resume after any kind of end, honest failures."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitrail.api import train
from vitrail.config import OptimConfig, RunConfig, ScheduleConfig, load_config
from vitrail.config_schema import override
from vitrail.console import Console
from vitrail.evaluation.classifier import load
from vitrail.evaluation.diagnosis import NotFinite
from vitrail.evaluation.prediction_tables import write_table
from vitrail.models.vit import ViT
from vitrail.optim.average import Average
from vitrail.optim.groups import parameter_groups
from vitrail.optim.optimizers import build_optimizer, clip_gradient
from vitrail.optim.schedules import Schedule
from vitrail.training import loop
from vitrail.training.cadence import build_cadence
from vitrail.training.signals import Stopped
from vitrail.weights.model_file import load_model

QUIET = Console(quiet=True)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def command(data: Path, out: Path, *more: str) -> list[str]:
    settings = ["--model", "nano8", "--model.depth", "2", "--model.embed-dim", "24", "--model.num-heads", "2"]
    settings += ["--epochs", "6", "--batch-size", "16", "--model.dropout", "0.1", "--log.every", "3 steps"]
    return [sys.executable, "-m", "vitrail", "train", str(data), "--out", str(out), *settings, *more]


def resume(out: Path, data: Path) -> list[str]:
    return [sys.executable, "-m", "vitrail", "train", str(data), "--out", str(out), "--resume"]


@pytest.mark.slow
def test_learns_real_digits(tmp_path):
    result = train("digits", out=tmp_path / "run", console=QUIET, epochs=12)
    assert result.top1 > 0.93
    assert load(result).labels == tuple("0123456789")
    losses = [line["eval/loss"] for line in lines_of(tmp_path / "run") if "eval/loss" in line]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_one_batch_overfits(make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data", count=6)
    settings = tiny | {"epochs": 120.0, "optim.lr": 3e-3, "optim.label_smoothing": 0.0, "model.drop_path": 0.0}
    settings |= {"augment.crop_scale": 1.0, "augment.flip": 0.0, "augment.rotation": 0.0}
    settings |= {"augment.brightness": 0.0, "augment.contrast": 0.0, "augment.saturation": 0.0}
    train(data, out=tmp_path / "run", console=QUIET, **settings)
    last = [line for line in lines_of(tmp_path / "run") if "train/loss" in line][-1]
    assert last["train/top1"] == 1.0
    assert last["train/loss"] < 0.05


def test_a_run_leaves_what_is_promised(tiny_run):
    run, data = tiny_run
    names = {path.name for path in run.iterdir()}
    promised = {"model.safetensors", "config.json", "metrics.jsonl", "last", "split.json", "report.html", "run.json"}
    assert promised <= names
    assert not [name for name in names if ".part" in name], "a draft was left behind"
    train_lines = [line for line in lines_of(run) if "train/loss" in line]
    eval_lines = [line for line in lines_of(run) if "eval/top1" in line]
    assert {"step", "epoch", "train/loss", "train/lr", "time/images_per_s", "time/data_wait"} <= set(train_lines[-1])
    assert {"step", "epoch", "eval/top1", "eval/top5", "eval/loss", "eval/ece"} <= set(eval_lines[-1])
    assert [line["epoch"] for line in eval_lines] == [1.0, 2.0]
    config = load_config(run / "config.json")
    assert config.data.source == str(data)
    model, header = load_model(run / "model.safetensors")
    assert header.labels == ("flat", "slant", "steep")
    assert header.split["fingerprint"] == json.loads((run / "split.json").read_text())["fingerprint"]
    assert header.metrics["top1"] == max(line["eval/top1"] for line in eval_lines)
    assert model.config == config.model


def test_the_configuration_of_a_run_trains_the_same_run(tiny_run, tmp_path):
    run, data = tiny_run
    train(data, out=tmp_path / "again", recipe=str(run / "config.json"), console=QUIET)
    assert_same_weights(run, tmp_path / "again")


def test_a_recipe_file_decides_the_split_too(make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    own = {"data.split_seed": 7, "data.val_fraction": 0.1, "data.damaged": "drop"}
    first = train(data, out=tmp_path / "first", console=QUIET, **tiny, **own).folder
    (data / "flat" / "000.png").write_bytes(b"broken since")
    again = train(data, out=tmp_path / "again", recipe=str(first / "config.json"), console=QUIET).folder
    config = load_config(again / "config.json")
    assert (config.data.split_seed, config.data.val_fraction, config.data.damaged) == (7, 0.1, "drop")
    split = json.loads((again / "split.json").read_text())["splits"]
    assert len(split["val"]) == 6
    other = train(
        data, out=tmp_path / "other", recipe=str(first / "config.json"), model="nano4", epochs=1.0, console=QUIET
    )
    assert load_config(other.folder / "config.json").model.embed_dim == 96


def test_another_seed_is_another_run(tiny_run, tmp_path, tiny):
    run, data = tiny_run
    train(data, out=tmp_path / "other", console=QUIET, seed=1, **tiny)
    ours, theirs = (load_file(path / "model.safetensors") for path in (run, tmp_path / "other"))
    assert not torch.equal(ours["head.weight"], theirs["head.weight"])


def interrupted(step: int, data: Path, **settings) -> Path:
    """Train, stopped by a signal right after a step as from outside; returns the run's folder."""
    real = loop.update

    def update(parallel, state, *more):
        if state.progress.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return real(parallel, state, *more)

    loop.update = update
    try:
        with pytest.raises(Stopped):
            train(data, console=QUIET, **settings)
    finally:
        loop.update = real
    return Path(settings["out"])


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "last/state.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


@pytest.mark.parametrize("memory", [2_000_000_000, 0])
def test_a_run_with_chosen_samples_goes_on_bit_for_bit(memory, make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    own = tiny | {"data.sampling": "balanced", "augment.repeats": 2, "data.memory_bytes": memory, "epochs": 3.0}
    train(data, out=tmp_path / "whole", console=QUIET, **own)
    cut = interrupted(5, data, out=tmp_path / "cut", **own)
    train(data, out=cut, console=QUIET, resume=True)
    assert_same_weights(tmp_path / "whole", cut)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_killed_at_five_random_steps_and_resumed_is_bit_identical(kind, make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=40)
    more = ["--log.save-minutes", "0.0005"] + (["--data.memory-bytes", "0"] if kind == "files" else [])
    subprocess.run(command(data, tmp_path / "whole", *more), check=True, capture_output=True)
    whole = lines_of(tmp_path / "whole")
    total = whole[-1]["step"]
    steps = sorted(random.Random(kind).sample(range(2, total - 1), 5))
    cut = tmp_path / "cut"
    for number, step in enumerate(steps):
        process = subprocess.Popen(
            resume(cut, data) if number else command(data, cut, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        kill_at(process, cut, step)
    done = subprocess.run(resume(cut, data), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(tmp_path / "whole", cut)
    timeless = [
        [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
        for lines in (whole, lines_of(cut))
    ]
    assert timeless[0] == timeless[1], "metrics of a resumed run are those of the uninterrupted one"


ALL_AUGMENTED = {
    "augment.crop_scale": 0.4,
    "augment.flip": 0.5,
    "augment.policy": "randaugment",
    "augment.erasing": 0.5,
    "augment.erasing_fill": "noise",
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.mix_chance": 0.9,
}


@pytest.mark.parametrize("memory", [10**9, 0])
def test_two_steps_and_two_more_are_four_with_every_augmentation(memory, make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data", count=19)  # 45 training images: a pair spans two epochs
    settings = tiny | ALL_AUGMENTED | {"epochs": 1.4, "data.memory_bytes": memory, "log.every": "1 steps"}
    train(data, out=tmp_path / "whole", console=QUIET, **settings)
    assert [line["step"] for line in lines_of(tmp_path / "whole") if "train/loss" in line] == [1, 2, 3, 4]
    interrupted(2, data, out=tmp_path / "cut", **settings)
    train(data, out=tmp_path / "cut", resume=True, console=QUIET)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def kill_at(process: subprocess.Popen, run: Path, step: int) -> None:
    """Kill the process without warning as soon as its metrics show that it has passed `step`."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if lines_of(run)[-1]["step"] >= step:
                break
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_stop_saves_and_tells_how_to_go_on(number, make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=40)
    subprocess.run(command(data, tmp_path / "whole"), check=True, capture_output=True)
    process = subprocess.Popen(
        command(data, tmp_path / "cut"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "cut" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number, output
    assert f"stopped by {number.name}" in output
    assert "Traceback" not in output
    again = next(line.strip() for line in output.splitlines() if line.strip().startswith("vitrail train"))
    assert again == f"vitrail train {data} --out {tmp_path / 'cut'} --resume"
    subprocess.run(resume(tmp_path / "cut", data), check=True, capture_output=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_full_disk_ends_with_one_message_and_an_intact_state(make_folder, tmp_path):
    data, small = make_folder(tmp_path / "data", count=30), tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        wide = ["--model.embed-dim", "48", "--log.save-minutes", "0.0005"]
        first = subprocess.Popen(command(data, small / "run", *wide), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while not (small / "run" / "last" / "state.safetensors").exists():
            assert first.poll() is None, first.communicate()
            time.sleep(0.002)
        usage = shutil.disk_usage(small)
        (small / "filler").write_bytes(b"x" * max(0, usage.free - 40_000))
        _, error = first.communicate()
        text = " ".join(error.decode().split())
        assert first.returncode == 1, text
        assert "Traceback" not in text
        assert "error:" in text
        assert "--resume" in text
        assert "No space left" in text or "could not be written" in text
        load_file(small / "run" / "last" / "state.safetensors")
        (small / "filler").unlink()
        done = subprocess.run(resume(small / "run", data), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        subprocess.run(command(data, tmp_path / "whole", *wide), check=True, capture_output=True)
        assert_same_weights(tmp_path / "whole", small / "run")
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("every", ["1 epochs", "1 steps"])
def test_a_loss_that_is_not_finite_stops_with_step_layer_and_files(every, make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    settings = tiny | {
        "optim.lr": 1e30,
        "optim.clip_norm": 0.0,
        "schedule.warmup": "0 steps",
        "optim.weight_decay": 0.0,
    }
    with pytest.raises(NotFinite) as caught:
        train(data, out=tmp_path / "run", console=QUIET, **settings, **{"log.eval_every": every})
    message = str(caught.value)
    assert "step " in message
    assert ".png" in message
    assert "first layer with such an output is" in message
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    state = tmp_path / "run" / "last" / "state.safetensors"
    if state.exists():
        assert all(torch.isfinite(value).all() for value in load_file(state).values())


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(parameter_groups(model), OptimConfig())
    before = model.weight.detach().clone()
    model(torch.tensor([[float("inf"), 1.0, 1.0]])).sum().backward()
    norm = clip_gradient(model, 1.0)
    assert not torch.isfinite(norm)
    optimizer.found_inf = (~torch.isfinite(norm)).float()
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_resume_refuses_what_would_not_be_the_same_run(tiny_run, make_folder, tmp_path):
    run, data = tiny_run
    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(ValueError, match="epochs 2.0, not 5.0"):
        train(data, out=copy, resume=True, console=QUIET, epochs=5.0)
    with pytest.raises(ValueError, match="did you mean 'optim.lr'"):
        train(data, out=copy, resume=True, console=QUIET, **{"optim.lrr": 1.0})
    with pytest.raises(ValueError, match="is a run of"):
        train(make_folder(tmp_path / "elsewhere"), out=copy, resume=True, console=QUIET)
    with pytest.raises(ValueError, match="is no run"):
        train(data, out=tmp_path, resume=True, console=QUIET)
    assert train(data, out=copy, resume=True, console=QUIET).top1 >= 0, "a finished run answers at once"


def test_refused_settings_leave_no_folder_behind(make_folder, tmp_path):
    data = make_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="shorten it"):
        train(data, out=tmp_path / "run", recipe="article", console=QUIET, epochs=1.0, variant="nano8")
    assert not (tmp_path / "run").exists()
    for wrong in (
        {"schedule.step_gamma": 0.5},
        {"model.num_classes": 5},
        {"augment.crop_ratio": 2.0, "augment.crop_scale": 1.0},
    ):
        with pytest.raises(ValueError, match="has no effect|leave it out"):
            train(data, out=tmp_path / "run", console=QUIET, **wrong)
    assert not (tmp_path / "run").exists()


def test_a_start_that_was_killed_can_be_made_again(make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    (tmp_path / "run").mkdir()
    for name in ("config.json", "split.json", ".run.json.123.part"):
        (tmp_path / "run" / name).write_text("{")
    assert train(data, out=tmp_path / "run", console=QUIET, **tiny).top1 >= 0


def test_images_added_since_do_not_change_a_resumed_run(make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    whole = train(data, out=tmp_path / "whole", console=QUIET, **tiny).folder
    cut = shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(cut / "last")
    info = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(info | {"status": "stopped"}))
    shutil.copy(data / "steep" / "001.png", data / "flat" / "0000.png")  # listed before nearly all others
    train(data, out=cut, resume=True, console=QUIET)
    assert_same_weights(whole, cut)


def test_names_that_are_not_utf8(make_folder, tmp_path, tiny, capsys):
    data = make_folder(tmp_path / "data")
    for label in ("flat", "steep"):
        for path in list((data / label).iterdir()):
            os.rename(path, os.fsencode(path.parent) + b"/h\xe9ron" + os.fsencode(path.name))
    run = train(data, out=tmp_path / "run", **tiny).folder
    rows = load(run).predict([os.fsdecode(path) for path in sorted((data / "flat").iterdir())[:3]])
    assert [row.error for row in rows] == [None] * 3
    for ending in ("csv", "jsonl", "parquet"):
        write_table(tmp_path / f"rows.{ending}", rows)
    assert "xe9ron" in (tmp_path / "rows.csv").read_text(encoding="utf-8")


def test_a_image_gone_since_the_split_is_named_on_resume(make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    train(data, out=tmp_path / "run", console=QUIET, **tiny)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"status": "stopped"}))
    (data / "flat" / "003.png").unlink()
    with pytest.raises(ValueError, match="flat/003.png"):
        train(data, out=tmp_path / "run", resume=True, console=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment", [[], ["--augment.policy", "trivialaugment", "--augment.mixup", "1", "--augment.cutmix", "1"]]
)
def test_two_processes_train_as_one(augment, make_folder, tmp_path):
    data = make_folder(tmp_path / "data", count=24)
    exact = ["--model.dropout", "0.0", "--model.drop-path", "0.0", "--precision", "fp32", "--optim.ema-decay", "0"]
    exact += augment
    subprocess.run(command(data, tmp_path / "one", *exact), check=True, capture_output=True)
    words = command(data, tmp_path / "two", *exact)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *words[2:]]
    done = subprocess.run(
        launcher, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("validation accuracy") >= 1
    for ours, theirs in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert ours["step"] == theirs["step"]
        if "eval/loss" in ours:
            assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=1e-3)
    one, two = (load_file(tmp_path / name / "last" / "state.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("augment", [{}, ALL_AUGMENTED])
def test_accumulated_parts_make_the_same_step(augment, make_folder, tmp_path, tiny):
    data = make_folder(tmp_path / "data")
    exact = tiny | augment | {"model.drop_path": 0.0, "precision": "fp32", "epochs": 1.0, "optim.ema_decay": 0.0}
    train(data, out=tmp_path / "one", console=QUIET, **exact)
    train(data, out=tmp_path / "four", console=QUIET, **exact, **{"optim.accumulate": 4})
    one, four = (load_file(tmp_path / name / "last" / "state.safetensors") for name in ("one", "four"))
    for name in one:
        if name.startswith("optimizer.exp_avg."):
            torch.testing.assert_close(one[name], four[name], atol=1e-4, rtol=1e-3)


def factors(total: int = 1000, **changes) -> list[float]:
    schedule = Schedule(ScheduleConfig(**changes), total_steps=total, steps_per_epoch=100)
    return [schedule(step) for step in range(1, total + 1)]


def test_schedules_by_hand():
    cosine = factors(warmup="100 steps", final_fraction=0.0)
    assert cosine[49] == pytest.approx(0.5)
    assert cosine[99] == 1.0
    assert cosine[549] == pytest.approx(0.5)
    assert cosine[-1] == pytest.approx(0.0, abs=1e-12)
    linear = factors(decay="linear", warmup="10 %", final_fraction=0.1)
    assert linear[549] == pytest.approx(0.55)
    assert linear[-1] == pytest.approx(0.1)
    stepped = factors(decay="step", warmup="0 steps", step_every="1 epochs", step_gamma=0.1)
    assert stepped[99] == 1.0
    assert stepped[100] == pytest.approx(0.1)
    assert stepped[250] == pytest.approx(0.01)
    assert set(factors(decay="constant", warmup="0 steps")) == {1.0}
    with pytest.raises(ValueError, match="shorten it"):
        factors(total=50, warmup="100 steps")


def test_weight_decay_leaves_out_biases_norms_tokens_and_positions():
    config = RunConfig().model
    model = ViT(override(RunConfig(), {"model.depth": 1, "model.embed_dim": 24, "model.num_heads": 2}).model)
    assert config.depth == 12
    groups = build_optimizer(parameter_groups(model), OptimConfig(weight_decay=0.3)).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    exempt = {names[id(each)] for group in groups if group["weight_decay"] == 0.0 for each in group["params"]}
    decayed = {names[id(each)] for group in groups if group["weight_decay"] == 0.3 for each in group["params"]}
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.attn.qkv.bias"} <= exempt
    assert {"head.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= decayed
    assert decayed | exempt == set(names.values())


def test_average_of_weights_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 0.0)
    average = Average(model, decay=0.5)
    torch.nn.init.constant_(model.weight, 1.0)
    average.update(model, step=1)  # the ramp: 2/11
    assert average.model.weight.item() == pytest.approx(9 / 11)
    average.update(model, step=1000)
    assert average.model.weight.item() == pytest.approx((9 / 11 + 1) / 2)
    assert not any(parameter.requires_grad for parameter in average.parameters())


@pytest.mark.parametrize(("count", "batch", "epochs"), [(100, 16, 3.0), (7, 16, 5.0), (64, 64, 0.5)])
def test_evaluations_fall_on_epoch_ends(count, batch, epochs):
    rhythm = build_cadence(override(RunConfig(), {"batch_size": batch, "epochs": epochs}), count)
    assert rhythm.total == max(1, math.ceil(epochs * count / batch))
    judged = [step for step in range(1, rhythm.total + 1) if rhythm.is_due(step, rhythm.evaluate)]
    wanted = {min(rhythm.total, math.ceil(epoch * count / batch - 1e-9)) for epoch in np.arange(1, int(epochs) + 1)}
    assert set(judged) == wanted | {rhythm.total}
