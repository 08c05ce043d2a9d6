"""What the book adds to :mod:`policyopt`: exercises, figures, tasks and tiny language
models.

Nothing in :mod:`policyopt` needs this package. What it needs comes with the extra
``book``; in a clone of the repository::

    pip install -e ".[book]"
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from policyopt.lm import LanguageModel

__all__ = ["load_model", "model_path", "model_paths"]


def model_paths() -> dict[str, Path]:
    """Names and folders of the tiny language models that come with the book."""
    folders = sorted((Path(__file__).parent / "models").glob("*"))
    return {
        folder.name: folder for folder in folders if (folder / "config.json").exists()
    }


def model_path(name: str) -> Path:
    """Return the folder of a tiny language model, ready for :func:`policyopt.lm.load`.

    Raises
    ------
    ValueError
        If the book has no model of this name.
    """
    paths = model_paths()
    if name not in paths:
        raise ValueError(
            f"name must be one of {sorted(paths)}, got {name!r}; load a folder, a "
            ".gguf file or a model of the Hugging Face hub with policyopt.lm.load"
        )
    return paths[name]


def load_model(name: str, **options: Any) -> LanguageModel:
    """Load a tiny language model of the book.

    Parameters
    ----------
    name : str
        One of :func:`model_paths`: ``"news-sft"``, ``"news-base"``,
        ``"addition-base"``.
    **options
        As in :func:`policyopt.lm.load`.

    Examples
    --------
    >>> load_model("news-sft", device="cpu").num_parameters
    180352
    """
    from policyopt.lm import load

    return load(model_path(name), **options)
