"""Failure detection: who died, who stands still, and what every process was doing when that happened."""
