"""Decoder, mixers, caches, and stock checkpoints."""
