"""A model as a folder: config.json, model.safetensors, tokenizer, model card; or on a hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib.errors import InputError, first_line
from lib.files import check_file, load_object, read_text, write_json, write_text_whole

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
WORDS, PIECES = "vocab.txt", "tokenizer.json"
BEST = "model_best.pth"  # what a run folder has in the place of all these
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_ENDINGS = (".pth", ".pt", ".safetensors", ".ckpt", ".bin", ".tar")
PRIVATE = "logger_name image_cache feature_cache resume".split()  # one machine's, left out


def checkpoint_file(path: str | os.PathLike) -> Path:
    """Return the weights file that a file, a model's or run's folder, or a hub id stands for.

    Only what has the form of a hub id, OWNER/NAME, and is nothing on this disk asks the hub. Raises
    InputError where a folder holds no model, or the hub does not hand it out.
    """
    found = Path(path)
    if found.is_dir():
        for name in (WEIGHTS, BEST):
            if (found / name).is_file():
                return found / name
        raise InputError(f"{path}: the folder holds neither {WEIGHTS} nor {BEST}")
    owner = str(path).split("/")[0]
    file_like = str(path).endswith(FILE_ENDINGS) or Path(owner).is_dir()
    if found.exists() or file_like or not HUB_ID.fullmatch(str(path)):
        return found
    return fetch(str(path)) / WEIGHTS


def fetch(hub_id: str) -> Path:
    """Return the folder that a hub id was downloaded to, or lies in the cache in.

    Raises InputError where it can't be had; HF_HUB_OFFLINE lets nothing but the cache be asked.
    """
    from huggingface_hub import snapshot_download  # slow to import, and only needed here

    names = [CONFIG, WEIGHTS, WORDS, PIECES]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=names))
    except Exception as error:  # the client has many kinds for one thing: it is not to be had
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else first_line(error)
        raise InputError(
            f"{hub_id}: neither a file or folder here nor a model that the hub hands out ({why})"
        ) from None


def push(folder: str | os.PathLike, hub_id: str) -> str:
    """Upload a model's folder, without what is only for resuming; return its address.

    Raises InputError where the hub refuses, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import HfApi

    names = [CONFIG, WEIGHTS, CARD, WORDS, PIECES]
    try:
        api = HfApi()
        address = api.create_repo(hub_id, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=str(folder), allow_patterns=names)
    except Exception as error:  # as in `fetch`
        raise InputError(
            f"--push_to_hub {hub_id}: not uploaded ({first_line(error)}); {folder} is whole: log "
            "in with `hf auth login`, or upload it by hand"
        ) from None
    return str(address)


def write_folder(
    folder: str | os.PathLike, payload: Mapping[str, Any], results: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint's payload as a folder, the config last: with it the model is whole.

    `results`, what a results.json holds, go on the model card. Raises OSError where it can't be.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().clone().contiguous() for key, value in payload["model"].items()}
    temporary = folder / f".{WEIGHTS}.part"
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / WEIGHTS)
    except SafetensorError as error:
        raise OSError(f"{folder / WEIGHTS}: could not be written ({first_line(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)
    facts = {key: value for key, value in payload.items() if key not in ("model", "training")}
    facts["args"] = {key: v for key, v in payload["args"].items() if key not in PRIVATE}
    words = facts.pop("vocabulary", None)
    if isinstance(words, dict):
        write_text_whole(folder / PIECES, words["tokenizer"])
        facts["tokenizer"] = {key: value for key, value in words.items() if key != "tokenizer"}
    elif words is not None:
        write_text_whole(folder / WORDS, "".join(f"{word}\n" for word in words))
    write_text_whole(folder / CARD, model_card(payload, results or {}))
    write_json(folder / CONFIG, facts)


def read_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the payload that `write_folder` wrote. Raises InputError for what is missing."""
    folder = Path(folder)
    facts = load_object(folder / CONFIG, "the folder is no model of this project's")
    pieces = facts.pop("tokenizer", None)
    words: Any = None
    if isinstance(pieces, dict):
        words = {**pieces, "tokenizer": read_text(folder / PIECES)}
    elif (folder / WORDS).is_file():
        words = read_text(folder / WORDS).split("\n")[:-1]
    check_file(folder / WEIGHTS)
    try:
        model = load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{folder / WEIGHTS}: not readable ({first_line(error)})") from None
    return {**facts, "vocabulary": words, "model": model}


def is_model_folder(folder: str | os.PathLike) -> bool:
    """Return whether a folder holds a model as `write_folder` writes it."""
    return all((Path(folder) / name).is_file() for name in (CONFIG, WEIGHTS))


def model_card(payload: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return README.md: what the model is, its results and their protocols, how it is loaded."""
    args = payload["args"]
    lines = [
        "---",
        "library_name: pytorch",
        "pipeline_tag: feature-extraction",
        f"tags: [image-text-retrieval, {payload['method']}]",
        "---",
        "",
        f"# {payload['method']} on {args.get('dataset')}",
        "",
        "Fine-grained image-text retrieval: images and captions are matched patch by word.",
        "",
        "| | |",
        "|---|---|",
        f"| method | `{payload['method']}` |",
        f"| image encoder | {_source(args, 'vit_type')}, {args.get('img_res')} pixels |",
        f"| text encoder | {_source(args, 'bert_path')} |",
        f"| frozen while trained | {args.get('freeze', 'none')} |",
        f"| data | {args.get('dataset')} |",
        f"| checkpoint chosen on | {payload.get('val_split', args.get('val_split', 'unknown'))} |",
        "",
        *_result_lines(results),
        "## Use",
        "",
        "```python",
        "from lib.checkpoints import load_model",
        'model, args = load_model("FOLDER or OWNER/NAME")  # in evaluation mode',
        "```",
        "",
        "`python eval.py --checkpoint FOLDER` prints the recall table.",
        "",
    ]
    return "\n".join(lines)


def _source(args: Mapping[str, Any], flag: str) -> str:
    """Return an encoder's name without the folders of the machine it was trained on."""
    name = str(args.get(flag))
    return Path(name).name if os.path.isabs(name) or name.startswith((".", "~")) else name


def _result_lines(results: Mapping[str, Any]) -> list[str]:
    if not results:
        return ["No results came with the checkpoint: `eval.py` makes them.", ""]
    lines = [
        "| split | protocol | I2T R@1 | R@5 | R@10 | T2I R@1 | R@5 | R@10 | rSum |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in results.items():
        numbers = [row[way][rank] for way in ("i2t", "t2i") for rank in ("r1", "r5", "r10")]
        told = " | ".join(f"{number:.1f}" for number in (*numbers, row["rsum"]))
        lines.append(f"| {name} | {row.get('protocol', 'unknown')} | {told} |")
    return [*lines, "", "Results of different protocols are not to be compared.", ""]
