"""The benchmark of searching: made indices hold what they say, its two commands run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lib.errors import InputError
from lib.retrieval.search import Searcher
from lib.retrieval.shortlist import saved_shortlist
from tools.benchmark import made_index, search
from tools.benchmark.__main__ import main, parser
from tools.benchmark.made_index import CPU, Made, forget_files, make_index

pytest.importorskip("faiss")
SMALL = ["--encoders", "tiny", "--embed_size", "16", "--queries", "2"]


@pytest.fixture
def few(monkeypatch):
    """Shards of eight pictures, of which sixteen are made."""
    monkeypatch.setattr(made_index, "SHARD_PICTURES", 8)
    monkeypatch.setattr(made_index, "DISTINCT", 16)


def made_searcher(folder, entries: int) -> tuple[Made, Searcher]:
    made = Made("laps", "float16", entries, "tiny", 16)
    model = made.model()
    index = make_index(folder, made, model)
    return made, Searcher(model, index, saved_shortlist(index), made.blank(), CPU)


def test_entries_beyond_the_made_ones_share_their_records(few, tmp_path):
    made, searcher = made_searcher(tmp_path / "index", 37)
    index = searcher.index
    assert len(index) == 37
    scores = searcher.exact(np.arange(37), searcher.encode_text(made.caption(0))[0])
    assert len(set(scores[:16].tolist())) == 16
    np.testing.assert_array_equal(scores[16:32], scores[:16])
    np.testing.assert_array_equal(scores[32:], scores[:5])
    assert len(np.unique(index.vectors, axis=0)) == 37
    disk = [(index.folder / "shards" / one / "records.npy").stat() for one in index.shards]
    assert len({one.st_ino for one in disk}) == 2
    assert forget_files(index) in (True, False)
    again = searcher.exact(np.arange(37), searcher.encode_text(made.caption(0))[0])
    np.testing.assert_array_equal(again, scores)


def test_made_captions_and_pictures_have_topics():
    made = Made("laps", "float16", 40, "tiny", 512)
    own = torch.randint(made_index.TOPICS, (2,), generator=made.generator(2, 0))
    near = (made.words(0, 50) @ made.topics().T).mean(0).topk(2).indices
    assert set(near.tolist()) == set(own.tolist())
    own = torch.randint(made_index.TOPICS, (3, 4), generator=made.generator(1, 8))
    near = (made.images(8, 3, 196, True).local @ made.topics().T).mean(1).topk(4).indices
    assert all(set(a) == set(b) for a, b in zip(near.tolist(), own.tolist(), strict=True))


def test_search_command(few, monkeypatch, tmp_path):
    monkeypatch.setattr(search, "SHORTLIST", 8)
    monkeypatch.setattr(search, "BARS", {20: {"seconds": 60.0}})
    path = tmp_path / "rows.json"
    flags = ["--entries", "12,20", "--kinds", "flat,hnsw", "--memory", "0", "--json", str(path)]
    assert main(["search", *SMALL, *flags]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        f"laps {entries} {store} {kind}"
        for entries in (12, 20)
        for store in ("float16", "int8")
        for kind in ("flat", "hnsw")
    ]
    assert all(row["cpu"] > 0 and 0 < row["wall"] <= row["worst"] for row in rows)
    assert all(0 <= row["kept"] <= 1 and sum(row["parts"].values()) > 0 for row in rows)
    assert [row.get("met") for row in rows] == [None] * 4 + [True] * 4
    assert "the shortlist kept" in rows[-1]["note"]


def test_photos_command(photos, seps_checkpoint, tmp_path):
    path, captions = tmp_path / "rows.json", tmp_path / "captions.txt"
    captions.write_text("a red star\na blue ring\n")
    flags = ["--folder", str(photos), "--checkpoint", str(seps_checkpoint), "--workers", "0"]
    rest = ["--captions", str(captions), "--batch_size", "5", "--json", str(path)]
    assert main(["photos", *flags, *rest]) == 0
    indexing, query = json.loads(path.read_text())["rows"]
    assert indexing["name"] == "index 12 photos"
    assert indexing["ratio"] == pytest.approx(indexing["ours"] / indexing["loop"])
    assert indexing["bar"] == {"ratio": 0.9}
    assert query["name"] == "query over 12 photos"
    assert query["kept"] == 1  # fewer pictures than a shortlist has
    assert main(["photos", *flags, "--captions", str(tmp_path / "none.txt")]) == 2


def test_photos_of_a_checkpoint_that_reads_dense_texts(photos, make_checkpoint, tmp_path, capsys):
    captions = tmp_path / "captions.txt"
    captions.write_text("a red star\n")
    flags = ["--folder", str(photos), "--checkpoint", str(make_checkpoint("seps"))]
    assert main(["photos", *flags, "--workers", "0", "--captions", str(captions)]) == 0
    assert "going on as --dense_side none" in capsys.readouterr().err


def test_what_is_not_measured_is_not_taken_for_granted(monkeypatch, capsys):
    for command in ("search", "epoch", "scale"):
        assert main([command, "--method", "laps,seps"]) == 2
        assert "laps,seps: one at a time" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    asked = parser(["search"]).parse_args(["search", "--device", "cuda"])
    with pytest.raises(InputError, match="searched on the CPU"):
        search.run(asked)
