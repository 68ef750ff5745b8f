"""Cutaway's client."""
