"""What a `.ckpt` file holds, which file to load, and objects made from it."""
