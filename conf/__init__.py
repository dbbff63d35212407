"""Hydra configuration, found as the package `alphatoken.conf` from a checkout and from an installed wheel alike."""
