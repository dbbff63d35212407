"""The maths: torch and transformers only. No Ray, no Hydra, no file formats beyond loading directions."""
