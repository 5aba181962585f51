"""Train and evaluate methods alike, and write the page of what came out."""
