"""HREM: the official recording, loops, warm-up, regions and pixels, two processes against one."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from arguments import parse_eval, parse_train
from lib import distributed
from lib.batch import Tokens, length_mask
from lib.errors import InputError
from lib.methods.registry import (
    build_model,
    check_arguments,
    get_method,
    method_names,
    model_defaults,
)
from lib.model.graph import closeness, connected, cross_matches
from tests.helpers import encode, pair_inputs, random_tokens, tiny_args, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "hrem_modules.npz"
REGION_DIM = 12


@pytest.fixture(scope="module")
def official():
    with np.load(GOLDEN) as arrays:
        return {name: torch.tensor(arrays[name]) for name in arrays}


def under(official: dict, prefix: str) -> dict:
    """The recorded state below a prefix; layers.0 of a one-layer encoder is our layer."""
    return {
        name[len(prefix) :].replace("layers.0.", "", 1): value
        for name, value in official.items()
        if name.startswith(prefix)
    }


def official_model(official: dict, **flags):
    """The recording's weights: 4 heads, top-k 5; images are regions, captions BERT's words."""
    recording = {"embed_size": 64, "nhead": 4, "topk": 5, "precomp": 1, "region_dim": 48}
    model = tiny_model("hrem", **{**recording, "warmup": 0, "hrem_loss": "vse", **flags}).eval()
    load_image_head(model.image_head, official)
    model.image_pool.relations.load_state_dict(under(official, "image_encoder_state.aggr."))
    model.text_encoder = RecordedWords(official)
    model.text_pool.relations.load_state_dict(under(official, "text_encoder_state.aggr."))
    model.graph.attention.load_state_dict(under(official, "graph_state.gnn."))
    for name in ("t2i_mlp", "i2t_mlp"):
        state = under(official, f"graph_state.adj_model.adj_learning.mlp_{name[:3]}.")
        # number 2 of the official layers is a dropout
        state = {key.replace("3.", "2."): value for key, value in state.items()}
        getattr(model.graph, name).load_state_dict(state)
    return model


def load_image_head(head, official: dict) -> None:
    """Load the recorded head; its first bias goes into the mean that BatchNorm takes away."""
    prefix = "image_encoder_state.fc."
    mlp = {name: official[f"{prefix}mlp.{name}"] for name in ("layers.1.weight", "layers.1.bias")}
    norm = {
        name.rpartition(".")[2]: value
        for name, value in official.items()
        if name.startswith(f"{prefix}mlp.bns.0.")  # bns.1 is never used
    }
    norm["running_mean"] = norm["running_mean"] - official[f"{prefix}mlp.layers.0.bias"]
    head.linear.load_state_dict(under(official, f"{prefix}fc."))
    head.mlp[0].load_state_dict({"weight": official[f"{prefix}mlp.layers.0.weight"]})
    head.mlp[1].load_state_dict(norm)
    head.mlp[3].load_state_dict({name.rpartition(".")[2]: value for name, value in mlp.items()})


class RecordedWords(nn.Module):
    """The text encoder of the recording behind its BERT."""

    def __init__(self, official: dict) -> None:
        super().__init__()
        self.hidden = official["bert_words"]
        self.proj = nn.Linear(768, 64)
        self.proj.load_state_dict(under(official, "text_encoder_state.linear."))

    def forward(self, ids, lengths):
        return Tokens(self.proj(self.hidden), length_mask(lengths, self.hidden.shape[1]))


def one_token(embeddings, features, lengths):
    mask = torch.ones(len(embeddings), 1, dtype=torch.bool)
    fragments = Tokens(features, length_mask(lengths, features.shape[1]))
    return Tokens(embeddings[:, None], mask, fragments=fragments)


def recorded_tokens(official: dict) -> tuple[Tokens, Tokens, list[torch.Tensor]]:
    """Images and captions of the recording with fragments, and their leaves."""
    leaves = [
        official[f"{name}_embedding"].clone().requires_grad_() for name in ("image", "caption")
    ]
    images = one_token(leaves[0], official["region_features"], official["region_lengths"])
    texts = one_token(leaves[1], official["word_features"], official["caption_lengths"])
    return images, texts, leaves


# --- the official recording --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["", "ragged_"])
def test_image_embedding_is_the_official_one(official, case):
    model = official_model(official)
    lengths = official["ragged_lengths" if case else "region_lengths"]
    with torch.no_grad():
        images = model.encode_images(official["regions"], pixel_lengths=lengths)
    expected = official[f"{case}image_embedding"]
    torch.testing.assert_close(images.local[:, 0], expected, atol=1e-5, rtol=0)


def test_region_features_are_the_official_ones(official):
    mask = length_mask(official["region_lengths"], 9)
    features = official_model(official).image_head(official["regions"], mask)
    torch.testing.assert_close(features, official["region_features"], atol=1e-5, rtol=0)


def test_caption_embedding_is_the_official_one(official):
    model = official_model(official)
    with torch.no_grad():
        texts = model.encode_texts(None, official["caption_lengths"])
    torch.testing.assert_close(texts.local[:, 0], official["caption_embedding"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [2, 64])
def test_the_graph_is_the_official_one(official, chunk):
    graph = official_model(official).graph
    images, texts, (seen, said) = recorded_tokens(official)
    matches = cross_matches(images.fragments, texts.fragments, 5, chunk)
    relevance = graph.relevance(seen, said, matches)
    connections = graph.connections(seen, said, matches)
    quarters = {"i2i": (0, 0), "i2t": (0, 6), "t2i": (6, 0), "t2t": (6, 6)}
    for name, (row, column) in quarters.items():
        block = (slice(row, row + 6), slice(column, column + 6))
        torch.testing.assert_close(
            relevance[block], official[f"relation_{name}"], atol=1e-5, rtol=0
        )
        assert torch.equal(connections[block], official[f"connect_{name}"])
    regulariser = graph(seen, said, matches).regulariser.detach()
    assert float(regulariser) == pytest.approx(float(official["regularization"]), abs=1e-6)


@pytest.mark.parametrize("kind", ["sum", "hard"])
def test_loss_and_gradients_are_the_official_ones(official, kind):
    model = official_model(official)
    model.set_hard_negatives(kind == "hard")
    images, texts, leaves = recorded_tokens(official)
    loss = model.losses(images, texts, official["image_ids"])["loss"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(official[f"loss_{kind}"]), abs=1e-5)
    for leaf, name in zip(leaves, ("image", "caption"), strict=True):
        expected = official[f"grad_{name}_{kind}"]
        assert (leaf.grad - expected).norm() < 1e-4 * expected.norm()


# --- loops -------------------------------------------------------------------------------------


def naive_matches(regions, words, k):
    """t2i and i2t of one image (N, C) and one caption (n, C): [mean, k largest], two lists."""
    cosines = normalize(words.detach(), dim=1) @ normalize(regions.detach(), dim=1).T  # (n, N)
    affinity = torch.where(cosines > 0, cosines, 0.1 * cosines)
    rows = []
    for table in (affinity, affinity.T):  # queries x context
        values = []
        for query in range(table.shape[0]):
            shares = [table[query, c] / table[:, c].norm() for c in range(table.shape[1])]
            values.append(float(max(shares)))
        ranked = sorted(values, reverse=True)[:k]
        rows.append([sum(values) / len(values), *ranked, *[0.0] * (k - len(ranked))])
    return rows


def test_matches_equal_a_loop():
    images = random_tokens(5, 7, 8, seed=1, ragged=True)
    texts = random_tokens(4, 6, 8, seed=2, ragged=True)
    assert int(images.lengths.min()) < 4  # fewer than k
    assert int(texts.lengths.min()) < 4
    found = cross_matches(images, texts, topk=4, chunk=3)
    assert found.dtype == torch.float64
    for i in range(5):
        for j in range(4):
            regions, words = images.local[i][images.mask[i]], texts.local[j][texts.mask[j]]
            expected = torch.tensor(naive_matches(regions, words, 4), dtype=torch.float64)
            torch.testing.assert_close(found[i, j], expected, atol=1e-12, rtol=0)


def test_connections_equal_a_loop():
    similarity = torch.randn(7, 7, dtype=torch.float64)
    for threshold in (0.01, 0.5, 1.0):
        kept = max(1, int(7 * threshold))
        expected = [[bool(v >= sorted(row)[-kept]) for v in row] for row in similarity.tolist()]
        assert connected(similarity, threshold).tolist() == expected


def test_equal_embeddings_have_closeness_one_and_a_finite_gradient():
    rows = normalize(torch.randn(40, 32), dim=1)
    rows[1] = rows[0]
    rows.requires_grad_()
    near = closeness(rows, rows)
    assert near[0, 1] == 1
    assert (near.diagonal() == 1).all()
    expected = (-(rows[2] - rows[3]).norm()).exp()
    torch.testing.assert_close(near[2, 3], expected, atol=1e-6, rtol=0)
    near.sum().backward()
    assert torch.isfinite(rows.grad).all()


# --- evaluation --------------------------------------------------------------------------------


def region_inputs(pairs: int = 6) -> dict:
    """`pair_inputs` with precomputed regions of unequal number in the place of pixels."""
    inputs = pair_inputs(pairs, method="hrem")
    generator = torch.Generator().manual_seed(3)
    inputs["pixels"] = torch.randn(pairs, 7, REGION_DIM, generator=generator)
    inputs["pixel_lengths"] = torch.tensor([7, 3, 6, 7, 1, 5])[:pairs]
    inputs["pixels"].masked_fill_(~length_mask(inputs["pixel_lengths"], 7)[:, :, None], 0)
    return inputs


def region_model(method: str = "hrem", **flags):
    return tiny_model(method, precomp=1, region_dim=REGION_DIM, **flags)


def region_similarity(model, inputs):
    with torch.no_grad():
        images = model.encode_images(inputs["pixels"], pixel_lengths=inputs["pixel_lengths"])
        texts = model.encode_texts(inputs["ids"], inputs["lengths"])
        return model.similarity(images, texts)


@pytest.mark.parametrize("method", ["hrem", "vse", "scan", "chan"])
def test_regions_padding_and_batch_mates_change_nothing(method):
    model, inputs = region_model(method).eval(), region_inputs()
    plain = region_similarity(model, inputs)
    assert plain.std() > 0
    padded = dict(inputs)
    padded["pixels"] = torch.cat([inputs["pixels"], torch.full((6, 2, REGION_DIM), 9.0)], dim=1)
    padded["pixels"][1, 3:] = -5.0
    padded["ids"] = torch.cat([inputs["ids"], torch.full((6, 3), 7)], dim=1)
    torch.testing.assert_close(region_similarity(model, padded), plain, atol=1e-5, rtol=0)
    for i in (1, 4):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        alone = region_similarity(model, one)[0, 0]
        torch.testing.assert_close(alone, plain[i, i], atol=1e-5, rtol=0)


def test_all_regions_are_real_without_lengths():
    model, inputs = region_model().eval(), region_inputs()
    inputs["pixel_lengths"].fill_(7)
    whole = region_similarity(model, inputs)
    assert torch.equal(region_similarity(model, {**inputs, "pixel_lengths": None}), whole)


def test_evaluation_is_the_cosine_and_carries_no_fragments():
    model = tiny_model("hrem", warmup=0).eval()
    images, texts = encode(model, pair_inputs(method="hrem"))
    assert images.fragments is None
    assert texts.fragments is None
    cosines = normalize(images.local[:, 0], dim=1) @ normalize(texts.local[:, 0], dim=1).T
    torch.testing.assert_close(model.similarity(images, texts), cosines, atol=1e-6, rtol=0)


def test_the_graph_is_not_seen_in_evaluation():
    model, inputs = region_model(warmup=0).eval(), region_inputs()
    plain = region_similarity(model, inputs)
    for parameter in model.graph.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(region_similarity(model, inputs), plain)


def test_fragments_travel_with_their_rows():
    model = tiny_model("hrem", warmup=0).train()
    _, texts = encode(model, pair_inputs(method="hrem"))
    wider = texts.fragments.padded(texts.fragments.local.shape[1] + 2)
    other = Tokens(texts.local, texts.mask, fragments=wider)
    both = Tokens.cat([texts, other])
    assert both.fragments.local.shape[1] == wider.local.shape[1]
    picked = both[[1, 7]].fragments
    assert torch.equal(picked.local[0], picked.local[1])
    assert picked.lengths.tolist() == [int(texts.fragments.lengths[1])] * 2


# --- training ----------------------------------------------------------------------------------


def test_the_graph_joins_in_after_the_warm_up():
    model, inputs = region_model(warmup=2).train(), region_inputs()
    for _ in range(2):
        assert model.may_leave_unused
        losses = model.training_losses(**inputs)
        assert set(losses) == {"loss", "alignment"}
        assert float(losses["loss"].detach()) == float(losses["alignment"])
    assert not model.may_leave_unused
    warm = model.training_losses(**inputs)
    parts = float(warm["alignment"] + warm["cross"] + warm["regulariser"])
    assert float(warm["loss"].detach()) == pytest.approx(parts, rel=1e-6)
    assert float(warm["cross"]) > 0
    assert float(warm["regulariser"]) > 0


def test_the_warm_up_counts_training_alone_and_is_saved():
    model, inputs = region_model(warmup=1).eval(), region_inputs()
    model.training_losses(**inputs)
    assert not model.warm
    model.train().training_losses(**inputs)
    other = region_model(warmup=1, seed=5)
    other.load_state_dict(model.state_dict())
    assert other.warm


@pytest.mark.parametrize("regions", [False, True])
def test_every_parameter_gets_gradient_once_warm(regions):
    model = region_model(warmup=0) if regions else tiny_model("hrem", warmup=0)
    inputs = region_inputs() if regions else pair_inputs(method="hrem")
    model.train().training_losses(**inputs)["loss"].backward()
    silent = [
        name
        for name, one in model.named_parameters()
        if "mask_token" not in name and (one.grad is None or not one.grad.abs().sum() > 0)
    ]
    assert silent == []


def test_the_alignment_scale_leaves_the_regulariser():
    losses = []
    for scale in (1.0, 0.5):
        model = region_model(warmup=0, hrem_loss="vse").train()
        model.set_alignment_scale(scale)
        losses.append(model.training_losses(**region_inputs()))
    for name, factor in (("alignment", 0.5), ("cross", 0.5), ("regulariser", 1.0)):
        assert float(losses[1][name]) == pytest.approx(factor * float(losses[0][name]), rel=1e-5)


def test_runs_under_autocast_once_warm():
    model = region_model(warmup=0).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.training_losses(**region_inputs())
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.graph.parameters())


# --- two processes -----------------------------------------------------------------------------

SHARES = [slice(0, 4), slice(4, 6)]


def shared(inputs: dict, share: slice) -> dict:
    """One rank's pairs, the padding that its own do not need cut off."""
    mine = {name: value[share] for name, value in inputs.items()}
    mine["ids"] = mine["ids"][:, : int(mine["lengths"].max())]
    mine["pixels"] = mine["pixels"][:, : int(mine["pixel_lengths"].max())]
    return mine


def train_share(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    distributed.start("gloo")
    for loss in ("vse", "trip"):
        model = region_model(warmup=1, hrem_loss=loss).train()
        network = DistributedDataParallel(model, find_unused_parameters=model.may_leave_unused)
        steps = []
        for _ in range(2):  # the first without the graph, the second with it
            network.zero_grad()
            total = network(**shared(region_inputs(), SHARES[rank]))["loss"]
            total.backward()
            steps.append((float(total.detach()), gradients(model)))
        results[rank, loss] = steps
    distributed.stop()


def gradients(model) -> dict[str, np.ndarray]:
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(train_share, (port, results), nprocs=2)
        return dict(results)


@pytest.mark.parametrize("loss", ["vse", "trip"])
def test_two_processes_equal_one(two_processes, loss):
    model = region_model(warmup=1, hrem_loss=loss).train()
    for step in range(2):
        model.zero_grad()
        total = model.training_losses(**region_inputs())["loss"]
        total.backward()
        assert ("graph.t2i_mlp.0.weight" in gradients(model)) == (step == 1)
        for rank in range(2):
            value, theirs = two_processes[rank, loss][step]
            assert value == pytest.approx(float(total.detach()), rel=1e-5)
            for name, gradient in gradients(model).items():
                np.testing.assert_allclose(
                    theirs[name], gradient, atol=1e-4, rtol=1e-3, err_msg=name
                )


# --- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "--batch_size 128 --data_path data/ --dataset f30k --logger_name runs/f30k_test "
        "--mask_weight 1.0",
        "--batch_size 256 --data_path data/ --dataset coco --logger_name runs/coco_test "
        "--mask_weight 1.5",
    ],
)
def test_the_readme_commands_parse(command):
    args = parse_train(["--method", "hrem", *command.split()])
    check_arguments(args)
    assert (args.method, args.hrem_loss, args.warmup) == ("hrem", "trip", 8000)
    assert args.mask_weight == float(command.split()[-1])


@pytest.mark.parametrize("dataset", ["f30k", "coco"])
def test_the_readme_evaluation_parses(dataset):
    assert parse_eval(["--data_path", "data/", "--dataset", dataset]).dataset == dataset


@pytest.mark.parametrize(("dataset", "cutoff"), [("f30k", 1.7), ("coco", 1.9)])
def test_the_published_loss_is_the_default(dataset, cutoff):
    loss = model_defaults().hrem_loss  # the contract's models take another
    criterion = tiny_model("hrem", dataset=dataset, hrem_loss=loss).criterion
    assert (criterion.loss, criterion.cutoff) == ("trip", cutoff)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("nhead", 5),
        ("nhead", 0),
        ("topk", 0),
        ("warmup", -1),
        ("threshold", 0.0),
        ("threshold", 1.5),
        ("mask_weight", math.nan),
        ("loss", "infonce"),
    ],
)
def test_flags_out_of_range_are_named(flag, value):
    with pytest.raises(InputError, match=f"--{flag} {value}"):
        check_arguments(tiny_args("hrem", **{flag: value}))


@pytest.mark.parametrize("method", method_names())
def test_patches_only_methods_refuse_regions(method):
    args = tiny_args(method, precomp=1)
    able = [name for name in method_names() if get_method(name).accepts_regions]
    assert {"hrem", "vse", "scan", "chan", "sgr", "saf"} <= set(able)
    if method in able:
        check_arguments(args)
        return
    with pytest.raises(InputError, match=rf"--method {method} .*--precomp.* {', '.join(able)}"):
        build_model(args, 100)


def test_regions_of_another_width_are_an_error():
    inputs = region_inputs()
    with pytest.raises(InputError, match="--region_dim 48: the region features have 12 channels"):
        tiny_model("hrem", precomp=1, region_dim=48).encode_images(inputs["pixels"])
    with pytest.raises(InputError, match="--region_dim 0"):
        check_arguments(tiny_args("hrem", precomp=1, region_dim=0))
