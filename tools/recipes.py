"""Runs recipes on their small models and writes their pages: `make recipes`, or `make recipes ARGS='3 4'` for some.

The definitions are in recipes/pages, what they may hold is said in tools/recipe_run.py. The data sets are looked for in
--data, else in CHULENGO_TEST_DATA, else beside the repository; a recipe whose data are absent is skipped.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from recipe_page import headline_of, write_index, write_page
from recipe_run import (
    ROOT,
    SIZES,
    Recipe,
    RecipeError,
    as_process,
    definitions,
    encoder_folder,
    load_recipe,
    prepare,
    run_steps,
)

DOCS = ROOT / "docs" / "recipes"


def main() -> int:
    """Runs what was asked for; returns 1 when a recipe failed."""
    options = _options()
    data = options.data or Path(os.environ.get("CHULENGO_TEST_DATA", ROOT.parent / "shared" / "data"))
    paths = [path for path in definitions()
             if not options.recipes or {path.stem, *path.stem.split("_", 1)} & set(options.recipes)]
    failed, started = [], time.perf_counter()
    for path in paths:
        recipe = load_recipe(path, options.size, encoder=encoder_folder() is not None)
        absent = [each for each in recipe.needs if not (data / each).exists()]
        if absent:
            print(f"{path.stem}: skipped, {data} has no {', '.join(absent)}")
            continue
        try:
            _run(recipe, data, options)
        except RecipeError as error:
            print(f"{path.stem}: FAILED: {error}", file=sys.stderr)
            failed.append(path.stem)
    if options.docs is None and options.size == "page" and DOCS.is_dir():
        every = [load_recipe(path, "page", encoder=True) for path in definitions()]
        write_index(dict(zip(definitions(), (each.page["title"] for each in every), strict=True)), DOCS)
    print(f"{len(paths)} recipes, {time.perf_counter() - started:.0f} s" + (f", failed: {failed}" if failed else ""))
    return int(bool(failed) or not paths)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="numbers or names (default: all)")
    parser.add_argument("--size", choices=SIZES, default="page", help="smallest writes no page unless --docs is given")
    parser.add_argument("--data", type=Path, help="folder with the data sets")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the working folders here")
    parser.add_argument("--docs", type=Path, help="folder of the pages (default: docs/recipes)")
    return parser.parse_args()


def _run(recipe: Recipe, data: Path, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)) / recipe.name
        prepare(recipe, folder, data, encoder_folder())
        ran = run_steps(recipe, folder, as_process)
        print(f"  {sum(each.seconds for each in ran):.1f} s: {headline_of(recipe, folder)[1]}")
        docs = options.docs or (DOCS if recipe.size == "page" else None)
        if docs is not None:
            print(f"  {write_page(recipe, ran, folder, docs)}")


if __name__ == "__main__":
    sys.exit(main())
