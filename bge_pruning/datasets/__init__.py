"""Readers and loaders of training data."""
