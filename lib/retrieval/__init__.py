"""Scores of a whole split -> ranks, recalls, results, pictures."""
