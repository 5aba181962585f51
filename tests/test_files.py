"""Files of another kind: one sentence each; destinations are checked before the work."""

from __future__ import annotations

import json
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lib import memory
from lib.errors import InputError, InputWarning, as_input_error
from lib.files import (
    check_destination,
    check_file,
    check_folder,
    load_json,
    load_object,
    read_json,
    read_text,
    temporary_beside,
    write_json,
    write_text_whole,
)
from lib.memory import check_fits, memory_bytes
from lib.model.encoders import warn_of_small_vocabulary
from lib.program import program, warnings_told
from lib.retrieval.result_files import save_matrix, write_results

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, r"no file .*x\.json; get it there"),
        (POINTER, r"x\.json: a Git LFS pointer, .* git lfs pull"),
        ("{", r"x\.json: not JSON"),
        ('{\n"a": ', r"x\.json:2: not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("1" * 5000, "not JSON that can be read"),
        ("[1]", "a JSON list where an object is meant"),
        (b"caf\xe9", r"x\.json:1: not UTF-8"),
    ],
)
def test_wrong_json_files_are_one_sentence(tmp_path, content, told):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=told):
        load_object(path, "get it there")
    assert read_json(path) == {}


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("\ufefftext")
    assert read_text(path) == "text"
    with pytest.raises(InputError, match="a folder, where a file is meant"):
        check_file(tmp_path)
    with pytest.raises(InputError, match=r"--x .*: a file, where a folder is meant"):
        check_folder(path, "--x")
    with pytest.raises(InputError, match="--x nowhere: no such folder"):
        check_folder("nowhere", "--x")
    with pytest.raises(InputError, match="can't be read"):
        load_json("a\0b")


def test_a_pointer_among_weights_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    check_folder(tmp_path, "--vit_type")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a Git LFS pointer"):
        check_folder(tmp_path, "--vit_type", weights=True)


def test_destinations_are_checked_and_left_as_they_were(tmp_path):
    check_destination(tmp_path / "new.npy", "--out")
    check_destination(tmp_path / "made" / "new.npy", "--out", make_folder=True)
    assert sorted(os.listdir(tmp_path)) == ["made"]
    for path, told in (
        (tmp_path, "a folder; name a file"),
        (tmp_path / "absent" / "x", "a folder that exists"),
        (tmp_path / ("x" * 300), "can't be written"),
        (f"{tmp_path}/a\0b", "can't be written"),
    ):
        with pytest.raises(InputError, match=f"--out .*{told}"):
            check_destination(path, "--out")


def test_a_damaged_results_file_is_kept_aside(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("[1, 2]")
    with pytest.warns(InputWarning, match=r"where an object is meant; kept as .*\.damaged"):
        write_results(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert (tmp_path / "results.json.damaged").read_text() == "[1, 2]"
    write_results(path, {"b": 2})
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}


def test_a_matrix_has_the_name_it_was_given(tmp_path):
    save_matrix(tmp_path / "matrix", np.eye(2))
    assert os.listdir(tmp_path) == ["matrix"]
    assert np.load(tmp_path / "matrix").tolist() == [[1, 0], [0, 1]]


def test_no_character_stops_a_file_or_a_program(tmp_path, capsys):
    write_text_whole(tmp_path / "a.txt", "a \udcff \u2026")
    assert (tmp_path / "a.txt").read_bytes() == b"a \\udcff \xe2\x80\xa6"

    @program
    def main(argv=None) -> int:
        print("said \udcff")
        return 0

    assert main() == 0
    assert capsys.readouterr().out == "said \\udcff\n"


def test_warnings_are_told_once_on_the_first_rank(capsys, monkeypatch):
    def warn() -> None:
        for _ in range(2):
            warnings.warn("3 of 4 are odd", InputWarning, stacklevel=1)

    with warnings_told():
        warn()
    assert capsys.readouterr().err == "warning: 3 of 4 are odd\n"
    said = []
    with warnings_told(said.append):
        warn()
    monkeypatch.setenv("RANK", "1")
    with warnings_told(said.append):
        warn()
    assert said == ["warning: 3 of 4 are odd"]


def test_foreign_errors_become_one_sentence():
    for error in (RecursionError("deep\nstack"), KeyError("x"), MemoryError()):
        with pytest.raises(InputError) as caught, as_input_error("x.pth: odd"):
            raise error
        assert str(caught.value).startswith("x.pth: odd (")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^mine$"), as_input_error("x.pth: odd"):
        raise InputError("mine")


def test_sizes_that_cannot_fit_name_their_flag(monkeypatch):
    monkeypatch.setattr(memory, "memory_bytes", lambda: 8_000_000_000)
    check_fits({"--a 1": 5e9, "--b 2": 2e9}, "it")
    with pytest.raises(InputError, match="--b 9: it takes at least 10 GB, and there are 8 GB"):
        check_fits({"--a 1": 4e9, "--b 9": 6e9}, "it")


def test_this_machine_has_memory():
    assert 2**28 < memory_bytes() < 2**50


def test_a_small_vocabulary_is_warned_of_with_counts():
    with pytest.warns(InputWarning, match="the vocabulary has 100 words, the encoder 30522"):
        warn_of_small_vocabulary(100, 30522, "--bert_path x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_small_vocabulary(30522, 30528, "--bert_path x")


def test_two_threads_write_one_file_at_a_time_and_neither_loses_its_own(tmp_path):
    """Each tidies up after itself alone: a name that both had was removed under the other."""
    path = tmp_path / "compare.json"
    with ThreadPoolExecutor(8) as threads:
        for one in [threads.submit(write_json, path, {"n": n}) for n in range(2000)]:
            one.result()
    assert read_json(path)["n"] in range(2000)
    assert list(tmp_path.iterdir()) == [path]


def test_processes_of_one_number_on_two_machines_write_beside_each_other(tmp_path, monkeypatch):
    here = temporary_beside(tmp_path / "results.json")
    monkeypatch.setattr(socket, "gethostname", lambda: "another-machine")
    there = temporary_beside(tmp_path / "results.json")
    assert here != there
    assert here.parent == there.parent == tmp_path
