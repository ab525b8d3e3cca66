"""How many examples hypothesis draws for a test that says no number of its own: `make slow` draws many."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("quick", max_examples=25, deadline=None)
settings.register_profile("many", max_examples=200, deadline=None)
settings.load_profile("quick")
