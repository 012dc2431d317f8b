"""An estimator for scikit-learn: images in, features out; fitted on images without labels."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from ssl_kit.api import Run, pretrain
from ssl_kit.core.console import spoken
from ssl_kit.core.sealed import Entries
from ssl_kit.data.given import channels_last
from ssl_kit.data.opening import open_source
from ssl_kit.embeddings.embeddings import embed
from ssl_kit.encoders.network import Network

_CUT = (0.1, 99.9)  # percentiles of tabular values that become 0 and 1
_SMALLEST = 8  # pixels of a view


class SSLTransformer(TransformerMixin, BaseEstimator):
    """Learns an encoder from images and turns images into its features.

    `make_pipeline(SSLTransformer(epochs=20), LogisticRegression())` learns features without labels, and then a
    classifier with them.

    Args:
        recipe: as `ssl_kit.pretrain` takes it: simclr, mae, vae, byol, a packaged recipe or a file.
        encoder: a timm model or a network, see `ssl_kit.pretrain`; by default the method's own.
        epochs: passes over the images; by default as many as `ssl_kit.pretrain` takes.
        image_shape: (height, width) or (height, width, channels) of the rows of a table of numbers; by default they are
            the pixels of a square grey image, which is filled up with zeros.
        random_state: seed of everything random.
        folder: to keep the run in; by default it goes once the encoder is there.
        options: further ones of `ssl_kit.pretrain`, such as `{"image_size": 64}`.

    Attributes:
        encoder_: the trained encoder.
        verdict_: what the run says of itself: {"state", "reason"}.
        n_features_in_: of a table of numbers.
    """

    def __init__(
        self,
        recipe: str = "simclr",
        encoder: str | Network | None = None,
        epochs: float | None = None,
        image_shape: tuple[int, ...] | None = None,
        random_state: int = 0,
        folder: str | None = None,
        options: Entries | None = None,
    ):
        self.recipe = recipe
        self.encoder = encoder
        self.epochs = epochs
        self.image_shape = image_shape
        self.random_state = random_state
        self.folder = folder
        self.options = options

    def fit(self, X: Any, y: Any = None) -> SSLTransformer:
        """Trains an encoder.

        Args:
            X: (N, F) numbers, an image in each row; or what `ssl_kit.pretrain` takes: a folder, (N, H, W, C) arrays, a
                list of files or pictures, a data set.
            y: is ignored.
        """
        images, options = self._images(X, fitting=True), {"seed": self.random_state, **(self.options or {})}
        if isinstance(images, np.ndarray) and images.dtype.kind == "f" and "range" not in options:
            low, high = np.percentile(images, _CUT)
            options["range"] = f"{low:.9g},{high if high > low else low + 1:.9g}"
        if isinstance(images, np.ndarray):
            with spoken(False):
                options.setdefault("channels", channels_last(images, 3).shape[3])
        if self.epochs is not None:
            options["epochs"] = self.epochs
        with tempfile.TemporaryDirectory() as temporary:
            run = str(Path(self.folder or temporary) / "run") if self.folder is None else self.folder
            trained: Run = pretrain(images, recipe=self.recipe, encoder=self.encoder, run=run, verbose=False, **options)
            self.encoder_ = trained.encoder
            self.verdict_ = trained["verdict"]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """(N, dim) float32 features of images, as `fit` takes them."""
        check_is_fitted(self)
        images = self._images(X, fitting=False)
        with spoken(False):
            source = open_source(images, reading=self.encoder_.reading, least=1)
            return np.array(embed(self.encoder_, source, precision="float32").vectors)

    def _images(self, X: Any, *, fitting: bool) -> Any:
        """Rows of a table as images (N, H, W, C); everything else as it is."""
        listed = isinstance(X, list | tuple) and len(X) > 0 and isinstance(X[0], list | tuple)
        dimensions = np.asarray(X).ndim if hasattr(X, "__array__") else getattr(X, "ndim", None)  # of sparse ones
        if not listed and dimensions not in (0, 1, 2):
            return X
        rows = validate_data(self, X, reset=fitting, dtype=np.float32, ensure_min_samples=2 if fitting else 1)
        shape = self.image_shape or (max(_SMALLEST, math.ceil(math.sqrt(rows.shape[1]))),) * 2
        filled = np.zeros((len(rows), math.prod(shape)), np.float32)
        filled[:, : rows.shape[1]] = rows
        return filled.reshape(len(rows), *shape)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # features are float32
        return tags
