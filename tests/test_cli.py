"""Command lines of the READMEs run as written on small data; mistakes get one sentence."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train
from arguments import parse_eval, parse_train
from lib.errors import InputError
from lib.model import backbones as hub

ROOT = Path(__file__).resolve().parent.parent

# Command lines printed by the repositories of the other methods; --method is what they need added.
FIELD_LINES = [
    "python train.py --dataset f30k --gpu-id 0 --logger_name runs/f30k_vit --batch_size 64 "
    "--vit_type vit --embed_size 512 --sparse_ratio 0.5 --aggr_ratio 0.4 "
    "--f30k_img_path data/flickr30k-images --use_cls_as_glob_embd 1 --use_token_selection 1 "
    "--token_selection_strategy 'ratio' --token_selection_ratio 0.8 "
    "--similarity_calc_method 'attn' --use_learnable_temp 0 --method ilaps",
    "python train.py --dataset f30k --gpu-id 0 --img_res 256 --logger_name runs/f30k_vit_224 "
    "--batch_size 128 --vit_type google/vit-base-patch16-224-in21k  --embed_size 1024 "
    "--method avse",
    "python train.py --dataset coco --gpu-id 0 --img_res 256 --logger_name runs/coco_swin_224 "
    "--batch_size 128 --vit_type microsoft/swin-base-patch4-window7-224-in22k  "
    "--embed_size 1024 --method avse",
    "CUDA_VISIBLE_DEVICES=0,1 python -m torch.distributed.run --nproc_per_node=2 train.py "
    "--dataset f30k --multi_gpu 1 --img_res 384 --logger_name runs/f30k_vit_384 "
    "--batch_size 64 --vit_type vit-base-patch16-384 --embed_size 1024 --method avse",
    "python train.py --batch_size 128 --data_path data/ --dataset f30k "
    "--logger_name runs/f30k_test --mask_weight 1.0 --method hrem",
    "python train.py --batch_size 256 --data_path data/ --dataset coco "
    "--logger_name runs/coco_test --mask_weight 1.5 --method hrem",
    "python eval.py  --data_path data/ --dataset f30k",
    "CUDA_VISIBLE_DEVICES=0,1,2,3 python -m torch.distributed.run --nproc_per_node=4 train.py "
    "--dataset coco --multi_gpu 1 --logger_name runs/coco_swin --batch_size 64 --vit_type swin "
    "--embed_size 512 --sparse_ratio 0.8 --aggr_ratio 0.6",
]


def readme_lines() -> list[str]:
    """Every train.py and eval.py line in the README's code blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).splitlines()
    return [line for line in lines if re.search(r"(train|eval)\.py --", line) and "python" in line]


def arguments_of(line: str) -> tuple[str, list[str]]:
    words = shlex.split(line)
    place = next(i for i, word in enumerate(words) if word in ("train.py", "eval.py"))
    return words[place], words[place + 1 :]


def test_the_readme_has_its_lines():
    assert len(readme_lines()) >= 10


@pytest.mark.parametrize("line", [*readme_lines(), *FIELD_LINES])
def test_command_lines_parse(line):
    program, argv = arguments_of(line)
    args = parse_train(argv) if program == "train.py" else parse_eval(argv)
    flags: dict[str, list[str]] = {}
    for word in argv:
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    for flag, values in flags.items():
        found = getattr(args, flag.lstrip("-").replace("-", "_"))
        if isinstance(found, list):
            assert [str(one) for one in found] == values
        else:
            (value,) = values
            assert str(found) == str(type(found)(value))


@pytest.fixture
def small_hub(backbones, monkeypatch):
    """`--vit_type vit` and its kin mean small saved backbones instead of the hub's."""
    names = {"vit": "vit", "vit_384": "vit", "swin": "swin"}
    monkeypatch.setattr(hub, "HUB_IDS", {k: backbones[v] for k, v in names.items()})
    return backbones


SINGLE = [
    line for line in readme_lines() if re.match(r"python train.py --dataset (f30k|coco)", line)
]


@pytest.mark.parametrize("line", SINGLE)
def test_single_process_lines_train_and_evaluate(line, layouts, small_hub, tmp_path, monkeypatch):
    _, argv = arguments_of(line)
    monkeypatch.chdir(tmp_path)
    small = ["--data_path", str(layouts), "--bert_path", small_hub["bert"], "--batch_size", "16"]
    quick = ["--num_epochs", "1", "--workers", "0", "--embed_size", "32"]
    assert train.main([*argv, *small, *quick]) == 0
    dataset = argv[argv.index("--dataset") + 1]
    assert evaluation.main(["--dataset", dataset, "--data_path", str(layouts)]) == 0
    run = tmp_path / argv[argv.index("--logger_name") + 1]
    tables = json.loads((run / "results.json").read_text())
    assert set(tables) == {"f30k_8" if dataset == "f30k" else "coco_10"}  # not the field's counts
    log = (run / "train.log").read_text()
    assert "training images are held out to choose the checkpoint" in log
    assert next(iter(tables.values()))["val_split"] == "held_out"


def test_eval_finds_every_run_of_the_data_set(layouts, small_hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = [
        "--data_path",
        str(layouts),
        "--bert_path",
        small_hub["bert"],
        "--num_epochs",
        "1",
        "--workers",
        "0",
        "--embed_size",
        "32",
        "--batch_size",
        "16",
        "--val_split",
        "test",
    ]
    for name in ("f30k_a", "f30k_b"):
        assert train.main([*base, "--logger_name", f"runs/{name}"]) == 0
    assert evaluation.main(["--dataset", "f30k", "--data_path", str(layouts)]) == 0
    printed = capsys.readouterr().out
    assert "f30k_a" in printed
    assert "f30k_b" in printed
    assert "checkpoint chosen on test" in printed


def test_any_folder_trains_and_evaluates_with_its_images_anywhere(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(layouts / "f30k", tmp_path / "data" / "pets")
    for path in (tmp_path / "data" / "pets").glob("f30k_*.jsonl"):
        path.rename(path.with_name(path.name.replace("f30k", "pets")))
    images = ["--dataset", "pets", "--image_path", str(layouts / "flickr30k-images")]
    tiny = "--vit_type tiny --bert_path tiny --img_res 32 --embed_size 32 --tiny_patch_size 8"
    quick = "--num_epochs 1 --workers 0 --batch_size 16 --logger_name runs/pets_a"
    assert train.main([*images, *tiny.split(), *quick.split()]) == 0
    assert evaluation.main(images) == 0
    tables = json.loads((tmp_path / "runs/pets_a/results.json").read_text())
    assert {name: table["images"] for name, table in tables.items()} == {"pets_8": 8}
    assert "describe --dataset pets --split dev" in (tmp_path / "runs/pets_a/train.log").read_text()


def test_a_run_evaluates_itself_and_a_broken_one_stops_no_other(
    scenes_path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = ["--dataset", "scenes", "--data_path", str(scenes_path), "--workers", "0"]
    data += ["--scenes_size", "32", "16", "16"]
    tiny = "--method laps --tiny_width 16 --tiny_layers 1 --img_res 64 --embed_size 32"
    quick = "--num_epochs 1 --batch_size 32 --eval 1 --logger_name runs/scenes_b"
    assert train.main([*data, *tiny.split(), *quick.split()]) == 0
    results = tmp_path / "runs/scenes_b/results.json"
    assert json.loads(results.read_text())["scenes"]["split"] == "test"
    results.unlink()
    for name in ("scenes_a", "scenes_c"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "model_best.pth").write_bytes(b"")
    capsys.readouterr()
    assert evaluation.main(data) == 2
    assert results.exists()
    told = capsys.readouterr().err.splitlines()
    assert "2 of 3 runs could not be evaluated" in told[-1]
    assert evaluation.main([*data, "--save_similarity", "a.npy"]) == 2
    assert "one place for 3 runs" in capsys.readouterr().err


def test_help_lists_every_method():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "seps" in done.stdout
    assert "--sparse_ratio" in done.stdout


# --- mistakes ----------------------------------------------------------------------------------


def never_build(*args, **kwargs):
    raise AssertionError("a model was built before the input was checked")


def refused(argv: list[str], capsys, monkeypatch) -> str:
    """The sentence that train.main prints for bad input, exit code 2, no model built."""
    monkeypatch.setattr(train, "build_model", never_build)
    assert train.main(argv) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: shutil.rmtree(root / "f30k"), "no folder"),
        (lambda root: (root / "f30k/train_caps.txt").unlink(), "train_caps.txt"),
        (lambda root: (root / "f30k/f30k_train.jsonl").unlink(), "f30k_train.jsonl"),
        (lambda root: (root / "f30k/f30k_train.jsonl").write_text('{"text": \n'), "jsonl:1"),
        (lambda root: (root / "f30k/train_caps.txt").write_text("one\n\n"), "train_caps.txt:2"),
        (lambda root: (root / "flickr30k-images/3.jpg").unlink(), "3.jpg"),
        (lambda root: (root / "f30k/id_mapping.json").write_text("{}"), "id_mapping.json"),
        (lambda root: (root / "f30k/train_ids.txt").write_text("1\n2\n3\n"), "40 captions"),
    ],
    ids=["folder", "captions", "dense", "json", "empty", "image", "mapping", "counts"],
)
def test_bad_data_is_refused_before_a_model_is_built(
    layouts, small_hub, tmp_path, capsys, monkeypatch, spoil, told
):
    root = tmp_path / "data"
    shutil.copytree(layouts, root)
    spoil(root)
    argv = [
        "--dataset",
        "f30k",
        "--data_path",
        str(root),
        "--logger_name",
        str(tmp_path / "run"),
        "--bert_path",
        small_hub["bert"],
    ]
    assert told in refused(argv, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--batch_size", "0"], "--batch_size 0"),
        (["--sparse_ratio", "1.5"], "--sparse_ratio 1.5"),
        (["--max_word", "2"], "--max_word 2"),
        (["--learning_rate", "-1"], "--learning_rate -1"),
        (["--resume", "runs/nowhere"], "--resume runs/nowhere"),
        (["--dense_side", "caption", "--dense_match", "mean"], "--dense_match mean"),
    ],
)
def test_bad_flags_are_refused(argv, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert told in refused(argv, capsys, monkeypatch)


def test_bad_backbones_are_refused(layouts, small_hub, tmp_path, capsys):
    argv = ["--data_path", str(layouts), "--logger_name", str(tmp_path / "run"), "--workers", "0"]
    bert = ["--bert_path", small_hub["bert"]]
    assert train.main([*argv, "--bert_path", "./nowhere"]) == 2
    assert "--bert_path ./nowhere" in capsys.readouterr().err
    assert train.main([*argv, *bert, "--vit_type", "./nowhere"]) == 2
    assert "--vit_type ./nowhere: no such folder" in capsys.readouterr().err
    assert train.main([*argv, *bert, "--max_word", "500"]) == 2
    assert "--max_word 500 is more than the 128 positions" in capsys.readouterr().err
    assert train.main([*argv, *bert, "--batch_size", "1000"]) == 2
    assert "--batch_size 1000" in capsys.readouterr().err


def test_evaluation_without_a_checkpoint_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluation.main(["--dataset", "coco"]) == 2
    assert "no runs/coco_*/model_best.pth" in capsys.readouterr().err
    assert evaluation.main(["--checkpoint", "nowhere.pth"]) == 2
    assert "nowhere.pth: no such file" in capsys.readouterr().err


def test_an_incomplete_backbone_is_refused(backbones, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "vit"
    shutil.copytree(backbones["vit"], folder)
    weights = load_file(folder / "model.safetensors")
    dropped = sorted(name for name in weights if "bias" in name)[0]
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks or has other shapes for 1 weights"):
        hub.load_backbone(str(folder), "--vit_type")
