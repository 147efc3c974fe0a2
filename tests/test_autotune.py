"""The choice among attention kernels: measured, cached, obeyed, and the same when a run is resumed."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vitrail.cli
from vitrail import ViT
from vitrail.api import train
from vitrail.config import RunConfig
from vitrail.files import replacing
from vitrail.kernels import autotune
from vitrail.kernels.autotune import cache_file, fastest_kernels, fastest_of, machine_key, measure, timings
from vitrail.kernels.registry import GLOBAL_KERNELS, LOCAL_KERNELS, Case, Kernels, candidate_kernels, default_kernel
from vitrail.models.config import ViTConfig
from vitrail.models.kernel_choice import attention_cases, training_cases
from vitrail.models.variants import variant_config
from vitrail.training.run_folder import is_draft, open_run

SMALL = Case("cpu", "float32", True, False, 65, 32)
LOCAL = Case("cpu", "float32", True, False, 197, 64, (14, 14), 7)


def test_a_measurement_names_every_candidate_and_takes_well_under_a_second():
    for case in (SMALL, LOCAL, SMALL._replace(training=False, dtype="bfloat16"), LOCAL._replace(dropout=True)):
        before, started = torch.get_num_threads(), time.process_time()
        taken = measure(case)
        assert time.process_time() - started < 3, "of all threads"
        assert list(taken) == candidate_kernels(case)
        assert next(iter(taken)) == default_kernel(case)
        assert all(0 < ms < 1000 for ms in taken.values())
        assert torch.get_num_threads() == before


def test_measuring_draws_no_random_numbers_of_the_run():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure(SMALL._replace(dropout=True))
    assert torch.equal(torch.rand(3), expected)


def test_the_rule_stays_unless_another_is_clearly_faster():
    assert fastest_of({"fused": 1.0, "matmul": 0.9}) == "fused"
    assert fastest_of({"fused": 1.0, "matmul": 0.7}) == "matmul"
    assert fastest_of({"matmul": 1.0, "fused": 1.5, "tiles": 0.5}) == "tiles"


def test_rules():
    assert default_kernel(SMALL) == "fused"
    assert default_kernel(SMALL._replace(dtype="bfloat16")) == "matmul"
    assert default_kernel(SMALL._replace(dtype="bfloat16", device="cuda")) == "fused"
    assert default_kernel(SMALL._replace(dtype="bfloat16", tokens=3137)) == "fused", "N×N weights would fill the memory"
    assert default_kernel(LOCAL) == "fused", "the halos of 14×14 are hardly less than the grid"
    big = LOCAL._replace(tokens=785, grid=(28, 28))
    assert default_kernel(big) == "tiles"
    assert default_kernel(big._replace(device="cuda")) != "tiles"
    huge = big._replace(tokens=12545, grid=(112, 112), window=67)
    assert candidate_kernels(huge) == ["tiles"], "N×N masks would fill the memory"
    assert candidate_kernels(huge._replace(device="cuda")) == ["fused"], "scores of all halos are more than the mask"
    assert candidate_kernels(big._replace(tokens=3137, grid=(56, 56))) == ["tiles"]


def test_what_was_measured_is_kept_and_read(tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "kernels.json"
    taken = timings(SMALL, cache)
    assert json.loads(cache.read_text()) == {machine_key(): {SMALL.key: taken}}
    monkeypatch.setattr(autotune, "measure", lambda case: pytest.fail("measured again"))
    assert timings(SMALL, cache) == taken
    assert fastest_kernels([SMALL], cache=cache).chosen == {SMALL.key: fastest_of(taken)}
    with pytest.raises(pytest.fail.Exception):
        timings(SMALL, cache, fresh=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"])
def test_a_broken_cache_is_measured_anew(tmp_path, monkeypatch, content):
    cache = tmp_path / "kernels.json"
    cache.write_bytes(content.replace(b'"a"', json.dumps(machine_key()).encode()))
    monkeypatch.setattr(autotune, "measure", lambda case: dict.fromkeys(candidate_kernels(case), 1.0))
    assert set(timings(SMALL, cache)) == {"fused", "matmul"}
    assert json.loads(cache.read_text())[machine_key()][SMALL.key] == {"fused": 1.0, "matmul": 1.0}


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(autotune, "measure", lambda case: {"fused": 2.0, "matmul": 1.0})
    assert fastest_kernels([SMALL], cache=tmp_path / "file" / "kernels.json").chosen == {SMALL.key: "matmul"}
    assert fastest_kernels([SMALL], cache=None).chosen == {SMALL.key: "matmul"}


def test_another_version_of_torch_is_another_machine(tmp_path, monkeypatch):
    cache = tmp_path / "kernels.json"
    monkeypatch.setattr(autotune, "measure", lambda case: {"fused": 2.0, "matmul": 1.0})
    timings(SMALL, cache)
    monkeypatch.setattr(autotune, "machine_key", lambda: "elsewhere")
    monkeypatch.setattr(autotune, "measure", lambda case: {"fused": 1.0, "matmul": 2.0})
    assert fastest_kernels([SMALL], cache=cache).chosen == {SMALL.key: "fused"}
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("measuring", [True, False])
@pytest.mark.parametrize(
    "entry",
    [5, "x", None, [], {}, {"fused": "a", "matmul": "b"}, {"fused": None, "matmul": 1}, {"fused": 1.0}]
    + [{"fused": 2.0, "matmul": number} for number in (float("nan"), float("-inf"), -1.0, True)],
)
def test_an_odd_entry_of_the_cache_counts_as_none(tmp_path, monkeypatch, entry, measuring):
    cache = tmp_path / "kernels.json"
    cache.write_text(json.dumps({machine_key(): {SMALL.key: entry}}))
    monkeypatch.setattr(autotune, "measure", lambda case: {"fused": 2.0, "matmul": 1.0})
    expected = {SMALL.key: "matmul"} if measuring else {}
    assert fastest_kernels([SMALL], cache=cache, measuring=measuring).chosen == expected
    assert timings(SMALL, cache) == {"fused": 2.0, "matmul": 1.0}


def test_cached_kernels_that_are_no_candidates_are_ignored(tmp_path, monkeypatch):
    cache, cached = tmp_path / "kernels.json", {"gone": 0.1, "triton": 0.1, "matmul": 1.0, "tiles": 3.0, "fused": 2.0}
    cache.write_text(json.dumps({machine_key(): {LOCAL.key: cached}}))
    monkeypatch.setattr(autotune, "measure", lambda case: pytest.fail("measured"))
    assert fastest_kernels([LOCAL], cache=cache).chosen == {LOCAL.key: "matmul"}
    assert list(timings(LOCAL, cache).items()) == [("fused", 2.0), ("matmul", 1.0), ("tiles", 3.0)]


@pytest.mark.parametrize(
    ("known", "says"),
    [
        (
            {SMALL.key: "gone"},
            "kernels in run.json has 'gone' for 'cpu float32 training, 65 tokens of 32'.*: fused, matmul;",
        ),
        ({LOCAL.key: "triton"}, "run.json has 'triton' .* expected one of: tiles, plain, fused, matmul; restore"),
        ({"another case": 3}, "run.json has 3 for 'another case'"),
        (["x"], r"kernels in run.json is \['x'\]; expected a kernel's name for each case"),
    ],
)
def test_choices_of_a_run_that_are_no_kernels_are_refused(known, says):
    with pytest.raises(ValueError, match=says):
        fastest_kernels([SMALL, LOCAL], cache=None, known=known)


WRITES = """
import sys, threading
from pathlib import Path
from vitrail.kernels import autotune
def write(thread):
    for number in range(10):
        assert autotune._write(Path(sys.argv[1]), {f"{sys.argv[2]} {thread} {number}": {"fused": 1.0}})
threads = [threading.Thread(target=write, args=(thread,)) for thread in range(2)]
for each in threads: each.start()
for each in threads: each.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no file locks there")
def test_threads_and_processes_lose_none_of_each_other_s_measurements(tmp_path):
    cache = tmp_path / "kernels.json"
    commands = [[sys.executable, "-W", "ignore", "-c", WRITES, str(cache), name] for name in ("one", "two")]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [each.communicate()[1] for each in running] == ["", ""]
    assert len(json.loads(cache.read_text())[machine_key()]) == 2 * 2 * 10


def test_two_writes_of_one_file_at_once_take_different_drafts(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as other:
        assert one != other
        assert all(is_draft(each) for each in (one, other))
        one.write_text("1")
        other.write_text("2")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["1"], "the outer one came last"


def test_what_was_measured_of_older_kernels_does_not_count(tmp_path, monkeypatch):
    cache = tmp_path / "kernels.json"
    monkeypatch.setattr(autotune, "measure", lambda case: {"fused": 2.0, "matmul": 1.0})
    fastest_kernels([SMALL], cache=cache)
    monkeypatch.setattr(autotune, "_REVISION", autotune._REVISION + 1)
    assert fastest_kernels([SMALL], cache=cache, measuring=False).chosen == {}


def test_known_choices_are_used_again_and_named_kernels_obeyed(monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda case: pytest.fail("measured"))
    assert fastest_kernels([SMALL], cache=None, known={SMALL.key: "matmul"}).chosen == {SMALL.key: "matmul"}
    assert fastest_kernels([SMALL], cache=None, measuring=False).chosen == {}
    named = fastest_kernels([SMALL, LOCAL], cache=None, global_attention="matmul", local_attention="tiles")
    assert (named.global_attention, named.local_attention) == ("matmul", "tiles")
    with pytest.raises(ValueError, match="kernels.local_attention 'tiles' has no effect: .* no local attention"):
        fastest_kernels([SMALL], cache=None, local_attention="tiles")
    with pytest.raises(ValueError, match="kernels.global_attention 'matmul' has no effect"):
        fastest_kernels([LOCAL], cache=None, global_attention="matmul")
    with pytest.raises(ValueError, match="'triton', which cannot compute cpu .* auto, tiles, plain, fused, matmul$"):
        fastest_kernels([LOCAL], cache=None, local_attention="triton")
    with pytest.raises(ValueError, match=r"kernels.local_attention is 'tiles', which cannot compute cuda float32"):
        fastest_kernels([LOCAL._replace(device="cuda")], cache=None, local_attention="tiles")


def test_a_model_uses_what_was_chosen(monkeypatch):
    model = ViT(variant_config("nano2-local5", num_classes=3, depth=2, attention="local,global")).eval()
    images, called = torch.rand(1, 3, 32, 32), []
    for table in (GLOBAL_KERNELS, LOCAL_KERNELS):
        for name, kernel in table.items():
            monkeypatch.setitem(
                table,
                name,
                lambda *x, name=name, kernel=kernel, **y: (called.append((name, len(x))), kernel(*x, **y))[1],
            )

    def kernels_of(kernels):
        model.kernels = kernels
        called.clear()
        with torch.no_grad():
            model(images)
        return called

    assert kernels_of(Kernels()) == [("tiles", 6), ("fused", 3)]
    assert kernels_of(Kernels(global_attention="matmul", local_attention="plain")) == [("plain", 6), ("matmul", 3)]
    cases = list(attention_cases(model.config, (32, 2), "cpu", "float32", training=False))
    assert kernels_of(Kernels({case.key: "matmul" for case in cases})) == [("matmul", 6), ("matmul", 3)]
    assert len(cases) == 2, "each attention of the pattern once"


@pytest.mark.parametrize("changes", [{}, {"patch_dropout": 0.5}, {"attention_dropout": 0.1}, {"patch_sizes": (4, 8)}])
def test_the_cases_of_a_run_are_those_that_training_meets(changes, monkeypatch):
    small = ViTConfig(image_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    config = dataclasses.replace(RunConfig(), model=dataclasses.replace(small, **changes))
    model, met = ViT(config.model), []
    monkeypatch.setattr(Kernels, "attend", _noting(met))
    for patch in config.model.patch_sizes or (8,):
        model.train()(torch.rand(2, 3, 32, 32), patch)
    with torch.inference_mode():
        model.eval()(torch.rand(2, 3, 32, 32))
    assert sorted(met) == sorted(case.key for case in training_cases(config.model, config.precision, "cpu"))


def _noting(met):
    own = Kernels.attend

    def attend(self, q, k, v, *, dropout=0.0):
        training = torch.is_grad_enabled() and q.requires_grad
        met.append(Case("cpu", "float32", training, dropout > 0, q.shape[2], q.shape[3]).key)
        return own(self, q, k, v, dropout=dropout)

    return attend


def test_a_run_keeps_its_choice_when_it_goes_on(tmp_path, make_folder, tiny, monkeypatch):
    """Resume is exact although the machine would choose otherwise by then."""
    data = make_folder(tmp_path / "shapes")
    settings = {**tiny, "epochs": 3.0, "model.attention": "local", "model.window": 3, "model.patch_size": 2}
    monkeypatch.setattr(autotune, "measure", lambda case: _slower(case, "fused"))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "one"))
    whole = train(data, out=tmp_path / "whole", **settings)
    chosen = open_run(whole.folder)[0].info()["kernels"]
    assert set(chosen.values()) == {"matmul"}, "what the measurement says"
    assert len(chosen) == 2

    from vitrail.training import loop
    from vitrail.training.signals import Stopped

    own, steps = loop.update, []

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise Stopped(15, 4)
        return own(*arguments)

    monkeypatch.setattr(loop, "update", stopping)
    with pytest.raises(Stopped):
        train(data, out=tmp_path / "halves", **settings)
    monkeypatch.setattr(loop, "update", own)
    monkeypatch.setattr(autotune, "measure", lambda case: _slower(case, "matmul"))
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "two"))
    halves = train(data, out=tmp_path / "halves", resume=True)
    assert open_run(halves.folder)[0].info()["kernels"] == chosen
    one, other = (load_file(each.folder / "last" / "state.safetensors") for each in (whole, halves))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def _slower(case, name):
    return {each: 2.0 if each == name else 3.0 if each == "tiles" else 1.0 for each in candidate_kernels(case)}


def test_wishes_on_the_command_line(tmp_path, make_folder, capfd):
    data = make_folder(tmp_path / "shapes")
    arguments = ["train", str(data), "--out", str(tmp_path / "run"), "--model", "nano8", "--epochs", "1"]
    assert vitrail.cli.run([*arguments, "--kernels.global-attention", "flash"]) == 1
    assert "unknown kernels.global_attention 'flash'" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
    assert vitrail.cli.run([*arguments, "--kernels.global-attention", "matmul", "--model.depth", "1"]) == 0
    run, config = open_run(tmp_path / "run")
    assert config.kernels.global_attention == "matmul"
    assert run.info()["kernels"] == {}


def test_doctor_says_what_the_machine_can_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path))
    out = tmp_path / "doctor.json"
    assert vitrail.cli.run(["doctor", "nano4", "ti16-local7", "--out", str(out)]) == 0
    printed = capfd.readouterr().out
    findings = json.loads(out.read_text())
    assert {each["topic"] for each in findings} >= {
        "machine",
        "GPU",
        "numbers",
        "compile",
        "images",
        "packages",
        "attention",
    }
    lines = {each["name"]: each["value"] for each in findings}
    assert "ms" in lines["nano4: cpu float32 training, 65 tokens of 32"]
    assert "tiles" in lines["ti16-local7: cpu float32 training, 785 tokens of 64, window 7 on 28x28"]
    assert str(torch.__version__) == lines["torch"] or lines["torch"] in str(torch.__version__)
    assert all(finding["value"] in printed for finding in findings)
    assert cache_file() == Path(tmp_path) / "kernels.json"
    assert len(json.loads(cache_file().read_text())[machine_key()]) >= 6
    assert vitrail.cli.run(["doctor", "nan4"]) == 1
    assert "did you mean 'nano'" in capfd.readouterr().err


def test_doctor_says_that_nothing_can_be_cached(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("vitrail.doctor._number_formats", lambda device: [])
    monkeypatch.setattr(autotune, "measure", lambda case: dict.fromkeys(candidate_kernels(case), 1.0))
    assert vitrail.cli.run(["doctor", "nano4"]) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "cached in nothing" in printed
    assert "cannot be written, so every run measures again; set VITRAIL_CACHE to a folder" in printed
    assert "processor time of one thread" in printed


def test_a_window_over_the_whole_grid_is_told(tmp_path, make_folder, capfd):
    data = make_folder(tmp_path / "shapes")
    arguments = [
        "train",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--model",
        "nano8",
        "--epochs",
        "1",
        "--model.depth",
        "1",
    ]
    local = ["--model.attention", "local", "--model.window"]
    remark = "covers the whole grid of 2×2 patches: local attention is global attention at 16 px"
    assert vitrail.cli.run([*arguments, *local, "31"]) == 0
    assert remark in " ".join(capfd.readouterr().out.split())
    for name, is_reported in (("nano8-local31", True), ("nano8-local3", False), ("nano8", False)):
        assert vitrail.cli.run(["models", name]) == 0
        remark = "window 31 covers the whole grid of 8×8 patches: local attention is global attention at 64 px"
        assert (remark in " ".join(capfd.readouterr().out.split())) == is_reported


def test_a_variant_with_two_windows_names_both():
    with pytest.raises(ValueError, match="names its attention twice: 'local3' and 'local5'"):
        variant_config("nano2-local3-local5")
