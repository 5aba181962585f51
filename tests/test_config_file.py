"""--config FILE: a YAML file of flags, checked as the command line is, which wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from arguments import DATASET_DEFAULTS, parse_train
from lib.errors import InputError


def written(folder: Path, text: str) -> list[str]:
    path = folder / "flags.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_flags_of_the_file_are_those_of_the_command_line_which_wins(tmp_path):
    text = """
method: laps
dataset: scenes
batch_size: 128
learning_rate: 2e-4
max_violation: true
lr_schedules: [9, 15]
size_augment: true
vit_type: google/vit-base-patch16-224-in21k
mask_weight: -0.5
gpu-id: 1
resume: null
"""
    config = written(tmp_path, text)
    args = parse_train([*config, "--batch_size", "32"])
    assert (args.method, args.batch_size, args.learning_rate) == ("laps", 32, 2e-4)
    assert (args.max_violation, args.lr_schedules, args.size_augment) == (True, [9, 15], 1)
    assert (args.mask_weight, args.gpu_id, args.resume) == (-0.5, 1, None)
    assert args.vit_type == "google/vit-base-patch16-224-in21k"
    assert args.num_epochs == DATASET_DEFAULTS["scenes"]["num_epochs"]  # the file names the set
    assert parse_train([f"--config={config[1]}"]).batch_size == 128
    assert args.config == config[1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("batchsize: 3", "batchsize is no flag that a file may hold; did you mean batch_size?"),
        ("config: other.yaml", "config is no flag that a file may hold"),
        ("batch_size: many", "batch_size"),
        ("batch_size: 0", "--batch_size 0: give a whole number of at least 1"),
        ("batch_size: {a: 1}", "batch_size is {'a': 1}, which --batch_size does not take"),
        ("max_violation: 3", "max_violation is 3; give true or false"),
        ("- a\n- b", "give one flag a line"),
        ("a: [1\nb: 2", "not YAML"),
        ("", "give one flag a line"),
    ],
)
def test_what_a_file_can_not_hold_is_named(text, told, tmp_path):
    with pytest.raises(InputError) as caught:
        parse_train(written(tmp_path, text))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.yaml: no such file"):
        parse_train(["--config", str(tmp_path / "nothing.yaml")])


# --- values of one kind or two -----------------------------------------------------------------


def test_a_ratio_for_each_backbone_and_sides_of_an_image(tmp_path):
    def parsed(*words: str):
        return parse_train(["--dataset", "f30k", *words])

    assert parsed("--backbone_lr_ratio", "0.1").backbone_lr_ratio == 0.1
    assert parsed("--backbone_lr_ratio", "0.1", "0.02").backbone_lr_ratio == [0.1, 0.02]
    assert parsed("--backbone_lr_ratio=0.1,0.02").backbone_lr_ratio == [0.1, 0.02]
    assert parsed("--img_res", "224x336").img_res == [224, 336]
    assert parsed("--img_res", "384x384").img_res == parsed("--img_res", "384").img_res == 384
    for words, told in [
        (("--backbone_lr_ratio", "1", "2", "3"), "give one number, or two"),
        (("--backbone_lr_ratio=-1,0",), "--backbone_lr_ratio -1"),
        (("--img_res", "224x0"), "--img_res 0: give a whole number"),
        (("--img_res", "a"), "HEIGHTxWIDTH"),
    ]:
        with pytest.raises(InputError, match=told):
            parsed(*words)
