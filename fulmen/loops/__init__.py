"""The loops that train, evaluate and predict, and what belongs to a run rather than to a part of it."""
