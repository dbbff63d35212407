"""The library, from the ground up: settings and maths, run, cluster, prepare, anchor, value, mask, report, plan.

Imports go down only. `from alphatoken import Directions, TokenValuer` needs maths alone.
"""
