"""Programs beside training and evaluation, each a thin main over lib."""
