"""Choosing tokens: rules and sampling as pure functions, search over anything that can take a step.

The loops over tokens are here; models made ready to take their steps fast, and text in and out, in `generation`.
"""
