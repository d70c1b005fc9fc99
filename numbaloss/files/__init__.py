"""Logits and targets in files: read in blocks, scored with bounded memory."""

from .readers import FileError
from .score import Score, score

__all__ = ["FileError", "Score", "score"]
