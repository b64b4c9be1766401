from __future__ import annotations

import pytest


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take most of a short run's time."""
    monkeypatch.setattr("neuralode.callbacks.gradient_flow.monitor.draw", lambda *args: None)
