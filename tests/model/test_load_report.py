"""A pretraining checkpoint loads without a table of what it holds besides the backbone."""

from __future__ import annotations

import pytest
import transformers
from transformers import BertConfig, BertForMaskedLM, BertModel

from lib.errors import InputError
from lib.model.backbones import load_backbone

CONFIG = BertConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
)


def test_heads_that_are_not_taken_are_no_news(tmp_path, capfd):
    BertForMaskedLM(CONFIG).save_pretrained(tmp_path)
    level = transformers.logging.get_verbosity()
    load_backbone(str(tmp_path), "--bert_path")
    printed = capfd.readouterr()
    assert "REPORT" not in printed.out + printed.err
    assert "UNEXPECTED" not in printed.out + printed.err
    assert transformers.logging.get_verbosity() == level


def test_weights_that_are_missing_are_still_told(tmp_path):
    model = BertModel(CONFIG)
    state = {key: value for key, value in model.state_dict().items() if "query" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match="query"):
        load_backbone(str(tmp_path), "--bert_path")
