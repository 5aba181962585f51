"""Programs beside training and evaluation, each a thin main over lib."""

import sys

if sys.argv[:1] == ["-m"]:  # one is being started: its libraries take seconds to load
    from lib.program import prepare_terminal

    prepare_terminal()
