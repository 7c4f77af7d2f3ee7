"""Results of experiments by hand, without replays."""

from mulsched.replay.confidence import half_width
from mulsched.replay.results import Results, Row, Run

SETTINGS = {
    "mulsched": "0.1.0",
    "backend": "native",
    "command": "mulsched replay",
    "notes": [],
    "engine": {"name": "builtin-8b"},
    "trace": "made",
    "synthetic": False,
    "profile": "builtin-8b",
    "instances": 2,
    "kv_blocks": 100,
    "loop": "open",
    "cache_source": "events",
    "seed": 0,
    "repeat": 1,
    "rate_scales": [1.0],
    "sweep": None,
    "tune": [],
    "objective": None,
    "slo": None,
}
FIGURES = {
    **{f"ttft_{q}_s": 0.1 for q in ("mean", "p50", "p95", "p99")},
    **{f"tpot_{q}_s": 0.01 for q in ("mean", "p50", "p95", "p99")},
    "requests_per_s": 2.0,
    "output_tokens_per_s": 100.0,
    "hit_ratio": 0.5,
    "request_spread": 1.0,
    "prefill_spread": 1.0,
}


class MadeResults:
    """Collects rows; a row's figures are FIGURES but for those given, one value or one a run."""

    def __init__(self, **settings):
        self.settings = SETTINGS | settings
        self.rows, self.runs = [], []

    def add(self, label, *, role="result", tuned=False, rate=1.0, series=None, parameters=None, **figures):
        repeats = max((len(v) for v in figures.values() if isinstance(v, list)), default=1)
        numbers = range(len(self.runs), len(self.runs) + repeats)
        values = {
            name: figures[name]
            if isinstance(figures.get(name), list)
            else [figures.get(name, value)] * repeats
            for name, value in (FIGURES | figures).items()
        }
        policy = label.partition("(")[0]
        own = {"label": label, "policy": policy, "parameters": parameters or {}, "rate_scale": rate}
        for i, number in enumerate(numbers):
            one = {name: v[i] for name, v in values.items()}
            self.runs.append(
                Run(
                    number=number,
                    offered_per_s=10 * rate,
                    requests=20,
                    seed=i,
                    ties="random",
                    figures=one,
                    **own,
                )
            )
        self.rows.append(
            Row(
                series=series or label,
                role=role,
                tuned=tuned,
                offered_per_s=10 * rate,
                runs=list(numbers),
                figures={name: sum(v) / repeats for name, v in values.items()},
                half_widths={name: half_width(v) for name, v in values.items()} if repeats > 1 else {},
                **own,
            )
        )
        return self

    def results(self):
        return Results(self.settings, self.rows, self.runs)
