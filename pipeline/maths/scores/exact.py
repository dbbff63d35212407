"""`adaptation_exact`, `stability_exact` (valuation.exact=true): the derivative of each token's own loss along a direction.

`adaptation_direct` splits the training gradient by position; a mask removes one token's loss. What that is worth to first
order is <gradient of the token's own loss, M>, for all tokens at once by forward-mode differentiation. Positive: a step
against the gradient of this token's loss goes along the direction's descent, as in the paper's columns, and over a whole
sequence, all positions included, both sum to the same number.
"""

import torch

from alphatoken.pipeline.maths.head import Predictions, Reading
from alphatoken.pipeline.maths.scores.kinds import HeadScore


def along(direction: str) -> Reading:
    """(n,): sum of p u less u at the token, u = the logits' derivative along ``direction``; 0 along zeros."""

    def derivative(found: Predictions) -> torch.Tensor:
        if direction not in found.moved:
            return found.probability.new_zeros(len(found.probability))
        moved = found.moved[direction]
        return found.expectation(moved) - found.at_target(moved)

    return derivative


DIRECTIONS = ("adaptation", "stability")
EXACT = HeadScore({f"{direction}_exact": along(direction) for direction in DIRECTIONS}, DIRECTIONS)
