"""Our replay beside the offline simulator of ai-dynamo-runtime: same trace, policy, blocks and step times.

``pip install '.[dynamo]'``, then ``cd benchmarks && python -m dynamo_replay``; docs/dynamo-crosscheck.md says
what it found.
"""
