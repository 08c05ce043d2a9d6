"""All of CI in one go: run each check to its end, then say what passed, what failed and how long it took."""

from __future__ import annotations

import subprocess
import sys
import time

from repository import ROOT

# In the order in which a fault is found soonest. `colab-test` runs every cell of every chapter, as `make test` does.
CHECKS = {
    "lint": "ruff and mypy --strict",
    "test-quick": "package, doctests, structure of the book, exercises",
    "book": "the pages are built without a warning, and every link in them leads somewhere",
    "web-test": "the pages in a browser: network, errors, phone, dark mode, accessibility",
    "colab-test": "each chapter alone in an empty folder, its outputs compared",
}


def main() -> int:
    """Run the checks; return the exit status."""
    rows, failed = [], []
    for target, meaning in CHECKS.items():
        print(f"\n=== make {target}: {meaning}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(["make", "--no-print-directory", target], cwd=ROOT, check=False).returncode
        if status:
            failed.append(target)
        rows.append((target, "passed" if status == 0 else "FAILED", time.perf_counter() - start))
    print(f"\n{'check':<12} {'result':<8} {'seconds':>7}")
    for target, verdict, seconds in rows:
        print(f"{target:<12} {verdict:<8} {seconds:7.0f}")
    if failed:
        print("To see one alone: " + ", ".join(f"make {target}" for target in failed))
        print("CONTRIBUTING.md says what each message means.")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
