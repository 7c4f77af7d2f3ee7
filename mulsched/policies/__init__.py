"""Whole policies by name: LMetric, the baselines of its paper, and those of other routers."""

from mulsched.policies._policy import Filter, Policy, Ties, get, names, register
from mulsched.policies.lmetric import lmetric

__all__ = ["Filter", "Policy", "Ties", "get", "lmetric", "names", "register"]
