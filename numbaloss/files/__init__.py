"""Logits and targets in files: read in blocks, scored and compared with bounded memory."""

from .compare import Comparison, compare
from .readers import FileError
from .run import Interrupted
from .score import Score, score

__all__ = ["Comparison", "FileError", "Interrupted", "Score", "compare", "score"]
