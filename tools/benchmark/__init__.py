"""Our similarity, training step, evaluation and input side by side with the field's way.

A command is a module with `add_arguments(parser)` and `run(args)`, which returns or yields rows; a
`page(found)` of its own takes the place of report's. `args` also has --device and --json. Each row
is JSON-able and has a "name"; what `report.COLUMNS` lists is shown.
"""
