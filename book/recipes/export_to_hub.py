"""From a finished run to a folder for the hub: weights, tokenizer and a model card.

python export_to_hub.py runs/dpo exported --base Qwen/Qwen2.5-0.5B-Instruct --dataset you/pairs --license mit
python export_to_hub.py ... --push you/my-model      # only this sends anything anywhere
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData

from policyopt.lm import load
from policyopt.lm.models import is_adapted

METHODS = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimisation (arXiv:2305.18290)",
    "grpo": "group relative policy optimisation (arXiv:2402.03300)",
    "ppo": "PPO with a KL penalty (arXiv:2203.02155)",
    "ranking": "a pairwise ranking loss on lists of completions",
}


def model_card(run: Path, *, name: str, base: str, dataset: str, license: str, adapters: bool) -> str:
    """Write the card from what the run left behind: its settings, and the last row of its history."""
    about = json.loads((run / "training.json").read_text(encoding="utf-8"))
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]
    data = ModelCardData(
        base_model=base,
        datasets=[dataset],
        license=license,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["policyopt", about["algorithm"]],
    )
    metrics = "\n".join(f"| {key} | {value} |" for key, value in last.items() if value not in ("", "nan"))
    return f"""---
{data.to_yaml()}
---

# {name}

`{base}`, trained on `{dataset}` by {METHODS[about["algorithm"]]}: {about["updates"]} updates, seed {about["seed"]},
{about["seconds"]:.0f} seconds. The training ended by: {about["stop_reason"]}.

## Metrics of the last update

| metric | value |
|:--|--:|
{metrics}

These are of the training. Say here what you measured on data that the model has not seen.

## Settings

```json
{json.dumps(about["config"], indent=1)}
```
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a folder that result.save() wrote")
    parser.add_argument("folder", type=Path, help="what to write")
    parser.add_argument("--base", required=True, help="the model that training began with")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--license", required=True, help="of the result; the base model's may bind you")
    parser.add_argument("--merge", action="store_true", help="add LoRA adapters into the weights")
    parser.add_argument("--push", metavar="REPO", help="upload to this repository, private at first")
    options = parser.parse_args(argv)

    model = load(options.run, device="cpu")
    if options.merge:
        model = model.merged()
    model.save(options.folder)
    card = model_card(
        options.run, name=options.folder.name, base=options.base, dataset=options.dataset, license=options.license,
        adapters=is_adapted(model.model),
    )  # fmt: skip
    (options.folder / "README.md").write_text(card, encoding="utf-8")
    print(f"written: {', '.join(sorted(path.name for path in options.folder.iterdir()))}")
    if options.push is None:
        print("nothing was uploaded; --push REPO does that")
        return
    api = HfApi()  # uses the token of `hf auth login`
    api.create_repo(options.push, private=True, exist_ok=True)
    api.upload_folder(repo_id=options.push, folder_path=options.folder, commit_message="Upload model")
    print(f"uploaded to {options.push}")


if __name__ == "__main__":
    main()
