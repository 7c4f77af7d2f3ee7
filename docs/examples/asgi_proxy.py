"""A proxy in Starlette before two engines. Run: ``uvicorn asgi_proxy:app --port 9000``."""

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from mulsched.adapters.asgi import INSTANCE, LMetricMiddleware

JSON = {"Content-Type": "application/json"}  # vLLM refuses any other

client = httpx.AsyncClient(timeout=None)


async def forward(request: Request) -> StreamingResponse:
    """Send a request to the instance that was chosen for it, and its answer back as it comes."""
    url = getattr(request.state, INSTANCE) + request.url.path
    outgoing = client.build_request("POST", url, content=await request.body(), headers=JSON)
    answer = await client.send(outgoing, stream=True)
    return StreamingResponse(
        answer.aiter_raw(),
        status_code=answer.status_code,
        media_type=answer.headers.get("content-type"),
        background=BackgroundTask(answer.aclose),
    )


app = LMetricMiddleware(
    Starlette(routes=[Route("/{path:path}", forward, methods=["POST"])]),
    instances=["http://127.0.0.1:8000", "http://127.0.0.1:8001"],
)
