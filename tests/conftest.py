"""Fixtures that several test modules share."""

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real GLUE and SQuAD files beside the repository, where there is one."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real GLUE and SQuAD data not found at {SHARED_DATA}")
    return SHARED_DATA
