"""The heart: routing, balance and dispatch."""
