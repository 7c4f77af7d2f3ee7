"""production-stack's router with LMetric as its routing logic; takes all options of ``vllm-router``.

Needs ``vllm_router`` from the repository vllm-project/production-stack (``pip install`` there, not from an
index). It wants a routing logic by name, which is replaced. Before three mock engines::

    mulsched mock-engine --count 3 --port 8000 &
    python docs/examples/production_stack.py --host 127.0.0.1 --port 9000 --routing-logic roundrobin \\
        --service-discovery static --static-models mock,mock,mock \\
        --static-backends http://127.0.0.1:8000,http://127.0.0.1:8001,http://127.0.0.1:8002 &
    curl 127.0.0.1:9000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "mock", "prompt": "Hello", "max_tokens": 4}'
"""

import uvicorn
from vllm_router.app import app, initialize_all
from vllm_router.parsers.parser import parse_args

from mulsched.adapters.production_stack import install

if __name__ == "__main__":
    args = parse_args()
    router = install(app, cache_tokens=100_000)  # before the server starts
    initialize_all(app, args)
    router.take_over(app)  # in place of the routing logic that was named
    uvicorn.run(app, host=args.host, port=args.port)
