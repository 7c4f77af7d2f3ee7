"""An endpoint picker for Envoy and Kubernetes' Inference Extension. Extra ``mulsched[envoy]``."""

from mulsched.adapters.envoy.exchange import Exchange
from mulsched.adapters.envoy.fleet import Fleet, check_endpoint
from mulsched.adapters.envoy.picker import EndpointPicker, Pick, Refusal
from mulsched.adapters.envoy.server import PickerServer

__all__ = ["EndpointPicker", "Exchange", "Fleet", "Pick", "PickerServer", "Refusal", "check_endpoint"]
