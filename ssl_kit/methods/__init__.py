"""One file = one paper. A method is an encoder, a loss over views, and nothing about data or evaluation."""
