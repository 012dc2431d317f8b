"""ssl_kit from Python: the verbs as functions, a run as an object, and an estimator for scikit-learn's pipelines.

    run = ssl_kit.pretrain(images, recipe="mae", epochs=20)     # a folder, arrays, a data set, ...: see data/opening.py
    run.encoder; run.embed(images); run.evaluate((images, labels)); run.search(image, k=5); run.report

Nothing is printed of what to type next, and nothing at all but warnings with `verbose=False`.
"""

from __future__ import annotations

import ast
import functools
import html
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ssl_kit import methods
from ssl_kit.core.console import spoken
from ssl_kit.core.errors import UserError
from ssl_kit.core.files import MANIFEST, read_json, read_manifest
from ssl_kit.core.owned import RUN
from ssl_kit.core.sealed import LARGE_JSON, Entries
from ssl_kit.data.given import is_one_image
from ssl_kit.data.opening import Data, open_source
from ssl_kit.embeddings.embeddings import Embeddings
from ssl_kit.embeddings.embeddings import embed as embedded
from ssl_kit.embeddings.search import Image, Index, Neighbour, has_index
from ssl_kit.encoders.encoder import Encoder
from ssl_kit.encoders.network import Network, register
from ssl_kit.verbs import doctor as verbs_doctor
from ssl_kit.verbs import drift as verbs_drift
from ssl_kit.verbs import duplicates as verbs_duplicates
from ssl_kit.verbs import embed as verbs_embed
from ssl_kit.verbs import evaluate as verbs_evaluate
from ssl_kit.verbs import export as verbs_export
from ssl_kit.verbs import finetune as verbs_finetune
from ssl_kit.verbs import index as verbs_index
from ssl_kit.verbs import pack as verbs_pack
from ssl_kit.verbs import plan as verbs_plan
from ssl_kit.verbs import pretrain as verbs_pretrain
from ssl_kit.verbs import report as verbs_report
from ssl_kit.verbs import search as verbs_search
from ssl_kit.verbs import views as verbs_views
from ssl_kit.verbs.recipes import packaged, read_how
from ssl_kit.views.recipe import ViewRecipe

_METHODS = Path(methods.__file__).parent


def quiet_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A verb with the argument `verbose`, and without hints at what to type next."""

    @functools.wraps(function)
    def call(*given: Any, verbose: bool = True, **named: Any) -> Any:
        known = inspect.signature(function).parameters
        if unknown := [name for name in named if name not in known]:
            raise TypeError(f"{function.__name__}() takes no {unknown[0]!r}; it takes {', '.join(known)}, verbose")
        with spoken(verbose):
            return function(*given, **named)

    signature = inspect.signature(function)
    verbose = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    vars(call)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), verbose])
    return call


doctor, drift = map(quiet_of, (verbs_doctor.doctor, verbs_drift.drift))
duplicates, embed = map(quiet_of, (verbs_duplicates.duplicates, verbs_embed.embed))
evaluate, export, finetune = map(quiet_of, (verbs_evaluate.evaluate, verbs_export.export, verbs_finetune.finetune))
index, pack = map(quiet_of, (verbs_index.index, verbs_pack.pack))
plan, search = map(quiet_of, (verbs_plan.plan, verbs_search.search))
report, views = map(quiet_of, (verbs_report.report, verbs_views.views))
_pretrain = quiet_of(verbs_pretrain.pretrain)


class Run(dict[str, Any]):
    """A run folder: the entries of its `run.json`, and what can be done with what it has learnt.

    Attributes:
        folder: of the run.
        data: what it was trained on, where that is still at hand; None otherwise.
    """

    def __init__(self, folder: Path | str, data: Data | None = None):
        self.folder, self.data = Path(folder), data
        super().__init__(read_json(self.folder / RUN))

    def __repr__(self) -> str:
        verdict = self.get("verdict", {})
        return f"<Run {self.folder}: {self.get('status')}, {verdict.get('state')} - {verdict.get('reason')}>"

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The trained encoder: (B, C, H, W) float in [0, 1] to (B, dim)."""
        return Encoder.load(self.folder / "encoder")

    def embed(self, data: Data | None = None, out: Path | str | None = None, **options: Any) -> Embeddings:
        """Features of images, those of the training by default; `np.asarray` of them is (N, D) float32.

        Args:
            data: what `open_source` takes.
            out: folder to keep them in; RUN/embeddings for the training images, nowhere for others.
            options: of `ssl_kit.embed`, where they are kept.

        Raises:
            UserError: see `ssl_kit.embed`.
        """
        kept = self.folder / "embeddings" if data is None and out is None else out
        if kept is None:
            if options:
                raise TypeError(f"embed() takes {', '.join(options)} only with out=, where the features are kept")
            one = not isinstance(data, str | Path) and is_one_image(data, self.encoder.channels)
            with spoken(False):
                source = open_source([data] if one else data, reading=self.encoder.reading, least=1)
            return embedded(self.encoder, source)
        if (Path(kept) / MANIFEST).is_file():
            made = read_manifest(Path(kept), verify=False, limit=LARGE_JSON)
            same = made.get("encoder_sha256") == self.encoder.sha256 and made.get("layers") == 1
            options["overwrite"] = data is not None or bool(options) or not same
        if options.get("overwrite") is not False:
            embed(str(self.folder), self._data(data), out=str(kept), verbose=False, **options)
        return Embeddings.load(kept)

    def evaluate(self, labelled: Data, **options: Any) -> Entries:
        """Scores beside the baselines, as `ssl_kit.evaluate` returns them."""
        return evaluate(str(self.folder), labelled, **options)

    def search(self, images: Image | Sequence[Image], k: int = 12) -> list[list[Neighbour]]:
        """The k nearest training images of each of `images`: files, pictures, arrays or tensors."""
        self.embed()
        if not has_index(self.folder / "embeddings"):
            index(str(self.folder / "embeddings"), verbose=False)
        return Index.load(self.folder / "embeddings", encoder=str(self.folder)).search(images, k)

    @property
    def report(self) -> Page:
        """The page about the run; a notebook shows it."""
        report([str(self.folder)], verbose=False)
        return Page(self.folder / "report.html")

    def _data(self, data: Data | None) -> Data:
        given = self.data if data is None else data
        if given is None:
            raise UserError(f"{self.folder}: the images it was trained on are not at hand; give them as data=")
        return given


class Page:
    """An HTML page; a notebook shows it in a frame."""

    def __init__(self, path: Path):
        self.path = path

    def __repr__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        text = html.escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{text}" style="width: 100%; height: 640px; border: 0"></iframe>'


def load_run(path: Path | str, encoder: Network | None = None) -> Run:
    """The run in a folder that `pretrain` has written.

    Args:
        path: of the folder.
        encoder: the network that was trained, where it is none of timm's: nothing is imported because a folder says so.

    Raises:
        UserError: it is none.
    """
    if not (Path(path) / RUN).is_file():
        raise UserError(f"{path} is no run: it has no {RUN}; give a folder that pretrain has written")
    if encoder is not None:
        register(encoder)
    run = Run(path)
    root = run.get("data", {}).get("root")
    run.data = root if isinstance(root, str) and Path(root).exists() else None
    return run


def pretrain(
    data: Data,
    *,
    recipe: str | None = None,
    encoder: str | Network | None = None,
    verbose: bool = True,
    **options: Any,
) -> Run:
    """Trains an encoder on images without labels.

    Args:
        data: a folder or several, a table, arrays, a list of files or pictures, a data set: what `open_source` takes.
        recipe: a packaged recipe (`mae`, `vae`, `simclr_cifar10_small`, ...), a file, or a method's module (`byol`).
        encoder: a timm model, `resnet50`; or a network: a module, or a function that makes one, with a number `dim`,
            the length of its features (B, dim). By default the method's own for images of this size.
        verbose: print what is found, chosen and measured.
        options: all others of `ssl-kit pretrain`; they win over the recipe.

    Returns:
        The run: the entries of `run.json`, and `encoder`, `embed`, `evaluate`, `search`, `report`.

    Raises:
        UserError: what a user can mend, in one line; TypeError: an option that there is none of.
    """
    settings = {**(_recipe(recipe) if recipe is not None else {}), **options}
    if encoder is not None:
        name = encoder if isinstance(encoder, str) else register(encoder)
        settings["method"] = _with_encoder(settings.get("method"), name)
    if isinstance(settings.get("views"), dict):
        settings["views"] = ViewRecipe(**settings["views"])
    record = _pretrain(data, verbose=verbose, **settings)
    return Run(record["run"], data)


def _recipe(name: str) -> Entries:
    """The settings of a recipe, or those of a method by the name of its module."""
    file = _METHODS / f"{name}.py"
    if not Path(name).is_file() and name not in packaged() and name.isidentifier() and file.is_file():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Method" for base in node.bases):
                return {"method": {"class_path": f"ssl_kit.methods.{name}.{node.name}"}}
    recipe = read_how(name)
    recipe.pop("data", None)
    return recipe


def _with_encoder(method: Entries | None, name: str) -> Entries:
    made = dict(method or {"class_path": "ssl_kit.methods.simclr.SimCLR"})
    made["init_args"] = {**made.get("init_args", {})}
    held = made["init_args"].get("encoder") or {}
    made["init_args"]["encoder"] = {**held, "init_args": {**held.get("init_args", {}), "name": name}}
    return made
