"""`entropy`: how undecided the policy is before the token, in nats, from 0 to log(vocabulary).

    -sum over the vocabulary of p log p,   p = the policy's distribution before the token

The few tokens of high entropy are where a text decides how it goes on; reinforcement learning on these alone does as
well as on all ("Beyond the 80/20 Rule", Wang et al. 2025, arXiv 2506.01939). Does not look at the token itself.
"""

import torch

from alphatoken.pipeline.maths.head import Predictions
from alphatoken.pipeline.maths.scores.kinds import HeadScore


def entropy(found: Predictions) -> torch.Tensor:
    """(n,): log of the sum of exp(s) less the mean of s under p, s = logits less their largest.

    A logit of minus infinity is a token that cannot follow: it adds nothing.
    """
    finite = torch.clamp(found.shifted, min=torch.finfo(found.shifted.dtype).min, out=found.scratch)
    return found.total.log().squeeze(1) - finite.mul_(found.probability).sum(dim=1)


ENTROPY = HeadScore({"entropy": entropy})
