"""Fine-grained image-text retrieval: encoders, slimming, alignment, losses, metrics, engine."""
