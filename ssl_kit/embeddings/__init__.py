"""The folder that `embed` writes: vectors with ids, and the index over them."""
