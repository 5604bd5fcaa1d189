"""Candidates for the launch tables."""
