"""Lengths and samples on disk."""
