"""The scores: what is computed for every response token, one small file each, all from one pass.

A score is read off the softmax (`HeadScore`) or off input and error of the scored linear maps (`LayerScore`). To add one,
write its file here, name it in `SCORES` below and its columns in data_schemas/values.py; docs/extending.md is a worked
example. Columns mean the same whatever else is computed.
"""

from __future__ import annotations

from alphatoken.pipeline.maths.scores.entropy import ENTROPY
from alphatoken.pipeline.maths.scores.exact import EXACT
from alphatoken.pipeline.maths.scores.gradient_norm import GradientNorm
from alphatoken.pipeline.maths.scores.information import INFORMATION
from alphatoken.pipeline.maths.scores.kinds import HeadScore, LayerScore
from alphatoken.pipeline.maths.scores.loss import LOSS
from alphatoken.pipeline.maths.scores.paper import Paper

# In the order of their columns.
SCORES: dict[str, HeadScore | type[LayerScore]] = {
    "paper": Paper,
    "information": INFORMATION,
    "loss": LOSS,
    "entropy": ENTROPY,
    "gradient_norm": GradientNorm,
    "exact": EXACT,
}
