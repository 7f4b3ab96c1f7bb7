"""The `fulmen` command."""
