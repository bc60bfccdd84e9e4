"""Helpers that clients import."""
