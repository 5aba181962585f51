"""Our similarity, training step, evaluation and input side by side with the field's way.

A command is a module with `add_arguments(parser)` and `run(args) -> list[dict]`. `args` also has
--device and --json. Each row is JSON-able and has a "name"; what `report.COLUMNS` lists is shown.
"""
