"""Overrides are tested on the JSONs of tests/deepspeed_json."""

from tests.deepspeed_json.conftest import read, refused, write

__all__ = ["read", "refused", "write"]
