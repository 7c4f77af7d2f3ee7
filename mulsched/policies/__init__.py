"""Whole policies by name: LMetric, the baselines of its paper, and those of other routers."""

from mulsched.policies._policy import Filter, Policy, Ties, get, names, parameters, register
from mulsched.policies._spec import PolicySpec, parse_spec
from mulsched.policies.affinity import consistent_hash_bounded, least_p_tokens, most_hits, sticky
from mulsched.policies.gated import aibrix, llm_d, preble, sglang_cache_aware
from mulsched.policies.guarded import lmetric_guarded, lmetric_paper_detector
from mulsched.policies.linear import bailian, dynamo, linear
from mulsched.policies.lmetric import lmetric
from mulsched.policies.load_only import least_loaded, power_of_two, random, round_robin, vllm
from mulsched.policies.predicted import least_ttft, polyserve

__all__ = [
    "Filter",
    "Policy",
    "PolicySpec",
    "Ties",
    "aibrix",
    "bailian",
    "consistent_hash_bounded",
    "dynamo",
    "get",
    "least_loaded",
    "least_p_tokens",
    "least_ttft",
    "linear",
    "llm_d",
    "lmetric",
    "lmetric_guarded",
    "lmetric_paper_detector",
    "most_hits",
    "names",
    "parameters",
    "parse_spec",
    "polyserve",
    "power_of_two",
    "preble",
    "random",
    "register",
    "round_robin",
    "sglang_cache_aware",
    "sticky",
    "vllm",
]
