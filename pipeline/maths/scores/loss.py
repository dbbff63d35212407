"""`loss`: the token's cross-entropy under the policy, in nats, never negative.

The small-loss criterion takes it as a filter against wrong tokens: what a model finds very unlikely is more often wrong
than the rest (Co-teaching, Han et al. 2018, arXiv 1804.06872). Where the data is clean, what is still to be learned also
has a high loss. Less the loss under a model that was trained on good data of the target it is Rho-1's excess loss (Lin et
al. 2024, arXiv 2404.07965).
"""

from alphatoken.pipeline.maths.head import Predictions
from alphatoken.pipeline.maths.scores.kinds import HeadScore

LOSS = HeadScore({"loss": Predictions.losses})
