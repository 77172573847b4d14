"""What item embeddings hold: the text alone, company and captions, each alone, and both.

python -m bench.collaborative [--data DIR] [--kinds company,captions,both] [--seeds 1] [--epochs 30] [--cold]
    [--threads 1] [--json FILE]

Without --data on MovieLens-100k. For each kind of embedding: HR@10 and NDCG@10 of the nearest items to the last one
(leave one out, test users, full ranking); of the pairs that are near each other in the whole sequences and not in their
training part, the share whose second item is among the first one's 10 nearest, its training partners left out; the
share of word pieces that a new decoder names, trained on the encoder's fixed outputs so that kinds compare.
--cold: the nearest items again, for items that neither texts nor sequences of the training have. More than one
seed: of the last kind alone. TIGER on IDs of both embeddings: vqkernels compare --methods rkmeans,collaborative.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from vqkernels.data import embed_texts, load_folder, movielens100k
from vqkernels.data.text import STATE_TOKENS, token_states
from vqkernels.info import machine
from vqkernels.models.resampler import CaptionDecoder
from vqkernels.recommend import CollaborativeEncoder, ContentNeighbours, cold_split, evaluate, leave_one_out
from vqkernels.recommend.baselines import top_k
from vqkernels.recommend.collaborative import Pairs

KINDS = {
    "company": {"caption_weight": 0.0},
    "captions": {"contrastive_weight": 0.0},
    "both": {},
}
SHOWN = ("Toy Story", "Star Wars", "Alien", "Fargo", "Cinderella")


def new_pairs_found(embeddings: np.ndarray, train: Pairs, whole: Pairs) -> float:
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    found = asked = 0
    for item in np.flatnonzero(whole.degree):
        known = train.others[train.starts[item] : train.starts[item + 1]]
        new = np.setdiff1d(whole.others[whole.starts[item] : whole.starts[item + 1]], known)
        scores = unit @ unit[item]
        scores[known], scores[item] = -np.inf, -np.inf
        found += len(np.intersect1d(new, top_k(scores[None], 10)[0]))
        asked += len(new)
    return found / asked


def probe(encoder: CollaborativeEncoder, texts, epochs: int, seed: int) -> tuple[float, float]:
    """Caption accuracy of a decoder that is trained on the encoder's outputs as they are."""
    sizes = {name: encoder._config[name] for name in ("width", "queries", "heads", "dropout")}
    torch.manual_seed(seed)
    decoder = CaptionDecoder(len(encoder.net.vocabulary), longest=STATE_TOKENS, **sizes)
    encoder.net.decoder, rng = decoder, np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    items = len(texts.starts) - 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * -(-items // 64), pct_start=0.1)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(items), -(-items // 64)):
            with torch.no_grad():
                queries = encoder._read(texts, rows)
            loss = torch.nn.functional.cross_entropy(*encoder._captions(texts, rows, queries))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    decoder.eval()
    return encoder._caption_accuracy(texts)


def unseen(catalogue, epochs: dict, seed: int) -> dict:
    split = cold_split(catalogue.sequences, share=0.1, seed=seed)
    warm = np.setdiff1d(np.arange(1, catalogue.num_items + 1), split.cold_items)
    texts = catalogue.item_texts
    encoder = CollaborativeEncoder(seed=seed).fit(
        [texts[i - 1] for i in warm], [np.searchsorted(warm, s) + 1 for s in split.train], **epochs
    )
    kinds = {"text": embed_texts(texts, "minilm")[0], "both": encoder.encode(texts)}
    parts = {"in-set": split.in_set, "cold": split.cold}
    return {kind: {n: evaluate(ContentNeighbours(e), q) for n, q in parts.items()} for kind, e in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    catalogue = load_folder(args.data) if args.data else movielens100k()
    split, titles = leave_one_out(catalogue.sequences), catalogue.item_titles
    train, whole = (Pairs(s, catalogue.num_items) for s in (split.train, catalogue.sequences))
    raw = embed_texts(catalogue.item_texts, "minilm")[0]
    began = time.process_time()
    states = token_states(catalogue.item_texts)
    print(f"{catalogue}; {machine()}\ntoken states: {time.process_time() - began:.0f} s of processor time", flush=True)
    epochs = {"epochs": args.epochs} if args.epochs else {}
    records = []
    for seed in range(args.seeds):
        made = {"text": raw}
        for kind in filter(None, args.kinds.split(",")) if seed == 0 else ["both"]:
            options = KINDS[kind]
            began = time.process_time()
            encoder = CollaborativeEncoder(**options, seed=seed).fit(catalogue.item_texts, split.train, **epochs)
            seconds = time.process_time() - began
            made[kind] = encoder.encode(catalogue.item_texts)
            own, other = probe(encoder, states, len(encoder.history), seed)
            records.append({"kind": kind, "seed": seed, "seconds": seconds, "caption": own, "caption_of_other": other})
        for kind, embeddings in made.items():
            scores = evaluate(ContentNeighbours(embeddings), split.test)
            extra = next((r for r in records if r["kind"] == kind and r["seed"] == seed), None)
            if extra is None:
                extra = {"kind": kind, "seed": seed}
                records.append(extra)
            extra |= scores | {"new_pairs": new_pairs_found(embeddings, train, whole)}
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in extra.items()}), flush=True)
        if args.cold:
            records.append({"kind": "cold", "seed": seed, **unseen(catalogue, epochs, seed)})
            print(json.dumps(records[-1]), flush=True)
        for name in SHOWN if seed == 0 else ():
            item = next((i for i, title in enumerate(titles) if title.startswith(name)), None)
            for kind in made if item is not None else ():
                near = ContentNeighbours(made[kind]).recommend_batch([np.array([item + 1])], 5)[0][0]
                print(f"{titles[item]}, {kind}: " + "; ".join(titles[i - 1] for i in near), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "data": catalogue.name, "records": records}, indent=1))


if __name__ == "__main__":
    main()
