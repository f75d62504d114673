"""Command line and other front ends; no algorithm lives here."""
