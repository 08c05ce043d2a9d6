"""All of CI in one go: run each check to its end, then say what passed, what failed and how long it took."""

from __future__ import annotations

import subprocess
import sys
import time

from repository import ROOT

# `web-test` builds the book, without a warning and with every link in it followed. It stands before `test-quick`, some
# of whose tests look at the built pages. `colab-test` runs every cell of every chapter, as `make test` does.
CHECKS = {
    "lint": "ruff and mypy --strict",
    "web-test": "the pages are built and looked at in a browser: network, errors, phone, dark mode, accessibility",
    "test-quick": "package, doctests, structure of the book, exercises",
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
