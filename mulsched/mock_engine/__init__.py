"""A server that speaks as vLLM does, with the engine model of replay where the GPU would be.

``engine``: which request gets which token when; no clock, no sockets. ``tokenizer``: text to tokens and back.
``kv_events``: what changes in the cache, over ZeroMQ. ``protocol``: what requests ask for and what answers
look like. ``metrics``: the page of Prometheus. ``server``: all of it behind HTTP.
The last four need the extra ``gateway``.
"""
