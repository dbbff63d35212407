"""AlphaToken: path-aware values of response tokens, and masks from them.

    from pipeline import Directions, TokenValuer
    valuer = TokenValuer(model, Directions.load("RUN/anchors/snapshot-00"), layers=3, window=32)
    values = valuer(input_ids, attention_mask, labels)

Source of the method: AlphaToken, arXiv 2606.01635. The names are loaded when first used, so that `import pipeline`
costs no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.maths.directions import Directions
    from pipeline.maths.valuer import TokenValuer

__all__ = ["Directions", "TokenValuer"]


def __getattr__(name: str) -> Any:
    if name == "Directions":
        from pipeline.maths.directions import Directions

        return Directions
    if name == "TokenValuer":
        from pipeline.maths.valuer import TokenValuer

        return TokenValuer
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
