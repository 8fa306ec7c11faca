"""Answers before a deadline: one problem in the terminal, or an OpenAI-style server."""
