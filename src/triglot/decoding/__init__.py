"""Choosing tokens: rules and sampling as pure functions, search over anything that can take a step."""
