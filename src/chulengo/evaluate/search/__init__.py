"""Hyper-parameter search and the sample-size curve, both on short runs."""
