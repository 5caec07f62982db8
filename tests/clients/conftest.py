"""Clients' own warnings are theirs; of ours there must be none, in no log."""

from __future__ import annotations

import logging
import warnings

import pytest

OURS = ("learned_optim", "LearnedOptimizer")


def pytest_collection_modifyitems(items):
    for item in items:
        if "clients" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(autouse=True)
def _nothing_of_ours_in_any_log(caplog, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in caught if any(name in f"{w.filename} {w.message}" for name in OURS)]
    ours += [record.getMessage() for record in caplog.records if any(n in record.getMessage() for n in OURS)]
    out, err = capfd.readouterr()
    ours += [line for line in (out + err).splitlines() if "warn" in line.lower() and any(n in line for n in OURS)]
    assert not ours, ours
