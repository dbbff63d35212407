"""Where the anchor stage keeps its files, and how much goes through the model at a time."""

PARTIAL = "anchors/partial"  # what is needed until the stage is done
FISHER = "anchors/fisher.safetensors"
FACTORS = f"{PARTIAL}/factors.safetensors"
REFERENCE = f"{PARTIAL}/reference.safetensors"
GRADIENT = PARTIAL + "/gradient-{index:02d}.safetensors"  # of adaptation; of an unrolled run, minus its residual
STABILITY = PARTIAL + "/stability-{index:02d}.safetensors"  # minus an unrolled run's residual
POLICY = "anchors/snapshot-{index:02d}/policy.safetensors"
TOKENS_PER_PASS = 4096
