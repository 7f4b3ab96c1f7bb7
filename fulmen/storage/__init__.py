"""Files and bytes: checkpoints on a disk that are old or complete, whole or sharded, at once or in the background."""
