"""SGR and SAF: the official recording, the loop over captions, masks, norms, vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from arguments import parse_train
from lib.batch import Tokens, length_mask
from lib.errors import InputError
from lib.methods.registry import check_arguments, get_method
from lib.model.gru import GRUTextEncoder
from tests import naive_sgraf
from tests.helpers import tiny_args, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "sgraf_modules.npz"
RECORDING = {
    "precomp": 1,
    "region_dim": 24,
    "sim_dim": 16,
    "text_encoder": "gru",
    "word_dim": 12,
    "gru_dropout": 0.0,
    "shard_size": 4,
}
NAMES = {  # official -> ours
    "img_enc.fc.": "image_encoder.proj.",
    "txt_enc.embed.": "text_encoder.embed.",
    "txt_enc.cap_rnn.": "text_encoder.gru.",
    "sim_enc.v_global_w.embedding_local.0.": "image_attention.local.",
    "sim_enc.v_global_w.embedding_local.1.": "image_attention.local_norm.",
    "sim_enc.v_global_w.embedding_global.0.": "image_attention.overall.",
    "sim_enc.v_global_w.embedding_global.1.": "image_attention.overall_norm.",
    "sim_enc.v_global_w.embedding_common.0.": "image_attention.common.",
    "sim_enc.t_global_w.embedding_local.0.": "text_attention.local.",
    "sim_enc.t_global_w.embedding_global.0.": "text_attention.overall.",
    "sim_enc.t_global_w.embedding_common.0.": "text_attention.common.",
    "sim_enc.sim_tranloc_w.": "nodes.local.",
    "sim_enc.sim_tranglo_w.": "nodes.overall.",
    "sim_enc.sim_eval_w.": "evaluate.",
    "sim_enc.SAF_module.attn_sim_w.": "reasoning.gate.",
    "sim_enc.SAF_module.bn.": "reasoning.norm.",
    "graph_query_w.": "query.",
    "graph_key_w.": "key.",
    "sim_graph_w.": "out.",
    "sim_enc.SGR_module.": "reasoning.steps.",
}
# biases that the softmax or the BatchNorm behind them cancels; a BatchNorm's goes into its mean
CANCELLED = {
    "image_attention.common.bias": None,
    "text_attention.common.bias": None,
    "reasoning.steps.0.key.bias": None,
    "reasoning.steps.1.key.bias": None,
    "reasoning.steps.2.key.bias": None,
    "reasoning.norm.num_batches_tracked": None,
    "image_attention.overall.bias": "image_attention.overall_norm.running_mean",
    "reasoning.gate.bias": "reasoning.norm.running_mean",
}


@pytest.fixture(scope="module")
def official():
    with np.load(GOLDEN) as arrays:
        return {name: torch.tensor(arrays[name]) for name in arrays}


def ours(name: str) -> str:
    for theirs, mine in NAMES.items():
        name = name.replace(theirs, mine)
    return name


def official_state(official: dict, method: str) -> tuple[dict, dict]:
    """The recorded weights under our names, and what each running mean was lowered by."""
    prefix = f"weights.{method}."
    state = {
        ours(name.removeprefix(prefix)): value.clone()
        for name, value in official.items()
        if name.startswith(prefix)
    }
    lowered = {}
    for name, mean in CANCELLED.items():
        bias = state.pop(name, None)
        if bias is not None and mean is not None:
            lowered[mean] = bias
            state[mean] -= bias
    return state, lowered


def official_model(official: dict, method: str, **flags):
    model = tiny_model(method, **{**RECORDING, **flags})
    model.text_encoder = GRUTextEncoder(50, 32, 12, dropout=0.0)
    model.load_state_dict(official_state(official, method)[0])
    return model.eval()


@pytest.mark.parametrize("method", ["sgr", "saf"])
def test_features_and_similarity_are_the_official_ones(official, method):
    model = official_model(official, method)
    with torch.no_grad():
        images = model.encode_images(official["images"])
        texts = model.encode_texts(official["caption_ids"], official["caption_lengths"])
        similarity = model.similarity(images, texts)
    found = {
        "region_features": images.local,
        "word_features": texts.local,
        "image_global": images.cls[:, 0],
        "caption_global": texts.cls[:, 0],
        "similarity": similarity,
    }
    for name, value in found.items():
        torch.testing.assert_close(value, official[f"{method}_{name}"], atol=1e-5, rtol=0)


def test_the_mean_of_both_is_the_recorded_ensemble(official):
    matrices = []
    for method in ("sgr", "saf"):
        model = official_model(official, method)
        texts = official["caption_ids"], official["caption_lengths"]
        with torch.no_grad():
            encoded = model.encode_images(official["images"]), model.encode_texts(*texts)
            matrices.append(model.similarity(*encoded))
    torch.testing.assert_close(
        torch.stack(matrices).mean(0), official["similarity"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("shard_size", [4, 64])
@pytest.mark.parametrize("kind", ["sum", "hard"])
@pytest.mark.parametrize("method", ["sgr", "saf"])
def test_training_is_the_official_one(official, method, kind, shard_size):
    model = official_model(official, method, shard_size=shard_size).train()
    model.set_hard_negatives(kind == "hard")
    pixels = official["train_images"].clone().requires_grad_()
    losses = model.training_losses(
        pixels, official["train_caption_ids"], official["train_lengths"], torch.arange(6)
    )
    losses["loss"].backward()
    expected = float(official[f"{method}_loss_{kind}"])
    assert float(losses["loss"].detach()) == pytest.approx(expected, abs=1e-5)
    gradients = {n: p.grad for n, p in model.named_parameters()} | {"images": pixels.grad}
    prefix = f"{method}_grad_{kind}."
    recorded = {ours(n.removeprefix(prefix)): g for n, g in official.items() if prefix in n}
    assert len(recorded) == 5
    for name, gradient in {**recorded, "images": official[f"{method}_grad_images_{kind}"]}.items():
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("method", ["sgr", "saf"])
def test_running_statistics_after_a_step_are_the_official_ones(official, method):
    model = official_model(official, method).train()
    lowered = official_state(official, method)[1]
    words = official["train_caption_ids"], official["train_lengths"]
    model.training_losses(official["train_images"], *words, torch.arange(6))
    prefix = f"{method}_after_step."
    recorded = {ours(n.removeprefix(prefix)): v for n, v in official.items() if prefix in n}
    assert len(recorded) == (6 if method == "saf" else 4)
    state = model.state_dict()
    for name, value in recorded.items():
        found = state[name] + lowered.get(name, 0)
        torch.testing.assert_close(found, value, atol=1e-5, rtol=0)


# --- the loop ----------------------------------------------------------------------------------


def random_inputs(images: int, texts: int, regions: int, words: int, channels: int):
    generator = torch.Generator().manual_seed(3)

    def unit_tokens(rows, width):
        values = torch.randn(rows, width, channels, generator=generator, dtype=torch.float64)
        return (values / values.norm(dim=2, keepdim=True)).requires_grad_()

    lengths = torch.randint(2, words + 1, (texts,), generator=generator)
    lengths[0] = words
    return unit_tokens(images, regions), unit_tokens(texts, words), lengths


def compared(method: str, training: bool, shape: tuple, **flags):
    """Similarity and gradients, ours and the loop's, of the same float64 model and inputs."""
    images, texts, regions, words, channels = shape
    shared = {"precomp": 1, "region_dim": 8, "num_regions": regions, "embed_size": channels}
    model = tiny_model(method, **shared, **flags).double().train(training)
    for name, parameter in model.named_parameters():
        if "query" in name or "key" in name:
            parameter.data *= 3  # flat edges make all nodes alike
    pixels, said, lengths = random_inputs(images, texts, regions, words, channels)
    mask = length_mask(lengths, words)
    weights = torch.randn(images, texts, dtype=torch.float64)
    results = []
    for naive in (False, True):
        state = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if naive:
            rows = [text[:length] for text, length in zip(said, lengths, strict=True)]
            similarity = naive_sgraf.similarity(model, list(pixels), rows)
        else:
            seen = pixels.new_ones(pixels.shape[:2], dtype=torch.bool)
            similarity = model.similarity(
                Tokens(pixels, seen, model.image_attention(pixels, seen)[:, None]),
                Tokens(said, mask, model.text_attention(said, mask)[:, None]),
            )
        leaves = [pixels, said, *(p for n, p in model.named_parameters() if "encoder" not in n)]
        gradients = torch.autograd.grad((similarity * weights).sum(), leaves)
        moved = [buffer.clone() for name, buffer in model.named_buffers() if "reasoning" in name]
        results.append((similarity.detach(), gradients, moved))
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    return results


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("method", ["sgr", "saf"])
def test_similarity_and_gradients_are_those_of_a_loop_over_captions(method, training):
    flags = {"sim_dim": 6, "shard_size": 2}
    fast, loop = compared(method, training, (5, 3, 7, 6, 12), **flags)
    torch.testing.assert_close(fast[0], loop[0], atol=1e-12, rtol=0)
    for one, other in zip(fast[1], loop[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-8)
    for one, other in zip(fast[2], loop[2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgr", "saf"])
def test_the_loop_at_the_sizes_people_use(method):
    fast, loop = compared(method, True, (3, 4, 36, 20, 1024), sim_dim=256, shard_size=2)
    torch.testing.assert_close(fast[0], loop[0], atol=1e-11, rtol=0)
    for one, other in zip(fast[1], loop[1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


# --- norms, dropout ----------------------------------------------------------------------------


def region_inputs(images: int = 4, regions: int = 5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(images, regions, 12, generator=generator)


def region_model(norm: str, **flags):
    shared = {"precomp": 1, "region_dim": 12, "num_regions": 5, "sim_dim": 8}
    model = tiny_model("sgr", **shared, sgraf_norm=norm, **flags)
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(3):  # running statistics that tell regions apart
            model.encode_images(torch.randn(8, 5, 12) * torch.arange(1.0, 6.0)[:, None])
    return model.eval()


def test_the_order_of_regions_matters_to_the_released_norm_alone():
    turned = torch.tensor([3, 1, 0, 4, 2])
    for norm, same in (("region", False), ("channel", True)):
        model = region_model(norm)
        plain = model.encode_images(region_inputs()).cls
        permuted = model.encode_images(region_inputs()[:, turned]).cls
        assert torch.allclose(plain, permuted, atol=1e-5) == same


def test_the_channel_norm_takes_any_number_of_regions_and_the_released_one_says_how_many():
    assert region_model("channel").encode_images(region_inputs(regions=7)).local.shape[1] == 7
    with pytest.raises(InputError, match="--num_regions 5: the images have 7"):
        region_model("region").encode_images(region_inputs(regions=7))


@pytest.mark.parametrize("norm", ["region", "channel"])
@pytest.mark.parametrize("training", [False, True])
def test_padded_regions_change_nothing(norm, training):
    lengths = torch.tensor([5, 2, 3, 4])
    model = region_model(norm).train(training)
    first = model.encode_images(region_inputs(), pixel_lengths=lengths)
    junk = torch.where(length_mask(lengths, 5)[..., None], region_inputs(), 1e3)
    model = region_model(norm).train(training)
    second = model.encode_images(junk, pixel_lengths=lengths)
    torch.testing.assert_close(first.cls, second.cls, atol=1e-5, rtol=0)
    assert torch.isfinite(model.image_attention.local_norm.running_var).all()


def test_scores_repeat_with_dropout_and_hardest_negatives():
    """Two passes over pairs must meet the same dropout: it is in the tokens, not in the score."""
    model = tiny_model("sgr", sgraf_dropout=0.5, sim_dim=8).train()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 100, (6, 7), generator=generator)
    images = model.encode_images(pixels)
    texts = model.encode_texts(ids, torch.tensor([7, 3, 4, 5, 6, 7]))
    assert torch.equal(model.similarity(images, texts), model.similarity(images, texts))
    other = model.encode_images(pixels)
    assert not torch.allclose(images.cls, other.cls)


# --- flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"), [("sgraf_dropout", 1.0), ("sim_dim", 0), ("num_regions", 0)]
)
def test_values_out_of_range_are_refused(flag, value):
    with pytest.raises(InputError, match=f"--{flag}"):
        check_arguments(tiny_args("saf", **{flag: value}))


def test_a_module_name_must_agree_with_the_method():
    get_method("saf").check_arguments(tiny_args("saf", module_name="SAF"))
    with pytest.raises(InputError, match="--module_name SGR is not --method saf"):
        get_method("saf").check_arguments(tiny_args("saf", module_name="SGR"))


SGRAF_COMMANDS = {  # the README's, with --method added
    "--method sgr --data_name coco_precomp --num_epochs 20 --lr_update 10 --module_name SGR": [10],
    "--method saf --data_name f30k_precomp --num_epochs 30 --lr_update 20 --module_name SAF": [20],
    "--method sgr --data_name f30k_precomp --num_epochs 40 --lr_update 30 --module_name SGR": [30],
}


@pytest.mark.parametrize("command", SGRAF_COMMANDS)
def test_the_command_lines_of_sgraf_give_its_settings(command):
    args = parse_train(command.split())
    assert args.lr_schedules == SGRAF_COMMANDS[command]
    assert args.dataset == command.split()[3].removesuffix("_precomp")
    expected = {"precomp": 1, "text_encoder": "gru", "embed_size": 1024, "decay_rate": 0.1}
    expected |= {"max_violation": True, "weight_decay": 0.0, "learning_rate": 2e-4, "sim_dim": 256}
    assert {name: getattr(args, name) for name in expected} == expected


def test_flags_given_go_before_what_a_command_line_of_sgraf_stands_for():
    command = "--method sgr --data_name f30k_precomp --embed_size 64 --text_encoder bert"
    args = parse_train([*command.split(), "--lr_update", "5", "--lr_schedules", "3", "7"])
    assert (args.embed_size, args.text_encoder, args.lr_schedules) == (64, "bert", [3, 7])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("--method sgr --data_name f30k", "--data_name f30k: give NAME_precomp"),
        ("--method sgr --lr_update 0", "--lr_update 0"),
    ],
)
def test_what_sgraf_can_not_mean_is_refused(command, told):
    with pytest.raises(InputError, match=told):
        parse_train(command.split())
