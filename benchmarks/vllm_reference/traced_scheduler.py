"""vLLM's own scheduler, which also writes down what it does; loaded by vLLM through --scheduler-cls.

One JSON object a line, into the file that MULSCHED_VLLM_TRACE names. Nothing is decided here.
"""

import json
import os

from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.v1.core.sched.scheduler import Scheduler


class TracedScheduler(Scheduler):
    """Writes arrivals, preemptions, steps and KV events in the order in which they happen."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # line by line: a reader sees all of a step before the step's answers go out
        self._trace = open(os.environ["MULSCHED_VLLM_TRACE"], "w", buffering=1)  # noqa: SIM115
        publish = self.kv_event_publisher.publish

        def publish_and_write(batch):
            for event in batch.events:
                if isinstance(event, BlockStored):
                    self._write(stored=event.block_hashes, parent=event.parent_block_hash)
                elif isinstance(event, BlockRemoved):
                    self._write(removed=event.block_hashes)
            publish(batch)

        self.kv_event_publisher.publish = publish_and_write

    def _write(self, **line):
        self._trace.write(json.dumps(line) + "\n")

    def add_request(self, request):
        super().add_request(request)
        self._write(added=request.request_id)

    def _preempt_request(self, request, *args, **kwargs):
        self._write(preempted=request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def schedule(self, *args, **kwargs):
        output = super().schedule(*args, **kwargs)
        tokens = output.num_scheduled_tokens
        if tokens:
            # in the order of scheduling: request, tokens it had, tokens it got
            step = [[name, self.requests[name].num_computed_tokens - n, n] for name, n in tokens.items()]
            self._write(step=step)
        return output
