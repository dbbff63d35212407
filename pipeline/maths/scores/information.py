"""`information`: how much a step along the adaptation direction moves what is predicted, whatever the label.

A mask that is computed once must not choose by the label: in one and the same context it would keep some labels and
drop others, always the same ones, and training on what is left learns another distribution than the data's.
`information` does not look at the label. With u = the logits' derivative along M and p = their softmax it is

    Var_p(u) = sum_y p_y (grad log p_y, M)^2 = vec(M)' F_t vec(M)

the Fisher information of the token's prediction along M, twice the Kullback-Leibler divergence per squared step:
high where a step along M changes what is predicted, 0 where the prediction is settled. It has no sign, and so it says
where there is something to learn, but not which tokens pull the model away. Quadratic in the direction.
"""

import torch

from alphatoken.pipeline.maths.head import Predictions
from alphatoken.pipeline.maths.scores.kinds import HeadScore

ALONG = "adaptation"


def information(found: Predictions) -> torch.Tensor:
    """(n,): the variance of the logits' derivative under their softmax; 0 along a direction of zeros."""
    if ALONG not in found.moved:
        return found.probability.new_zeros(len(found.probability))
    moved = found.moved[ALONG]
    centred = torch.sub(moved, found.expectation(moved)[:, None], out=found.scratch)
    return centred.square_().mul_(found.probability).sum(dim=1)


INFORMATION = HeadScore({"information": information}, (ALONG,))
