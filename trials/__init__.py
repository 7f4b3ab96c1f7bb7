"""What is tried hundreds of times, with real kills and real files: run one with ``python -m trials.NAME``."""
