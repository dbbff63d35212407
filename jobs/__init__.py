"""Entry points: one short file per stage, the command line, and the configuration. Hydra lives here alone."""
