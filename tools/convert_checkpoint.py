"""Rewrite a checkpoint in this project's format: python -m tools.convert_checkpoint IN OUT."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lib.checkpoints.checkpoint import model_payload, restore_model, save_payload
from lib.checkpoints.payloads import SAFETENSORS, read_payload, write_safetensors
from lib.errors import InputError
from lib.files import check_destination, check_file
from lib.flags import Parser
from lib.program import program, run_program
from vocab import load_tokenizer


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Write the converted file; return the exit code: 0, or 2 for bad input."""
    return convert(parser().parse_args(argv))


def parser() -> Parser:
    """Return the parser of this tool."""
    own = Parser("tools.convert_checkpoint", description=__doc__)
    own.add_argument("checkpoint", help="an official or one of our checkpoints")
    own.add_argument("out", help="ends in .pth or .safetensors")
    own.add_argument("--method", default=None, help="laps, seps_released or ilaps")
    own.add_argument("--vit_path", default=None, help="folder with the image config.json")
    own.add_argument("--bert_path", default=None, help="folder with BERT's config and vocabulary")
    return own


def convert(args: argparse.Namespace) -> int:
    """Write `args.out` from `args.checkpoint` and return 0.

    Raises InputError where either does not suit.
    """
    out = Path(args.out)
    if out.suffix not in (".pth", SAFETENSORS):
        raise InputError(f"{out}: end the name in .pth or {SAFETENSORS}")
    check_file(args.checkpoint)
    if out.exists() and out.samefile(args.checkpoint):
        raise InputError(f"{out} is the input itself; write to another file")
    check_destination(out, "OUT", make_folder=True)
    source = read_payload(args.checkpoint)
    paths = args.vit_path, args.bert_path
    model, trained = restore_model(args.checkpoint, source, args.method, *paths)
    words = source.get("vocabulary")
    if words is None:
        words = load_tokenizer(trained.bert_path).vocabulary
    payload = model_payload(model, trained, words)
    (write_safetensors if out.suffix == SAFETENSORS else save_payload)(out, payload)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    run_program(main)
