"""What the search page answers, without a browser."""

from __future__ import annotations

import json

import pytest

from lib.retrieval.index import find_pictures
from tools import search
from tools.opened import open_searcher
from tools.serve import Page, parser

for needed in ("faiss", "matplotlib"):
    pytest.importorskip(needed)
TEXT = "a big red star"


@pytest.fixture
def page(photos, make_checkpoint, tmp_path) -> Page:
    """A page over an index with dense texts, a different one a picture."""
    checkpoint = make_checkpoint("seps", dense_side="image")
    colours = ("red", "blue", "green", "cyan", "pink", "orange", "yellow")
    lines = [
        json.dumps({"file_name": one, "text": f"a {colours[n % 7]} ring. " * (n + 1)})
        for n, one in enumerate(find_pictures(photos))
    ]
    dense = tmp_path / "dense.jsonl"
    dense.write_text("\n".join(lines))
    out = str(tmp_path / "index")
    flags = ["--checkpoint", str(checkpoint), "--workers", "0", "--batch_size", "5"]
    assert search.main(["index", str(photos), *flags, "--dense", str(dense), "--out", out]) == 0
    return Page(*open_searcher(parser().parse_args([out])))


def test_a_picture_is_explained_with_its_own_dense_text(page, monkeypatch):
    gallery, said, state, _, hint = page.search(TEXT, 12)
    assert len(gallery) == len(state) == 12
    assert "12 of 12 pictures" in said
    assert "Click" in hint
    seen = {}
    gather = page.explain.__globals__["gather_evidence"]

    def watched(*arguments):
        found = gather(*arguments)
        seen[arguments[3].tobytes()] = found[0].similarity
        return found

    monkeypatch.setitem(page.explain.__globals__, "gather_evidence", watched)
    for place, (_, picture, path) in enumerate(state):
        heat, told = page.explain(state, place)
        assert heat.ndim == 3
        assert path in told
        score = page.searcher.find(search.query_batch(page.opened, TEXT), 12)[place].score
        assert list(seen.values())[-1] == pytest.approx(score, abs=5e-3), picture


def test_what_is_not_there_any_more_is_a_sentence(page, photos):
    _, _, state, _, _ = page.search(TEXT, 3)
    assert "search again" in page.explain(state, 3)[1]
    (photos / state[0][2]).unlink()
    heat, told = page.explain(state, 0)
    assert heat is None
    assert "can't be read any more" in told
    assert page.thumbnail(state[0][1]).shape[2] == 3
    assert "can't be read any more" in page.explain([[TEXT, 99, "x.jpg"]], 0)[1]


def test_an_index_that_gave_rows_back_meanwhile_is_a_sentence(page):
    index = page.searcher.index
    for shard in (index.folder / "shards").iterdir():
        shard.rename(shard.with_name(f".{shard.name}.dead"))
    found, told, state, _, _ = page.search(TEXT, 3)
    assert (found, state) == ([], [])
    assert "start the page again" in told


def test_nothing_asked_and_nothing_known(page):
    assert page.search("  ", 5)[0] == []
    assert "knows no word" in page.search("ЖЖ", 5)[1]
    assert "&lt;b&gt;" in page.search("a <b>red</b> star", 5)[1]
    assert len(page.search(TEXT, -3)[0]) == 1
