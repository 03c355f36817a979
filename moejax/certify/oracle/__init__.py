"""Routing and balance in slow float64 NumPy, written from the papers."""
