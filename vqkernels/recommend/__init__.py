"""Recommendation on semantic IDs: TIGER, the baselines beside it, and their evaluation."""

from .baselines import ContentNeighbours, Markov, Popularity
from .collaborative import CollaborativeEncoder, collaborative_embeddings
from .evaluation import ColdSplit, Queries, Split, cold_split, evaluate, leave_one_out, metrics
from .liger import LIGER
from .sasrec import SASRec
from .tiger import TIGER

__all__ = [
    "LIGER",
    "TIGER",
    "ColdSplit",
    "CollaborativeEncoder",
    "ContentNeighbours",
    "Markov",
    "Popularity",
    "Queries",
    "SASRec",
    "Split",
    "cold_split",
    "collaborative_embeddings",
    "evaluate",
    "leave_one_out",
    "metrics",
]
