"""Steering as a differential equation: fields, barriers, and the flows that follow them."""
