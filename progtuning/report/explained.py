"""The page of `progtuning explain`: one HTML file, with the document in it and a script that shows it."""

import json
from importlib.resources import files


def explained_page(document: dict) -> str:
    """Return the page, which fetches nothing. Its numbers are the document's; the script rounds and places them."""
    template = files("progtuning.report").joinpath("explained.html").read_text(encoding="utf-8")
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{document}}", text)
