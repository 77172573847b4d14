"""Recommendation on semantic IDs: TIGER, the baselines beside it, and their evaluation."""

from .baselines import ContentNeighbours, Markov, Popularity
from .evaluation import Queries, Split, evaluate, leave_one_out, metrics
from .tiger import TIGER

__all__ = [
    "TIGER",
    "ContentNeighbours",
    "Markov",
    "Popularity",
    "Queries",
    "Split",
    "evaluate",
    "leave_one_out",
    "metrics",
]
