"""Forecasts: plain samples in, a number or why there is none out. They enter policies as signals."""
