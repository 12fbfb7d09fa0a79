"""What every test shares: no network, reproducible examples, the way to the real data."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set before transformers is imported anywhere: a test that reaches for the network fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("ronna", derandomize=True, database=None, deadline=None, max_examples=50)
settings.load_profile("ronna")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets beside the checkout; the test is skipped where there is none."""
    folder = Path(os.environ.get("RONNA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the real data sets: set RONNA_TEST_DATA to their folder")
    return folder
