"""Rewrite a checkpoint in this project's format: python -m tools.convert_checkpoint IN OUT."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.checkpoints.checkpoint import LAST, model_payload, restore_model, save_payload
from lib.checkpoints.hub import FILE_ENDINGS, WEIGHTS, checkpoint_file, push, write_folder
from lib.checkpoints.payloads import SAFETENSORS, read_payload, write_safetensors
from lib.errors import InputError
from lib.files import check_destination, check_file, read_json, write_json
from lib.flags import Parser
from lib.program import program, run_program
from vocab import load_tokenizer

# what describes the moment a checkpoint was written
FACTS = ("epoch", "step", "best_rsum", "val_split", "hard_negatives", "data")


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Write the converted file; return the exit code: 0, or 2 for bad input."""
    return convert(parser().parse_args(argv))


def parser() -> Parser:
    """Return the parser of this tool."""
    own = Parser("tools.convert_checkpoint", description=__doc__)
    own.add_argument("checkpoint", help="an official or one of our checkpoints, or a folder")
    own.add_argument("out", help="a folder, or a file that ends in .pth or .safetensors")
    own.add_argument("--method", default=None, help="laps, seps_released or ilaps")
    own.add_argument("--vit_path", default=None, help="folder with the image config.json")
    own.add_argument("--bert_path", default=None, help="folder with BERT's config and vocabulary")
    own.add_argument(
        "--push_to_hub", default=None, metavar="ID", help="upload the folder as OWNER/NAME"
    )
    return own


def convert(args: argparse.Namespace) -> int:
    """Write `args.out` from `args.checkpoint` and return 0.

    Raises InputError where either does not suit.
    """
    out, checkpoint = Path(args.out), checkpoint_file(args.checkpoint)
    as_file = out.suffix in (".pth", SAFETENSORS)
    if not as_file and (out.suffix in FILE_ENDINGS or out.is_file()):
        raise InputError(f"{out}: end the name in .pth or {SAFETENSORS}, or name a folder")
    if args.push_to_hub and as_file:
        raise InputError("--push_to_hub uploads a folder: give OUT without an ending")
    check_file(checkpoint)
    if (out if as_file else out / WEIGHTS).exists() and checkpoint.resolve().is_relative_to(
        out.resolve()
    ):
        raise InputError(f"{out} is the input itself; write to another place")
    check_destination(out if as_file else out / WEIGHTS, "OUT", make_folder=True)
    source = read_payload(checkpoint)
    paths = args.vit_path, args.bert_path
    model, trained = restore_model(checkpoint, source, args.method, *paths)
    words = source.get("vocabulary")
    if words is None:
        words = load_tokenizer(trained.bert_path).vocabulary
    kept = {key: source[key] for key in FACTS if key in source}
    payload = model_payload(model, trained, words, **kept)
    if not as_file:
        _write_folder(out, payload, source, checkpoint)
    else:
        (write_safetensors if out.suffix == SAFETENSORS else save_payload)(out, payload)
    print(f"written to {args.out}")
    if args.push_to_hub:
        print(f"uploaded to {push(out, args.push_to_hub)}")
    return 0


def _write_folder(
    out: Path, payload: dict[str, Any], source: dict[str, Any], checkpoint: Path
) -> None:
    """Write the folder; one of a checkpoint_last.pth keeps what --resume goes on from."""
    write_folder(out, payload, read_json(checkpoint.with_name("results.json")))
    if "training" in source:
        save_payload(out / LAST, source)
        write_json(out / "args.json", source["args"])


if __name__ == "__main__":
    run_program(main)
