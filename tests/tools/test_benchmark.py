"""The benchmark: its loop computes our numbers, its commands run, its lengths are repeatable."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.batch import Tokens
from lib.model import compiled
from tools.benchmark import cached, evaluate, measure, scale, similarity, step
from tools.benchmark.__main__ import main
from tools.benchmark.cases import Case, call_of, fewer_captions, least_work, pair_flops
from tools.benchmark.lengths import draw_lengths, histogram
from tools.benchmark.loop import LOOPS, PEERS
from tools.benchmark.measure import multiply_adds, peak_flops, rss_peak, seconds_of
from tools.benchmark.report import judge, page

SMALL = ["--patches", "9", "--embed_size", "16", "--batch", "3", "--repeats", "1"]
WITH_CLS, WITHOUT_CLS = 12, 49


def small_case(method: str = "laps", patches: int = WITH_CLS, **changes) -> Case:
    case = Case(method, "sum", patches, None, images=4, captions=5, embed_size=16)
    return replace(case, **changes)


def doubled(tokens: Tokens | None) -> Tokens | None:
    """The tokens in float64, with gradient where they had one."""
    if tokens is None:
        return None

    def wide(tensor):
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    cls = None if tokens.cls is None else wide(tokens.cls)
    return Tokens(wide(tokens.local), tokens.mask, cls, doubled(tokens.dense))


# --- the loop computes our numbers ---------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(LOOPS))
@pytest.mark.parametrize("patches", [WITH_CLS, WITHOUT_CLS])
def test_loop_gives_our_similarity(method, patches):
    case = small_case(method, patches)
    model, images, texts = case.model(), case.image_tokens(), case.text_tokens()
    assert (images.cls is None) == (patches == WITHOUT_CLS)
    ours, loop = model.similarity(images, texts), LOOPS[method](model, images, texts)
    assert loop.shape == (4, 5)
    torch.testing.assert_close(loop, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", sorted(LOOPS))
@pytest.mark.parametrize("patches", [WITH_CLS, WITHOUT_CLS])
@pytest.mark.parametrize("mode", ["hardest", "sum"])
def test_loop_gives_our_gradients(method, patches, mode):
    case = small_case(method, patches, mode=mode, captions=4)
    model = case.model().double()
    images, texts = doubled(case.image_tokens()), doubled(case.text_tokens())
    found = {}
    for way in ("loop", "ours"):
        loss = call_of(case, way, model, images, texts)()
        tokens = {"patches": images.local, "cls": images.cls, "words": texts.local}
        leaves = {**tokens, **dict(model.named_parameters())}
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}
        found[way] = {name: one.clone() for name, one in gradients.items() if one is not None}
    assert found["loop"].keys() == found["ours"].keys()
    assert len(found["loop"]) > 5
    for name, gradient in found["ours"].items():
        torch.testing.assert_close(found["loop"][name], gradient, rtol=1e-8, atol=1e-10)
    assert loss > 0


def test_fewer_captions_are_spread_over_lengths():
    texts = small_case(captions=40).text_tokens()
    some = fewer_captions(texts, 3).lengths.tolist()
    assert some == sorted(some)
    assert (some[0], some[-1]) == (int(texts.lengths.min()), int(texts.lengths.max()))
    assert len(fewer_captions(texts, 100)) == 40


# --- commands ------------------------------------------------------------------------------------


def test_similarity_command(tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--words", "real,4", "--mode", "eval,hardest", "--captions", "6"]
    rest = ["--loop_captions", "2", "--memory", "0", "--clock", "cpu", "--json", str(path)]
    assert main(["similarity", "--method", "laps", *SMALL, *flags, *rest]) == 0
    found = json.loads(path.read_text())
    assert found["command"].startswith("python -m tools.benchmark similarity --method laps")
    assert {"machine", "date", "torch", "threads"} <= set(found)
    rows = found["rows"]
    assert [row["name"] for row in rows] == [
        "laps eval 9 patches real 3x6",
        "laps eval 9 patches 4 words 3x6",
        "laps hardest 9 patches real 3x3",
        "laps hardest 9 patches 4 words 3x3",
    ]
    assert [row["loop_pairs"] for row in rows] == [6, 6, 9, 9]
    assert {row["clock"] for row in rows} == {"cpu"}
    assert all(row["ours"] > 0 and row["loop"] > 0 and 0 < row["share"] < 1 for row in rows)
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["loop"]) for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith("laps eval 9 patches 4 words 3x6") for line in printed)
    assert max(map(len, printed[1:])) <= 110


def test_evaluation_command(tmp_path):
    path = tmp_path / "rows.json"
    flags = ["--patches", "9", "--embed_size", "16", "--images", "4", "--captions", "6"]
    rest = ["--encoded", "2", "--repeats", "1", "--method", "laps", "--json", str(path)]
    assert main(["evaluate", *flags, *rest]) == 0
    passes, scoring = json.loads(path.read_text())["rows"]
    assert (passes["loop"], passes["ours"], passes["met"]) == (10, 2, True)
    assert scoring["seconds"] == pytest.approx(125e6 / scoring["ours"])
    assert "from 24 and" in scoring["note"]


@pytest.mark.parametrize("method", sorted(LOOPS))
def test_field_evaluation_gives_our_matrix(method):
    case = step.StepCase(method, "sum", 3, encoders="tiny", embed_size=16)
    model = case.model().eval()
    images, captions = evaluate.split_inputs(case)
    ours = evaluate.our_matrix(model, images, captions)
    np.testing.assert_allclose(evaluate.field_matrix(model, images, captions), ours, atol=1e-5)


@pytest.mark.parametrize("method", sorted(LOOPS))
def test_both_steps_learn_the_same(method):
    case = step.StepCase(method, "hardest", 3, encoders="tiny", embed_size=16)
    model, batch = case.model(), case.inputs()
    ours, loop = step.our_loss(model, batch), step.loop_loss(model, batch)
    ratio = model.network.kept_share * sum(model.ratio_lambdas) - model.network.sparse_ratio
    constant = model.ratio_weight * ratio**2  # of hard top-k
    assert float((ours - loop).detach()) == pytest.approx(constant, abs=1e-4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step.step_of(case, "loop", model)()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_seps_is_measured_against_the_released_network():
    assert PEERS["seps"] == "seps_released"
    case = small_case("seps", mode="eval")
    images, texts = case.image_tokens(), case.text_tokens()
    assert texts.dense.local[0].equal(texts.dense.local[4])  # five captions of an image share one
    peer = case.model("loop")
    found = call_of(case, "loop", peer, images, texts)()
    torch.testing.assert_close(found, peer.similarity(images, texts), rtol=0, atol=1e-5)
    ours = call_of(case, "ours", case.model(), images, texts)()
    alone = case.model().similarity(images, Tokens(texts.local, texts.mask))
    torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)


def test_scale_command_fits_exponents(tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--images", "8,16", "--batches", "4,8", "--memory", "0", "--json", str(path)]
    assert main(["scale", *flags]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        *("evaluation 8", "evaluation 16", "evaluation growth"),
        *("epoch 8", "epoch 16", "epoch growth"),
        *("step 4", "step 8", "step growth"),
    ]
    assert "time ~ n^" in capsys.readouterr().out


def test_cached_command_compares_both_steps(tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--batches", "8,4", "--cached_batch", "2", "--embed_size", "16", "--memory", "0"]
    assert main(["cached", *flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == ["laps hardest batch 4", "laps hardest batch 8"]
    assert all(row["cached_ms"] > 0 and row["ordinary_ms"] > 0 for row in rows)
    assert [row["kept_bytes"]["matrix"] for row in rows] == [4 * 16, 4 * 64]
    assert "cached ms/pair" in capsys.readouterr().out


def test_an_ordinary_step_that_would_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(cached, "free_memory", lambda device: 100)
    case, cpu = cached.BatchCase("laps", "hardest", 8), torch.device("cpu")
    assert cached.ordinary_fits(case, None, cpu)
    smaller = {"batch": 4, "ordinary_ms": 1.0, "ordinary_memory": 24}
    assert cached.ordinary_fits(case, smaller, cpu)
    assert not cached.ordinary_fits(case, {**smaller, "ordinary_memory": 25}, cpu)
    assert not cached.ordinary_fits(case, {**smaller, "ordinary_memory": None}, cpu)
    assert not cached.ordinary_fits(case, {"batch": 4}, cpu)


def test_growth_is_judged_against_that_of_the_pairs():
    rows = [{"ours": 3.0, "ours_memory": 10}, {"ours": 12.0, "ours_memory": 20}]
    fine = scale.growth("step", [4, 8], rows, most=2)
    assert fine["exponents"] == {"time": pytest.approx(2), "memory": pytest.approx(1)}
    assert fine["met"]
    assert not scale.growth("epoch", [4, 8], rows, most=1)["met"]
    assert scale.exponent([4], [1.0]) is None


def test_step_command(tmp_path, capsys):
    path = tmp_path / "rows.json"
    flags = ["--encoders", "tiny", "--batch", "2", "--method", "laps", "--embed_size", "16"]
    assert main(["step", *flags, "--repeats", "1", "--memory", "0", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["unit"] == "steps/s"
    assert "random weights, the bar is for CUDA" in row["note"]
    assert "random weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["similarity", "--method", "vse"],
            "--method vse: 'vse' is not one of laps, seps, seps_released",
        ),
        (["similarity", "--patches", "0"], "--patches 0: give whole numbers of at least 1"),
        (["similarity", "--words", "real,x"], "--words x: give whole numbers"),
        (["similarity", "--repeats", "0"], "--repeats 0: give a whole number of at least 1"),
        (["evaluate", "--device", "tpu"], "--device tpu: give cpu, cuda or cuda:N"),
        (["step", "--json", "/nowhere/a.json"], "--json /nowhere/a.json: give a file in a folder"),
        (["lengths", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_wrong_flags_are_told_in_one_sentence(flags, told, capsys, monkeypatch):
    monkeypatch.setattr("tools.benchmark.lengths.load_tokenizer", lambda name: None)
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1


def test_lengths_command(tmp_path, capsys, monkeypatch):
    captions, dense = tmp_path / "caps.txt", tmp_path / "dense.jsonl"
    captions.write_text("a b c\na\n")
    dense.write_text('{"text": "a b c d e"}\n')
    words = SimpleNamespace(encode=lambda text, most: [0, *text.split(), 0])
    monkeypatch.setattr("tools.benchmark.lengths.load_tokenizer", lambda name: words)
    assert main(["lengths", str(captions), str(dense)]) == 0
    assert "mean length 5.0; counts from length 3 on: 1 0 1 0 1" in capsys.readouterr().out


# --- lengths, work, memory, verdicts -------------------------------------------------------------


def test_lengths_are_drawn_alike_from_what_was_counted():
    assert sum(histogram("caption").values()) == 30000
    assert sum(histogram("dense").values()) == 6000
    drawn = draw_lengths("caption", 4000, seed=3)
    assert drawn == draw_lengths("caption", 4000, seed=3) != draw_lengths("caption", 4000, seed=4)
    assert np.mean(drawn) == pytest.approx(14.17, abs=0.4)
    assert max(draw_lengths("dense", 50, seed=0)) == 90
    assert max(draw_lengths("dense", 50, seed=0, longest=1000)) > 90


def test_least_work_by_hand():
    # 10 patches: 5 kept, 2 aggregated, fused and [CLS]; 3 words, 4 channels
    direct, gram = 2 * 2 * 5 * 4 + 2 * 4 * 4 * 3, 2 * 10 * 4 * 3 + 2 * 5 * (5 + 2 * 3)
    assert pair_flops(10, 3, 4) == min(direct, gram) + 2 * 10 * 4
    case = small_case(patches=10, words=3, embed_size=4, images=8, captions=8)
    pair = pair_flops(10, 3, 4)
    assert least_work(replace(case, mode="eval"))[0] == pair * 64
    assert least_work(replace(case, mode="sum"))[0] == 3 * pair * 64
    assert least_work(replace(case, mode="hardest"))[0] == pair * (64 + 2 * 24)
    assert least_work(replace(case, mode="eval"))[1] == 4 * (8 * 10 + 8 * 3) * 4 + 4 * 64


def take_memory(mebibytes: int):
    """A call that holds so much for a moment, and a small one."""
    return (lambda: None), (lambda: torch.ones(mebibytes * 2**18).sum())


def test_the_cpu_clock_does_not_count_waiting():
    device = torch.device("cpu")
    assert seconds_of(lambda: time.sleep(0.2), device) >= 0.2
    assert seconds_of(lambda: time.sleep(0.2), device, "cpu") < 0.1


def test_peak_memory_is_that_of_the_call():
    found = rss_peak(take_memory, 64)
    if found is None:
        pytest.skip("no /proc here")
    assert 64 * 2**20 <= found < 96 * 2**20


def test_bars():
    row = {"name": "x", "ours": 60.0, "loop": 10.0, "ours_memory": 10, "loop_memory": 100}
    assert judge(row, {"ratio": 6, "memory": 1 / 10})["met"] is True
    assert judge(row, {"ratio": 6.1, "memory": 1 / 10})["met"] is False
    assert judge(row, {"ratio": 6, "memory": 1 / 11})["met"] is False
    assert judge(dict(row, loop_memory=None), {"ratio": 6, "memory": 1 / 10})["met"] is None
    assert judge(row, {"gigabytes": 1e-8})["met"] is True
    assert "met" not in judge(row, {})
    told = {"machine": "m", "torch": "t", "threads": 1, "date": "d"}
    assert "MISSED" in page({**told, "rows": [judge(row, {"ratio": 7})]})


@pytest.mark.skipif(not compiled.is_available(), reason="no C compiler here")
def test_the_peak_is_no_less_than_what_registers_reach(monkeypatch):
    cpu = torch.device("cpu")
    assert multiply_adds("cpu") > 1e9
    monkeypatch.setattr(measure, "multiply_adds", lambda clock: 1e15)
    monkeypatch.setattr(measure, "PATIENCE", 0)  # one small product will do
    assert peak_flops.__wrapped__(cpu, "off", "cpu") == 1e15
    assert peak_flops.__wrapped__(cpu, "bf16", "cpu") < 1e15  # other instructions
    monkeypatch.setenv("SEPS_NATIVE", "0")
    assert 1e9 < peak_flops.__wrapped__(cpu, "off", "cpu") < 1e15


def test_rows_with_a_bar_are_measured_by_default():
    args = SimpleNamespace(
        device="cpu", captions=None, full=False, embed_size=512, amp=None, seed=0
    )
    vars(args).update(dict.fromkeys(similarity.GRID))
    barred = [
        (case.method, case.mode, case.patches, case.words, "cpu")
        for case in similarity.chosen_cases(args)
        if similarity.bar_of(case, torch.device("cpu"))
    ]
    assert set(barred) == {key for key in similarity.BARS if key[4] == "cpu"}
    args.full = True
    assert len(similarity.chosen_cases(args)) == 3 * 3 * 3 * 4 * 3
