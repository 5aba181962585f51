"""The embedded data set, drawn from a seed."""
