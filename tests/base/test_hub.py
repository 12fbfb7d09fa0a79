"""Only `hub:` reaches for the network, and what it does not get is the user's to mend."""

import sys
from pathlib import Path

import pytest

from ronna.base.errors import RonnaError
from ronna.base.hub import local_folder


def test_a_path_stays_a_path():
    assert local_folder("some/model") == Path("some/model")


def test_the_hub_is_asked_for_weights_and_configs_only(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def fetch(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert local_folder("hub:org/model") == tmp_path
    assert list(asked) == ["org/model"]
    assert not any(p.endswith((".bin", ".pt", ".py", ".pkl", "*")) for p in asked["org/model"])


def test_a_hub_that_does_not_answer_is_a_clear_error(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RonnaError, match="hub:nobody/nothing: the hub did not give this folder"):
        local_folder("hub:nobody/nothing")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RonnaError, match=r"ronna\[hub\]"):
        local_folder("hub:org/model")
