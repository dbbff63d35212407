"""The stages of a run: Ray, storage and the run directory around the maths."""
