"""Is one result really better? python -m tools.significance runs/a runs/b

A and B are folders with a results.json, or folders of such folders, one a seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lib.flags import Parser
from lib.program import program, run_program
from lib.retrieval.result_files import stored_results
from lib.retrieval.significance import compare_results, format_comparison


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Print the differences A − B with their intervals; return the exit code, 0 or 2."""
    args = parser().parse_args(argv)
    sides = stored_results(args.a), stored_results(args.b)
    compared = compare_results(
        *sides,
        args.table,
        args.table_b,
        repeats=args.repeats,
        seed=args.seed,
        level=args.level / 100,
    )
    print("\n\n".join(format_comparison(one, args.a, args.b) for one in compared))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = Parser("tools.significance", description=__doc__)
    parser.add_argument("a", help="result folder, or a folder of them (seeds)")
    parser.add_argument("b", help="the same, what A is compared with")
    parser.add_argument(
        "--table",
        default=None,
        metavar="NAME",
        help="entry of results.json, as f30k_1k; default: all that both have but controls",
    )
    parser.add_argument(
        "--table_b",
        default=None,
        metavar="NAME",
        help="entry of B where it has another name, as an ensemble's and a member's; default: "
        "--table's",
    )
    parser.add_argument("--repeats", type=int, default=10_000, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--level", type=float, default=95.0, help="of the interval, in %%")
    return parser


if __name__ == "__main__":
    run_program(main)
