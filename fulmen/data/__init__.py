"""Batches in: who gives the loaders, how they are checked, combined and read."""
