"""When a hot prefix makes LMetric herd: the cases, replayed.

``cd benchmarks && python -m failure.run`` and ``python -m failure.page``.
"""
