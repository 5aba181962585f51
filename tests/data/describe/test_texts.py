"""Files of texts: whole after a cut, alone with a lock, put together from parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.data.describe.outcomes import PROMPT, Outcome, Sampling, Task, judge
from lib.data.describe.run import describe_images, parse_part
from lib.data.describe.texts import TextFile, described, part_file, read_records
from lib.errors import InputError

TASKS = [Task(str(number), f"{number}.jpg", Path(f"{number}.jpg")) for number in range(7)]


class Scripted:
    """A backend that answers from a function of the task."""

    name = "scripted"

    def __init__(self, answer=lambda task: Outcome(text=f"about {task.image_id}")):
        self.answer, self.asked = answer, []

    def describe(self, tasks, emit):
        for task in tasks:
            self.asked.append(task.image_id)
            emit(task, self.answer(task))


def describe(path, backend, tasks=TASKS, **how):
    return describe_images(tasks, path, lambda: backend, Sampling(), **how)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_what_wrote_it_and_nothing_is_asked_twice(tmp_path):
    path = tmp_path / "a_train.jsonl"
    assert describe(path, Scripted()).written == 7
    assert lines(path)[2] == {
        "image_id": "2",
        "file_name": "2.jpg",
        "text": "about 2",
        "model": "scripted",
        "prompt_sha": Sampling().prompt_sha,
    }
    assert Sampling(prompt="other").prompt_sha != Sampling(prompt=PROMPT).prompt_sha

    def never():
        raise AssertionError("a model was loaded for nothing")

    tally = describe_images(TASKS, path, never, Sampling())
    assert (tally.known, tally.written) == (7, 0)


@pytest.mark.parametrize("rest", ['{"image_id": "1", "te', "x" * 10000, '{"a": 1}'])
def test_a_last_line_without_end_is_cut_off_and_asked_again(tmp_path, rest):
    path = tmp_path / "a.jsonl"
    first = json.dumps({"image_id": "0", "text": "zero"})
    path.write_text(first + "\n" + rest)
    backend = Scripted()
    describe(path, backend)
    assert backend.asked == list("123456")
    assert path.read_text().splitlines()[0] == first
    assert [one["image_id"] for one in lines(path)] == list("0123456")


def test_a_file_that_is_nothing_but_an_unfinished_line_is_emptied(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image_id"')
    assert describe(path, Scripted()).written == 7
    assert len(lines(path)) == 7


def test_failures_are_listed_and_tried_again(tmp_path):
    path = tmp_path / "a.jsonl"
    odd = Scripted(
        lambda task: Outcome(reason="refused: no") if task.image_id in "135" else Outcome(text="t")
    )
    tally = describe(path, odd)
    assert tally.failed == {f"{n}.jpg": "refused: no" for n in (1, 3, 5)}
    listed = lines(tmp_path / "a.failed.jsonl")
    assert [one["file_name"] for one in listed] == ["1.jpg", "3.jpg", "5.jpg"]
    backend = Scripted()
    assert describe(path, backend).written == 3
    assert backend.asked == ["1", "3", "5"]
    assert not (tmp_path / "a.failed.jsonl").exists()


def test_a_model_that_is_gone_stops_the_call_and_a_refusing_one_does_not(tmp_path):
    many = [Task(str(n), f"{n}.jpg", Path(f"{n}.jpg")) for n in range(100)]
    gone = Scripted(lambda task: Outcome(reason="no answer", broken=int(task.image_id) >= 10))
    tally = describe(tmp_path / "a.jsonl", gone, many)
    assert len(gone.asked) == 30
    assert "20 images in a row got no answer (no answer)" in tally.stopped
    refusing = Scripted(lambda task: Outcome(reason="refused"))
    assert describe(tmp_path / "b.jsonl", refusing, many).stopped is None
    assert len(refusing.asked) == 100
    assert not (tmp_path / "b.jsonl").exists()  # no empty file that would look like dense texts


def test_parts_share_the_images_and_the_last_puts_them_together(tmp_path):
    path = tmp_path / "a_train.jsonl"
    path.write_text(json.dumps({"image_id": "4", "text": "old"}) + "\n")
    asked = []
    for number in (2, 3, 1):
        backend = Scripted()
        tally = describe(path, backend, part=(number, 3))
        asked.append(backend.asked)
        assert tally.parts_missing == (number != 1)
    assert asked == [["1"], ["2", "5"], ["0", "3", "6"]]
    assert [one["image_id"] for one in lines(path)] == list("0123456")
    assert lines(path)[4]["text"] == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a_train.jsonl"]


def test_a_call_without_part_does_what_the_parts_left(tmp_path):
    path = tmp_path / "a.jsonl"
    describe(path, Scripted(), part=(1, 2))
    assert part_file(path, 1, 2).exists()
    backend = Scripted()
    tally = describe(path, backend)
    assert backend.asked == ["1", "3", "5"]
    assert (tally.file, len(lines(path))) == (path, 7)
    assert [one.name for one in tmp_path.iterdir()] == ["a.jsonl"]


def test_parts_that_cover_all_become_the_file_though_nothing_is_left_to_ask(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [json.dumps({"image_id": str(n), "text": f"t{n}"}) for n in range(7)]
    part_file(path, 1, 1).write_text("\n".join(records) + "\n")
    assert describe(path, Scripted()).written == 0
    assert len(lines(path)) == 7


def test_a_limit_leaves_the_rest_for_later(tmp_path):
    path = tmp_path / "a.jsonl"
    assert describe(path, Scripted(), limit=2).written == 2
    assert describe(path, Scripted()).written == 5


@pytest.mark.parametrize("text", ["0/2", "3/2", "a/b", "1", "1/0", "-1/2"])
def test_wrong_parts_are_refused(text):
    with pytest.raises(InputError, match="--part"):
        parse_part(text)


def test_two_calls_at_once_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    with TextFile(path), pytest.raises(InputError, match=r"another tools.describe.*--part 1/2"):
        TextFile(path)


def test_texts_without_names_count_by_number_or_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 7)
    assert len(described(path, TASKS)) == 7
    path.write_text('{"text": "a"}\n' * 5)
    with pytest.raises(InputError, match="5 texts for 7 images"):
        described(path, TASKS)
    path.write_text('{"text": "a", "file_name": "3.jpg"}\n')
    assert described(path, TASKS) == {"3"}
    path.write_text('{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"a.jsonl:2: not a JSON line with a text"):
        read_records(path)


@pytest.mark.parametrize(
    "text",
    ["", "  \n", None, "I'm sorry, but I can't help.", "I cannot describe people.", "Sorry, no.",
     "As an AI language model, I", "Unable to view the image.", "I’m unable to see it."],
)  # fmt: skip
def test_refusals_and_empty_texts_are_failures(text):
    assert judge(text).text is None
    assert judge(text).reason


@pytest.mark.parametrize("text", ["A sorry dog.", "I see a man who can't swim.", " The image. "])
def test_texts_are_texts(text):
    assert judge(text).text == text.strip()
    assert judge("A dog", refusal="policy").text is None
