"""Measured speed beside what the machine could do at best."""
