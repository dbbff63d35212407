"""AlphaToken: path-aware values of response tokens, and masks from them.

    from alphatoken import Directions, TokenValuer
    valuer = TokenValuer(model, Directions.load("RUN/anchors/snapshot-00"), layers=3, window=32)
    values = valuer(input_ids, attention_mask, labels)

Source of the method: AlphaToken, arXiv 2606.01635. The names are loaded when first used, so that `import alphatoken`
costs no torch. In the repository this folder is the front door alone; pyproject.toml puts `pipeline`, `jobs`, `conf` and
`data_schemas` into this package, so that nothing else appears at the top of site-packages.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphatoken.pipeline.maths.directions import Directions
    from alphatoken.pipeline.maths.valuer import TokenValuer

__all__ = ["Directions", "TokenValuer"]

_here = Path(__file__).parent
if not (_here / "pipeline").is_dir():  # in the repository, also as a job's working directory: its parts lie beside it
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    if name == "Directions":
        from alphatoken.pipeline.maths.directions import Directions

        return Directions
    if name == "TokenValuer":
        from alphatoken.pipeline.maths.valuer import TokenValuer

        return TokenValuer
    raise AttributeError(f"module 'alphatoken' has no attribute {name!r}")
