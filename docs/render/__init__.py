"""Parts of the documentation that the code itself says: `python -m docs.render` writes them, `--check` compares."""
