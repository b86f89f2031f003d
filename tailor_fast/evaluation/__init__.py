"""What models say to old and new tasks, and how well that agrees with the right answers."""

from tailor_fast.evaluation.generating import GenerationOptions
from tailor_fast.evaluation.job import EvaluationTask, evaluate_models
from tailor_fast.evaluation.metrics import METRICS
from tailor_fast.evaluation.table import ModelScores, table_rows

__all__ = [
    "METRICS",
    "EvaluationTask",
    "GenerationOptions",
    "ModelScores",
    "evaluate_models",
    "table_rows",
]
