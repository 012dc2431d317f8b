"""Sources of images, decoding, and the loader that turns them into batches of views."""
