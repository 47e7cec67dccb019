"""Choosing tokens: sampling as pure functions, search over anything that can take a step."""
