"""Text against text: captions matched with dense texts, no pixel seen and nothing trained.

What any result that reads dense texts is to be held against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lib.errors import InputError

BATCH = 64  # texts that an encoder reads at once


def tfidf_similarity(dense: Sequence[str], captions: Sequence[str]) -> np.ndarray:
    """Return the cosines of TF-IDF vectors, (N_images, N_captions) float32.

    Term counts enter as 1 + log; document frequencies are those of the dense texts alone, as these
    are what a gallery knows before it is asked. Raises InputError without scikit-learn.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise InputError(
            f"the TF-IDF baseline needs scikit-learn: pip install scikit-learn ({error})"
        ) from None
    words = TfidfVectorizer(sublinear_tf=True).fit(dense)
    images, texts = words.transform(dense), words.transform(captions)
    return (images @ texts.T).toarray().astype(np.float32)


def encoder_similarity(
    folder: str,
    dense: Sequence[str],
    captions: Sequence[str],
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the cosines of a text encoder's mean embeddings, (N_images, N_captions) float32.

    `folder` is a hub id or a folder of transformers; the mean is over real tokens. Raises
    InputError where it can't be loaded.
    """
    from transformers import AutoModel, AutoTokenizer  # slow to import

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"--encoder {folder} can't be loaded ({told:.160})") from None
    longest = min(512, getattr(model.config, "max_position_embeddings", 512))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def embed(texts: Sequence[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            ).to(device)
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state  # (B, M, C)
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            rows.append((hidden * mask).sum(1) / mask.sum(1))  # (B, C)
            progress(len(rows[-1]))
        return torch.nn.functional.normalize(torch.cat(rows), dim=-1)

    return (embed(dense) @ embed(captions).T).float().cpu().numpy()
