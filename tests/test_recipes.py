"""The README's recipes are the files that the servers' tests run."""

from __future__ import annotations

import re
from pathlib import Path

from tests.servers.running import RECIPES

README = Path(__file__).parents[1] / "README.md"


def test_the_recipes_are_the_files_that_are_run() -> None:
    """Each block of the section "Recipes" is a file in tests/servers/recipes, and each file is there."""
    _, _, rest = README.read_text().partition("\n## Recipes\n")
    section = rest.partition("\n## ")[0]
    blocks = re.findall(r"^```\w+\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    files = [path.read_text() for path in RECIPES.iterdir() if path.is_file()]
    assert sorted(blocks) == sorted(files)
