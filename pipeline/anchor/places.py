"""Where the anchor stage keeps its files, and how much goes through the model at a time."""

PARTIAL = "anchors/partial"  # what is needed until the stage is done
FISHER = "anchors/fisher.safetensors"
FACTORS = f"{PARTIAL}/factors.safetensors"
REFERENCE = f"{PARTIAL}/reference.safetensors"
GRADIENT = PARTIAL + "/gradient-{index:02d}.safetensors"  # of adaptation; of an unrolled run, minus its residual
STABILITY = PARTIAL + "/stability-{index:02d}.safetensors"  # minus an unrolled run's residual
POLICY = "anchors/snapshot-{index:02d}/policy.safetensors"
TOKENS_PER_PASS = 4096


def made(objective: str, index: int) -> str:
    """What is known of an objective's direction at a snapshot before it is preconditioned and scaled."""
    place = {"adaptation": GRADIENT, "stability": STABILITY}.get(
        objective, PARTIAL + "/" + objective + "-{index:02d}.safetensors"
    )
    return place.format(index=index)
