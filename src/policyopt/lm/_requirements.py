"""The packages of the extra ``lm``, looked for before any of them is imported."""

from importlib.util import find_spec

for _package in ("transformers", "tokenizers"):
    if find_spec(_package) is None:
        raise ImportError(
            f"policyopt.lm needs the package {_package}: pip install 'policyopt[lm]'"
        )
