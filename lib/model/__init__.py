"""Networks and losses: features in, features or scores out."""
