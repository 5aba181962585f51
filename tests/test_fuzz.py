"""Thousands of wrong flags, files and checkpoints: one sentence and an exit code, no traceback."""

from __future__ import annotations

import copy
import json
import os
import string
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval as evaluation
import train
from arguments import eval_parser, parse_train, train_parser
from lib.checkpoints.checkpoint import load_model, model_payload, save_payload
from lib.data.splits import load_split
from lib.errors import InputError
from lib.files import write_text_whole
from lib.model.backbones import load_backbone
from lib.retrieval.result_files import write_results
from tests.conftest import write_layout
from tests.helpers import tiny_args, tiny_model
from vocab import load_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),
]
SHARE = float(os.environ.get("FUZZ_SHARE", "1"))  # of the inputs, for a quick look


def scaled(count: int) -> int:
    return max(1, int(count * SHARE))


QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}

VALUES = st.one_of(
    st.integers(-3, 3).map(str),
    st.sampled_from(
        "nan inf -inf 1e400 -1e-400 99999999999999999999999 2147483648 0x10 1_0 ٣ true None [] {} "
        ". .. / ~ ./x --x = , 1,2 1,,2 -1,0 tiny vit swin seps f30k coco scenes".split()
    ),
    st.just(""),
    st.text(string.printable + "é\u2028\udcff", max_size=12),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
CONTENT = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"[" * 20_000,
            b'{"a":' * 20_000,
            b"1" * 5000,
            b"\xff\xfe{}",
            b"PK\x03\x04",
            b"\x80\x04\x95.",
            b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}",
        ]
    ),
)


def told(call, *args) -> None:
    """Run; an InputError of one line is how it may end beside success."""
    sentence = "fine"
    try:
        call(*args)
    except InputError as error:
        sentence = str(error)
    assert len(sentence.strip().splitlines()) == 1, sentence


def flag_lists(parser) -> st.SearchStrategy[list[str]]:
    names = sorted(one for one in parser._option_string_actions if one not in ("-h", "--help"))
    names = [one for one in names if one not in ("--config", "--resume")]
    word = st.tuples(st.sampled_from(names), VALUES).map(lambda pair: f"{pair[0]}={pair[1]}")
    return st.lists(word | VALUES, max_size=4)


@settings(max_examples=scaled(1500), **QUIET)
@given(argv=flag_lists(train_parser()))
def test_flags_of_training(argv):
    told(parse_train, argv)


@pytest.fixture(scope="module")
def empty_place(tmp_path_factory):
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    yield
    os.chdir(before)


@settings(max_examples=scaled(400), **QUIET)
@given(argv=flag_lists(eval_parser()))
def test_programs_where_there_is_nothing(empty_place, argv):
    """No data and no run is here, so that each call ends before any work: with code 2."""
    argv = [one for one in argv if not one.startswith(("--multi_gpu", "--dataset"))]
    assert evaluation.main([*argv, "--dataset=f30k"]) == 2


@settings(max_examples=scaled(300), **QUIET)
@given(argv=flag_lists(train_parser()))
def test_trainings_where_there_is_nothing(empty_place, argv):
    kept = ("--multi_gpu", "--dataset", "--logger_name", "--compile", "--method", "--data_path")
    argv = [one for one in argv if not one.startswith(kept)]
    assert train.main([*argv, "--dataset=f30k", "--data_path=absent", "--logger_name=run"]) == 2


# --- files ---------------------------------------------------------------------------------------

FILES = (
    "train_caps.txt train_ids.txt f30k_train.jsonl id_mapping.json test_caps.txt test_ids.txt"
).split()


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    write_layout(root, "f30k", images=3)
    return root


@settings(max_examples=scaled(700), **QUIET)
@given(name=st.sampled_from(FILES), content=CONTENT, lines=st.lists(CONTENT, max_size=3))
def test_files_of_a_data_set(layout, name, content, lines):
    path = layout / "f30k" / name
    before = path.read_bytes()
    try:
        path.write_bytes(b"\n".join([content, *lines]))
        told(load_split, layout, "f30k", "train" if "t_" not in name else "test", None, True)
        told(load_split, layout, "f30k", "train", None, True)
    finally:
        path.write_bytes(before)


@settings(max_examples=scaled(300), **QUIET)
@given(name=st.sampled_from(["vocab.txt", "tokenizer.json"]), content=CONTENT)
def test_vocabularies(tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("vocabulary", numbered=True)
    (folder / name).write_bytes(content)
    told(load_tokenizer, str(folder))


@settings(max_examples=scaled(300), **QUIET)
@given(
    name=st.sampled_from(["config.json", "model.safetensors", "pytorch_model.bin"]), content=CONTENT
)
def test_folders_of_backbones(backbones, tmp_path_factory, name, content):
    folder = tmp_path_factory.mktemp("backbone", numbered=True)
    (folder / "config.json").write_bytes((Path(backbones["vit"]) / "config.json").read_bytes())
    (folder / name).write_bytes(content)
    told(load_backbone, str(folder), "--vit_type")


CONFIG_KEYS = (
    "model_type hidden_size num_hidden_layers num_attention_heads intermediate_size image_size "
    "patch_size hidden_act layer_norm_eps architectures"
).split()


@settings(max_examples=scaled(400), **QUIET)
@given(changes=st.dictionaries(st.sampled_from(CONFIG_KEYS), JSON | VALUES, max_size=3))
def test_configs_with_other_values(backbones, tmp_path_factory, changes):
    folder = tmp_path_factory.mktemp("config", numbered=True)
    config = json.loads((Path(backbones["vit"]) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    told(load_backbone, str(folder), "--vit_type")


@settings(max_examples=scaled(300), **QUIET)
@given(content=CONTENT, values=st.dictionaries(st.text(max_size=5), st.integers()))
def test_results_and_arguments_of_a_run(tmp_path_factory, content, values):
    folder = tmp_path_factory.mktemp("run", numbered=True)
    (folder / "results.json").write_bytes(content)
    write_results(folder / "results.json", values)
    (folder / "args.json").write_bytes(content)
    told(parse_train, [], folder / "args.json")


@settings(max_examples=scaled(400), **QUIET)
@given(changes=st.dictionaries(st.sampled_from(sorted(vars(parse_train([])))), JSON, max_size=3))
def test_arguments_of_other_kinds(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("args", numbered=True) / "args.json"
    write_text_whole(path, json.dumps({**vars(parse_train([])), **changes}))
    told(parse_train, [], path)


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def payload() -> dict:
    args = tiny_args("laps")
    return model_payload(tiny_model("laps"), args, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])


PLACES = st.one_of(
    st.tuples(st.sampled_from("format version method args image_config text_config".split())),
    st.tuples(st.sampled_from(["vocabulary", "model", "hard_negatives"])),
    st.tuples(st.just("args"), st.sampled_from(sorted(vars(tiny_args("laps"))))),
    st.tuples(st.just("image_config"), st.sampled_from(CONFIG_KEYS)),
    st.tuples(
        st.just("text_config"),
        st.sampled_from("model_type hidden_size vocab_size max_position_embeddings".split()),
    ),
    st.tuples(st.just("model"), st.integers(0, 30)),
)
MISSING = "left out"
TENSORS = st.sampled_from(
    [torch.zeros(2), torch.zeros(0), torch.zeros(3, 4, dtype=torch.int64), torch.tensor(True)]
)


@settings(max_examples=scaled(900), **QUIET)
@given(
    changes=st.lists(
        st.tuples(PLACES, JSON | VALUES | TENSORS | st.just(MISSING)), min_size=1, max_size=2
    )
)
def test_checkpoints_made_by_hand(payload, tmp_path_factory, changes):
    changed = {key: copy.copy(value) for key, value in payload.items()}
    for place, value in changes:
        whole, key = changed, place[0]
        if len(place) == 2:
            whole, key = changed.get(place[0]), place[1]
        if not isinstance(whole, dict):
            continue
        if isinstance(key, int):
            key = sorted(map(str, whole))[key % len(whole)] if whole else "x"
        if isinstance(value, str) and value == MISSING:
            whole.pop(key, None)
        else:
            whole[key] = value
    path = tmp_path_factory.mktemp("made", numbered=True) / "model.pth"
    save_payload(path, changed)
    told(load_model, path)
    path.unlink()


@settings(max_examples=scaled(300), **QUIET)
@given(content=CONTENT, suffix=st.sampled_from([".pth", ".safetensors"]))
def test_checkpoints_that_are_none(tmp_path_factory, content, suffix):
    path = tmp_path_factory.mktemp("none", numbered=True) / f"model{suffix}"
    path.write_bytes(content)
    told(load_model, path)
