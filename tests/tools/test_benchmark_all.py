"""`tools.benchmark all` and `epoch`: the budget, what fails, the plan, the Markdown, the parts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lib.model.precision import autocast_for
from tests.test_imports import ROOT
from tools.benchmark import budget, epoch, report, whole
from tools.benchmark.__main__ import main
from tools.benchmark.budget import OutOfTime, Planned, stopped_after, within
from tools.benchmark.machine import circumstances, driver_version

ARGS = SimpleNamespace(device="cpu", seed=0, repeats=1)


def planned(name: str, measure, kind: str = "k", guess: float = 0.0, bar=None) -> Planned:
    return Planned(name, kind, measure, guess, bar or {})


def rows_of(name: str, **more) -> list[dict]:
    return [{"name": name, "ours": 2.0, "loop": 1.0, **more}]


def fails(error: Exception):
    def measure():
        raise error

    return measure


# --- the budget ----------------------------------------------------------------------------------


def test_what_fails_is_a_row_with_its_reason_and_the_rest_goes_on():
    errors = [
        RuntimeError("ptxas fatal: no such target\nmore"),
        torch.OutOfMemoryError("Tried to allocate 9 GiB"),
        RuntimeError("CUDA error: out of memory"),
    ]
    plan = [planned(f"bad {n}", fails(one), bar={"ratio": 2}) for n, one in enumerate(errors)]
    rows = list(within([*plan, planned("good", lambda: rows_of("good"))], 60))
    assert [row["name"] for row in rows] == ["bad 0", "bad 1", "bad 2", "good"]
    assert [row.get("failed") for row in rows] == [
        "ptxas fatal: no such target",
        "out of memory: Tried to allocate 9 GiB",
        "out of memory: CUDA error: out of memory",
        None,
    ]
    assert "RuntimeError: ptxas fatal" in rows[0]["fault"]
    assert rows[0]["met"] is None


def test_what_does_not_fit_is_named_and_shorter_work_goes_on(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def taking(name: str, seconds: float, kind: str, guess: float = 0.0) -> Planned:
        def measure():
            now[0] += seconds
            return rows_of(name)

        return planned(name, measure, kind, guess)

    plan = [
        taking("first", 30, "a", guess=50),
        taking("second", 10, "a"),  # as long as the first would still fit
        taking("third", 40, "b"),
        taking("never", 40, "b"),
        taking("guessed", 1, "c", guess=21),
        taking("short", 10, "a"),
    ]
    rows = list(within(plan, 101))
    assert [row["name"] for row in rows if "ours" in row] == ["first", "second", "third", "short"]
    assert rows[3]["left_out"] == "20 s were left, and it takes about 40"
    assert rows[4]["name"] == "guessed"


def test_the_end_of_the_budget_stops_what_is_under_way():
    def swallows():
        try:
            time.sleep(30)
        except Exception:  # as the fall-back of a kernel does
            return rows_of("kept on")

    started = time.monotonic()
    (row,) = within([planned("long", swallows)], 1.3)
    assert time.monotonic() - started < 5
    assert "the budget was spent" in row["failed"]


def overtaken() -> None:
    with stopped_after(0.4):
        with stopped_after(20):
            pass
        time.sleep(5)


def test_a_timer_of_others_goes_on():
    with pytest.raises(OutOfTime):
        overtaken()


# --- the plan ------------------------------------------------------------------------------------


def test_a_gpu_is_asked_for_every_bar_first():
    plan = whole.plan(ARGS, whole.SIZES["full"], judged=True)
    assert [(one.name, one.bar) for one in plan[:5]] == [
        ("laps eval ViT-224 real 256x1024 float32", {"ratio": 30}),
        ("laps scoring, ViT-224 real 5000x25000 float32", {"seconds": 10}),
        ("laps hardest ViT-224 real 64x64 bf16", {"ratio": 2, "gigabytes": 8}),
        ("laps sum ViT-224 real 64x64 bf16", {"ratio": 2, "gigabytes": 8}),
        ("laps whole step hardest batch 64 bf16", {"ratio": 2, "gigabytes": 8}),
    ]
    assert all(not one.bar for one in plan[5:])
    assert all(one.guess > 0 for one in plan)
    names = [one.name for one in plan]
    assert len(names) == len(set(names))
    grid = [name for name in names if " real " in name and "scoring" not in name]
    assert len(grid) == 3 * 3 * 4 * 3
    unjudged = whole.plan(ARGS, whole.SIZES["small"], judged=False)
    assert len(unjudged) < len(plan)
    assert all(not one.bar for one in unjudged)


def test_the_official_way_is_measured_alone_where_it_runs_out_of_memory(monkeypatch):
    calls = []

    def measure(case, args, bar, with_loop=True):
        calls.append(with_loop)
        if with_loop:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"name": "x", "ours": 1.0}

    monkeypatch.setattr(whole, "measure_case", measure)
    one = whole.plan(ARGS, whole.SIZES["small"], judged=False)[0]
    (row,) = one.measure()
    assert calls == [True, False]
    assert row["name"] == one.name


def test_one_call_measures_and_tells(tmp_path, capsys, monkeypatch):
    tiny = whole.Sizes(4, 6, 4, 4, 6, (9,), 16, (6, 12), "tiny", "8,16", (1, 64))
    monkeypatch.setitem(whole.SIZES, "small", tiny)
    kept = whole.plan

    def few(*args, **more):
        plan = kept(*args, **more)
        bad = planned("bad row", fails(RuntimeError("no such thing")), bar={"seconds": 10})
        return [*plan[:3], bad, *plan[-3:], planned("never", lambda: [], "never", guess=1e9)]

    monkeypatch.setattr(whole, "plan", few)
    path = tmp_path / "rows.json"
    assert main(["all", "--repeats", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[:2] == [
        "laps eval 9 patches real 4x6 float32",
        "laps scoring, 9 patches real 6x12 float32",
    ]
    told = capsys.readouterr().out
    assert "| laps eval 9 patches real 4x6 float32 |" in told
    assert "- bad row: failed, no such thing" in told
    assert "Left out, as the time did not suffice: never." in told
    assert "- bad row: <=10s not measured (no such thing)" in told
    assert found["versions"]["torch"].split("+")[0] in told
    assert "- step growth: time ~ n^" in told


def test_no_budget_is_refused(capsys):
    assert main(["all", "--budget", "0"]) == 2
    assert "--budget 0.0: give a number above 0" in capsys.readouterr().err


# --- the report ----------------------------------------------------------------------------------


def test_markdown_and_verdicts():
    met = report.judge({"name": "a", "ours": 60.0, "loop": 2.0, "unit": "pairs/s"}, {"ratio": 30})
    missed = report.judge({"name": "b", "ours": 1.0, "seconds": 12.0}, {"seconds": 10})
    left = {"name": "c", "left_out": "why", "bar": {"seconds": 10}, "met": None}
    lines = report.markdown([met, missed, left])
    assert lines[0] == "| row | official way | ours | unit | ratio | bar |"
    assert lines[1] == "|---|---:|---:|---:|---:|---:|"
    assert lines[2] == "| a | 2.00 | 60.0 | pairs/s | 30.0x | >=30x met |"
    assert lines[-1] == "Left out, as the time did not suffice: c."
    assert report.verdicts([met, missed, left]) == [
        "a: >=30x met (30.0)",
        "b: <=10s MISSED (12.0)",
        "c: <=10s not measured (why)",
    ]


def test_the_machine_is_told_without_a_gpu_too(monkeypatch, tmp_path):
    found = circumstances(torch.device("cpu"))
    assert found["versions"]["transformers"]
    assert "driver" not in found
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n")
    monkeypatch.setattr("tools.benchmark.machine.DRIVER", told)
    assert driver_version() == "570.86.15"
    monkeypatch.setattr("tools.benchmark.machine.DRIVER", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version() is None


# --- the epoch -----------------------------------------------------------------------------------

TINY = (
    "--patches 9 --image_width 8 --text_layers 1 --text_width 64 --batch 3 --embed_size 16 "
    "--encoded 3 --scored 7 --repeats 1 --roofline 0"
).split()


@pytest.mark.parametrize("method", ["laps", "vse"])
def test_the_parts_of_a_step_are_the_step(method):
    case = epoch.EpochCase(method, "hardest", 9, 8, 1, 64, 4, embed_size=16)
    model, batch = case.model(), case.inputs()
    model.text_encoder.eval()  # no dropout
    watch = epoch.Stopwatch(torch.device("cpu"), "cpu")
    epoch.backward(model, batch, autocast_for("off", torch.device("cpu")), watch)
    assert set(watch.seconds) == {epoch.TEXT, epoch.HEAD, epoch.SIMILARITY}
    found = {name: one.grad for name, one in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    losses = model.training_losses(batch.pixels, batch.ids, batch.lengths, batch.image_ids)
    losses["loss"].backward()
    for name, one in model.named_parameters():
        assert (one.grad is None) == (found[name] is None), name
        if one.grad is not None:
            torch.testing.assert_close(found[name], one.grad, rtol=1e-5, atol=1e-6)
    assert not any(one.requires_grad for one in model.image_encoder.backbone.parameters())


@pytest.mark.parametrize("method", epoch.METHODS)
def test_epoch_command(method, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert main(["epoch", "--method", method, *TINY, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    parts = [row["name"].rsplit(": ", 1)[1] for row in rows]
    assert parts == [
        *("text encoder", "image head", "similarity", "optimizer"),
        *("text encoder", "image head", "similarity"),
        *("text encoder", "image head", "similarity", "optimizer"),
    ]
    assert sum(row["part"] for row in rows) == pytest.approx(3)
    for number in range(3):
        assert rows[7 + number]["ours"] == pytest.approx(
            rows[number]["ours"] + rows[4 + number]["ours"]
        )
    judged = [row for row in rows if "met" in row]
    assert [row["of_text"] for row in judged] == [
        pytest.approx(rows[2]["ours"] / rows[0]["ours"]),
        pytest.approx(rows[6]["ours"] / rows[4]["ours"]),
        pytest.approx(rows[9]["ours"] / rows[7]["ours"]),
    ]
    assert all(row["met"] == (row["of_text"] <= 1) for row in judged)
    assert "the rest by proportion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--patches", "10"], "--patches 10: give a square number"),
        (["--batch", "1"], "--batch 1: a single pair has no negatives"),
        (["--method", "hrem"], "--method hrem: 'hrem' is not one of laps"),
    ],
)
def test_epochs_wrong_flags(flags, told, capsys):
    assert main(["epoch", *flags]) == 2
    assert told in capsys.readouterr().err


# --- missing libraries ---------------------------------------------------------------------------

WITHOUT = """
import sys
for name in "cv2 torchvision PIL tensorboard matplotlib triton".split():
    sys.modules[name] = None
from tools.benchmark.__main__ import main
print(main(["all", "--budget", "1"]), main(["input"]))
"""


def test_a_machine_that_has_torch_and_transformers_alone_measures():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 2"
    assert "Left out, as the time did not suffice: laps eval" in done.stdout
    assert "error: tools.benchmark input needs cv2, which is not installed" in done.stderr
