"""The router inside other projects' gateways: a module or package for each, each an extra."""
