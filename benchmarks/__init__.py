"""Speed, memory and call counts of a trainer beside the loop one would write by hand. See README.md in this folder."""
