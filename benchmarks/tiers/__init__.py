"""What it brings to count copies in the host's memory, on modelled engines that offload there."""
