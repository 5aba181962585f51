"""How far text alone gets: python -m tools.text_baseline --dataset f30k.

Captions against dense texts, no pixel, nothing trained: TF-IDF, and with --encoder the mean
embeddings of a text encoder. Results that read dense texts are to be held against these.
"""

from __future__ import annotations

from collections.abc import Sequence

from tqdm import tqdm

from lib.data.splits import load_split
from lib.flags import Parser
from lib.program import program, run_program
from lib.retrieval.evaluation import split_results
from lib.retrieval.protocol import protocol_of, repeated_captions
from lib.retrieval.tables import format_table
from lib.retrieval.text_baseline import encoder_similarity, tfidf_similarity


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code, 0 or 2 (bad input)."""
    args = parser().parse_args(argv)
    split = load_split(
        args.data_path, args.dataset, args.split, needs_dense=True, check_images=False
    )
    matrices = {"tf-idf": tfidf_similarity(split.dense, split.captions)}
    if args.encoder:
        total = len(split.dense) + len(split.captions)
        with tqdm(total=total, desc="texts", leave=False, ncols=80) as bar:
            matrices["encoder"] = encoder_similarity(
                args.encoder, split.dense, split.captions, bar.update
            )
    repeated = repeated_captions(split.dense, split.captions, split.caption_image)
    protocol = protocol_of(True, False, repeated)
    tables = {
        name: {**split_results(matrix, split.caption_image), "protocol": protocol}
        for name, matrix in matrices.items()
    }
    told = f"{len(split.dense)} dense texts as gallery,"
    print(f"{args.dataset} {args.split}, protocol {protocol}: {told}")
    print(f"{len(split.captions)} captions; no pixel seen, nothing trained")
    print(format_table(tables))
    return 0


def parser() -> Parser:
    """Return the parser of this tool."""
    own = Parser("tools.text_baseline", description=__doc__)
    own.add_argument("--dataset", default="f30k", metavar="NAME", help="any folder of --data_path")
    own.add_argument("--data_path", default="data/", help="root folder of the data sets")
    own.add_argument("--split", default="test", choices=["train", "dev", "test"], help="its part")
    own.add_argument(
        "--encoder", default=None, metavar="FOLDER", help="text encoder, hub id or folder"
    )
    return own


if __name__ == "__main__":
    run_program(main)
