"""Self-supervised pretraining for images: a folder in; an encoder, an honest verdict and a searchable index out."""

__version__ = "0.1.0"
