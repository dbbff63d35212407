"""What a plan is told beside the run that it plans."""

from dataclasses import dataclass
from typing import Any

from alphatoken.pipeline.settings.option import option


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """Configuration group ``plan``."""

    price: Any = option(
        None,
        "of one hour of a device, in any currency, with which `plan` turns device-hours into money: a number for all devices, or "
        "{part of a name: number}, such as {H100: 2.5, A100: 1.2}",
    )

    def problems(self) -> list[str]:
        """Every reason why these settings cannot be used, one sentence each."""
        prices = self.price if isinstance(self.price, dict) else {"": self.price}
        return [
            f"plan.price{f'.{name}' if name else ''}={one}: must be a number, 0 or more"
            for name, one in prices.items()
            if not (one is None and not name)
            and (isinstance(one, bool) or not isinstance(one, int | float) or not one >= 0)
        ]
