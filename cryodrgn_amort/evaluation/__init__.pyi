from .comparison import (
    compare as compare,
    comparison_table as comparison_table,
    write_comparison as write_comparison,
)
from .evaluator import assist as assist, evaluate as evaluate
from .scores import add_scores as add_scores, load_scores as load_scores
