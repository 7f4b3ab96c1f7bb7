"""Files and bytes: checkpoints written atomically, whole or sharded, synchronously or in the background."""
