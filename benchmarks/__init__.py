"""Measurements behind the project's claims."""
