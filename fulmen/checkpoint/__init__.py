"""Snapshots out and in: the chapters of a `.ckpt` file, where it lies, and objects made from it."""
